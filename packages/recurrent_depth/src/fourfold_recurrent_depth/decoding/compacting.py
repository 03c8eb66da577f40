"""Decoding in which rows that have ended leave the batch; for transformers' `generate`.

    model.generate(prompt, custom_generate=compacting, exit="latent_diff", ...)

Logits processors and stopping criteria are transformers' own; greedy decoding and sampling. What remains of
the batch is computed alone, so a row's tokens do not depend on when its neighbours end.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
)  # fmt: skip

from fourfold_recurrent_depth.cache import CACHE, RecurrentCache
from fourfold_recurrent_depth.causal_lm import RecurrentDepthForCausalLM
from fourfold_recurrent_depth.decoding.greedy import refuse_extras
from fourfold_recurrent_depth.stages import either
from fourfold_recurrent_depth.states import RowStates

_BY_ROW = (
    EncoderNoRepeatNGramLogitsProcessor, EncoderRepetitionPenaltyLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
)  # fmt: skip
"""Processors that know a row by its place in the batch."""


def compacting(
    model: RecurrentDepthForCausalLM,
    input_ids: Int[Tensor, "batch token"],
    *,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    **options: Any,
) -> Int[Tensor, "batch longer"]:
    """Tokens of every row, padded behind its end.

    Args:
        model: decodes.
        input_ids: prompts, padded on the left where `attention_mask` says so.
        logits_processor: as `generate` prepares it.
        stopping_criteria: likewise.
        generation_config: for sampling or not, and the padding token.
        synced_gpus: not supported, since rows leave on each rank by themselves.
        streamer: not supported, since it takes whole batches.
        options: arguments of the model's forward pass.

    Raises:
        ValueError: for beams, a streamer, synced ranks, values of single rows, or without an empty cache.
    """
    refuse_extras(generation_config, options)
    cache = options.pop(CACHE, None)
    if generation_config.num_beams > 1 or synced_gpus or streamer is not None:
        raise ValueError(
            "compacting decodes greedily or by sampling, without streamer and synced ranks; "
            "leave custom_generate out for the rest"
        )
    if not isinstance(cache, RecurrentCache) or cache.length:
        raise ValueError(
            "compacting needs an empty RecurrentCache; leave use_cache and past_key_values out"
        )
    state = either(
        options.get("initial_state"), options.get("input_states"), ("initial_state", "input_states")
    )
    is_by_row = isinstance(state, RowStates) or (isinstance(state, Tensor) and len(state) > 1)
    if is_by_row or any(isinstance(processor, _BY_ROW) for processor in logits_processor):
        raise ValueError(
            "initial states or allowed tokens of each row by itself do not follow rows that leave; use a "
            "StateTable and no prefix_allowed_tokens_fn, or leave custom_generate out"
        )
    options.pop("position_ids", None)
    options.pop("logits_to_keep", None)
    mask = options.pop("attention_mask", None)
    mask = torch.ones_like(input_ids) if mask is None else mask
    ends = {}
    rows = torch.arange(len(input_ids))
    tokens, fed = input_ids, input_ids
    while len(rows):
        out = model(fed, attention_mask=mask, logits_to_keep=1, **{CACHE: cache}, **options)
        scores = logits_processor(tokens, out.logits[:, -1])
        if generation_config.do_sample:
            fed = torch.multinomial(scores.softmax(-1), 1)
        else:
            fed = scores.argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, fed], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        ended = stopping_criteria(tokens, None)
        if bool(ended.any()):
            for place in ended.nonzero().flatten().tolist():
                ends[int(rows[place])] = tokens[place]
            keep = (~ended).nonzero().flatten()
            rows, tokens, fed, mask = rows[keep.cpu()], tokens[keep], fed[keep], mask[keep]
            cache.batch_select_indices(keep)
    padding = generation_config.pad_token_id
    padding = 0 if padding is None else padding
    made = [ends[row] for row in range(len(input_ids))]
    return torch.nn.utils.rnn.pad_sequence(made, batch_first=True, padding_value=padding)
