"""The certificate's laws: never exceeded, falling with every key that is read, zero where none is left."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from fourfold_loki import (
    Basis,
    Budget,
    Error,
    Exact,
    Loki,
    Quest,
    Selector,
    Sparse,
    Statistics,
    attending,
    fit,
    loki,
)
from fourfold_loki.basis import Label, PublishedSource
from fourfold_loki.certificate import Scene, norms, read_until, scene_of
from fourfold_loki.selectors import CATALOGUE, Candidates

HEADS, KV_HEADS, WIDTH = 4, 2, 16
FLOAT64 = 1e-12

seeds = st.integers(0, 2**31)
dtypes = st.sampled_from([torch.float32, torch.bfloat16])
kinds = st.sampled_from(["round", "sink", "rest", "equal", "huge", "zero"])


def basis_of(seed: int) -> Basis:
    """A random balanced basis, well away from orthonormal, of float32 maps."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(1, KV_HEADS, WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    maps = maps + 2 * torch.eye(WIDTH, dtype=torch.float64)
    source = PublishedSource(folder="random")
    return Basis(
        query_maps=maps.float(),
        key_maps=maps.inverse().mT.float(),
        spectra=torch.ones(1, KV_HEADS, WIDTH),
        label=Label(kind="balanced", stage="after rotary", source=source),
    )


def drawn(
    seed: int, kind: str, *, tokens: int = 40, dtype: torch.dtype = torch.float32, turned: bool
) -> tuple[Candidates, Tensor]:
    """Queries, keys and values, of which a kind is against what an index sees of them."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    queries, keys = random(1, HEADS, 2, WIDTH), random(1, KV_HEADS, tokens, WIDTH)
    values = random(1, KV_HEADS, tokens, 8)
    match kind:
        case "sink":
            keys[:, :, 0] *= 9
            values[:, :, 0] *= 1e-3
        case "rest":  # leading coordinates say nothing, and the best key lies where no index looks
            keys[..., :4] = 0
            keys[:, :, tokens // 2, 4:] = 5 * queries[:, :: HEADS // KV_HEADS, 0, 4:]
            values[:, :, tokens // 2] *= 100
        case "equal":
            keys[:] = keys[:, :, :1]
        case "huge":
            queries, keys = 30 * queries, 30 * keys
        case "zero":
            keys[:, :, ::2], values[:, :, ::3] = 0, 0
        case _:
            pass
    visible = torch.ones(2, tokens, dtype=torch.bool).tril(tokens - 2).expand(1, 1, -1, -1)
    among = Candidates(
        queries=queries.to(dtype),
        keys=keys.to(dtype),
        visible=visible,
        scaling=WIDTH**-0.5,
        layer=0,
        turned=turned,
        past_mass=torch.zeros(1, HEADS, tokens),
        allowance=visible.sum(-1),
    )
    return among, values.to(dtype)


def scene_for(selector: Selector, among: Candidates, values: Tensor) -> Scene:
    queries, keys = selector.compared(among)
    return scene_of(
        queries, keys, values, selector.bounds(among), among.visible, scaling=among.scaling
    )


def dense(among: Candidates, values: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and outputs of attention to every key, written out in float64."""
    weights = torch.zeros(*among.queries.shape[:3], among.keys.shape[2], dtype=torch.float64)
    outputs = torch.zeros(*among.queries.shape[:3], values.shape[-1], dtype=torch.float64)
    for head in range(HEADS):
        own = head * KV_HEADS // HEADS
        scores = among.scaling * among.queries[0, head].double() @ among.keys[0, own].double().T
        weights[0, head] = scores.masked_fill(~among.visible[0, 0], -torch.inf).softmax(-1)
        outputs[0, head] = weights[0, head] @ values[0, own].double()
    return weights, outputs


def selectors_of(seed: int) -> st.SearchStrategy[Selector]:
    basis = basis_of(seed)
    return st.one_of(
        st.builds(
            lambda width, bits: Loki(basis=basis, widths=(width,), bits=bits),
            st.integers(1, WIDTH),
            st.sampled_from([0, 1, 4, 8]),
        ),
        st.builds(lambda page: Quest(page=page), st.sampled_from([1, 4, 16])),
        st.just(Exact()),
    )


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(), seed=seeds, kind=kinds, dtype=dtypes, turned=st.booleans(),
    share=st.floats(0, 1),
)  # fmt: skip
def test_no_bound_is_ever_exceeded(
    data: st.DataObject, seed: int, kind: str, dtype: torch.dtype, turned: bool, share: float
) -> None:
    """Scores, unread mass and output, whichever keys were read and however the numbers lie."""
    selector = data.draw(selectors_of(seed))
    among, values = drawn(seed, kind, dtype=dtype, turned=turned)
    scene = scene_for(selector, among, values)
    off = (scene.scores - scene.bounds.centre).abs() - scene.bounds.radius
    size = scene.slack[..., None]
    assert (off <= size).all()
    generator = torch.Generator().manual_seed(seed)
    read = (torch.rand(scene.scores.shape, generator=generator) < share) & scene.visible
    weights, outputs = dense(among, values)
    certificate = scene.certify(read)
    mass = (weights * ~read).sum(-1)
    assert (mass <= certificate.unread * (1 + FLOAT64) + FLOAT64).all()
    some = read.any(-1)
    error = (certificate.output - outputs).norm(dim=-1)
    allowed = certificate.distance * (1 + FLOAT64) + FLOAT64 * values.double().abs().max()
    assert (error <= allowed)[some].all()


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(), seed=seeds, kind=kinds, dtype=dtypes, turned=st.booleans(),
    error=st.sampled_from([0.3, 0.1, 1e-2, 1e-3, 0.0]), page=st.sampled_from([1, 4, 16]),
    selection=st.sampled_from(["shared in groups", "per head"]), window=st.sampled_from([0, 5]),
)  # fmt: skip
def test_reading_ends_within_the_error_that_was_asked_for(
    data: st.DataObject, seed: int, kind: str, dtype: torch.dtype, turned: bool,
    error: float, page: int, selection: Any, window: int,
) -> None:  # fmt: skip
    """Of the layer's output, also after it is rounded to bfloat16, by that rounding more."""
    selector = data.draw(selectors_of(seed))
    among, values = drawn(seed, kind, dtype=dtype, turned=turned)
    scene = scene_for(selector, among, values)
    amount = Error(of_output=error)
    budget = Budget(amount=amount, page=page, selection=selection, window=window)
    read, certificate = read_until(amount, scene, budget)
    assert (certificate.relative() <= error).all()
    assert bool((read & ~scene.visible).any()) is False
    assert (read | ~budget.forced(scene.visible)).all()
    if error == 0:
        assert torch.equal(read, scene.visible)
    _, outputs = dense(among, values)
    size = outputs.square().sum((1, 3)).sqrt()
    for output, more in (
        (certificate.output, 0.0),
        (certificate.output.to(dtype).double(), torch.finfo(dtype).eps / 2 * (1 + error)),
    ):
        distance = (output - outputs).square().sum((1, 3)).sqrt()
        assert (distance <= (error + more) * size * (1 + FLOAT64) + 1e-30 + FLOAT64 * size).all()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), seed=seeds, kind=kinds)
def test_bounds_fall_with_every_key_that_is_read(data: st.DataObject, seed: int, kind: str) -> None:
    """Mass and output both, key by key in any order, down to zero."""
    selector = data.draw(selectors_of(seed))
    among, values = drawn(seed, kind, tokens=12, turned=True)
    scene = scene_for(selector, among, values)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    read = torch.zeros_like(scene.visible)
    unread = distance = torch.full(scene.scores.shape[:3], math.inf, dtype=torch.float64)
    for token in order.tolist():
        read[..., token] = scene.visible[..., token]
        certificate = scene.certify(read)
        assert (certificate.unread <= unread * (1 + FLOAT64)).all()
        assert (certificate.distance <= distance * (1 + FLOAT64)).all()
        unread, distance = certificate.unread, certificate.distance
    assert not distance.any()
    assert not unread.any()


@given(seed=seeds, dtype=dtypes, size=st.floats(1e-30, 1e30))
def test_norms_are_never_rounded_down(seed: int, dtype: torch.dtype, size: float) -> None:
    vectors = size * torch.randn(
        9, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    stored = norms(vectors, dtype)
    exact = vectors.norm(dim=-1)
    assert (stored >= exact).all()
    assert (stored <= exact * (1 + 3 * torch.finfo(dtype).eps) + 1e-37).all()
    assert torch.equal(stored.to(dtype).double(), stored)


def test_more_of_an_index_reads_less() -> None:
    """Codes of the rest bound tighter than its norm; who knows the scores reads the least."""
    among, values = drawn(3, "round", tokens=400, turned=True)
    among = replace(among, queries=3 * among.queries)
    amount = Error(of_output=0.1)
    kept = []
    for selector in (
        Loki(basis=basis_of(0), widths=(8,), bits=0),
        Loki(basis=basis_of(0), widths=(8,), bits=4),
        Loki(basis=basis_of(0), widths=(8,), bits=12),
        Exact(),
    ):
        read, _ = read_until(amount, scene_for(selector, among, values), Budget(amount=amount))
        kept.append(int(read.sum()))
    assert kept[0] > kept[1] > kept[2]
    assert kept[3] < 1.05 * kept[2]  # rounds are a quarter apart


def test_only_who_bounds_scores_can_keep_an_error(statistics: Statistics) -> None:
    among, _ = drawn(0, "round", turned=False)
    for name in set(CATALOGUE) - {"loki", "quest", "exact"}:
        with pytest.raises(ValueError, match="bounds no score that it has not read"):
            CATALOGUE[name](statistics).bounds(among)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_within_an_error(
    llama: PreTrainedModel, statistics: Statistics, tokens: Any, dtype: torch.dtype
) -> None:
    """In every layer, with either cache; at 0 the logits are those of full attention."""
    model = llama if dtype == torch.float32 else _copied(llama, dtype)
    ids, basis = tokens(1, 60), fit(statistics)
    if dtype != torch.float32:
        from fourfold_loki.calibration import calibrate_tokens

        basis = fit(calibrate_tokens(model, tokens(8, 64)))

    def last(cache: Any) -> Tensor:
        with torch.no_grad():
            model(ids[:, :59], past_key_values=cache)
            return model(ids[:, 59:], past_key_values=cache).logits

    full = last(DynamicCache(config=model.config))
    for error in (0.0, 0.05, 0.5):
        budget = Budget(amount=Error(of_output=error))
        with loki(model, basis, budget, width=8) as session:
            for cache in (DynamicCache(config=model.config), session.cache()):
                logits = last(cache)
                close = 2e-4 if dtype == torch.float32 else 0.3
                assert torch.allclose(logits, full, atol=close, rtol=0) or error > 0
        assert session.reads.error <= error
        assert session.reads.queries == 4
        assert (session.reads.share < 1) == (error > 0.1) or error == 0.05


def _copied(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    from copy import deepcopy

    return deepcopy(model).to(dtype)


def test_an_error_is_refused_where_nothing_bounds_it(llama: PreTrainedModel, tokens: Any) -> None:
    from fourfold_loki import SparQ

    mode = Sparse(selector=SparQ(channels=4), budget=Budget(amount=Error(of_output=0.1)))
    with attending(llama, mode), pytest.raises(ValueError, match="SparQ bounds no score"):
        llama.generate(tokens(1, 20), max_new_tokens=2, do_sample=False)


def test_the_amounts_of_an_error() -> None:
    with pytest.raises(ValueError, match=r"of_output=1\.0"):
        Error(of_output=1.0)
    with pytest.raises(ValueError, match="until a bound holds"):
        Budget(amount=Error(of_output=0.1)).keep(
            torch.zeros(1, 1, 1, 4), torch.ones(1, 1, 1, 4, dtype=torch.bool), kv_heads=1, layer=0
        )


def test_the_account_of_prompts_is_the_records() -> None:
    """The table, the share of attention, and the best that follows from both (Amdahl's law)."""
    package = Path(__file__).parents[1]
    record = package.parents[1] / "benchmarks" / "loki_prefill.jsonl"
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    text = " ".join((package / "docs" / "certificate.md").read_text().split())

    def pages(error: float, queries: int) -> float:
        asked = ("block", error, queries)
        shares = [
            line["pages_read"]
            for line in lines
            if (line["event"], line.get("error"), line.get("queries")) == asked
        ]
        assert len(shares) == 5
        return sum(shares) / len(shares)

    for queries in (1, 8, 32):
        row = f"| {queries} | {pages(0.1, queries):.2f} | {pages(0.01, queries):.2f} |"
        assert row in text
    [attention] = [line["attention_share"] for line in lines if line["event"] == "prompt"]
    best = {
        share: 1 / (1 - attention * (1 - share))
        for share in (pages(0.1, 32), pages(0.01, 32), 0.25)
    }
    large, small, quarter = best.values()
    assert f"Attention is {attention:.2f} of the time" in text
    assert f"{large:.1f} times as fast at an error of 0.1 and {small:.2f} at 0.01" in text
    assert f"found for nothing, would give {quarter:.1f})" in text
