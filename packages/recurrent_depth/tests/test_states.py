"""Where recurrences begin: the law, and that equal calls give equal results in any company."""

from typing import Any

import pytest
import torch
from scipy import stats

from fourfold_recurrent_depth import FreshNoise, TokenStates, state_table
from fourfold_recurrent_depth.exits import KL, LatentDiff
from fourfold_recurrent_depth.states import CUT

ROUNDING = 3e-5
"""As in test_model.py."""
LENGTHS = (4, 7, 12)


def drawn(seed: int = 0, width: int = 32) -> torch.Tensor:
    """States of 64 tokens at 64 positions each."""
    tokens = torch.arange(64)[:, None].expand(-1, 64)
    return TokenStates(seed=seed).of(tokens, torch.arange(64)[None], width)


@pytest.mark.parametrize(
    "states", [drawn(), drawn(seed=7), drawn(seed=-(2**40)), state_table(4096, 32, seed=3).states]
)
def test_states_follow_the_initial_law(states: torch.Tensor) -> None:
    """N(0, 2/5), cut at three standard deviations: the distribution, not its moments alone."""
    law = stats.truncnorm(-CUT, CUT, scale=0.4**0.5)
    assert states.abs().max() <= CUT * 0.4**0.5 + 1e-6
    distance = float(stats.kstest(states.flatten().double().numpy(), law.cdf).statistic)
    assert distance < 2 / states.numel() ** 0.5


def test_states_of_tokens_do_not_resemble_one_another() -> None:
    """Neighbours in token, position, feature or seed are uncorrelated; no two states are equal."""
    states = drawn()
    bound = 5 / states[1:].numel() ** 0.5
    pairs = [(states[1:], states[:-1]), (states[:, 1:], states[:, :-1])]
    pairs += [(states[..., 1:], states[..., :-1]), (states, drawn(seed=1))]
    pairs += [(states[1:, :-1], states[:-1, 1:])]
    for ours, theirs in pairs:
        both = torch.stack([ours.flatten(), theirs.flatten()]).double()
        assert abs(float(torch.corrcoef(both)[0, 1])) < bound
    assert len(states.flatten(0, 1).unique(dim=0)) == 64 * 64


def test_a_state_is_a_function_of_token_and_position() -> None:
    """Whatever stands beside it, and where in the tensor it stands."""
    tokens = torch.tensor([[5, 9, 2], [7, 7, 5]])
    places = torch.tensor([[0, 1, 2], [4, 3, 0]])
    whole = TokenStates().of(tokens, places, 16)
    assert torch.equal(whole[0, 0], whole[1, 2])
    assert not torch.equal(whole[1, 0], whole[1, 1])
    assert torch.equal(TokenStates().of(tokens[1:], places[1:], 16)[0], whole[1])


@pytest.mark.parametrize("exits", [None, LatentDiff(threshold=0.1), KL(threshold=0.02)])
def test_equal_calls_give_equal_tokens_in_any_batch(
    tiny: Any, tokens: torch.Tensor, exits: Any
) -> None:
    """Greedily, with nothing said of states: again, row by row without padding, and without a cache."""
    padded, mask = torch.zeros(3, 12, dtype=torch.long), torch.zeros(3, 12, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        padded[row, 12 - length :], mask[row, 12 - length :] = tokens[row, :length], 1
    options: Any = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "exit": exits}
    together = tiny.generate(padded, attention_mask=mask, **options)[:, 12:]
    torch.rand(5)
    again = tiny.generate(padded, attention_mask=mask, **options)[:, 12:]
    assert together.tolist() == again.tolist()
    for row, length in enumerate(LENGTHS):
        alone = tiny.generate(tokens[row : row + 1, :length], **options)[:, length:]
        assert alone[0].tolist() == together[row].tolist()
    if exits is None:
        slow = tiny.generate(padded, attention_mask=mask, use_cache=False, **options)[:, 12:]
        assert slow.tolist() == together.tolist()


@torch.no_grad()
def test_states_decide_the_logits(tiny: Any, tokens: torch.Tensor) -> None:
    """The default is TokenStates in evaluation and fresh noise in training; another seed, other logits."""

    def logits(**options: Any) -> torch.Tensor:
        return tiny(tokens, num_steps=1, **options).logits

    plain = logits()
    assert torch.equal(plain, logits(initial_state=TokenStates()))
    zeros, halves = logits(init_scale=0.0), logits(init_scale=0.5)
    for other in (logits(initial_state=TokenStates(seed=1)), zeros, halves):
        assert not torch.allclose(other, plain, atol=1e-2)
    noise = FreshNoise()
    assert not torch.allclose(logits(initial_state=noise), logits(initial_state=noise), atol=1e-2)
    tiny.train()
    assert not torch.allclose(logits(), logits(), atol=1e-2)


@torch.no_grad()
def test_embeddings_take_states_by_position(tiny: Any, tokens: torch.Tensor) -> None:
    """No tokens are known: equal calls are equal still, whatever the batch."""
    embeds = tiny.get_input_embeddings()(tokens)
    whole = tiny(inputs_embeds=embeds).logits
    alone = tiny(inputs_embeds=embeds[1:2]).logits
    torch.testing.assert_close(alone[0], whole[1], rtol=0, atol=ROUNDING)
