"""The page, the commands, and what an outsider gets wrong."""

from __future__ import annotations

import html
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fourfold_gemstones import commands, page
from fourfold_gemstones.__main__ import main
from fourfold_gemstones.architecture import GEMSTONES
from fourfold_gemstones.laws import CHINCHILLA, WIDTH_DEPTH, Variable
from fourfold_gemstones.page import Analysis, NoShape, Prescription
from fourfold_gemstones.parametric import ParametricLaw
from fourfold_gemstones.questions.allocation import Compute, Free, Lattice, Planner
from fourfold_gemstones.questions.simulate import SAMPLE, sample
from fourfold_gemstones.runs import RunTable


def analysed(table: RunTable, variables: tuple[Variable, ...]) -> Analysis:
    return page.analyse(
        table,
        ParametricLaw(variables=variables, delta=1e-3),
        1e21,
        architecture=GEMSTONES,
        lattice=Lattice(),
        draws=40,
        generator=np.random.default_rng(0),
    )


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr("sys.argv", ["fourfold-gemstones", *words])
    main()


def test_a_page_holds_the_numbers_of_its_analysis(suite: RunTable) -> None:
    analysis = analysed(suite, CHINCHILLA)
    assert isinstance(analysis.prescription, Prescription)
    text = page.page(analysis)
    assert f"{analysis.prescription.band.best.parameters:.3g}" in text
    assert f"a = {analysis.fit.estimate.slope:.3f}" in text
    assert "24 of 24" in text
    assert text.count("<svg") == 2
    assert "src=" not in text
    assert "<link" not in text
    assert text == page.page(analysis)


def test_a_law_without_shape_prints_none(suite: RunTable) -> None:
    analysis = analysed(suite, CHINCHILLA)
    text = page.page(analysis)
    assert "width / depth" not in text
    assert "What to run next" in text
    assert 'data-name="width"' not in text
    assert "width/depth" not in " ".join(page.said(analysis))
    assert isinstance(analysis.prescription, Prescription)
    assert not analysis.prescription.near


def test_a_table_without_widths_is_counted_by_size_alone(suite: RunTable) -> None:
    columns = {name: suite.columns[name] for name in ("parameters", "tokens", "loss_nats")}
    text = page.page(analysed(RunTable.from_columns({"run": suite.run, **columns}), CHINCHILLA))
    assert "FLOPs are counted as 6 N T" in text
    assert "What to run next" not in text
    assert "at a width of 40 times the depth" in page.page(analysed(suite, CHINCHILLA))


def test_shape_that_plays_no_part_is_not_identified(suite: RunTable) -> None:
    """Losses of a law in N and T, to which a law in width and depth fits as well."""
    analysis = analysed(suite, WIDTH_DEPTH)
    assert analysis.fit.score(suite) > 0.99
    assert isinstance(analysis.prescription, NoShape)
    said = " ".join(page.said(analysis))
    assert "shape is not identified by this table" in said
    assert "parameters (" not in said
    text = page.page(analysis)
    assert "shape is not identified by this table" in html.unescape(text)
    assert "Shapes that can be built" not in text
    assert "width / depth" not in text


def test_shape_that_plays_its_part_is_prescribed() -> None:
    """The sample follows a law in width and depth; the interval holds its own optimum."""
    analysis = analysed(sample(), WIDTH_DEPTH)
    assert isinstance(analysis.prescription, Prescription)
    band = analysis.prescription.band
    plan = Planner(architecture=GEMSTONES, cost=Compute(), shapes=Free())
    assert band.aspect.contains(plan.allocate(SAMPLE, 1e21).aspect)
    assert f"width/depth {band.best.aspect:.3g}" in " ".join(page.said(analysis))
    text = page.page(analysis)
    assert f'<td data-name="width">{analysis.prescription.near[0].width:.0f}</td>' in text


def test_the_command_fits_the_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    call(monkeypatch, "sample")
    call(
        monkeypatch,
        "fit",
        "runs.csv",
        "--budget",
        "1e21",
        "--draws",
        "30",
        "--report",
        "a/out.html",
    )
    assert (tmp_path / "a" / "out.html").read_text().startswith("<!doctype html>")
    said = capsys.readouterr()
    assert said.out == "runs.csv\n"
    assert "descents agree; R²" in said.err
    assert "for 1e+21 FLOPs" in said.err


def test_what_is_weak_about_a_table_is_said(suite: RunTable) -> None:
    """Warnings of reading and of fitting are on the page."""
    few = suite.where(np.isin(suite.run, sorted(set(suite.run))[:6]))
    analysis = analysed(replace(few, source="few <runs>"), CHINCHILLA)
    assert any("6 groups" in text for text in analysis.warnings)
    assert "few &lt;runs&gt; has 6 groups" in page.page(analysis)


def test_the_command_names_what_is_wrong(
    suite: RunTable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    suite.where(suite.column("width") == 256).write("runs.csv")
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, "fit", "runs.csv", "--law", "width-depth", "--budget", "1e21")
    assert stopped.value.code == 2
    assert "width is 256 in all 24 rows" in " ".join(capsys.readouterr().err.split())


def test_a_page_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    """The table does not exist either, and is not what is complained of."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a folder; name the file"):
        commands.fit(tmp_path / "absent.csv", budget=1e21, report=tmp_path)
    with pytest.raises(ValueError, match="cannot make the folder"):
        commands.fit(tmp_path / "absent.csv", budget=1e21, report=tmp_path / "file" / "out.html")
    with pytest.raises(ValueError, match="no file"):
        commands.fit(tmp_path / "absent.csv", budget=1e21, report=tmp_path / "out.html")
    page.ready(os.fspath(tmp_path / "out.html"))


def test_a_law_that_prescribes_nothing_is_refused_with_the_way_out(tmp_path: Path) -> None:
    table = tmp_path / "runs.csv"
    sample().write(table)
    with pytest.raises(ValueError, match="--law skaling prescribes no size; ask `identify`"):
        commands.fit(table, budget=1e21, law="skaling", report=tmp_path / "page.html")


def test_only_the_page_needs_matplotlib(tmp_path: Path) -> None:
    """Without it `fit` says its numbers, and then the line that installs what the page needs."""
    script = (
        "import sys; sys.modules['matplotlib'] = None; "
        "from fourfold_gemstones.__main__ import main; main()"
    )

    def called(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", script, *words],
            capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False,
        )  # fmt: skip

    assert called("sample").returncode == 0
    refused = called("fit", "runs.csv", "--budget", "1e21", "--draws", "20")
    assert refused.returncode == 2
    assert "for 1e+21 FLOPs" in refused.stderr
    assert not (tmp_path / "scaling-law.html").exists()
    assert "this needs matplotlib" in refused.stderr
    assert "pip install 'matplotlib" in refused.stderr
