"""The frame of greedy decoders for `model.generate(custom_generate=...)`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Protocol

import torch
from jaxtyping import Int
from torch import Tensor

from fourfold_recurrent_depth.causal_lm import RecurrentDepthForCausalLM
from fourfold_recurrent_depth.stages import either
from fourfold_recurrent_depth.states import InitialState


class Decoded(Protocol):
    """Generated tokens, beside what a decoder says of how it made them."""

    @property
    def tokens(self) -> Int[Tensor, "batch generated"]:
        """The tokens behind the prompt."""
        ...


class GreedyDecoder(ABC):
    """A decoder for `model.generate(prompt, custom_generate=...)`: greedy, rows of equal length."""

    __slots__ = ()
    budget: ClassVar[int | None] = None
    """The cache's, which alone may be asked for as `kv_budget`."""

    @abstractmethod
    def decode(
        self,
        model: RecurrentDepthForCausalLM,
        prompt: Int[Tensor, "batch token"],
        *,
        max_new_tokens: int,
        num_steps: int,
        initial_state: InitialState | None,
        init_scale: float,
    ) -> Decoded:
        """Continue rows without padding."""

    def __call__(
        self,
        model: RecurrentDepthForCausalLM,
        input_ids: Int[Tensor, "batch token"],
        *,
        generation_config: Any,
        **options: Any,
    ) -> Int[Tensor, "batch longer"]:
        """Serve what `generate` hands on.

        Raises:
            ValueError: for sampling, beams, padding, and for what would change greedy tokens.
        """
        if generation_config.do_sample or generation_config.num_beams > 1:
            raise ValueError(
                "this decoder is greedy; use do_sample=False and num_beams=1, or leave custom_generate out"
            )
        refuse_extras(generation_config, options)
        self._refuse(options)
        mask = options.get("attention_mask")
        if mask is not None and not bool(mask.bool().all()):
            raise ValueError(
                "this decoder takes rows of equal length; group prompts by length, or drop custom_generate"
            )
        without, with_gradient, _ = model.recurrences(options.get("num_steps"), 1)
        result = self.decode(
            model,
            input_ids,
            max_new_tokens=generation_config.max_length - input_ids.shape[1],
            num_steps=without + with_gradient,
            initial_state=either(
                options.get("initial_state"),
                options.get("input_states"),
                ("initial_state", "input_states"),
            ),
            init_scale=options.get("init_scale", 1.0),
        )
        return _with_prompt(input_ids, result.tokens, generation_config)

    def _refuse(self, options: dict[str, Any]) -> None:
        """Raise for what this decoder does not do."""
        processors = [type(part).__name__ for part in options.get("logits_processor") or ()]
        known = ("MaxLengthCriteria", "EosTokenCriteria")
        stopping = [type(part).__name__ for part in options.get("stopping_criteria") or ()]
        changing = ("exit", "warm_start", "streamer", "kv_budget")
        given = {name: options.get(name) for name in changing}
        if given["kv_budget"] == self.budget:
            del given["kv_budget"]
        unknown = processors + [name for name in stopping if name not in known]
        unknown += [f"{name}={value}" for name, value in given.items() if value]
        if unknown:
            raise ValueError(
                f"{type(self).__name__} decodes greedily, at one depth, without "
                f"{', '.join(unknown)}; leave these or custom_generate out"
            )


def refuse_extras(generation_config: Any, options: dict[str, Any]) -> None:
    """Raise where more than tokens is asked for, or embeddings stand for them."""
    wanted = generation_config.return_dict_in_generate or options.get("inputs_embeds") is not None
    if wanted:
        raise ValueError(
            "custom_generate takes input_ids and gives tokens alone; leave return_dict_in_generate and "
            "inputs_embeds, or custom_generate, out"
        )


def _with_prompt(
    input_ids: Int[Tensor, "batch token"], generated: Int[Tensor, "batch generated"], config: Any
) -> Int[Tensor, "batch longer"]:
    """Prompt and tokens, with padding behind each row's first end token."""
    ends = config.eos_token_id
    if ends is not None:
        chosen = torch.isin(generated, torch.as_tensor(ends, device=generated.device).flatten())
        behind = chosen.cumsum(1) - chosen.long() > 0
        padding = config.pad_token_id
        generated = generated.masked_fill(behind, 0 if padding is None else padding)
        generated = generated[:, : int((~behind).sum(1).max())]
    return torch.cat([input_ids, generated], dim=1)
