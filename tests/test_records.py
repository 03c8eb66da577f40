"""Committed records outlive the names of the code that wrote them."""

import ast
from collections import Counter
from pathlib import Path

import pytest

from fourfold_parallel.common.records import read_record
from fourfold_parallel.common.values import digest, from_json, to_json
from fourfold_parallel.reproduce.experiment import experiment_of, load

ROOT = Path(__file__).resolve().parent.parent
RECORDS = sorted(
    path for path in ROOT.glob("packages/*/results/*.jsonl") if path.name != "ledger.jsonl"
)
OF_OTHER_DATA = {"gemstones/published"}
"""Stages whose run holds the digest of files that are not here."""


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_every_committed_record_rebuilds_its_run(path: Path) -> None:
    """Whatever has moved or was renamed since; and what is rebuilt survives being written again."""
    run = read_record(path).run
    assert digest(from_json(to_json(run))) == digest(run)


@pytest.mark.parametrize("package", sorted({path.parts[-3] for path in RECORDS}))
def test_committed_records_are_of_todays_stages(package: str) -> None:
    """`--resume` beside the committed records runs nothing: their runs equal today's recipes'."""
    experiment = experiment_of(package)
    stages = {stage.name for stage in experiment.stages("laptop")}
    done = load(experiment, "laptop", ROOT / "packages" / package / "results")
    assert {
        name for name in stages - set(done) if f"{package}/{name}" not in OF_OTHER_DATA
    } == set()


@pytest.mark.parametrize("package", sorted(path.name for path in ROOT.glob("packages/*")))
def test_no_two_dataclasses_of_a_package_share_a_name(package: str) -> None:
    """A tag is `package/Name`, so that a class may move between modules."""
    names = Counter(
        node.name
        for path in ROOT.glob(f"packages/{package}/src/**/*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef)
        and any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)
    )
    assert [name for name, count in names.items() if count > 1] == []
