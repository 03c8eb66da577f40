"""Laws of speculation, of the diffusion-style sampler, and of the analysis of states."""

from typing import Any

import pytest
import torch

from fourfold_recurrent_depth import state_table
from fourfold_recurrent_depth.analysis.latents import (
    classify,
    convergence_steps,
    path_independence,
    principal_components,
    token_correlation,
    trajectory,
)
from fourfold_recurrent_depth.decoding.diffusion import Diffusion, diffuse
from fourfold_recurrent_depth.decoding.speculate import Speculation, speculate


def greedy(model: Any, tokens: torch.Tensor, **options: Any) -> list[list[int]]:
    made = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, pad_token_id=0, **options
    )
    return made[:, tokens.shape[1] :].tolist()


@pytest.mark.parametrize("draft", [1, 3, 5])
@pytest.mark.parametrize("lookahead", [1, 4])
@pytest.mark.parametrize("rows", [1, 3])
def test_speculation_is_greedy(
    tiny: Any, tokens: torch.Tensor, draft: int, lookahead: int, rows: int
) -> None:
    """The same tokens for every draft, lookahead and batch; never more than asked for."""
    table = state_table(64, 32, seed=4)
    found = speculate(
        tiny, tokens[:rows], speculation=Speculation(draft_steps=draft, lookahead=lookahead),
        max_new_tokens=11, num_steps=6, initial_state=table,
    )  # fmt: skip
    expected = greedy(tiny, tokens[:rows], max_new_tokens=11, num_steps=6, initial_state=table)
    assert found.tokens.tolist() == expected


def test_deep_drafts_are_accepted_and_spare_recurrences(tiny: Any, tokens: torch.Tensor) -> None:
    """A draft one recurrence short is mostly right; what it computed is not computed again."""
    tiny.transformer["adapter"].weight.data[:, :32] *= 0.2
    found = speculate(
        tiny, tokens[:1], speculation=Speculation(draft_steps=7, lookahead=4), max_new_tokens=12,
        num_steps=14,
    )  # fmt: skip
    assert found.accepted / found.drafted > 0.7
    assert found.recurrences < 14 * 12


def test_the_sampler_without_shortcuts_is_greedy(tiny: Any, tokens: torch.Tensor) -> None:
    """Zero threshold, no smoothing, a contracting core: the window's fixed points are greedy's tokens."""
    tiny.transformer["adapter"].weight.data[:, :32] *= 0.2
    for rows in (1, 2):
        found = diffuse(
            tiny, tokens[:rows], diffusion=Diffusion(threshold=0.0, smoothing=0.0), max_new_tokens=9,
            num_steps=24, init_scale=0.0,
        )  # fmt: skip
        expected = greedy(
            tiny, tokens[:rows], max_new_tokens=9, num_steps=24, init_scale=0.0, kv_budget=1
        )
        assert found.tokens.tolist() == expected


def test_the_sampler_takes_fewer_passes(tiny: Any, tokens: torch.Tensor) -> None:
    tiny.transformer["adapter"].weight.data[:, :32] *= 0.2
    found = diffuse(tiny, tokens[:1], diffusion=Diffusion(), max_new_tokens=16, num_steps=16)
    assert found.tokens.shape == (1, 16)
    assert found.core_passes < 16 * 16 / 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Speculation(draft_steps=0), "draft_steps=0"),
        (lambda: Diffusion(inner_recurrences=0), "inner_recurrences=0"),
        (lambda: Diffusion(smoothing=1.5), "smoothing=1.5"),
    ],
)
def test_bad_input_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_draft_as_deep_as_the_model_is_refused(tiny: Any, tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="draft_steps=6"):
        speculate(
            tiny, tokens, speculation=Speculation(draft_steps=6), max_new_tokens=2, num_steps=6
        )


def test_trajectories_end_where_passes_end(tiny: Any, tokens: torch.Tensor) -> None:
    states = trajectory(tiny, tokens, steps=5, seed=3)
    table = state_table(64, 32, seed=3)
    with torch.no_grad():
        out = tiny(tokens, num_steps=5, initial_state=table)
    assert states.shape == (6, 3, 12, 32)
    assert torch.equal(states[-1], out.final_state)
    assert torch.equal(states[0], table.at(torch.arange(12)[None]).expand(3, -1, -1))


def test_a_contracting_core_forgets_where_it_began(tiny: Any, tokens: torch.Tensor) -> None:
    tiny.transformer["adapter"].weight.data[:, :32] *= 0.2
    near = path_independence(tiny, tokens, steps=30, seeds=(0, 1))
    far = path_independence(tiny, tokens, steps=1, seeds=(0, 1))
    assert near.distance.max() < 1e-3 < far.distance.max()
    assert bool(near.agrees.all())
    with pytest.raises(ValueError, match="2 or more"):
        path_independence(tiny, tokens, steps=3, seeds=(0,))


def test_made_up_trajectories_are_classified() -> None:
    """A point, circles of period 3 and 5, a drift, noise."""
    steps = torch.arange(40).float()
    ones = torch.ones(6)
    point = ones * (1 + 0.5**steps)[:, None]
    drift = ones * (5 + steps)[:, None]
    assert classify(point) == ("fixed point", 1)
    assert classify(drift) == ("slider", 0)
    # Rounds longer than the eight moves that a look back takes, and a round that is not whole.
    for period in (3, 5, 12, 16, 24, 33):
        angle = 2 * torch.pi * steps / period
        orbit = torch.stack([angle.cos(), angle.sin()], dim=1) + 3
        assert classify(orbit) == ("orbit", period)
    angle = 2 * torch.pi * steps / 55
    arc = torch.stack([angle.cos(), angle.sin()], dim=1) + 3
    assert classify(arc)[0] == "unsettled"
    noise = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    assert classify(noise)[0] == "unsettled"


def test_convergence_is_counted_from_the_last_far_state() -> None:
    states = torch.tensor([4.0, 1.0, 3.0, 1.0, 1.0, 1.0]).view(6, 1, 1, 1)
    assert convergence_steps(states, tolerance=0.1).tolist() == [[3]]


def test_components_and_correlation_of_known_states() -> None:
    """One direction holds all variance; equal tokens correlate fully, opposed ones do not."""
    generator = torch.Generator().manual_seed(0)
    line = torch.randn(5, 7, 1, generator=generator) * torch.tensor([3.0, 4.0]) / 5
    found = principal_components(line, count=2)
    assert found[..., 1].abs().max() < 1e-5
    spread_along = (line.flatten(0, 1) - line.flatten(0, 1).mean(0)).square().sum().item()
    assert found[..., 0].square().sum().item() == pytest.approx(spread_along, rel=1e-4)
    spread = torch.randn(4, 16, 64, generator=generator)
    assert abs(token_correlation(spread)) < 0.1
    collapsed = spread[:, :1].expand(-1, 16, -1) + 1e-3 * spread
    assert token_correlation(collapsed) > 0.99
    opposed = torch.cat([spread[:, :1], -spread[:, :1]], dim=1)
    assert token_correlation(opposed) == pytest.approx(-1.0, abs=1e-5)
    for wrong in (lambda: token_correlation(spread[:, :1]), lambda: classify(spread[0, :5])):
        with pytest.raises(ValueError, match="or more"):
            wrong()
