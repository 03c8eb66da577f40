"""A training's log of its time to quality passes MLCommons' checker, and no spoilt one passes ours."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fourfold_mlperf_hpc.mllog import RULES, Submitter, lines
from fourfold_mlperf_hpc.reproduce.recipes import TimeToQuality
from fourfold_mlperf_hpc.trainings import attempt_of, attempts_in
from fourfold_parallel.common.progress import silent
from fourfold_parallel.common.records import Record, read_record
from fourfold_parallel.run.recipe import Run, Until
from fourfold_parallel.run.train import train

QUALITY = 4.5
"""Nats that the small run has after some ten steps."""


def recorded(run: Run, folder: Path, **how: Any) -> Record:
    train(run, record=folder / "r.jsonl", checkpoints=folder / "c", **{"progress": silent, **how})
    return read_record(folder / "r.jsonl")


def to_quality(run: Run) -> Run:
    """Until a validation that is good enough."""
    return replace(run, horizon=Until(loss_nats=QUALITY, count=60), validate_every=5)


def passes(text: str, folder: Path, *options: str) -> bool:
    """What the checker says, in a process of its own: it keeps what it has still to check in a global."""
    (folder / "run.mllog").write_text(text)
    checked = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "mlperf_logging.compliance_checker", *options,
         "--log_output", str(folder / "said.log"), str(folder / "run.mllog")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return checked.returncode == 0


def interrupt_at(step: int) -> Callable[[int, int, str], None]:
    def tell(done: int, total: int, note: str) -> None:
        if done == step:
            raise KeyboardInterrupt

    return tell


def test_a_run_to_quality_passes_their_checker_and_ours(tmp_path: Path, small_run: Run) -> None:
    """With a restart in it; under the stock HPC rules too, as one of their benchmarks."""
    run = to_quality(small_run)
    with pytest.raises(KeyboardInterrupt):
        recorded(run, tmp_path, progress=interrupt_at(5))
    record = recorded(run, tmp_path)
    last = record.last("validation")
    assert last.number("validation_loss_nats") <= QUALITY
    assert record.last("step").number("step") == last.number("step") < 60
    assert record.last("reached").number("step") == last.number("step")
    text = lines(record)
    assert '"key": "restart"' in text
    assert passes(text, tmp_path, "--config", str(RULES))
    hpc = lines(record, by=Submitter(benchmark="cosmoflow"))
    told = [json.loads(line.removeprefix(":::MLLOG ")) for line in hpc.splitlines()]
    [stop] = [line for line in told if line["key"] == "run_stop"]
    [start] = [line for line in told if line["key"] == "run_start"]
    assert stop["time_ms"] == last.number("at_ms")
    assert start["time_ms"] < stop["time_ms"]
    # Their target is an error of 0.124, ours a loss of nats: all but that holds.
    assert not passes(hpc, tmp_path, "--usage", "hpc", "--ruleset", "3.0.0")
    nats = str(last.number("validation_loss_nats"))
    assert passes(hpc.replace(nats, "0.1"), tmp_path, "--usage", "hpc", "--ruleset", "3.0.0")
    # A run that has reached its quality is over.
    again = recorded(run, tmp_path)
    assert len(again.of("step")) == len(record.of("step"))


def test_a_run_of_steps_names_no_quality(tmp_path: Path, small_run: Run) -> None:
    record = recorded(small_run, tmp_path)
    with pytest.raises(ValueError, match="names no quality to be timed to; name one"):
        lines(record)
    assert passes(lines(record, target_loss_nats=9.0), tmp_path, "--config", str(RULES))
    missed = lines(record, target_loss_nats=0.1)
    assert '"status": "aborted"' in missed
    assert not passes(missed, tmp_path, "--config", str(RULES))


def swap(text: str, one: str, other: str) -> str:
    rows = text.splitlines()
    a = next(i for i, row in enumerate(rows) if f'"{one}"' in row)
    b = next(i for i, row in enumerate(rows) if f'"{other}"' in row)
    rows[a], rows[b] = rows[b], rows[a]
    return "\n".join(rows)


def without(text: str, key: str) -> str:
    return "\n".join(row for row in text.splitlines() if f'"key": "{key}"' not in row)


def changed(
    text: str, key: str, *, which: Callable[[Iterable[int]], int] = max, **values: Any
) -> str:
    """The last (or first) line of a key with other values."""
    rows = text.splitlines()
    index = which(i for i, row in enumerate(rows) if f'"key": "{key}"' in row)
    line = json.loads(rows[index].removeprefix(":::MLLOG "))
    metadata = {**line["metadata"], **values.pop("metadata", {})}
    rows[index] = ":::MLLOG " + json.dumps({**line, **values, "metadata": metadata})
    return "\n".join(rows)


def graded(text: str, value: float) -> str:
    """The last evaluation with another result, under both of its names."""
    return changed(changed(text, "eval_accuracy", value=value), "eval_error", value=value)


def twice(text: str, key: str, **values: Any) -> str:
    """The last line of a key once more, behind itself, with other values."""
    rows = text.splitlines()
    index = max(i for i, row in enumerate(rows) if f'"key": "{key}"' in row)
    again = changed(text, key, **values).splitlines()[index]
    return "\n".join([*rows[: index + 1], again, *rows[index + 1 :]])


SPOILT: dict[str, Callable[[str], str]] = {
    "aborted": lambda text: changed(text, "run_stop", metadata={"status": "aborted"}),
    "no status": lambda text: changed(text, "run_stop", metadata={"status": ""}),
    "quality not a number": lambda text: graded(text, float("nan")),
    "an earlier quality not a number": lambda text: changed(
        text, "eval_accuracy", which=min, value=float("nan")
    ),
    "error not a number": lambda text: changed(text, "eval_error", value=float("nan")),
    "quality infinite": lambda text: graded(text, float("-inf")),
    "quality of two minds": lambda text: changed(text, "eval_error", value=0.1),
    "quality missed": lambda text: graded(text, 9.9),
    "target finer than reached": lambda text: changed(text, "quality_target", value=0.5),
    "two targets": lambda text: twice(text, "quality_target", value=1.0),
    "stopped before its evaluation": lambda text: swap(text, "run_stop", "eval_start"),
    "started twice": lambda text: twice(text, "run_start"),
    "stopped twice": lambda text: twice(text, "run_stop"),
    "started before staging": lambda text: swap(text, "run_start", "staging_start"),
    "evaluation ends before it begins": lambda text: swap(text, "eval_start", "eval_stop"),
    "block ends before it begins": lambda text: swap(text, "block_start", "block_stop"),
    "time runs back at the end": lambda text: changed(text, "run_stop", time_ms=1),
    "time runs back in a block": lambda text: changed(text, "block_stop", time_ms=1),
    "time runs back in a fact": lambda text: changed(text, "train_samples", time_ms=1),
    "samples do not add up": lambda text: changed(text, "eval_accuracy", metadata={"samples_count": 7}),
    "block of no samples": lambda text: changed(text, "block_start", metadata={"samples_count": 0}),
    "block of other samples": lambda text: changed(text, "block_stop", metadata={"samples_count": 1}),
    "no training samples": lambda text: changed(text, "train_samples", value=0),
    "cut": lambda text: text[:-40],
    **{
        f"without {key}": (lambda text, key=key: without(text, key))
        for key in (
            "run_start", "run_stop", "eval_accuracy", "eval_start", "block_start", "train_samples",
            "quality_target", "seed", "submission_benchmark", "staging_start",
        )
    },
}  # fmt: skip
STOCK_LETS_THROUGH = {
    "an earlier quality not a number",
    "aborted",
    "block ends before it begins",
    "block of no samples",
    "block of other samples",
    "evaluation ends before it begins",
    "no status",
    "no training samples",
    "quality of two minds",
    "samples do not add up",
    "started twice",
    "stopped before its evaluation",
    "stopped twice",
    "target finer than reached",
    "time runs back at the end",
    "time runs back in a block",
    "time runs back in a fact",
    "two targets",
    "without eval_accuracy",
    "without eval_start",
    "without quality_target",
    "without seed",
}
"""Spoilt logs that the stock rules (hpc 3.0.0) accept of a run of a benchmark that they know."""


def is_sound(text: str, folder: Path, *, rules: str | None) -> bool:
    """What the checker says, called as a library: in processes of their own each would take a second."""
    from mlperf_logging.compliance_checker import mlp_compliance

    (folder / "spoilt.mllog").write_text(text)
    mlp_compliance.enqueued_configs.clear()
    usage = ("training", "6.1.0") if rules else ("hpc", "3.0.0")
    checker = mlp_compliance.make_checker(*usage, quiet=True, werror=bool(rules))
    config = rules or "hpc_3.0.0/common.yaml"
    return mlp_compliance.main(str(folder / "spoilt.mllog"), config, checker)[0]


def test_no_spoilt_log_passes_our_rules(tmp_path: Path, small_run: Run) -> None:
    sound = lines(recorded(to_quality(small_run), tmp_path))
    assert len(SPOILT) >= 25
    assert is_sound(sound, tmp_path, rules=str(RULES))
    passed = [
        name for name, spoil in SPOILT.items() if is_sound(spoil(sound), tmp_path, rules=str(RULES))
    ]
    assert passed == []


def test_the_stock_rules_let_some_of_them_through(tmp_path: Path, small_run: Run) -> None:
    """Of a run of a benchmark that they know, at an error that they ask for: what our rules are for."""
    run = to_quality(small_run)
    record = recorded(run, tmp_path)
    nats = str(record.last("validation").number("validation_loss_nats"))
    known = lines(record, by=Submitter(benchmark="cosmoflow")).replace(nats, "0.1")
    assert is_sound(known, tmp_path, rules=None)
    passed = {
        name for name, spoil in SPOILT.items() if is_sound(spoil(known), tmp_path, rules=None)
    }
    assert passed == STOCK_LETS_THROUGH


def test_a_run_that_was_interrupted_needs_as_many_samples(tmp_path: Path, small_run: Run) -> None:
    """Bit for bit: the same validations, the same samples to quality; the time lost is in the rest."""
    run = to_quality(small_run)
    (tmp_path / "once").mkdir()
    (tmp_path / "again").mkdir()
    once = recorded(run, tmp_path / "once")
    with pytest.raises(KeyboardInterrupt):
        recorded(run, tmp_path / "again", progress=interrupt_at(5))
    again = recorded(run, tmp_path / "again")
    plain, resumed = attempt_of(once), attempt_of(again)
    assert plain.is_reached
    assert resumed.samples == plain.samples
    assert [event.number("validation_loss_nats") for event in again.of("validation")] == [
        event.number("validation_loss_nats") for event in once.of("validation")
    ]
    keys = [json.loads(line.removeprefix(":::MLLOG "))["key"] for line in lines(again).splitlines()]
    assert [keys.count(key) for key in ("run_start", "run_stop", "restart")] == [1, 1, 1]
    assert len(again.of("staged")) == 2


def test_an_easier_target_ends_the_time_earlier(tmp_path: Path, small_run: Run) -> None:
    record = recorded(to_quality(small_run), tmp_path)
    first = record.of("validation")[0]
    loss = first.number("validation_loss_nats")
    easy = attempt_of(record, target_loss_nats=loss)
    assert easy.samples == first.number("step") * 8 < attempt_of(record).samples
    assert easy.elapsed_s < attempt_of(record).elapsed_s
    missed = attempt_of(record, target_loss_nats=0.1)
    assert not missed.is_reached
    assert missed.samples == record.last("step").number("step") * 8


def test_seeds_of_one_configuration_lie_in_a_folder(tmp_path: Path, small_run: Run) -> None:
    run = to_quality(small_run)
    for seed in (3, 4):
        recorded(replace(run, seed=seed), tmp_path / str(seed))
        (tmp_path / f"{seed}.jsonl").write_text((tmp_path / str(seed) / "r.jsonl").read_text())
    assert len(attempts_in(tmp_path)) == 2
    (tmp_path / "5.jsonl").write_text((tmp_path / "4.jsonl").read_text())
    with pytest.raises(ValueError, match=r"repeats seed 4 of .*; a seed counts once"):
        attempts_in(tmp_path)
    recorded(replace(run, batch=4, microbatch=4), tmp_path / "other")
    (tmp_path / "5.jsonl").write_text((tmp_path / "other" / "r.jsonl").read_text())
    with pytest.raises(ValueError, match="of another batch, model or engine"):
        attempts_in(tmp_path)
    with pytest.raises(ValueError, match="holds no record"):
        attempts_in(tmp_path / "other" / "c")


def test_a_study_s_record_is_read_through_to_its_run(tmp_path: Path, small_run: Run) -> None:
    """Other packages record a run together with what they ask of it."""
    run = to_quality(small_run)
    study = TimeToQuality(run=run, seeds=(3,), targets_nats=(QUALITY,), ranks=1)
    record = recorded(run, tmp_path, study=study)
    assert attempt_of(record).samples == record.last("reached").number("step") * run.batch
    assert passes(lines(record), tmp_path, "--config", str(RULES))
