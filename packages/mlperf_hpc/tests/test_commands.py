"""What is typed, and what comes out: tables, pages, logs, and sentences for mistakes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fourfold_mlperf_hpc import commands
from fourfold_parallel.common.progress import silent
from fourfold_parallel.run.recipe import Run, Until
from fourfold_parallel.run.train import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("records")


@pytest.fixture
def places(folder: Path, small_run: Run) -> tuple[Path, Path]:
    """Two batches, three seeds each."""
    for batch in (4, 8):
        for seed in (3, 4, 5):
            place = folder / f"batch{batch}"
            run = replace(
                small_run, batch=batch, microbatch=batch, seed=seed, validate_every=5,
                horizon=Until(loss_nats=4.9, count=80),
            )  # fmt: skip
            record = place / f"seed{seed}.jsonl"
            if not record.exists():
                train(run, record=record, checkpoints=folder / f"{batch}-{seed}", progress=silent)
    return folder / "batch4", folder / "batch8"


def test_two_folders_are_taken_apart_into_a_table_and_a_page(
    places: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    commands.decompose(*places, out=out)
    told = capsys.readouterr().err
    for word in ("convergence", "compute", "overhead", "whole", "staging, s", "over seeds"):
        assert word in told
    page = out.read_text()
    assert "<svg" in page
    assert "batch4" in page
    with pytest.raises(ValueError, match="is compared with itself"):
        commands.decompose(places[0], places[0])
    with pytest.raises(ValueError, match="none of 3 attempts met the quality"):
        commands.decompose(*places, target_loss_nats=0.1, out=out)


def test_seeds_are_scored(places: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    commands.score(places[1])
    assert "the mean of 1 of 3" in capsys.readouterr().err


def test_a_record_becomes_a_log_and_a_table(
    places: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.mllog(places[1] / "seed3.jsonl", out=tmp_path / "x.mllog")
    assert '"key": "run_stop"' in (tmp_path / "x.mllog").read_text()
    assert "exposed communication" in capsys.readouterr().err


def test_a_record_s_run_gets_a_roofline(
    places: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.roofline(places[1] / "seed3.jsonl", steps=1, out=tmp_path / "r.html")
    assert "bound by" in capsys.readouterr().err
    assert "GFLOP/s" in (tmp_path / "r.html").read_text()


def test_public_systems_are_listed_and_taken_apart(capsys: pytest.CaptureFixture[str]) -> None:
    commands.published(benchmark="deepcam")
    assert "139.29" in capsys.readouterr().err
    commands.published(pair=("Fugaku 512", "Fugaku 8,192"))
    assert "2.457" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no cosmoflow run of 'Summit'"):
        commands.published(pair=("Fugaku 512", "Summit"))
