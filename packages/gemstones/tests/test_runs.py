"""What a table refuses, and that it names the rows."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from fourfold_gemstones.architecture import GEMSTONES, Embeddings
from fourfold_gemstones.runs import RunsWarning, RunTable


def columns(**changes: list) -> dict[str, list]:
    """Four good rows of two runs, changed."""
    good: dict[str, list] = {
        "run": ["a", "a", "b", "b"],
        "parameters": [1e8, 1e8, 2e8, 2e8],
        "tokens": [1e9, 2e9, 1e9, 2e9],
        "loss_nats": [3.5, 3.2, 3.3, 3.0],
    }
    return {**good, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_nats": [3.5, float("nan"), 3.3, 3.0]}, "not finite in row 1"),
        ({"loss_nats": [3.5, -1.0, 3.3, 0.0]}, r"is -1 in rows 1, 3"),
        ({"tokens": [1e9, 1e9, 1e9, 2e9]}, "row 1 .* repeats the token count"),
        ({"tokens": [2e9, 1e9, 1e9, 2e9]}, "row 1 .* has fewer tokens"),
        ({"loss_nats": [33.0, 30.0, 29.0, 28.0]}, "a perplexity"),
        ({"tokens": [1.0, 2.0, 1.0, 2.0]}, "steps, or millions"),
        ({"parameters": [1e8, "many", 2e8, 2e8]}, "'many' in row 1"),
        ({"parameters": [1e8, 1e8]}, "2 rows and 'run' has 4"),
        ({"tokens": [1e9, float("inf"), 1e9, 2e9]}, "'tokens' is not finite in row 1"),
    ],
)
def test_bad_rows_are_named(changes: dict[str, list], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunTable.from_columns(columns(**changes))


def test_missing_columns_are_named() -> None:
    bad = columns()
    del bad["loss_nats"]
    with pytest.raises(ValueError, match="'loss_nats' is missing"):
        RunTable.from_columns(bad)
    with pytest.raises(ValueError, match="no column 'width'"):
        RunTable.from_columns(columns()).column("width")
    with pytest.raises(ValueError, match="how large its vocabulary is"):
        RunTable.from_columns(columns()).parameters(Embeddings.NONE)


def test_a_missing_column_shows_the_columns_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("run,Width,n_layers,tokens,eval_loss\na,256,8,1e9,3\n")
    with pytest.raises(ValueError, match="columns are run, Width, n_layers, tokens, eval_loss"):
        RunTable.read(path)
    path.write_text("run,Width,n_layers,tokens,loss\na,256,8,1e9,3\n")
    with pytest.raises(ValueError, match="no column 'depth', its columns are run, Width, n_layers"):
        RunTable.read(path).column("depth")


def test_a_name_may_hold_what_separates_lines_elsewhere(tmp_path: Path) -> None:
    """JSON need not escape these, and a quoted field of CSV may hold a line feed."""
    for separator in ("\u2028", "\u0085", "\f"):
        name = f"a{separator}b"
        fields = {"run": name, "width": 256, "depth": 8, "tokens": 1e9, "loss": 3}
        lines = [json.dumps({**fields, "run": run}, ensure_ascii=False) for run in (name, "c")]
        (tmp_path / "runs.jsonl").write_text("\n".join(lines), encoding="utf-8")
        (tmp_path / "runs.csv").write_text(
            f'run,width,depth,tokens,loss\n{name},256,8,1e9,3\n"c\nd",256,8,1e9,3\n',
            encoding="utf-8",
        )
        assert RunTable.read(tmp_path / "runs.csv").run.tolist() == [name, "c\nd"]
        if separator != "\f":  # JSON escapes control characters
            assert RunTable.read(tmp_path / "runs.jsonl").run.tolist() == [name, "c"]


def test_capitals_do_not_matter_and_two_names_for_one_thing_do(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("Run,Width,Depth,TOKENS,Loss\na,256,8,1e9,3\n")
    table = RunTable.read(str(path))
    assert sorted(table.columns) == ["depth", "loss_nats", "tokens", "width"]
    assert table.run.tolist() == ["a"]
    path.write_text("run,loss,tokens,loss_nats\na,3,1e9,3\n")
    with pytest.raises(
        ValueError, match=r"\['loss', 'loss_nats'\] of runs.csv all mean 'loss_nats'"
    ):
        RunTable.read(path)


def test_a_table_without_runs_says_so(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("parameters,tokens,loss\n1e8,1e9,3\n1e8,2e9,2.9\n")
    with pytest.warns(RunsWarning, match=r"runs.csv has no column 'run': each row counts as a run"):
        table = RunTable.read(path)
    assert table.run.tolist() == ["row 0", "row 1"]


def test_what_is_written_is_read_again(tmp_path: Path, suite: RunTable) -> None:
    suite.write(str(tmp_path / "runs.csv"))
    again = RunTable.read(tmp_path / "runs.csv")
    assert again.run.tolist() == suite.run.tolist()
    for name, values in suite.columns.items():
        assert again.column(name) == pytest.approx(values, rel=1e-11)


def test_an_empty_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text("")
    with pytest.raises(ValueError, match="has no rows"):
        RunTable.read(path)


def test_every_format_reads_the_same(tmp_path: Path) -> None:
    """CSV, JSONL, Parquet and a frame of the same rows are the same table."""
    pandas = pytest.importorskip("pandas", reason="pandas writes the Parquet file")
    frame = pandas.DataFrame(columns())
    frame.to_parquet(tmp_path / "runs.parquet")
    with (tmp_path / "runs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns())
        writer.writerows(zip(*columns().values(), strict=True))
    rows = [dict(zip(columns(), row, strict=True)) for row in zip(*columns().values(), strict=True)]
    (tmp_path / "runs.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    tables = [RunTable.read(tmp_path / f"runs.{kind}") for kind in ("csv", "jsonl", "parquet")]
    for table in [*tables, RunTable.from_frame(frame)]:
        assert table.run.tolist() == ["a", "a", "b", "b"]
        assert {name: values.tolist() for name, values in table.columns.items()} == {
            name: values for name, values in columns().items() if name != "run"
        }


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "runs.xlsx").write_text("")
    with pytest.raises(ValueError, match=r"'\.xlsx'"):
        RunTable.read(tmp_path / "runs.xlsx")
    with pytest.raises(ValueError, match="no file"):
        RunTable.read(tmp_path / "absent.csv")


def test_a_row_with_a_hole_is_named(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("run,tokens,loss_nats\na,1e9,3\na,2e9,\n")
    with pytest.raises(ValueError, match=r"row 1 of runs.csv lacks \['loss_nats'\]"):
        RunTable.read(path)


def test_compute_of_large_runs_does_not_overflow() -> None:
    """6 N T of integer columns beyond 2^63 is what the floating-point product says."""
    table = RunTable.from_columns(
        {"parameters": np.asarray([10**11]), "tokens": np.asarray([10**13]), "loss_nats": [2.0]}
    )
    assert table.resource("flops_6nt")[0] == pytest.approx(6e24)


def test_flops_are_counted_from_the_shape() -> None:
    table = RunTable.from_columns(
        {"width": [256], "depth": [23], "tokens": [1e9], "loss_nats": [3.0]},
        architecture=GEMSTONES,
    )
    assert table.flops()[0] == 341_618_496e9
    assert table.column("parameters")[0] == 48_377_600
