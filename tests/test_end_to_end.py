"""Packages combined: the scripts as a person calls them."""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest

from fourfold_parallel.common.records import read_record
from fourfold_parallel.reproduce import figures, terminal
from fourfold_parallel.reproduce.claims import read_ledger, write_ledger
from fourfold_parallel.reproduce.experiment import committed_results, experiment_of, installed
from fourfold_parallel.reproduce.report import ORDER, Results, compare, first_commands, write
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


@pytest.fixture
def smoke(tmp_path: Path) -> Path:
    """A folder as a run leaves it, made of committed results: one claim decided otherwise, one not run."""
    folder = tmp_path / "smoke"
    for name in installed():
        if committed(name):
            shutil.copytree(ROOT / "packages" / name / "results", folder / name)
    ledger = folder / "goldfish" / "ledger.jsonl"
    rows = {row.id: row for row in read_ledger(ledger)}
    rows["G1"] = replace(rows["G1"], verdict="inconclusive")
    rows["G2"] = replace(
        rows["G2"], verdict="not tested", ours="", record="", because="needs: more"
    )
    write_ledger(ledger, tuple(rows.values()))
    return folder


def committed(name: str) -> bool:
    return (committed_results(name) / "ledger.jsonl").exists()


def test_a_report_is_one_self_contained_page(smoke: Path) -> None:
    """Every claim and figure is in it, and nothing is fetched from elsewhere."""
    called = call("-m", "fourfold_parallel", "report", str(smoke))
    assert called.returncode == 0, called.stderr
    page = (smoke / "report.html").read_text()
    for name in filter(committed, installed()):
        experiment = experiment_of(name)
        for claim in experiment.claims:
            assert f"<strong>{claim.id}</strong>" in page
        assert experiment.headline(
            Results(smoke / name, package=name, name="x").records
        ) in unescape(page)
        assert f'id="card-committed-{name}-{experiment.picture}' in page
    assert page.count("<figure ") == 2 * len([*smoke.glob("*/*.svg")])
    anchors = Counter(re.findall(r'id="([^"]+)"', page))
    assert {name for name, count in anchors.items() if count > 1} == set()
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(anchors)
    assert not re.search(r'(src|href)="https?:', page)
    assert "<link" not in page


def test_a_report_shows_the_committed_finding_beside_this_runs(smoke: Path) -> None:
    """Also of what was not run; where the two differ it says so, and contradictions come first."""
    entries = {entry.claim.id: entry for entry in compare("goldfish", smoke / "goldfish")}
    assert next(iter(entries)) == "G1"
    assert entries["G1"].differs
    assert not entries["G2"].differs
    assert entries["G2"].finding.verdict == "reproduced"
    verdicts = [entry.finding.verdict for entry in entries.values()][1:]
    assert verdicts == sorted(verdicts, key=ORDER.index)
    page = write(smoke, scale="smoke").read_text()
    [row] = re.findall(r'<tr id="goldfish-G2".*?</tr>', page, re.DOTALL)
    record = read_record(committed_results("goldfish") / "k4-seed0.jsonl")
    assert str(record.events[0].values["commit"])[:7] in row
    assert "#committed-goldfish-k4-seed0-jsonl-244" in row
    assert "#run-goldfish" not in row


def test_the_end_of_a_run_is_a_line_a_package(smoke: Path) -> None:
    line = terminal.compared("goldfish", compare("goldfish", smoke / "goldfish")).plain
    assert line == (
        "goldfish        23 of 26 claims: 3 contradicted 19 reproduced 1 inconclusive  not as committed: G1"
    )
    same = terminal.compared("loki", compare("loki", smoke / "loki")).plain
    assert same.startswith("loki            26 of 28 claims: ")
    assert same.endswith("  all as committed")


def test_a_report_of_a_package_that_is_installed_alone_shows_its_run(smoke: Path) -> None:
    page = write(smoke, scale="smoke", committed=lambda _: smoke / "nowhere").read_text()
    assert "committed-goldfish" not in page
    assert "#run-goldfish-plain-seed0-jsonl-244" in page
    assert page.count("<figure ") == len([*smoke.glob("*/*.svg")])
    assert "python -m fourfold_goldfish --help" in page


@pytest.mark.parametrize("name", [name for name in installed() if committed(name)])
def test_committed_figures_are_drawn_from_the_committed_records(name: str) -> None:
    """Captions and all; no label of an axis touches another."""
    experiment, folder = experiment_of(name), committed_results(name)
    drawings = experiment.drawings(committed_scale(name))
    captions = json.loads((folder / "figures.json").read_text())
    assert captions == {drawing.name: drawing.caption for drawing in drawings}
    records = Results(folder, package=name, name="x").records
    for drawing in drawings:
        with figures.style():
            figure = drawing.draw(records)
            assert figures.svg(figure) == (folder / f"{drawing.name}.svg").read_text(), drawing.name
            assert figures.touching(figure) == [], drawing.name


@pytest.mark.parametrize("name", [name for name in installed() if committed(name)])
def test_a_readme_begins_with_commands_that_there_are(name: str) -> None:
    """What the report shows to begin with."""
    readme = ROOT / "packages" / name / "README.md"
    commands = first_commands(readme.read_text()).splitlines()
    mine = [
        line.replace(f"fourfold {name}", f"python -m fourfold_{name}").split()
        for line in commands
        if line.startswith(("python -m fourfold_", f"fourfold {name} "))
    ]
    assert mine or not commands
    for _, dash_m, module, subcommand, *words in mine:
        called = call(dash_m, module, subcommand, "--help")
        if words and f"{{{words[0]}," in called.stdout.replace("\n", ""):  # a command of a command
            called = call(dash_m, module, subcommand, words[0], "--help")
        options = {word for word in words if word.startswith("--")}
        assert options <= set(re.findall(r"--[a-z-]+", called.stdout)), subcommand
