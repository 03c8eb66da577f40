"""The public round: 15 scores, computed from facts, beside what was read off the logs by another program."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from fourfold_mlperf_hpc.decomposition import expected, factors
from fourfold_mlperf_hpc.logs import extract
from fourfold_mlperf_hpc.published import FACTS, read_round, submission_of, submissions

READ: dict[tuple[str, str, str], tuple[float, int, float, float, float, float, float]] = {
    ("Cori GPU 64", "cosmoflow", "closed"): (364.73, 0, 16.47, 16.52, 54.9, 6.427, 43.8),
    ("HAL V100 64", "cosmoflow", "closed"): (265.59, 0, 0, 0.24, 55.4, 4.769, 31.6),
    ("Frontera RTX 64", "cosmoflow", "closed"): (602.23, 0, 0, 0.37, 50.1, 11.838, 81.9),
    ("Piz Daint 128", "cosmoflow", "closed"): (461.01, 0, 0, 0.18, 70.1, 6.331, 36.2),
    ("Piz Daint 256", "cosmoflow", "closed"): (327.01, 1, 0, 0.41, 111.0, 2.821, 10.7),
    ("Fugaku 512", "cosmoflow", "closed"): (249.35, 1, 1.56, 2.17, 102.5, 2.397, 30.0),
    ("Fugaku 8,192", "cosmoflow", "closed"): (101.49, 0, 3.95, 4.69, 93.0, 1.039, 22.5),
    ("ABCI 512", "cosmoflow", "closed"): (34.42, 1, 0.90, 0.99, 99.7, 0.332, 1.4),
    ("Cori KNL 512", "cosmoflow", "closed"): (536.06, 0, 0, 1.82, 113.8, 4.673, 53.9),
    ("Cori KNL 1,024", "cosmoflow", "open"): (419.69, 0, 0, 1.74, 166.4, 2.550, 39.9),
    ("ABCI 2,048", "cosmoflow", "open"): (13.21, 0, 0.20, 0.33, 98.6, 0.127, 0.4),
    ("Fugaku 16,384", "cosmoflow", "open"): (30.07, 0, 0.86, 1.63, 157.9, 0.173, 7.1),
    ("Cori GPU 64", "deepcam", "closed"): (139.29, 0, 0, 0.0, 10.2, 14.10, 51.0),
    ("ABCI 1,024", "deepcam", "closed"): (11.71, 0, 2.24, 2.24, 24.0, 0.401, 0.5),
    ("ABCI 1,024", "deepcam", "open"): (10.49, 0, 1.95, 1.95, 23.6, 0.360, 0.1),
}
"""Score, misses, staging, before the first epoch, epochs, median epoch, evaluation; minutes, rounded."""


@pytest.mark.parametrize("named", READ, ids=str)
def test_the_round_is_recomputed_to_a_hundredth_of_a_minute(named: tuple[str, str, str]) -> None:
    submission = submission_of(*named)
    score, misses, staging, before, epochs, epoch, evaluation = READ[named]
    runs = submission.finished
    assert len(submission.runs) == (10 if submission.benchmark == "cosmoflow" else 5)
    assert submission.score_min == pytest.approx(score, abs=0.005 + 1e-9)
    assert submission.misses == misses
    assert submission.mean_min([run.staging_s for run in runs]) == pytest.approx(
        staging, abs=0.0051
    )
    assert submission.mean_min([run.before_s for run in runs]) == pytest.approx(before, abs=0.0051)
    assert statistics.fmean(run.epochs_begun for run in runs) == pytest.approx(epochs, abs=0.051)
    assert submission.mean_min([run.epoch_s for run in runs]) == pytest.approx(epoch, abs=0.0051)
    spent = submission.mean_min([run.evaluation_s for run in runs])
    assert spent == pytest.approx(evaluation, abs=0.051)


def test_there_are_135_runs_and_two_that_only_say_success() -> None:
    everything = [(s, run) for s in submissions() for run in s.runs]
    assert len(everything) == 135
    assert len(submissions()) == len(READ) == 15
    boasts = [
        (s.system, run.log)
        for s, run in everything
        if run.status == "success" and not run.attempt(s.target).is_reached
    ]
    assert boasts == [("ABCI 512", "result_9.txt"), ("Fugaku 512", "result_4.txt")]
    [unfinished] = [(s.system, run.log) for s, run in everything if not run.is_finished]
    assert unfinished == ("Piz Daint 256", "result_4.txt")
    # Open by its system's description and closed by its logs.
    told = {s.title for s, run in everything if run.division_in_log != s.division}
    assert told == {"ABCI 1,024 open"}


def test_parts_of_a_public_run_add_up_to_its_time() -> None:
    for submission in submissions():
        for run in submission.runs:
            attempt = run.attempt(submission.target)
            assert attempt.elapsed_s == pytest.approx(run.elapsed_s, rel=1e-12)
            assert min(attempt.seconds.values()) > -0.1, (submission.title, run.log)


@pytest.mark.parametrize(
    ("a", "b", "benchmark", "whole", "compute"),
    [
        ("Piz Daint 128", "Piz Daint 256", "cosmoflow", 1.41, 2.17),
        ("Fugaku 512", "Fugaku 8,192", "cosmoflow", 2.46, 2.62),
        ("ABCI 512", "ABCI 2,048", "cosmoflow", 2.61, 2.54),
        ("Cori GPU 64", "ABCI 1,024", "deepcam", 11.90, 24.7),
    ],
)
def test_public_pairs_close_to_the_ratio_of_scores(
    a: str, b: str, benchmark: str, whole: float, compute: float
) -> None:
    """Each submitter states the ratio of ABCI (2.61) and of Piz Daint (about 1.6 more epochs)."""
    first = submission_of(a, benchmark)
    second = submission_of(b, benchmark, "" if benchmark == "cosmoflow" else "closed")
    parts = factors(expected(first.counted), expected(second.counted))
    assert parts.whole == pytest.approx(first.score_min / second.score_min, rel=1e-12)
    assert parts.whole == pytest.approx(whole, abs=0.005)
    assert parts.compute == pytest.approx(compute, rel=0.005)


def test_an_unknown_system_is_answered_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match=r"no cosmoflow run of 'Summit'; there are .*Fugaku 512"):
        submission_of("Summit")


LINE = (
    ':::MLL{0} {{"time_ms": {1}, "key": "{2}", "value": {3}, "event_type": "X", "metadata": {4}}}'
)


def test_facts_are_extracted_from_logs_with_anything_between(tmp_path: Path) -> None:
    """A log written here: words before the token, a cut line, an epoch that never ends."""
    place = tmp_path / "Us" / "results" / "little" / "cosmoflow"
    place.mkdir(parents=True)
    system = {"number_of_nodes": "2", "accelerators_per_node": "0", "division": "closed",
              "accelerator_model_name": "", "host_processor_model_name": "abacus"}  # fmt: skip
    (tmp_path / "Us" / "systems").mkdir()
    (tmp_path / "Us" / "systems" / "little.json").write_text(json.dumps(system))
    events = [
        (0, "submission_division", '"closed"', "{}"), (0, "global_batch_size", 8, "{}"),
        (0, "train_samples", 64, "{}"), (1000, "run_start", "null", "{}"),
        (1100, "staging_start", "null", "{}"), (1400, "staging_stop", "null", "{}"),
        (2000, "epoch_start", "null", "{}"), (2500, "eval_start", "null", "{}"),
        (2900, "eval_stop", "null", "{}"), (3000, "eval_error", 0.123456789, "{}"),
        (3000, "epoch_stop", "null", "{}"), (3010, "epoch_start", "null", "{}"),
    ]  # fmt: skip
    lines = [LINE.format("OG", *event) for event in events]
    lines[3] = f"rank 0 says {lines[3]}"
    lines.insert(5, LINE.format("", 1200, "seed", 1, "{}")[:-9])
    (place / "result_0.txt").write_text("a banner\n" + "\n".join(lines))
    assert extract(tmp_path, tmp_path / "facts.jsonl") == 1
    [submission] = read_round(tmp_path / "facts.jsonl")
    [run] = submission.runs
    assert (submission.devices, submission.device) == (2, "abacus")
    assert (run.status, run.epochs_begun, run.samples) == ("unfinished", 2, 128)
    assert run.qualities == (0.1234568,)
    attempt = run.attempt(submission.target)
    assert not attempt.is_reached  # its last line comes before its stop
    assert attempt.seconds == pytest.approx(
        {"staging": 0.3, "compute": 0.6, "evaluation": 0.4, "checkpoint": 0, "rest": 0.71}
    )
    with pytest.raises(ValueError, match="holds no logs"):
        extract(tmp_path / "Us", tmp_path / "none.jsonl")


def test_the_facts_name_their_source_and_licence() -> None:
    first = json.loads(FACTS.read_text().partition("\n")[0])
    assert first["licence"] == "Apache-2.0"
    assert first["source"] == "https://github.com/mlcommons/hpc_results_v0.7"
    assert len(first["commit"]) == 40
    with pytest.raises(ValueError, match="holds no facts of logs"):
        read_round(Path(__file__))
