"""What the recipes promise: fair budgets, text that no calibration saw, records that rebuild their run."""

import json
from pathlib import Path
from typing import Any

import pytest

from fourfold_loki.budget import Count
from fourfold_loki.reproduce import recipes
from fourfold_loki.reproduce.experiment import EXPERIMENT
from fourfold_loki.reproduce.recipes import Perplexity
from fourfold_loki.reproduce.text import windows_of
from fourfold_parallel.common.values import from_json, to_json
from fourfold_parallel.reproduce.claims import judge, write_ledger
from fourfold_parallel.reproduce.experiment import load
from fourfold_parallel.run.corpora import Wikipedia
from fourfold_parallel.run.models import SmolLM2


@pytest.mark.parametrize("scale", ["smoke", "laptop"])
def test_a_record_rebuilds_its_run(scale: str) -> None:
    for stage in EXPERIMENT.stages(scale):  # type: ignore[arg-type]
        assert from_json(to_json(stage.run)) == stage.run


def test_every_selector_gets_the_same_number_of_keys() -> None:
    """A quarter of the window, for 8,192 scored tokens."""
    run = recipes.perplexity("laptop")
    assert run.scored == 8192
    kinds = {type(arm.ranking).__name__ for arm in run.arms}
    assert kinds == {
        "ByBasis", "ByLabelChannels", "Exact", "SparQ", "Quest", "H2O", "Streaming", "Random",
    }  # fmt: skip
    assert {arm.budget.amount for arm in run.arms} == {Count(keys=run.context // 4)}
    assert not any(arm.budget.sinks or arm.budget.window for arm in run.arms)


def test_nothing_scored_was_calibrated_on() -> None:
    """No window of a stage holds a token that a calibration saw."""
    corpus, fitted = Wikipedia(), recipes.calibration("laptop")
    seen = windows_of(
        corpus, SmolLM2(), count=fitted.tokens // fitted.context, context=fitted.context
    ).flatten()
    # Documents differ: 24 equal tokens in a row would be the same place.
    places = {tuple(seen[i : i + 24].tolist()) for i in range(len(seen) - 23)}
    runs = [stage.run for stage in EXPERIMENT.stages("laptop")]
    scored = [run for run in runs if isinstance(run, Perplexity)]
    assert len(scored) == 6
    for run in scored:
        assert run.corpus == corpus
        if run.model != SmolLM2():
            assert run.skip_tokens >= 2 * fitted.tokens, "the same texts, in other words"
            continue
        ids = windows_of(
            corpus, run.model, skip_tokens=run.skip_tokens, count=run.windows, context=run.context
        ).flatten()
        assert not any(
            tuple(ids[i : i + 24].tolist()) in places for i in range(0, len(ids) - 23, 24)
        )


def test_a_scale_that_is_not_there_is_refused() -> None:
    assert EXPERIMENT.stages("paper") == ()
    with pytest.raises(ValueError, match="use smoke or laptop"):
        recipes.calibration("paper")


def test_the_committed_ledger_is_what_the_claims_say_of_the_committed_records(
    tmp_path: Path,
) -> None:
    """To the byte."""
    results = Path(__file__).parents[1] / "results"
    records = load(EXPERIMENT, "laptop", results)
    assert set(records) == {stage.name for stage in EXPERIMENT.stages("laptop")}
    rows = judge(EXPERIMENT.claims, records, package="loki", scale="laptop")
    write_ledger(tmp_path / "ledger.jsonl", rows)
    assert (tmp_path / "ledger.jsonl").read_bytes() == (results / "ledger.jsonl").read_bytes()


def test_the_readmes_speeds_are_those_of_the_benchmarks_record() -> None:
    """The table row by row, and the ranges in the text below it."""
    package = Path(__file__).parents[1]
    record = package.parents[1] / "benchmarks" / "loki_decode.jsonl"
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    every = [line for line in lines if line["event"] == "loki_decode"]
    timed = [line for line in every if line["threads"] == 1]
    speeds: dict[tuple[str, str], dict[tuple[int, str], str]] = {}
    for line in timed:
        row = speeds.setdefault((line["shape"], line["dtype"]), {})
        row[line["tokens"], line["instructions"]] = f"{line['over_best_dense']:.2f}"
    text = (package / "README.md").read_text()
    for (shape, dtype), row in speeds.items():
        cells = [
            " / ".join(row[tokens, name] for name in ("native", "x86-64-v3"))
            for tokens in (4096, 8192, 16384, 32768)
            if (tokens, "native") in row
        ]
        assert f"| {shape} | {dtype} | {' | '.join(cells)} |" in text

    def extremes(key: str, digits: int, among: list[dict[str, Any]]) -> str:
        values = [line[key] for line in among]
        return " to ".join(f"{value:.{digits}g}" for value in (min(values), max(values)))

    flowing = " ".join(text.split())
    assert f"Over transformers' own sdpa it is {extremes('over_sdpa', 2, timed)} times" in flowing
    assert (
        f"torch's operations are {extremes('by_torch_over_best_dense', 2, timed)} times" in flowing
    )
    two = [line for line in every if line["threads"] == 2 and line["tokens"] >= 8192]
    assert f"On two threads it is {extremes('over_best_dense', 3, two)} times" in flowing
    for end in lines:
        if end["event"] == "loki_end_to_end":
            assert f"{end['over_dense']:.2g} times as fast as with a DynamicCache" in flowing
            assert f"{end['over_static_cache']:.2g} as with a StaticCache" in flowing
            assert f"to {100 * abs(1 - end['read_over_predicted']):.1g} %" in flowing


@pytest.mark.slow
def test_the_published_basis_fails_and_the_balanced_one_does_not() -> None:
    """The finding itself, on the real model: 12 windows of 2,048 tokens, minutes on one core."""
    from dataclasses import replace

    import torch

    from fourfold_loki.evaluate.perplexity import score
    from fourfold_loki.reproduce.experiment import built, modes_of

    run = recipes.long_context("laptop")
    arms = [arm for arm in run.arms if arm.name in {"loki-pca", "loki-balanced-shared"}]
    run = replace(run, arms=tuple(arms), windows=12)
    model = built(SmolLM2())
    ids = windows_of(
        run.corpus, run.model, skip_tokens=run.skip_tokens, count=run.windows, context=run.context
    )
    scored = list(score(model, ids, modes_of(run.arms, model), prompt=run.prompt))
    nats = {
        name: torch.cat([window.nats for window in scored if window.arm == name]).mean()
        for name in ("full", "loki-pca", "loki-balanced-shared")
    }
    assert float((nats["loki-pca"] - nats["full"]).exp()) > 1.2
    assert float((nats["loki-balanced-shared"] - nats["full"]).exp()) < 1.015
