"""Committed records outlive the names of the code that wrote them."""

import ast
from collections import Counter
from pathlib import Path

import pytest

from fourfold_parallel.common.records import read_record
from fourfold_parallel.common.values import digest, from_json, to_json
from fourfold_parallel.reproduce.claims import read_ledger
from fourfold_parallel.reproduce.experiment import experiment_of

ROOT = Path(__file__).resolve().parent.parent
RECORDS = sorted(
    path for path in ROOT.glob("packages/*/results/*.jsonl") if path.name != "ledger.jsonl"
)


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_every_committed_record_rebuilds_its_run(path: Path) -> None:
    """Whatever has moved or was renamed since; and what is rebuilt survives being written again."""
    run = read_record(path).run
    assert digest(from_json(to_json(run))) == digest(run)


@pytest.mark.parametrize("package", sorted({path.parts[-3] for path in RECORDS}))
def test_committed_records_are_of_todays_recipes(package: str) -> None:
    """`--resume` beside the committed records runs nothing; a recipe that changed without its record fails.

    A fingerprint of data may be of another copy of them than the one that lies here.
    """
    results = ROOT / "packages" / package / "results"
    scale = read_ledger(results / "ledger.jsonl")[0].scale
    for stage in experiment_of(package).stages(scale):
        path = results / f"{stage.name}.jsonl"
        record = read_record(path)
        assert record.is_finished
        assert apart_from_fingerprints(record.run) == apart_from_fingerprints(stage.run)


def apart_from_fingerprints(run: object) -> dict[str, object]:
    fields = to_json(run)
    assert isinstance(fields, dict)
    return {key: value for key, value in fields.items() if not key.endswith("_sha256")}


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
