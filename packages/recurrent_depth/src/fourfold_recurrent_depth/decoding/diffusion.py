"""Decode many positions at once, each on its own way to its fixed point (arXiv 2510.14961).

A recurrent state can be refined while the tokens before it are still guesses. Every outer step takes a
few recurrences on a window of positions, guesses a token after each of them, opens one more position,
and freezes the prefix that has settled. Only a contiguous prefix freezes: a position counts as settled
when its state moves little *and* its input is what the position before it now predicts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from fourfold_recurrent_depth.cache import RecurrentCache
from fourfold_recurrent_depth.causal_lm import RecurrentDepthForCausalLM
from fourfold_recurrent_depth.decoding.greedy import GreedyDecoder
from fourfold_recurrent_depth.states import FreshNoise, InitialState


@dataclass(frozen=True, slots=True, kw_only=True)
class Diffusion(GreedyDecoder):
    """Settings of the moving window; the defaults are the paper's."""

    budget = 1
    inner_recurrences: int = 4
    """Recurrences of every position in an outer step."""
    threshold: float = 0.03
    """A state that moves less than this, relatively, has settled."""
    smoothing: float = 0.1
    """Share of the last outer step's embedding that is kept."""
    noise: float = 0.0
    """Share of fresh noise mixed into states, divided by one plus the recurrences that they took."""
    window: int = 128
    """Positions under way at most."""

    def __post_init__(self) -> None:
        if self.inner_recurrences < 1 or self.window < 1:
            raise ValueError(
                f"inner_recurrences={self.inner_recurrences}, window={self.window}; "
                "use 1 or more for both"
            )
        if not (0 <= self.smoothing < 1 and 0 <= self.noise <= 1):
            raise ValueError(
                f"smoothing={self.smoothing}, noise={self.noise} are shares; use 0 or more, below 1"
            )

    def decode(
        self, model: RecurrentDepthForCausalLM, prompt: Int[Tensor, "batch token"], **how: Any
    ) -> DiffusionResult:
        """For `model.generate(prompt, custom_generate=Diffusion(...))`."""
        return diffuse(model, prompt, diffusion=self, **how)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffusionResult:
    """Generated tokens, and the work that they took."""

    tokens: Int[Tensor, "batch generated"]
    core_passes: int
    """Recurrences, whatever the number of positions in each; the prompt's included."""
    positions_recurred: int
    """Recurrences times positions, over all rows."""
    outer_steps: int


@torch.no_grad()
def diffuse(
    model: RecurrentDepthForCausalLM,
    prompt: Int[Tensor, "batch token"],
    *,
    diffusion: Diffusion,
    max_new_tokens: int,
    num_steps: int,
    initial_state: InitialState | None = None,
    init_scale: float = 1.0,
) -> DiffusionResult:
    """Greedy tokens, decoded in a moving window; rows go on together, by the slowest row's prefix.

    Args:
        model: decodes.
        prompt: rows of equal length, without padding.
        diffusion: how.
        max_new_tokens: tokens to make.
        num_steps: recurrences of the prompt, and after which a first position freezes at the latest.
        initial_state: s_0 of a position that opens, as for a forward pass.
        init_scale: multiplies states that are drawn; 0 gives zeros.

    Raises:
        ValueError: where no token is asked for, or recurrences do not see their tokens again.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} asks for no token; use 1 or more")
    if model.config.form.injects is None:
        raise ValueError(
            f"Diffusion changes a token under way, and {model.config.family} sees it in the beginning alone; "
            "leave custom_generate out"
        )
    rows = len(prompt)
    cache = RecurrentCache(
        model.config, steps=num_steps, budget=1, capacity=prompt.shape[1] + max_new_tokens
    )
    out = model(
        prompt, past_key_values=cache, use_cache=True, num_steps=num_steps, logits_to_keep=1,
        initial_state=initial_state, init_scale=init_scale,
    )  # fmt: skip
    assert out.logits is not None
    made = out.logits[:, -1:].argmax(-1)
    inputs = made
    states = prompt.new_zeros((rows, 0, model.config.n_embd), dtype=model.dtype)
    smoothed = states
    taken = prompt.new_zeros(0, dtype=torch.long)
    passes, recurred, outer = num_steps, num_steps * prompt.numel(), 0
    while made.shape[1] < max_new_tokens:
        outer += 1
        # 1. Read the window's guesses, smoothed over outer steps; states go on, a new position begins.
        embedded, this_pass, positions = model.begin(inputs, cache)
        cache.open(rows, inputs.shape[1], steps=1)
        e = model.read(embedded, this_pass)
        fresh = model.start(e, inputs, positions, initial_state, scale=init_scale)
        known = states.shape[1]
        e[:, :known] = torch.lerp(e[:, :known], smoothed, diffusion.smoothing)
        s = torch.cat([states, fresh[:, known:]], dim=1)
        taken = torch.cat([taken, taken.new_zeros(inputs.shape[1] - known)])
        if diffusion.noise:
            noise = model.start(e, inputs, positions, FreshNoise(), scale=1.0)
            s = torch.lerp(s, noise, (diffusion.noise / (1 + taken))[None, :, None])
        # 2. A few recurrences of all positions, and a guess after each of them.
        s = model.iterate(e, s, this_pass, diffusion.inner_recurrences - 1, 0)
        before, s = s, model.recur(s, model.inject(e), this_pass, 0)
        passes += diffusion.inner_recurrences
        recurred += diffusion.inner_recurrences * inputs.numel()
        taken = taken + diffusion.inner_recurrences
        guesses = model.predict(s, this_pass).argmax(-1)

        # 3. Freeze the prefix that has settled: little movement, and inputs that are what was predicted.
        moved = torch.linalg.vector_norm(s - before, dim=-1) / torch.linalg.vector_norm(s, dim=-1)
        settled = (moved < diffusion.threshold) | (taken >= num_steps)
        settled[:, 1:] &= inputs[:, 1:] == guesses[:, :-1]
        frozen = int(settled.all(0).long().cumprod(0).sum())
        frozen = min(frozen, max_new_tokens - made.shape[1])
        made = torch.cat([made, guesses[:, :frozen]], dim=1)
        cache.length += frozen
        # 4. Move the window behind it, with one position more.
        room = min(diffusion.window, max_new_tokens - made.shape[1])
        inputs = torch.cat([inputs[:, :1], guesses], dim=1)[:, frozen:][:, : max(1, room)]
        states, smoothed = (x[:, frozen:][:, : inputs.shape[1]] for x in (s, e))
        taken = taken[frozen:][: inputs.shape[1]]
    return DiffusionResult(
        tokens=made, core_passes=passes, positions_recurred=recurred, outer_steps=outer
    )
