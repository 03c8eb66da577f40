"""Packages combined: the scripts as a person calls them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fourfold_parallel.reproduce.claims import read_ledger
from fourfold_parallel.reproduce.experiment import experiment_of, installed
from fourfold_parallel.reproduce.scale import Scale

ROOT = Path(__file__).resolve().parent.parent
MEMBERS = {path.parent.name for path in ROOT.glob("packages/*/pyproject.toml")}


def committed_scale(name: str) -> Scale:
    """The scale of the records that a package commits."""
    return read_ledger(ROOT / "packages" / name / "results" / "ledger.jsonl")[0].scale


def call(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=250, check=False
    )


def test_every_announced_experiment_is_a_package_with_stages_claims_and_figures() -> None:
    for name in installed():
        experiment = experiment_of(name)
        assert name == experiment.package
        assert name in MEMBERS
        names = [stage.name for stage in experiment.stages("smoke")]
        assert len(names) == len(set(names)) > 0
        identities = [claim.id for claim in experiment.claims]
        assert len(identities) == len(set(identities)) > 0
        assert experiment.drawings("smoke")


def test_a_wrong_package_name_is_refused_with_the_right_ones() -> None:
    called = call("scripts/reproduce.py", "--only", "goldfsh", "--scale", "smoke")
    assert called.returncode == 2
    assert "no package 'goldfsh' is installed" in called.stderr
    assert "goldfish" in called.stderr


@pytest.mark.parametrize("package", installed())
def test_the_papers_own_runs_are_commands_that_there_are(package: str, tmp_path: Path) -> None:
    """Each launch line names a subcommand and options that its package's parser takes."""
    for launch in experiment_of(package).launches():
        module, subcommand, *words = launch.command.removeprefix("-m ").split()
        called = call("-m", module, subcommand, "--help")
        assert called.returncode == 0, called.stderr
        options = {word for word in words if word.startswith("--")}
        assert options <= set(re.findall(r"--[a-z-]+", called.stdout)), launch.command


@pytest.mark.parametrize("form", ["--out {}", "--out={}"])
def test_results_go_where_one_asks(tmp_path: Path, form: str) -> None:
    """Both ways to write the option; the script's own folder is for those who name none."""
    words = form.format(tmp_path).split()
    called = call("scripts/reproduce.py", "--only", "goldfish", "--scale", "paper", *words)
    assert called.returncode == 0, called.stderr
    assert (tmp_path / "paper" / "goldfish" / "tinyllama-k4.sbatch").exists()


def test_no_packages_at_a_time_is_refused(tmp_path: Path) -> None:
    called = call("scripts/reproduce.py", "--scale", "smoke", "--jobs", "0", "--out", str(tmp_path))
    assert called.returncode == 2
    assert "--jobs 0 works on nothing" in called.stderr


def test_the_report_of_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    called = call("-m", "fourfold_parallel", "report", str(tmp_path))
    assert called.returncode == 2
    assert "holds no ledger" in called.stderr


def test_a_report_is_one_self_contained_page(tmp_path: Path) -> None:
    """From committed results: every claim and figure is in it, and nothing is fetched from elsewhere."""
    folder = tmp_path / "smoke"
    experiments = {name: experiment_of(name) for name in installed()}
    for name, experiment in experiments.items():
        target = folder / name
        target.mkdir(parents=True)
        for path in (ROOT / "packages" / name / "results").iterdir():
            (target / path.name).write_bytes(path.read_bytes())
        drawings = experiment.drawings(committed_scale(name))
        captions = {one.name: one.caption for one in drawings}
        (target / "figures.json").write_text(json.dumps(captions))
    called = call("-m", "fourfold_parallel", "report", str(folder))
    assert called.returncode == 0, called.stderr
    page = (folder / "report.html").read_text()
    for experiment in experiments.values():
        for claim in experiment.claims:
            assert f"<strong>{claim.id}</strong>" in page
    assert page.count("<figure ") == sum(
        len(one.drawings(committed_scale(name))) for name, one in experiments.items()
    )
    assert 'src="http' not in page
    assert "<link" not in page
