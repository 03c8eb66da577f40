"""Looking at the states: where they go, how fast, whether they forget where they began (section 7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fourfold_recurrent_depth.causal_lm import RecurrentDepthForCausalLM
from fourfold_recurrent_depth.states import state_table

STRAIGHT = 0.9
"""Of a way, the share that remains as the distance of its ends; a quarter of a circle has this much."""
Ending = Literal["fixed point", "orbit", "slider", "unsettled"]


@torch.no_grad()
def trajectory(
    model: RecurrentDepthForCausalLM, tokens: Int[Tensor, "batch token"], *, steps: int, seed: int
) -> Float[Tensor, "step batch token width"]:
    """s_0 .. s_steps of every token; s_0 is drawn by position from `seed`, or the embedding."""
    is_drawn = model.config.form.begins == "noise"
    table = state_table(model.config.block_size, model.config.n_embd, seed=seed)
    out = model(
        tokens, num_steps=steps, initial_state=table if is_drawn else None, output_hidden_states=True,
        logits_to_keep=1,
    )  # fmt: skip
    assert out.hidden_states is not None
    return torch.stack(list(out.hidden_states))


def convergence_steps(
    states: Float[Tensor, "step batch token width"], *, tolerance: float
) -> Int[Tensor, "batch token"]:
    """First recurrence after which a state stays within `tolerance` of the last one, relatively."""
    last = states[-1]
    distance = torch.linalg.vector_norm(states - last, dim=-1) / torch.linalg.vector_norm(
        last, dim=-1
    )
    far = distance > tolerance
    places = torch.arange(1, len(states) + 1, device=states.device)[:, None, None]
    return (far * places).amax(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PathIndependence:
    """Traces of s_0 that are left after r recurrences, over pairs of seeds."""

    distance: Float[Tensor, "batch token"]
    """Largest relative distance between two seeds' states."""
    agrees: Bool[Tensor, "batch token"]
    """True where all seeds predict the same token."""


@torch.no_grad()
def path_independence(
    model: RecurrentDepthForCausalLM,
    tokens: Int[Tensor, "batch token"],
    *,
    steps: int,
    seeds: Sequence[int],
) -> PathIndependence:
    """Compare final states and predictions from several tables of initial states.

    Raises:
        ValueError: for fewer than two seeds, which have nothing to compare.
    """
    if len(seeds) < 2:
        raise ValueError(f"{len(seeds)} seeds leave nothing to compare; use 2 or more")
    finals, argmax = [], []
    for seed in seeds:
        table = state_table(model.config.block_size, model.config.n_embd, seed=seed)
        out = model(tokens, num_steps=steps, initial_state=table)
        assert out.logits is not None
        finals.append(out.final_state)
        argmax.append(out.logits.argmax(-1))
    distance = finals[0].new_zeros(tokens.shape)
    for i, final in enumerate(finals):
        for other in finals[i + 1 :]:
            apart = torch.linalg.vector_norm(final - other, dim=-1)
            distance = torch.maximum(distance, apart / torch.linalg.vector_norm(final, dim=-1))
    agrees = torch.stack([choice == argmax[0] for choice in argmax]).all(0)
    return PathIndependence(distance=distance, agrees=agrees)


def principal_components(
    states: Float[Tensor, "step token width"], *, count: int
) -> Float[Tensor, "step token component"]:
    """Projection on the leading directions of all states, centred."""
    flat = states.flatten(0, 1)
    centred = flat - flat.mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    return (centred @ directions[:count].T).unflatten(0, states.shape[:2])


def classify(
    states: Float[Tensor, "step width"], *, settled: float = 1e-2, longest: int = 8
) -> tuple[Ending, int]:
    """The kind of end that a token's trajectory comes to, and its period.

    A fixed point moves less than `settled`, relatively. An orbit returns to itself after p recurrences,
    looked for over the whole trajectory. A slider drifts along one direction: over the later half of the
    trajectory, and at least its last `longest` moves, it comes nearly as far as it goes (`STRAIGHT`). A
    round of which not even half was recorded comes as far, and may be called one.

    Raises:
        ValueError: where there are too few states to look back on.
    """
    if len(states) <= longest:
        raise ValueError(
            f"{len(states)} states do not show orbits of {longest}; use {longest + 1} or more"
        )
    size = torch.linalg.vector_norm(states[-1])
    back = torch.linalg.vector_norm(states[:-1].flip(0) - states[-1], dim=-1) / size
    if float(back[0]) < settled:
        return "fixed point", 1
    returns = (back < settled).nonzero().flatten()
    if len(returns):
        return "orbit", int(returns[0]) + 1
    window = states[-max(longest, len(states) // 2) - 1 :]
    gone = torch.linalg.vector_norm(window.diff(dim=0), dim=-1).sum()
    come = torch.linalg.vector_norm(window[-1] - window[0])
    return ("slider", 0) if float(come / gone) > STRAIGHT else ("unsettled", 0)


def token_correlation(states: Float[Tensor, "batch token width"]) -> float:
    """Mean correlation of two tokens of a row, over features: near 1 where a run has collapsed (figure 5).

    Raises:
        ValueError: for rows of one token.
    """
    tokens = states.shape[1]
    if tokens < 2:
        raise ValueError(f"rows of {tokens} tokens have no pairs to compare; use 2 or more")
    unit = torch.nn.functional.normalize(states - states.mean(dim=-1, keepdim=True), dim=-1)
    pairs = unit @ unit.transpose(1, 2)
    others = pairs.sum(dim=(1, 2)) - pairs.diagonal(dim1=1, dim2=2).sum(-1)
    return float((others / (tokens * (tokens - 1))).mean())
