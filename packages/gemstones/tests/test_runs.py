"""What a table refuses, and that it names the rows."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from fourfold_gemstones.architecture import GEMSTONES, Embeddings
from fourfold_gemstones.parametric import ParametricLaw
from fourfold_gemstones.reading import read_table
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
        ({"loss_nats": [3.5, float("nan"), 3.3, 3.0]}, "no value in row 1"),
        ({"loss_nats": [3.5, -1.0, 3.3, 0.0]}, r"is -1 in rows 1, 3"),
        ({"tokens": [1e9, 1e9, 1e9, 2e9]}, "row 1 .* repeats the token count"),
        ({"tokens": [2e9, 1e9, 1e9, 2e9]}, "row 1 .* has fewer tokens"),
        ({"loss_nats": [33.0, 30.0, 29.0, 28.0]}, "a perplexity"),
        ({"tokens": [1.0, 2.0, 1.0, 2.0]}, "steps, or millions"),
        ({"loss_nats": [3.5, "many", 3.3, 3.0]}, "'many' in row 1"),
        ({"run": ["a", "", "b", "b"]}, "'run' has no value in row 1"),
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
    path.write_text("run,Width,blocks,tokens,quality\na,256,8,1e9,3\n")
    with pytest.raises(ValueError, match="columns are run, Width, blocks, tokens, quality"):
        read_table(path)
    path.write_text("run,Width,blocks,tokens,loss\na,256,8,1e9,3\n")
    with pytest.raises(ValueError, match="no column 'depth', its columns are run, Width, blocks"):
        read_table(path).column("depth")


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
        assert read_table(tmp_path / "runs.csv").run.tolist() == [name, "c\nd"]
        if separator != "\f":  # JSON escapes control characters
            assert read_table(tmp_path / "runs.jsonl").run.tolist() == [name, "c"]


def test_capitals_do_not_matter_and_two_names_for_one_thing_do(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("Run,Width,Depth,TOKENS,Loss\na,256,8,1e9,3\n")
    table = read_table(str(path))
    assert sorted(table.columns) == ["depth", "loss_nats", "tokens", "width"]
    assert table.run.tolist() == ["a"]
    path.write_text("run,loss,tokens,loss_nats\na,3,1e9,3\n")
    with pytest.raises(
        ValueError, match=r"\['loss', 'loss_nats'\] of runs.csv all mean 'loss_nats'"
    ):
        read_table(path)


def test_a_table_without_runs_says_so(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("parameters,tokens,loss\n1e8,1e9,3\n1e8,2e9,2.9\n")
    with pytest.warns(RunsWarning, match=r"runs.csv has no column 'run': each row counts as a run"):
        table = read_table(path)
    assert table.run.tolist() == ["row 0", "row 1"]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("learning_rate", ["", "cosine", 1e-3, 1e-3]),
        ("seed", ["a", "b", "c", "d"]),
        ("step", [1.0, float("nan"), 1.0, 2.0]),
        ("width", [256, 256, "", 512]),
        ("gpu_hours", [1.0, -2.0, 1.0, 2.0]),
    ],
)
def test_a_column_that_nothing_reads_stops_nothing(name: str, values: list) -> None:
    """What a law does not read may hold anything; who reads it is told the row."""
    table = RunTable.from_columns(columns(**{name: values}))
    assert len(ParametricLaw().inputs(table)["parameters"]) == 4
    with pytest.raises(ValueError, match=rf"column '{name}' .* in rows? \d"):
        table.column(name)


def test_flops_of_a_broken_column_are_not_counted_instead() -> None:
    shape = {"width": [256, 256, 512, 512], "depth": [8, 8, 8, 8]}
    table = RunTable.from_columns(
        columns(**shape, flops=[1e18, "", 1e18, 2e18]), architecture=GEMSTONES
    )
    with pytest.raises(ValueError, match="'flops' has no value in row 1"):
        table.flops()


def test_a_column_that_nobody_filled_in_is_none(tmp_path: Path) -> None:
    """The published losses on other texts have two such columns in all 770 rows."""
    path = tmp_path / "losses.jsonl"
    row = {"run_name": "a", "tokens": 1e9, "final_loss": 3.0, "num_nodes": None}
    rows = [row, {**row, "tokens": 2e9, "final_loss": 2.9}]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    table = read_table(path)
    assert sorted(table.columns) == ["loss_nats", "tokens"]
    with pytest.raises(ValueError, match="no column 'num_nodes', its columns are run_name, tokens"):
        table.column("num_nodes")


@pytest.mark.parametrize("delimiter", [",", ", ", ";", "; ", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_table_is_read_as_people_have_it(
    tmp_path: Path, delimiter: str, encoding: str, end: str
) -> None:
    """Separators of several countries, a spreadsheet's marks and endings, and its trailing empty row."""
    path = tmp_path / "runs.csv"
    lines = [
        ["Run", "tokens", "loss", "note"],
        ["a", "1e9", "3.0", "long"],
        ["b", "2e9", "2.9", ""],
        [""] * 4,
    ]
    text = end.join(delimiter.join(line) for line in lines)
    path.write_bytes(text.encode(encoding))
    table = read_table(path)
    assert table.run.tolist() == ["a", "b"]
    assert table.column("loss_nats").tolist() == [3.0, 2.9]
    assert table.header == ("Run", "tokens", "loss", "note")


def test_a_header_that_is_not_known_shows_what_was_seen(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("Modell; Token; Verlust\na; 1e9; 3\n")
    with pytest.warns(RunsWarning), pytest.raises(ValueError, match="are Modell, Token, Verlust"):
        read_table(path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("runs.csv", "run,loss,tokens,loss\na,3,1e9,4\n", r"more than one column \['loss'\]"),
        (
            "runs.csv",
            "run,loss, tokens,Loss\na,3,1e9,4\n",
            r"\['loss', 'Loss'\] of runs.csv all mean",
        ),
        ("runs.csv", "run,params,tokens,loss,parameters\na,1,1e9,4,2\n", "all mean 'parameters'"),
        ("runs.jsonl", '{"run": "a", "tokens": 1e9, "loss": 3, "loss": 4}', "more than one column"),
        (
            "runs.jsonl",
            '{"run": "a", "tokens": 1e9, "loss": 3, "loss_nats": 4}',
            "all mean 'loss_nats'",
        ),
        (
            "runs.jsonl",
            '{"run": "a", "tokens": 1e9, "loss": 3}\n{"run"',
            "line 2 of runs.jsonl is not JSON",
        ),
        ("runs.csv", "run,tokens,loss\na,1e9,3,4\n", "row 0 of runs.csv has 4 fields"),
        (
            "runs.csv",
            "run,tokens,loss\na,1e9,3,5\n".replace("a", "\udcff"),
            "runs.csv is not utf-8",
        ),
    ],
)
def test_a_file_of_two_meanings_is_refused(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / name)


def test_a_frame_with_a_name_twice_is_refused() -> None:
    pandas = pytest.importorskip("pandas", reason="pandas makes the frame")
    frame = pandas.DataFrame([["a", 1e9, 3.0, 4.0]], columns=["run", "tokens", "loss", "loss"])
    with pytest.raises(ValueError, match=r"a frame has more than one column \['loss'\]"):
        RunTable.from_frame(frame)


def test_what_is_written_is_read_again(tmp_path: Path, suite: RunTable) -> None:
    suite.write(str(tmp_path / "runs.csv"))
    again = read_table(tmp_path / "runs.csv")
    assert again.run.tolist() == suite.run.tolist()
    for name, values in suite.columns.items():
        assert again.column(name) == pytest.approx(values, rel=1e-11)


def test_an_empty_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text("")
    with pytest.raises(ValueError, match="has no rows"):
        read_table(path)


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
    tables = [read_table(tmp_path / f"runs.{kind}") for kind in ("csv", "jsonl", "parquet")]
    for table in [*tables, RunTable.from_frame(frame)]:
        assert table.run.tolist() == ["a", "a", "b", "b"]
        assert {name: values.tolist() for name, values in table.columns.items()} == {
            name: values for name, values in columns().items() if name != "run"
        }


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "runs.xlsx").write_text("")
    with pytest.raises(ValueError, match=r"'\.xlsx'"):
        read_table(tmp_path / "runs.xlsx")
    with pytest.raises(ValueError, match="no file"):
        read_table(tmp_path / "absent.csv")


def test_a_row_without_a_loss_is_left_out_and_named(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("run,tokens,loss_nats\na,1e9,3\na,2e9,\n")
    with pytest.warns(RunsWarning, match=r"1 of 2 rows left out, which have no loss.*\(row 1\)"):
        table = read_table(path)
    assert table.column("tokens").tolist() == [1e9]


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
