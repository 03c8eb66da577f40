"""Self-speculation that wastes nothing: draft with few recurrences, then go on from the drafts' states.

The keys of recurrence i depend on recurrences up to i alone. So what a draft of d recurrences has
computed, states and keys, is exactly what the full pass computes on its way, wherever the drafted tokens
are right. Verification therefore takes r - d further recurrences on all drafted tokens at once, not r
(the paper's section 6.3 says that drafted states "are not wasted"; the published code drops them).
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
from fourfold_recurrent_depth.states import InitialState


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation(GreedyDecoder):
    """Depth and number of the tokens that are drafted."""

    draft_steps: int = 4
    lookahead: int = 4
    """Tokens drafted before each verification."""

    def __post_init__(self) -> None:
        if self.draft_steps < 1 or self.lookahead < 1:
            raise ValueError(
                f"draft_steps={self.draft_steps}, lookahead={self.lookahead}; use 1 or more for both"
            )

    def decode(
        self, model: RecurrentDepthForCausalLM, prompt: Int[Tensor, "batch token"], **how: Any
    ) -> SpeculationResult:
        """For `model.generate(prompt, custom_generate=Speculation(...))`."""
        return speculate(model, prompt, speculation=self, **how)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationResult:
    """Generated tokens, and how many drafts were right."""

    tokens: Int[Tensor, "batch generated"]
    drafted: int
    """Drafted tokens, over all rows."""
    accepted: int
    """Of these, how many the full depth confirmed."""
    recurrences: int
    """Core passes, whatever the number of tokens in each."""


@torch.no_grad()
def speculate(
    model: RecurrentDepthForCausalLM,
    prompt: Int[Tensor, "batch token"],
    *,
    speculation: Speculation,
    max_new_tokens: int,
    num_steps: int,
    initial_state: InitialState | None = None,
    init_scale: float = 1.0,
) -> SpeculationResult:
    """Greedy decoding, the same tokens as without speculation, for any batch.

    Rows go on together, by the shortest accepted prefix of any row.

    Args:
        model: drafts and verifies.
        prompt: rows of equal length, without padding.
        speculation: how to draft.
        max_new_tokens: tokens to make; never exceeded.
        num_steps: full depth.
        initial_state: s_0, as for a forward pass; not drawn anew, since drafts and checks must agree.
        init_scale: multiplies states that are drawn; 0 gives zeros.

    Raises:
        ValueError: where the draft is not shallower than the full depth, or no token is asked for.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} asks for no token; use 1 or more")
    if speculation.draft_steps >= num_steps:
        raise ValueError(
            f"draft_steps={speculation.draft_steps} is not below num_steps={num_steps}; "
            "draft with fewer recurrences"
        )
    cache = RecurrentCache(model.config, steps=num_steps, capacity=prompt.shape[1] + max_new_tokens)
    options = {"initial_state": initial_state, "init_scale": init_scale}
    out = model(
        prompt,
        past_key_values=cache,
        use_cache=True,
        num_steps=num_steps,
        logits_to_keep=1,
        **options,
    )
    assert out.logits is not None
    made = out.logits[:, -1:].argmax(-1)
    drafted, accepted, recurrences = 0, 0, num_steps
    while made.shape[1] < max_new_tokens:
        ahead = min(speculation.lookahead, max_new_tokens - made.shape[1])
        window, embeds, states = [made[:, -1:]], [], []
        for _ in range(ahead):
            e, s, logits = _draft(
                model, window[-1], cache, speculation.draft_steps, initial_state, init_scale
            )
            embeds.append(e)
            states.append(s)
            window.append(logits.argmax(-1))
            cache.length += 1
        cache.length -= ahead
        confirmed = _verify(
            model,
            torch.cat(window[:-1], dim=1),
            embeds,
            states,
            cache,
            speculation.draft_steps,
            num_steps,
        )
        right = (confirmed == torch.cat(window[1:], dim=1)).long().cumprod(1)
        kept = int(right.sum(1).min())
        # The first token that a row gets wrong is corrected by the full depth: one more than confirmed.
        take = min(kept + 1, ahead)
        made = torch.cat([made, confirmed[:, :take]], dim=1)
        cache.length += take
        drafted += ahead * len(prompt)
        accepted += kept * len(prompt)
        recurrences += ahead * speculation.draft_steps + num_steps - speculation.draft_steps
    return SpeculationResult(
        tokens=made, drafted=drafted, accepted=accepted, recurrences=recurrences
    )


def _draft(
    model: RecurrentDepthForCausalLM,
    token: Int[Tensor, "batch 1"],
    cache: RecurrentCache,
    steps: int,
    initial_state: InitialState | None,
    init_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One shallow pass: prelude's output, state, logits. Its keys stay in the cache's slots."""
    e, this_pass, positions = model.begin(token, cache)
    cache.open(len(token), 1, steps=cache.steps)
    e = model.read(e, this_pass)
    s = model.start(e, token, positions, initial_state, scale=init_scale)
    s = model.iterate(e, s, this_pass, steps, 0)
    return e, s, model.predict(s, this_pass)


def _verify(
    model: RecurrentDepthForCausalLM,
    tokens: Int[Tensor, "batch drafted"],
    embeds: list[Tensor],
    states: list[Tensor],
    cache: RecurrentCache,
    done: int,
    steps: int,
) -> Int[Tensor, "batch drafted"]:
    """The full depth's choice after each drafted input, going on from recurrence `done`."""
    e, s = torch.cat(embeds, dim=1), torch.cat(states, dim=1)
    this_pass, _ = model.locate(e, None, None, cache, {}, tokens=tokens)
    cache.open(e.shape[0], e.shape[1], steps=cache.steps)
    s = model.iterate(e, s, this_pass, steps - done, 0, first=done)
    return model.predict(s, this_pass).argmax(-1)
