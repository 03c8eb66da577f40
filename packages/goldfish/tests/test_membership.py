"""Membership scores on planted data, where the answer is known."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from fourfold_goldfish.memorization.membership import (
    TokenStatistics,
    auc,
    auc_interval,
    exposure,
    loss_score,
    min_k_plus_score,
    min_k_score,
    reference_score,
    token_statistics,
    tpr_at_fpr,
    zlib_score,
)
from fourfold_parallel.run.models import Llama

TINY = Llama(
    width=16, depth=1, heads=2, kv_heads=1, hidden=32, vocabulary=64, context=32, tied=False
)


def trained_on(passages: Tensor) -> torch.nn.Module:
    """A tiny model after 60 steps on some passages."""
    model = TINY.build(seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(input_ids=passages, labels=passages).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def planted() -> tuple[TokenStatistics, TokenStatistics, list[bytes]]:
    """Statistics of 16 members and 16 others under a model, and under one that saw neither."""
    generator = torch.Generator().manual_seed(1)
    passages = torch.randint(3, 64, (32, 20), generator=generator)
    model = trained_on(passages[:16])
    texts = [bytes(row.tolist()) for row in passages]
    with torch.random.fork_rng():
        fresh = TINY.build(seed=5).eval()
    return (
        token_statistics(model, passages, batch=5),  # type: ignore[arg-type]
        token_statistics(fresh, passages, batch=32),
        texts,
    )


def test_every_score_is_higher_for_members(
    planted: tuple[TokenStatistics, TokenStatistics, list[bytes]],
) -> None:
    """The sign that the published evaluation has wrong."""
    statistics, reference, texts = planted
    scores = {
        "loss": loss_score(statistics),
        "zlib": zlib_score(statistics, texts),
        "reference": reference_score(statistics, reference),
        "min-k": min_k_score(statistics),
        "min-k++": min_k_plus_score(statistics),
    }
    for name, score in scores.items():
        members, others = score[:16].numpy(), score[16:].numpy()
        assert auc(members, others) > 0.95, name
        assert tpr_at_fpr(members, others, fpr=0.1) > 0.5, name


def test_statistics_are_those_of_the_models_own_distribution(
    planted: tuple[TokenStatistics, TokenStatistics, list[bytes]],
) -> None:
    """Tokens drawn from a model have its mean log probability; its own mean is minus its entropy."""
    model = TINY.build(seed=5).eval()
    generator = torch.Generator().manual_seed(1)
    passages = torch.randint(3, 64, (32, 20), generator=generator)
    with torch.no_grad():
        chances = model(input_ids=passages[:, :-1]).logits.softmax(-1)
    entropy = -(chances * chances.log()).sum(-1)
    torch.testing.assert_close(planted[1].mean, -entropy, atol=1e-4, rtol=1e-4)
    true = chances.gather(-1, passages[:, 1:, None]).squeeze(-1).log()
    torch.testing.assert_close(planted[1].log_probability, true, atol=1e-4, rtol=1e-4)


def test_min_k_looks_at_the_least_likely_tokens() -> None:
    log_probability = torch.tensor([[-1.0, -9.0, -2.0, -8.0, -3.0]])
    flat = TokenStatistics(
        log_probability=log_probability,
        mean=torch.full((1, 5), -4.0),
        deviation=torch.full((1, 5), 2.0),
    )
    assert min_k_score(flat, share=0.4).item() == -8.5
    assert min_k_plus_score(flat, share=0.4).item() == (-8.5 + 4) / 2
    assert min_k_score(flat, share=0.01).item() == -9.0
    with pytest.raises(ValueError, match="share=0"):
        min_k_score(flat, share=0)


def test_the_area_is_the_share_of_pairs_that_a_member_wins() -> None:
    """Counted pair by pair, ties as half, down to one passage each and to scores that are all equal."""
    random = np.random.default_rng(0)
    for size, scores in ((17, 6), (17, 1), (1, 3)):
        for _ in range(20):
            members = random.integers(0, scores, size).astype(float)
            others = random.integers(0, scores, size + 6).astype(float)
            wins = (members[:, None] > others) + (members[:, None] == others) / 2
            assert auc(members, others) == wins.mean()


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    """Normal scores one deviation apart: the area is Phi(1/sqrt 2), 95 % intervals of 40 and 40."""
    random = np.random.default_rng(1)
    truth = stats.norm.cdf(1 / math.sqrt(2))
    covered = 0
    for seed in range(60):
        interval = auc_interval(
            random.normal(1, 1, 40), random.normal(0, 1, 40), resamples=200, seed=seed
        )
        covered += interval.low <= truth <= interval.high
    # 57 are expected; the percentile bootstrap of 40 is a little narrow. 50 has chance 0.4 % at 95 %.
    assert covered >= 50


def test_a_threshold_lets_through_no_more_others_than_allowed() -> None:
    others = np.arange(100.0)
    members = np.arange(0.5, 200, 2)
    for fpr in (0.01, 0.05, 0.5):
        threshold = np.sort(others)[::-1][round(fpr * 100)]
        assert (others > threshold).mean() <= fpr
        assert tpr_at_fpr(members, others, fpr=fpr) == (members > threshold).mean()
    with pytest.raises(ValueError, match=r"fpr=0\.001 of 100 others"):
        tpr_at_fpr(members, others, fpr=0.001)


def test_exposure_counts_bits() -> None:
    """The likeliest of 1,024 has 10 bits; one that was never seen has 1/ln 2 on average."""
    references = np.arange(1023.0)
    assert exposure(-1.0, references) == 10
    assert exposure(510.5, references) == 1
    unseen = [exposure(rank - 0.5, references) for rank in range(1024)]
    assert np.mean(unseen) == pytest.approx(1 / math.log(2), abs=0.01)
