"""Two languages: margins as asked, the same entropy rate, and rows that follow both."""

import numpy as np
import pytest
import torch

from fourfold_outliers.reproduce.language import (
    Bigrams,
    GivenFrequencies,
    Law,
    entropy_rate,
    joint,
    margins,
    transitions,
)
from fourfold_parallel.run.models import Llama

IDS, NATS = 64, 2.0
LAWS: tuple[Law, ...] = ("zipf", "flat")


def test_only_frequencies_differ() -> None:
    """Both laws have the entropy rate asked for, and their own margin is where the chain stays."""
    for law in LAWS:
        after = transitions(law, IDS, NATS, 0)
        margin = margins(law, IDS)
        np.testing.assert_allclose(after.sum(1), 1, atol=1e-12)
        np.testing.assert_allclose(margin @ after, margin, atol=1e-6)
        assert entropy_rate(margin[:, None] * after) == pytest.approx(NATS, abs=1e-3)


def test_a_joint_keeps_the_affinities_ratios() -> None:
    """Odds ratios of any four cells are the affinity's own: margins are all that the scaling sets."""
    affinity = np.random.default_rng(0).standard_normal((8, 8))
    pairs = joint(affinity, margins("zipf", 8), 1.5)
    odds = np.log(pairs[1, 2] * pairs[5, 6] / (pairs[1, 6] * pairs[5, 2]))
    expected = 1.5 * (affinity[1, 2] + affinity[5, 6] - affinity[1, 6] - affinity[5, 2])
    assert odds == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("law", LAWS)
def test_rows_follow_the_law(law: Law) -> None:
    """Frequencies of ids and of pairs in 40,000 tokens; the validation has other rows."""
    source = Bigrams(
        law=law, vocabulary=IDS, entropy_nats=NATS, rows=800, validation_rows=8, seed=0
    )
    stream = source.open(sequence=49, seed=0)
    rows = stream.file.tokens.reshape(-1, 50)
    counts = np.bincount(rows.reshape(-1), minlength=IDS) / rows.size
    np.testing.assert_allclose(counts, margins(law, IDS), atol=0.012)
    after = transitions(law, IDS, NATS, 0)
    [most] = np.unravel_index([np.argmax(margins(law, IDS)[:, None] * after)], after.shape)[0]
    following = rows[:, 1:][rows[:, :-1] == most]
    likely = int(after[most].argmax())
    assert (following == likely).mean() == pytest.approx(after[most, likely], abs=0.06)
    held_out = source.validation(sequence=49)
    assert not {tuple(row) for row in held_out.file.tokens.reshape(-1, 50).tolist()} & {
        tuple(row) for row in rows.tolist()
    }


def test_more_entropy_than_the_law_has_is_refused() -> None:
    with pytest.raises(ValueError, match=r"entropy_nats=9.0 of a language whose tokens have 4.159"):
        transitions("flat", IDS, 9.0, 0)


def test_given_frequencies_are_added_to_the_logits_and_not_trained() -> None:
    llama = Llama(
        width=16, depth=1, heads=2, kv_heads=2, hidden=16, vocabulary=IDS, context=8, tied=True
    )
    plain, given = (
        model.build(seed=0) for model in (llama, GivenFrequencies(llama=llama, law="zipf"))
    )
    rows = torch.arange(8)[None]
    with torch.no_grad():
        gap = given(input_ids=rows).logits - plain(input_ids=rows).logits
    expected = torch.from_numpy(np.log(margins("zipf", IDS))).float().expand_as(gap)
    torch.testing.assert_close(gap, expected, atol=1e-5, rtol=0)
    assert [n for n, _ in given.named_parameters()] == [n for n, _ in plain.named_parameters()]
