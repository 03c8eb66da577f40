"""The newer selectors against values computed with published code at toy size (published_samplers.json)."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fourfold_loki import Budget, HashAttention, MagicPIG, PQCache, SkipSoftmax, Threshold
from fourfold_loki.attention import scores_of, shared_in_groups
from fourfold_loki.selectors import Candidates
from fourfold_loki.selectors.hash_attention import Networks, lesson_loss
from fourfold_loki.selectors.vattention import with_replacement

PUBLISHED = 2e-3
"""MagicPIG's reference adds 1e-4 to probabilities of a tenth and more."""


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("published_samplers.json").read_text())


def wave(*shape: int, pace: float) -> Tensor:
    """Numbers that any version of torch makes alike."""
    steps = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)
    return (torch.sin(pace * steps) + torch.cos(pace * pace * steps * 1.7)).reshape(shape).float()


def scene(queries: Tensor, keys: Tensor, *, scaling: float) -> Candidates:
    """Queries that see all keys."""
    visible = torch.ones(1, 1, queries.shape[2], keys.shape[2], dtype=torch.bool)
    return Candidates(
        queries=queries,
        keys=keys,
        visible=visible,
        scaling=scaling,
        layer=0,
        turned=False,
        past_mass=torch.zeros(1, queries.shape[1], keys.shape[2]),
        allowance=visible.sum(-1),
    )


def test_vattention_draws_as_many_as_the_published_rule(published: dict[str, Any]) -> None:
    """With replacement and for a one-sided error, as there; it rounds down."""
    case = published["vattention"]
    spread, denominator = (torch.tensor(case[name]) for name in ("std", "denominator"))
    others = torch.full_like(spread, case["range"])
    draws = with_replacement(
        spread.square(), others, case["epsilon"] * denominator, chance=case["delta"]
    )
    assert draws.clamp(1, case["range"]).long().tolist() == case["budget"]


def networks(heads: int, name: str) -> Networks:
    paces = {"query": (0.37, 0.53, 0.71, 0.91), "key": (0.31, 0.43, 0.61, 0.83)}[name]
    return Networks(
        weights=(wave(heads, 8, 8, pace=paces[0]), wave(heads, 8, 12, pace=paces[1])),
        offsets=(wave(heads, 8, pace=paces[2]), wave(heads, 12, pace=paces[3])),
    )


def test_hash_attention_scores_and_learns_as_published(published: dict[str, Any]) -> None:
    """Heads of a group have the same key networks there."""
    case = published["hash_attention"]
    of_queries, of_keys = networks(4, "query"), networks(2, "key")
    selector = HashAttention(queries=(of_queries,), keys=(of_keys,))
    among = scene(wave(1, 4, 3, 8, pace=0.29), wave(1, 2, 10, 8, pace=0.47), scaling=1.0)
    assert selector.scores(among).int().tolist() == case["scores"]

    def softer(of: Networks) -> Networks:
        return Networks(
            weights=tuple(0.3 * part for part in of.weights),
            offsets=tuple(0.3 * part for part in of.offsets),
        )

    queries, keys = wave(1, 4, 48, 8, pace=0.29)[0, :, 33:], wave(1, 2, 48, 8, pace=0.47)[0]
    visible = torch.ones(48, 48, dtype=torch.bool).tril()[33:]
    loss = lesson_loss(softer(of_queries), softer(of_keys), queries, keys, visible)
    # There what is not visible has a product of sigmoid 0, and no loss either.
    assert float(loss) == pytest.approx(case["loss"], rel=1e-3)


def test_pqcache_ranks_the_published_keys_first(published: dict[str, Any]) -> None:
    """Ten of 40 for each group of two heads. Keys of one code tie, so their ranks are compared, not they."""
    keys, queries = wave(1, 2, 40, 8, pace=0.57), wave(1, 4, 1, 8, pace=0.77)
    among = scene(queries, keys, scaling=8**-0.5)
    scores = PQCache(parts=2, bits=3, rounds=10, seed=0).scores(among)
    shared = shared_in_groups(scores, among.visible, kv_heads=2)[0, :, 0]
    theirs = shared.gather(-1, torch.tensor(published["pqcache"]["kept"]))
    best = shared.sort(-1, descending=True).values
    torch.testing.assert_close(theirs.sort(-1, descending=True).values, best[:, :10])
    assert (best[:, 9] > best[:, 20] + 0.1).all()


def test_magicpig_attends_as_the_published_reference(
    published: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four first, four last and the new key are read for certain there, and moved by the others' mean."""
    keys, values = wave(1, 2, 64, 8, pace=0.33), wave(1, 2, 64, 8, pace=0.39)
    newest = wave(1, 2, 1, 8, pace=0.97), wave(1, 2, 1, 8, pace=1.07)
    queries = wave(1, 4, 1, 8, pace=0.87)
    maps = wave(8, 12, pace=0.67)
    monkeypatch.setattr(torch, "randn", lambda *shape, generator: maps)
    among = scene(queries, keys[:, :, 4:-4], scaling=8**-0.5)
    budget = Budget(amount=Threshold(score=2), selection="per head")
    selection = MagicPIG(hashes=6, bits=2).select(among, budget)
    assert float(selection.keep.float().mean()) == pytest.approx(published["magicpig"]["share"])
    assert selection.log_weights is not None
    mean = keys[:, :, 4:-4].mean(2, keepdim=True)
    sure = torch.cat([keys[:, :, :4], keys[:, :, -4:], newest[0]], 2)
    drawn = among.scores() - scores_of(queries, mean, scaling=among.scaling) + selection.log_weights
    logits = torch.cat(
        [
            scores_of(queries, sure - mean, scaling=among.scaling),
            drawn.masked_fill(~selection.keep, -torch.inf),
        ],
        dim=-1,
    )
    of = torch.cat([values[:, :, :4], values[:, :, -4:], newest[1], values[:, :, 4:-4]], 2)
    output = logits.softmax(-1) @ of.repeat_interleave(2, 1)
    theirs = torch.tensor(published["magicpig"]["output"])
    torch.testing.assert_close(output.flatten(), theirs, atol=PUBLISHED, rtol=0)


def test_skip_softmax_skips_the_published_blocks(published: dict[str, Any]) -> None:
    keys, queries = 1.5 * wave(1, 2, 50, 8, pace=0.33), 6 * wave(1, 4, 1, 8, pace=0.87)
    among = scene(queries, keys, scaling=8**-0.5)
    budget = Budget(amount=Threshold(score=math.log(0.1)), selection="per head")
    keep = SkipSoftmax(block=8).select(among, budget).keep
    assert keep[0, :, 0, ::8].int().tolist() == published["skip_softmax"]["blocks"]
    assert not keep.all()
