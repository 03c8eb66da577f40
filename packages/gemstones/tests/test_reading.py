"""Tables as people have them: read right, or refused with the row and the way out; never in silence."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from fourfold_gemstones import reading
from fourfold_gemstones.reading import read_table
from fourfold_gemstones.runs import RunsWarning


def read(folder: Path, text: str, name: str = "runs.csv", **options: object) -> reading.Reading:
    """The reading of one file of this text."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return reading.read(path, **options)  # pyright: ignore[reportArgumentType]


def test_columns_are_guessed_shown_and_can_be_chosen(tmp_path: Path) -> None:
    text = "Name,n_params,train_tokens,train/loss,eval/loss\na,1e8,1e9,3.1,3.2\na,1e8,2e9,3.0,3.1\n"
    guessed = read(tmp_path, text)
    assert guessed.table.column("loss_nats").tolist() == [3.2, 3.1]
    said = "\n".join(guessed.notes)
    assert "loss_nats is 'eval/loss' (not train/loss; choose with --columns loss_nats=...)" in said
    assert "parameters from 'n_params'" in said
    chosen = read(tmp_path, text, columns={"loss_nats": "train/loss", "depth": "12"})
    assert chosen.table.column("loss_nats").tolist() == [3.1, 3.0]
    assert chosen.table.column("depth").tolist() == [12.0, 12.0]
    assert "depth is 12 in all rows, as chosen" in "\n".join(chosen.notes)
    with pytest.raises(ValueError, match="no column 'perplexity' for loss_nats; its columns are"):
        read(tmp_path, text, columns={"loss_nats": "perplexity"})
    with pytest.raises(ValueError, match=r"\['loss_mean'\] are none of ours"):
        read(tmp_path, text, columns={"loss_mean": "eval/loss"})


def test_two_columns_of_one_meaning_must_be_chosen_between(tmp_path: Path) -> None:
    text = "run,tokens,a/eval_loss,b/eval_loss\nx,1e9,3.1,3.2\n"
    with pytest.raises(
        ValueError, match=r"all mean 'loss_nats'.*--columns loss_nats='a/eval_loss'"
    ):
        read(tmp_path, text)
    both = read(tmp_path, text, columns={"loss_nats": "b/eval_loss"})
    assert both.table.column("loss_nats").tolist() == [3.2]


@pytest.mark.parametrize(
    ("header", "cells", "tokens", "loss"),
    [
        ("run,tokens,loss", 'a,"1,500,000",3.125', 1.5e6, 3.125),
        ("run,tokens,loss", 'a,"150,000","3,125"', 1.5e5, 3.125),
        ("run;tokens;loss", "a;1.500.000;3,125", 1.5e6, 3.125),
        ("run;tokens;loss", "a;150.000;3,5", 1.5e5, 3.5),
        ("run;tokens;loss", "a;1 500 000;3,5", 1.5e6, 3.5),
        ("run,tokens (B),loss", "a,1.5,3.5", 1.5e9, 3.5),
        ("run,tokens_in_billions,loss", "a,1.5,3.5", 1.5e9, 3.5),
        ("run,tokens_B,loss", "a,1.5,3.5", 1.5e9, 3.5),
        ("run,tokens,loss", "a,1.5B,3.5", 1.5e9, 3.5),
        ("run,tokens,loss", "a,350M,3.5", 3.5e8, 3.5),
        ("run\ttokens\tloss", "a\t2e9\t3.5", 2e9, 3.5),
        ("run|tokens|loss", "a|2'000'000|3.5", 2e6, 3.5),
    ],
)
def test_numbers_as_people_write_them(
    header: str, cells: str, tokens: float, loss: float, tmp_path: Path
) -> None:
    table = read(tmp_path, f"{header}\n{cells}\n").table
    assert table.column("tokens").tolist() == [pytest.approx(tokens)]
    assert table.column("loss_nats").tolist() == [loss]


def test_a_comma_that_may_be_either_is_refused_with_its_row(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"'tokens' is '150,000' in row 0 of runs.csv: the comma may"
    ):
        read(tmp_path, "run;tokens;loss\na;150,000;3.5\n")
    with pytest.raises(ValueError, match=r"is '1,5' in row 1 of runs.csv, which is no number"):
        read(tmp_path, 'run,tokens,loss\na,"1,500,000",3.5\na,"1,5",3.4\n')
    with pytest.raises(ValueError, match="below 1000: steps, or millions"):
        read(tmp_path, "run,tokens,loss\na,1.5,3.5\n")


def test_what_is_left_out_is_counted_and_named(tmp_path: Path) -> None:
    text = "run,tokens,loss\na,1e9,3.2\na,1.5e9,\na,2e9,nan\na,3e9,3.0\na,3e9,3.0\na,2.5e9,3.05\n"
    got = read(tmp_path, text)
    assert got.table.column("tokens").tolist() == [1e9, 2.5e9, 3e9]
    said = "\n".join(got.notes)
    assert "1 of 6 rows left out, which have no loss: nothing was evaluated there (row 1)" in said
    assert "1 of 5 rows left out, whose loss is not finite: diverged" in said
    assert "(row 2)" in said
    assert "which repeat a token count of their run: 1 say the same" in said
    assert "put in the order of their tokens" in said
    with pytest.warns(RunsWarning, match="left out"):
        read_table(tmp_path / "runs.csv")


def test_losses_that_disagree_are_refused_or_settled_as_chosen(tmp_path: Path) -> None:
    text = "run,tokens,loss\na,1e9,3.2\na,1e9,3.4\na,2e9,3.0\n"
    with pytest.raises(
        ValueError, match=r"rows 0, 1 of runs.csv are of one run \(a\).*losses 3.2, 3.4"
    ):
        read(tmp_path, text)
    last = read(tmp_path, text, duplicates="last")
    assert last.table.column("loss_nats").tolist() == [3.4, 3.0]
    assert "for 1 the last of several losses was taken" in "\n".join(last.notes)
    mean = read(tmp_path, text, duplicates="mean")
    assert mean.table.column("loss_nats").tolist() == [pytest.approx(3.3), 3.0]


def test_a_chart_of_weights_and_biases_holds_runs_as_columns(tmp_path: Path) -> None:
    text = (
        '"Step","small - eval/loss","small - eval/loss__MIN","small - eval/loss__MAX",'
        '"large - eval/loss","large - eval/loss__MIN","large - eval/loss__MAX"\n'
        '"100","3.5","3.5","3.5","3.4","3.4","3.4"\n"200","3.2","3.2","3.2","","",""\n'
    )
    with pytest.raises(ValueError, match=r"counts steps and no tokens.*--tokens-per-step"):
        read(tmp_path, text)
    (tmp_path / "models.csv").write_text("run,params\nsmall,10M\nlarge,0.1B\n")
    got = read(tmp_path, text, tokens_per_step=1e6, about=tmp_path / "models.csv")
    assert got.table.run.tolist() == ["small", "small", "large"]
    assert got.table.column("tokens").tolist() == [1e8, 2e8, 1e8]
    assert got.table.column("parameters").tolist() == [1e7, 1e7, 1e8]
    said = "\n".join(got.notes)
    assert "a chart of 2 runs, eval/loss as loss_nats; 1 cells are blank" in said
    (tmp_path / "models.csv").write_text("run,params\nsmall,10M\n")
    with pytest.raises(ValueError, match=r"no row for the runs \['large'\]"):
        read(tmp_path, text, tokens_per_step=1e6, about=tmp_path / "models.csv")


def test_the_table_and_the_history_of_weights_and_biases(tmp_path: Path) -> None:
    """A row a run, of which one crashed; and a history in which most steps were not evaluated."""
    summary = (
        '"Name","State","Notes","Created","Runtime","hidden_size","num_hidden_layers","params","tokens","val_loss"\n'
        '"a","finished","","2026-01-01","3600","256","8","1e7","1e9","3.4"\n'
        '"b","crashed","","2026-01-01","100","512","8","3e7","1e8","5.0"\n'
    )
    got = read(tmp_path, summary)
    assert got.table.run.tolist() == ["a"]
    assert got.table.column("width").tolist() == [256.0]
    assert "of runs that crashed, failed or were killed (row 1)" in "\n".join(got.notes)
    history = [
        {
            "_step": step,
            "run_name": "a",
            "train/loss": 3.0,
            "eval/loss": loss,
            "tokens_seen": 1e6 * step,
        }
        for step, loss in ((10, None), (20, 3.3), (30, None), (40, 3.1))
    ]
    lines = "\n".join(json.dumps(row) for row in history)
    got = read(tmp_path, lines, "history.jsonl")
    assert got.table.column("loss_nats").tolist() == [3.3, 3.1]
    assert "2 of 4 rows left out, which have no loss" in "\n".join(got.notes)


def test_a_folder_of_tensorboards_scalars(tmp_path: Path) -> None:
    for name, loss in (("small", 3.4), ("large", 3.2)):
        (tmp_path / f"run-{name}-tag-eval_loss.csv").write_text(
            f"Wall time,Step,Value\n1700000000.0,0,11.0\n1700000001.0,100,{loss}\n"
        )
    got = reading.read(tmp_path, tokens_per_step=1e6)
    assert sorted(got.table.run.tolist()) == ["large", "small"]
    assert "at step 0, before any training" in "\n".join(got.notes)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=re.escape("no .csv, .jsonl or .parquet file")):
        reading.read(tmp_path / "empty")


def test_parquet_and_csv_are_one_table(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet is an extra")
    arrow = pytest.importorskip("pyarrow")
    columns = {"run": ["a", "a"], "n_params": [1e8, 1e8], "D": [1e9, 2e9], "val_loss": [3.2, 3.1]}
    parquet.write_table(arrow.table(columns), tmp_path / "runs.parquet")
    table = reading.read(tmp_path / "runs.parquet").table
    rows = "\n".join("a,1e8,{},{}".format(*pair) for pair in ((1e9, 3.2), (2e9, 3.1)))
    same = read(tmp_path, f"run,n_params,D,val_loss\n{rows}\n").table
    for name in ("parameters", "tokens", "loss_nats"):
        assert np.array_equal(table.column(name), same.column(name))
