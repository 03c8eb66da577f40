"""The page, the command line, and what an outsider gets wrong."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from fourfold_gemstones import __main__ as command
from fourfold_gemstones import report
from fourfold_gemstones.allocation import Lattice
from fourfold_gemstones.architecture import GEMSTONES
from fourfold_gemstones.laws import CHINCHILLA
from fourfold_gemstones.parametric import ParametricLaw
from fourfold_gemstones.runs import RunTable


def write(table: RunTable, path: Path) -> Path:
    names = ("width", "depth", "parameters", "tokens", "loss_nats")
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("run", *names))
        writer.writerows(zip(table.run, *(table.column(name) for name in names), strict=True))
    return path


def test_a_page_holds_the_numbers_of_its_analysis(suite: RunTable) -> None:
    analysis = report.analyse(
        suite,
        ParametricLaw(variables=CHINCHILLA, delta=1e-3),
        1e21,
        architecture=GEMSTONES,
        lattice=Lattice(),
        draws=40,
        generator=np.random.default_rng(0),
    )
    text = report.page(analysis)
    assert f"{analysis.band.best.parameters:.3g}" in text
    assert f"a = {analysis.fit.estimate.slope:.3f}" in text
    assert "24 of 24" in text
    assert text.count("<svg") == 2
    assert "src=" not in text
    assert "<link" not in text
    assert text == report.page(analysis)


def test_the_command_fits_a_file(
    suite: RunTable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(suite, tmp_path / "runs.csv")
    page = tmp_path / "out.html"
    command.fit([str(path), "--budget", "1e21", "--draws", "30", "--report", str(page)])
    assert page.read_text().startswith("<!doctype html>")
    said = capsys.readouterr().err
    assert "24 of 24 descents agree" in said
    assert "for 1e+21 FLOPs" in said


def test_the_command_names_what_is_wrong(
    suite: RunTable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(suite.where(suite.column("width") == 256), tmp_path / "runs.csv")
    with pytest.raises(SystemExit) as stopped:
        command.fit([str(path), "--law", "width-depth", "--budget", "1e21"])
    assert stopped.value.code == 2
    assert "width is 256 in all 24 rows" in " ".join(capsys.readouterr().err.split())
