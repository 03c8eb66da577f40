"""Sampled and thresholded attention: unbiased, within its error, equal to its twin, counted to the number."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fourfold_loki import (
    CATALOGUE,
    Budget,
    Count,
    Error,
    Exact,
    MagicPIG,
    PQCache,
    Quest,
    Random,
    Share,
    SkipSoftmax,
    Sparse,
    Statistics,
    Streaming,
    Threshold,
    VAttention,
    WhereItPays,
    attending,
)
from fourfold_loki.attention import attend
from fourfold_loki.evaluate.traffic import read_share
from fourfold_loki.selectors import Candidates, Selection
from fourfold_loki.selectors.hash_attention import Learner
from fourfold_loki.selectors.pqcache import lloyd, nearest

FLOAT32 = 1e-5
HEADS, KV_HEADS, WIDTH = 6, 2, 16
"""Of the model in conftest."""
NEW = ("pqcache", "hash-attention", "magicpig", "vattention", "skip-softmax")


def scene(tokens: int, *, queries: int = 4, seed: int = 0, peak: float = 1.0) -> Candidates:
    """Queries that see all keys; `peak` sharpens attention."""
    generator = torch.Generator().manual_seed(seed)
    visible = torch.ones(1, 1, queries, tokens, dtype=torch.bool)
    return Candidates(
        queries=peak * torch.randn(1, HEADS, queries, WIDTH, generator=generator),
        keys=torch.randn(1, KV_HEADS, tokens, WIDTH, generator=generator),
        visible=visible,
        scaling=WIDTH**-0.5,
        layer=0,
        turned=False,
        past_mass=torch.zeros(1, HEADS, tokens),
        allowance=visible.sum(-1),
    )


def values_of(tokens: int) -> Tensor:
    return torch.randn(1, KV_HEADS, tokens, WIDTH, generator=torch.Generator().manual_seed(9))


def sums(among: Candidates, values: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
    """Denominator and numerator of attention over what was selected, with its weights."""
    scores = among.scores()
    group = HEADS // KV_HEADS
    keep = selection.keep.repeat_interleave(HEADS // selection.keep.shape[1], 1)
    weights = scores.exp() * keep
    if selection.log_weights is not None:
        rows = selection.log_weights
        weights = weights * rows.repeat_interleave(HEADS // rows.shape[1], 1).exp()
    return weights.sum(-1), weights @ values.repeat_interleave(group, 1)


def dense(among: Candidates, values: Tensor) -> Tensor:
    everything = among.visible.expand(-1, HEADS, -1, -1)
    return attend(among.queries, among.keys, values, everything, scaling=among.scaling)


def output(among: Candidates, values: Tensor, selection: Selection) -> Tensor:
    return attend(
        among.queries,
        among.keys,
        values,
        selection.keep,
        scaling=among.scaling,
        log_weights=selection.log_weights,
    )


PER_HEAD = {"selection": "per head"}


def sampling(seed: int) -> dict[str, tuple[Exact | MagicPIG | VAttention, Budget]]:
    few = {"sinks": 2, "window": 4}
    pig = MagicPIG(hashes=12, bits=2, seed=seed)
    heavy = VAttention(heavy=Exact(), epsilon=0.3, delta=0.2, seed=seed)
    blind = VAttention(heavy=Random(seed=1), epsilon=0.3, delta=0.2, seed=seed)
    return {
        "magicpig": (pig, Budget(amount=Threshold(score=2), **few, **PER_HEAD)),  # type: ignore[arg-type]
        "vattention": (heavy, Budget(amount=Count(keys=16), **few)),  # type: ignore[arg-type]
        "vattention, per head": (heavy, Budget(amount=Count(keys=16), **few, **PER_HEAD)),  # type: ignore[arg-type]
        "vattention, blind": (blind, Budget(amount=Count(keys=16), **few)),  # type: ignore[arg-type]
    }


@pytest.mark.parametrize("name", sampling(0))
def test_sampled_sums_are_unbiased(name: str) -> None:
    """Mean over 400 seeds of numerator and denominator against dense ones, in standard errors.

    Of 24 rows and 17 numbers a row, 5 standard errors are exceeded once in ten thousand tests.
    """
    among = scene(160, seed=3)
    values = values_of(160)
    truth = torch.cat([part.flatten() for part in sums(among, values, everything(among))])
    draws = []
    for seed in range(400):
        selector, budget = sampling(seed)[name]
        selection = selector.select(among, budget)
        draws.append(torch.cat([part.flatten() for part in sums(among, values, selection)]))
        assert not selection.keep.all()
    drawn = torch.stack(draws).double()
    error = (drawn.mean(0) - truth).abs() / (drawn.std(0) / math.sqrt(len(draws))).clamp(min=1e-6)
    assert float(error.max()) < 5


def everything(among: Candidates) -> Selection:
    return Selection(keep=among.visible.expand(-1, HEADS, -1, -1), mass=among.past_mass)


@pytest.mark.parametrize(
    ("selector", "budget"),
    [
        (MagicPIG(), Budget(amount=Threshold(score=0), selection="per head")),
        (
            VAttention(heavy=Exact(), epsilon=0.1, delta=0.1, first=1.0),
            Budget(amount=Count(keys=8)),
        ),
        (VAttention(heavy=Exact(), epsilon=1e-9, delta=0.1), Budget(amount=Count(keys=8))),
        (VAttention(heavy=Exact(), epsilon=0.1, delta=0.1), Budget(amount=Share(of_visible=1.0))),
        (SkipSoftmax(block=8), Budget(amount=Threshold(score=-math.inf))),
        (MagicPIG(), Budget(amount=Threshold(score=9), selection="per head", dense_below=200)),
    ],
)
def test_reading_everything_is_dense(selector: MagicPIG, budget: Budget) -> None:
    among, values = scene(100), values_of(100)
    selection = selector.select(among, budget)
    assert selection.keep.all()
    torch.testing.assert_close(output(among, values, selection), dense(among, values))


def planted(kind: str) -> Candidates:
    """Keys that a sample is likely to misjudge: a few heavy ones, many that tie, one of each size."""
    among = scene(600, queries=24, seed=5, peak=2.0)
    keys = among.keys.clone()
    direction = among.queries[:, ::3].mean(2, keepdim=True)
    direction = direction / direction.norm(dim=-1, keepdim=True)
    if kind == "few heavy":
        keys[:, :, 100:110] = 12 * direction
    elif kind == "ties":
        keys[:, :, ::2] = keys[:, :, :1]
    elif kind == "ladder":
        keys = direction * torch.linspace(-20, 20, 600)[None, None, :, None]
    return replace(among, keys=keys)


@pytest.mark.parametrize("delta", [0.05, 0.2])
@pytest.mark.parametrize(
    ("kind", "bound"),
    [
        *((kind, "hoeffding") for kind in ("random", "few heavy", "ties", "ladder")),
        *((kind, "normal") for kind in ("random", "few heavy", "ties")),
    ],
)
def test_the_error_is_within_epsilon_as_often_as_promised(
    kind: str, bound: str, delta: float
) -> None:
    """The denominator's, behind the exact heaviest keys: over 20 seeds of 24 queries and 6 heads."""
    among = planted(kind)
    truth = among.scores().exp().sum(-1)
    budget = Budget(amount=Count(keys=24), sinks=2, window=4, selection="per head")
    missed, read = [], []
    for seed in range(20):
        selector = VAttention(heavy=Exact(), epsilon=0.1, delta=delta, bound=bound, seed=seed)  # type: ignore[arg-type]
        selection = selector.select(among, budget)
        got, _ = sums(among, values_of(600), selection)
        missed.append((got / truth - 1).abs() > 0.1)
        read.append(selection.keep.float().mean())
    share = float(torch.stack(missed).float().mean())
    # Heads of a group share a sample: 20 * 24 * 2 rows are independent.
    assert share <= delta + 3 * math.sqrt(delta * (1 - delta) / 960)
    if kind == "random" and bound == "normal":
        assert float(torch.stack(read).mean()) < 0.6


def test_a_first_sample_of_few_keys_breaks_the_promise() -> None:
    """Of 16 keys the spread is mostly too small: about one denominator in six is off where 5 % may be."""
    among = planted("random")
    truth = among.scores().exp().sum(-1)
    budget = Budget(amount=Count(keys=24), sinks=2, window=4, selection="per head")

    def missed(fewest: int) -> float:
        shares = []
        for seed in range(20):
            selector = VAttention(heavy=Exact(), epsilon=0.1, delta=0.05, fewest=fewest, seed=seed)
            got, _ = sums(among, values_of(600), selector.select(among, budget))
            shares.append(((got / truth - 1).abs() > 0.1).float().mean())
        return float(torch.stack(shares).mean())

    assert 0.12 < missed(16) < 0.2
    assert missed(64) < 0.08


def test_the_normal_bound_can_be_betrayed_and_the_other_cannot() -> None:
    """Where heavy keys are not ranked first and no first sample meets them, a spread says nothing."""
    among = scene(600, queries=24, seed=5, peak=0.1)
    keys = 0.1 * among.keys
    keys[:, :, 300] = 400 * among.queries[:, ::3, 0]
    among = replace(among, keys=keys, queries=among.queries[:, :, :1].expand(-1, -1, 24, -1))
    truth = among.scores()[:, ::3].exp().sum(-1)
    budget = Budget(amount=Count(keys=24), sinks=2, window=4, selection="per head")

    def misses(bound: str, heavy: Streaming | Exact | Quest) -> float:
        selector = VAttention(heavy=heavy, epsilon=0.1, delta=0.1, bound=bound)  # type: ignore[arg-type]
        got, _ = sums(among, values_of(600), selector.select(among, budget))
        return float(((got[:, ::3] / truth - 1).abs() > 0.1).float().mean())

    assert misses("normal", Streaming(sinks=2)) > 0.5
    assert misses("normal", Exact()) == 0
    assert misses("hoeffding", Exact()) == 0
    assert misses("hoeffding", Quest(page=8)) == 0


def test_a_smaller_error_reads_more() -> None:
    among, budget = scene(600, peak=2.0), Budget(amount=Count(keys=24))

    def read(epsilon: float, delta: float) -> float:
        selector = VAttention(heavy=Exact(), epsilon=epsilon, delta=delta)
        return float(selector.select(among, budget).keep.float().mean())

    by_error = [read(epsilon, 0.1) for epsilon in (1.0, 0.3, 0.1, 0.03, 0.01)]
    assert by_error == sorted(by_error)
    assert by_error[0] < by_error[-1]
    assert read(0.1, 0.4) <= read(0.1, 0.01)


@pytest.mark.parametrize("score", [0.0, -1.0, -4.0])
def test_skip_softmax_is_an_online_softmax_that_passes_over_blocks(score: float) -> None:
    """The twin, key block by key block, for every query alone."""
    block, among, values = 8, scene(100, peak=3.0), values_of(100)
    budget = Budget(amount=Threshold(score=score), selection="per head")
    selection = SkipSoftmax(block=block).select(among, budget)
    ours, group = output(among, values, selection), HEADS // KV_HEADS
    skipped = 0
    for head in range(HEADS):
        for query in range(among.queries.shape[2]):
            largest, total, summed = -math.inf, 0.0, torch.zeros(WIDTH)
            for first in range(0, 100, block):
                keys = among.keys[0, head // group, first : first + block]
                scores = keys @ among.queries[0, head, query] * among.scaling
                if float(scores.max()) < largest + score:
                    skipped += 1
                    continue
                now = max(largest, float(scores.max()))
                weights = (scores - now).exp()
                shrink = math.exp(largest - now)
                total = total * shrink + float(weights.sum())
                summed = summed * shrink + weights @ values[0, head // group, first : first + block]
                largest = now
            torch.testing.assert_close(ours[0, head, query], summed / total, atol=1e-5, rtol=1e-4)
    assert skipped > 0


def test_a_threshold_keeps_what_scores_it_and_what_is_forced() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 4, 3, 50, generator=generator)
    visible = torch.ones(2, 1, 3, 50, dtype=torch.bool).tril(47)
    forced = Budget(amount=Threshold(score=0), sinks=2, window=3).forced(visible)
    for least in (-5.0, 0.0, 0.7, 1.4):
        alone = Budget(amount=Threshold(score=least), sinks=2, window=3, selection="per head")
        keep = alone.keep(scores, visible, kv_heads=2, layer=0)
        assert torch.equal(keep, visible & ((scores >= least) | forced))
        together = replace(alone, selection="shared in groups")
        shared = together.keep(scores, visible, kv_heads=2, layer=0)
        assert torch.equal(shared, keep.unflatten(1, (2, 2)).any(2))
    nothing = Budget(amount=Threshold(score=99.0), selection="per head")
    assert (nothing.keep(scores, visible, kv_heads=2, layer=0).sum(-1) == 1).all()
    with pytest.raises(ValueError, match="nan"):
        Threshold(score=math.nan)


def test_magicpig_reads_a_key_as_often_as_it_says() -> None:
    """The rate over 600 seeds against the probability, for every key, in standard errors."""
    among = scene(40, queries=2)
    seeds = 600
    read = torch.zeros(1, HEADS, 2, 40)
    for seed in range(seeds):
        read += MagicPIG(hashes=9, bits=2, seed=seed).scores(among) >= 2
    chance = MagicPIG(hashes=9, bits=2).chance(among, at_least=2)
    error = (read / seeds - chance).abs() / (chance * (1 - chance) / seeds).sqrt()
    assert float(error.max()) < 5
    assert float(chance.min()) < 0.8


def test_with_as_many_centroids_as_keys_the_ranking_is_exact() -> None:
    among = scene(60)
    torch.testing.assert_close(PQCache(parts=2, bits=6).scores(among), among.scores())
    coarse = PQCache(parts=2, bits=2).scores(among)
    assert not torch.allclose(coarse, among.scores(), atol=0.1)


def test_every_round_of_k_means_brings_centroids_nearer() -> None:
    keys = torch.randn(2, 3, 200, 4, generator=torch.Generator().manual_seed(0))
    distances = []
    for rounds in range(6):
        centroids = lloyd(keys, keys[:, :, :8], rounds=rounds)
        codes = nearest(keys, centroids)[..., None].expand(keys.shape)
        distances.append(float((keys - centroids.gather(-2, codes)).square().sum()))
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < distances[0]


def test_signatures_learn_to_tell_the_heaviest_keys() -> None:
    """On queries and keys that no lesson saw: the loss falls, and recall rises above chance and before."""
    generator = torch.Generator().manual_seed(0)

    def lesson(count: int) -> tuple[Tensor, Tensor]:
        # Keys near a plane, as real ones are near few directions.
        plane = torch.eye(WIDTH)[:4]
        return (
            torch.randn(HEADS, count, 4, generator=generator) @ plane * 3,
            torch.randn(KV_HEADS, 256, 4, generator=generator) @ plane * 3,
        )

    learner = Learner(heads=HEADS, kv_heads=KV_HEADS, sizes=(WIDTH, 32, 32), steps=1)
    recalls = []
    for steps in (1, 250):
        learner.steps = steps
        queries, keys = lesson(64)
        learner.learn(0, queries, keys, torch.ones(64, 256, dtype=torch.bool))
        queries, keys = (part[None] for part in lesson(32))
        among = replace(scene(256, queries=32), queries=queries, keys=keys)
        ours = learner.selector().scores(among).topk(32, -1).indices
        best = torch.zeros_like(among.scores()).scatter(-1, among.scores().topk(32, -1).indices, 1)
        recalls.append(float(best.gather(-1, ours).mean()))
    assert learner.losses[0][-1] < 0.8 * learner.losses[0][0]
    assert recalls[1] > max(recalls[0], 32 / 256) + 0.2


@pytest.mark.parametrize("name", CATALOGUE)
def test_measured_reads_are_what_the_traffic_model_says(
    name: str, statistics: Statistics, llama: PreTrainedModel, tokens: Callable[..., Tensor]
) -> None:
    """To a tenth of a percent, index and tables included, for every selector that does not sample."""
    selector, ids = CATALOGUE[name](statistics), tokens(1, 128)
    page = 16 if name == "quest" else 1
    share = 1.0 if name == "pca-attention" else 0.5
    budget = Budget(amount=Share(of_visible=share), sinks=2, window=3, page=page)
    with attending(llama, Sparse(selector=selector, budget=budget, reach="every query")) as session:
        llama(ids, use_cache=False)
    seen, sizes = range(1, 129), {"head_width": WIDTH, "group": HEADS // KV_HEADS}
    if selector.samples:
        with pytest.raises(ValueError, match=f"{type(selector).__name__}.*depend on chance"):
            read_share(selector, budget, seen, **sizes)
        return
    predicted = read_share(selector, budget, seen, **sizes)
    # H2O may have evicted more than the group's budget would keep.
    assert session.reads.read_share == pytest.approx(predicted, rel=0.02 if name == "h2o" else 1e-3)


@pytest.mark.parametrize(
    ("selector", "score", "index", "vectors"),
    [(SkipSoftmax(block=8), -1.0, 0.5, 0.5), (MagicPIG(hashes=9, bits=3), 2.0, 0.0, 1.0)],
)
def test_reads_of_thresholds_and_samples_are_counted_key_by_key(
    selector: SkipSoftmax | MagicPIG,
    score: float,
    index: float,
    vectors: float,
    llama: PreTrainedModel,
    tokens: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Skip-softmax: all keys, values of what is kept. MagicPIG: what is kept, two numbers a place."""
    kind, group = type(selector), HEADS // KV_HEADS
    kept: list[float] = []
    seen: list[float] = []
    looked_up: list[float] = []
    whole = kind.select

    def select(self: SkipSoftmax | MagicPIG, among: Candidates, budget: Budget) -> Selection:
        chosen = whole(self, among, budget)  # type: ignore[arg-type]
        for head in range(KV_HEADS):
            mine = chosen.keep[:, head * group : (head + 1) * group].any(1)
            kept.append(float(mine.sum()))
            seen.append(float(among.visible.sum()))
        if isinstance(self, MagicPIG):
            looked_up.append(2 * float((self.scores(among) * among.visible).sum()))
        return chosen

    monkeypatch.setattr(kind, "select", select)
    budget = Budget(amount=Threshold(score=score), selection="per head")
    mode = Sparse(selector=selector, budget=budget, reach="every query")
    with attending(llama, mode) as session:
        llama(tokens(1, 96), use_cache=False)
    tables = sum(looked_up) / (2 * WIDTH * sum(seen))
    by_hand = vectors * sum(kept) / sum(seen) + index + tables
    assert session.reads.read_share == pytest.approx(by_hand, rel=1e-9)
    assert 0 < session.reads.share < 1


@pytest.mark.parametrize("name", NEW)
def test_a_selector_is_refused_by_name_where_it_cannot_be_used(
    name: str, statistics: Statistics, llama: PreTrainedModel, tokens: Callable[..., Tensor]
) -> None:
    """Caches in the basis, paged ones, lossless drafts, self-timing, certificates."""
    selector = CATALOGUE[name](statistics)
    who = type(selector).__name__
    budget = Budget(amount=Share(of_visible=0.5))
    with attending(llama, Sparse(selector=selector, budget=budget)) as session:
        for ask in (
            session.cache,
            session.cached,
            lambda: session.paged_cache(rows=1, capacity=64),
        ):
            with pytest.raises(ValueError, match=f"{who} ranks by no basis.*lossless"):
                ask()
    timed = replace(budget, dense_below=WhereItPays())
    with (
        pytest.raises(ValueError, match=who),
        attending(llama, Sparse(selector=selector, budget=timed)),
    ):
        pass
    certified = Sparse(
        selector=selector, budget=Budget(amount=Error(of_output=0.1)), reach="every query"
    )
    with attending(llama, certified), pytest.raises(ValueError, match=f"{who} bounds no score"):
        llama(tokens(1, 32), use_cache=False)


def test_what_samples_is_not_compiled(
    llama: PreTrainedModel, tokens: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = Budget(amount=Threshold(score=2), selection="per head")
    mode = Sparse(selector=MagicPIG(), budget=budget, reach="every query")
    with attending(llama, mode):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        with pytest.raises(ValueError, match="MagicPIG draws keys at random"):
            llama(tokens(1, 32), use_cache=False)


def test_settings_and_budgets_that_mean_nothing_are_refused() -> None:
    among = scene(100)
    shared = Budget(amount=Threshold(score=2))
    with pytest.raises(ValueError, match="MagicPIG samples keys for each query head"):
        MagicPIG().select(among, shared)
    with pytest.raises(ValueError, match="VAttention samples single keys, not pages of 16"):
        VAttention(heavy=Exact(), epsilon=0.1, delta=0.1).select(
            among, Budget(amount=Count(keys=32), page=16)
        )
    with pytest.raises(ValueError, match="heavy=MagicPIG evicts, samples"):
        VAttention(heavy=MagicPIG(), epsilon=0.1, delta=0.1)
    with pytest.raises(ValueError, match=r"delta=1\.5"):
        VAttention(heavy=Exact(), epsilon=0.1, delta=1.5)
    with pytest.raises(ValueError, match="parts=3 of a head of 16"):
        PQCache(parts=3).scores(among)
    with pytest.raises(ValueError, match="bits=0"):
        PQCache(bits=0)
    with pytest.raises(ValueError, match="bits=16"):
        MagicPIG(bits=16)
    with pytest.raises(ValueError, match="block=0"):
        SkipSoftmax(block=0)
    with pytest.raises(ValueError, match=r"Threshold.*not known before ranking"):
        Budget(amount=Threshold(score=2)).units(100)
