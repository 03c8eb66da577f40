"""Both sets of definitions against values that ParEval's scripts gave, and against the corrected ones."""

import csv
import math
from pathlib import Path

import pytest

from fourfold_hpc_coder.evaluation import build_at_k, pass_at_k, speedup_at_k, speedup_max_at_k
from fourfold_hpc_coder.pareval import files as pareval
from fourfold_hpc_coder.pareval import metrics as published
from fourfold_hpc_coder.vocabulary import Processors, Sample

GOLDEN = Path(__file__).parents[4] / "shared" / "golden" / "hpc_coder"

pytestmark = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="../shared/golden/hpc_coder is not beside this checkout"
)

ROUNDING = 1e-12  # the same sums in another order
PRINTED = 1e-9  # the corrected file holds ten digits
KERNEL_SIZE = 1 << 22  # of the GPU kernel in the synthetic file: its efficiencies divide by it


def golden(name: str) -> list[dict[str, str]]:
    with (GOLDEN / name).open() as file:
        return [*csv.DictReader(file)]


@pytest.mark.parametrize(
    ("results", "expected", "ks"),
    [
        ("synthetic-results.json", "synthetic-results.metrics.k1-2-5-20.csv", (1, 2, 5, 20)),
        ("edge-omp-mpi.json", "edge-omp-mpi.metrics.k1-2-5-20.csv", (1, 2, 5, 20)),
        ("real-results.json", "real-results.metrics.csv", (1, 2, 5)),
    ],
)
def test_every_published_metric_is_reproduced(results: str, expected: str, ks) -> None:
    """Every row, column and order, errors included."""
    prompts = pareval.read_results(GOLDEN / results)
    sizes = {("55_transform_relu", "cuda"): KERNEL_SIZE, ("55_transform_relu", "hip"): KERNEL_SIZE}
    rows = published.metrics(prompts, ks, sizes=sizes)
    wanted = golden(expected)
    assert [[*row] for row in rows] == [[key for key in row if key != "model"] for row in wanted]
    for row, want in zip(rows, wanted, strict=True):
        for key, value in row.items():
            if isinstance(value, str):
                assert value == want[key]
            else:
                assert value == pytest.approx(float(want[key]), rel=ROUNDING, abs=ROUNDING), key


def test_the_published_scaling_table_is_reproduced() -> None:
    prompts = [
        p for p in pareval.read_results(GOLDEN / "synthetic-results.json") if p.model == "omp"
    ]
    [row] = published.scaling(prompts, 1, (1, 2, 32))
    [want] = golden("synthetic-results.scaling-omp.k1.csv")
    assert [*row] == [*want]
    assert all(row[key] == pytest.approx(float(want[key]), rel=ROUNDING) for key in [*row][2:])


def test_the_corrected_definitions_are_the_corrected_values() -> None:
    prompts = pareval.read_results(GOLDEN / "synthetic-results.json")
    for want in golden("synthetic-results.corrected.csv"):
        model, k = want["execution model"], int(want["k"])
        group = [p for p in prompts if p.model == model and p.problem_type == want["problem type"]]
        processors = published.MEASURED_ON.get(model, Processors())  # type: ignore[call-overload]
        found = {
            "build@k": build_at_k(group, k),
            "pass@k (loose)": pass_at_k(group, k, parallel=False),
            "pass@k (strict: source valid)": pass_at_k(group, k),
            "speedup_n@k (0 for failures)": speedup_at_k(group, k, processors=processors),
            "speedup_max@k (0 for failures)": speedup_max_at_k(group, k),
        }
        for key, value in found.items():
            assert value == pytest.approx(float(want[key]), rel=PRINTED, abs=PRINTED), (model, key)


@pytest.mark.parametrize("name", ["edge-serial-only.json", "edge-none-valid.json"])
def test_inputs_on_which_pareval_stops_are_scored(name: str) -> None:
    prompts = pareval.read_results(GOLDEN / name)
    [row] = published.metrics(prompts, (1, 2), sizes={})
    assert 0 <= float(str(row["pass@1"])) <= float(str(row["build@1"])) <= 1
    if name == "edge-none-valid.json":
        assert pass_at_k(prompts, 1) == 0
        assert speedup_at_k(prompts, 1, processors=Processors(threads=2)) == 0


def test_more_samples_than_there_are_is_not_a_success() -> None:
    """ParEval's script gives a pass@5 of 1 to a model none of whose two samples builds."""
    prompts = [
        p for p in pareval.read_results(GOLDEN / "synthetic-results.json") if p.model == "hip"
    ]
    assert published.pass_at_k(prompts, 5) == 1
    assert math.isnan(pass_at_k(prompts, 5))


def test_results_survive_reading_and_writing() -> None:
    """The driver's fields come back as they were, save what ParEval says of unbuilt samples."""
    import json

    for entry in json.loads((GOLDEN / "real-results.json").read_text()):
        [prompt] = [
            p
            for p in pareval.read_results(GOLDEN / "real-results.json")
            if (p.name, p.model) == (entry["name"], entry["parallelism_model"])
        ]
        for sample, fields in zip(prompt.samples, entry["outputs"], strict=True):
            assert isinstance(sample, Sample)
            again = pareval.result_fields(fields["generated_output"], sample, prompt.model)
            assert again == fields


def test_the_table_of_runs_is_parevals() -> None:
    import json

    entries = json.loads((GOLDEN / "real-results.json").read_text())
    ours = [*csv.DictReader(pareval.runs_csv(entries).splitlines())]
    theirs = golden("real-results.df.csv")
    assert [*ours[0]] == [*theirs[0]]
    for mine, want in zip(ours, theirs, strict=True):
        for key, value in want.items():
            same = mine[key] == value or float(mine[key]) == float(value)
            assert same, (key, mine[key], value)
