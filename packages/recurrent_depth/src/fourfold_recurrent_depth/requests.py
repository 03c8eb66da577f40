"""What `model.generate(custom_generate=...)` asks of a decoder of ours, and what it gets back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from fourfold_recurrent_depth.states import StateTable


@dataclass(frozen=True, slots=True, kw_only=True)
class GreedyRequest:
    """A request that greedy decoders without padding can serve."""

    max_new_tokens: int
    num_steps: int
    initial_state: StateTable | None


def greedy_request(
    model: Any, input_ids: Int[Tensor, "batch token"], config: Any, options: dict[str, Any]
) -> GreedyRequest:
    """The request in the arguments that `generate` hands on.

    Raises:
        ValueError: for sampling, beams or padding.
    """
    if config.do_sample or config.num_beams > 1:
        raise ValueError(
            "this decoder is greedy; use do_sample=False and num_beams=1, or leave custom_generate out"
        )
    mask = options.get("attention_mask")
    if mask is not None and not bool(mask.bool().all()):
        raise ValueError(
            "this decoder takes rows of equal length; group prompts by length, or leave custom_generate out"
        )
    return GreedyRequest(
        max_new_tokens=config.max_length - input_ids.shape[1],
        num_steps=options.get("num_steps") or model.config.mean_recurrence,
        initial_state=options.get("initial_state"),
    )


def with_prompt(
    input_ids: Int[Tensor, "batch token"], made: Int[Tensor, "batch generated"], config: Any
) -> Int[Tensor, "batch longer"]:
    """Prompt and tokens, with padding behind each row's first end token."""
    ends = config.eos_token_id
    if ends is not None:
        chosen = torch.isin(made, torch.as_tensor(ends, device=made.device).flatten())
        behind = chosen.cumsum(1) - chosen.long() > 0
        padding = config.pad_token_id
        made = made.masked_fill(behind, 0 if padding is None else padding)
        made = made[:, : int((~behind).sum(1).max())]
    return torch.cat([input_ids, made], dim=1)
