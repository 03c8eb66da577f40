"""Tables of runs as people have them: exports, logs and spreadsheets, read whole or refused with the row.

`read` gives the table and says what it did: which column it took for which, what it computed, how many rows
it left out and why. Nothing is left out in silence. It knows

- CSV of any dialect, JSON lines, Parquet;
- Weights & Biases: the table of runs, the history of a run, and a chart's export, whose columns are runs;
- TensorBoard's CSV of a scalar, one file a run;
- a folder of such files, and a second table of what each run is (`about`).
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from fourfold_gemstones.architecture import Architecture
from fourfold_gemstones.runs import (
    NAMES,
    NUMERIC,
    ROWS_NAMED,
    UNKNOWN,
    RunsWarning,
    RunTable,
    StrPath,
    UnknownArchitecture,
    plain_name,
    warn_without_run,
)

Duplicates = Literal["refuse", "last", "mean"]
"""Rows of one run at one token count with different losses: refused, the last one, or their mean."""
Columns = dict[str, list[Any]]
"""Values by the name of their column."""

COUNTS = frozenset(
    {
        "tokens",
        "parameters",
        "step",
        "width",
        "depth",
        "batch_tokens",
        "unique_tokens",
        "once_parameters",
        "looped_parameters",
        "flops",
        "num_nodes",
    }
)
"""Columns whose numbers are whole, so that a mark before three digits separates thousands."""
UNITS = MappingProxyType({"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12})
WORDS = MappingProxyType(
    {
        "thousand": 1e3,
        "million": 1e6,
        "millions": 1e6,
        "billion": 1e9,
        "billions": 1e9,
        "trillion": 1e12,
    }
    | UNITS
)
HOLES = frozenset({"", "nan", "none", "null", "n/a", "na", "-", "–"})
DIVERGED = frozenset({"inf", "-inf", "infinity", "-infinity", "nan", "diverged"})
WANDB_TABLE = frozenset({"name", "state", "created", "runtime"})
"""Columns of which three make a table that Weights & Biases wrote."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A table, and sentences on what was done to get it."""

    table: RunTable
    notes: tuple[str, ...]


@dataclass(slots=True, kw_only=True)
class _Sheet:
    """Columns on their way to a table; `rows` are numbers of rows in the file, from zero."""

    columns: Columns
    rows: list[int]
    source: str
    header: tuple[str, ...] = ()
    """Names of the columns in the file."""
    decimal_comma: bool = False
    notes: list[str] = field(default_factory=list)

    def drop(self, bad: Sequence[bool], why: str) -> None:
        """Leave rows out and say so."""
        if not any(bad):
            return
        gone = [row for row, is_bad in zip(self.rows, bad, strict=True) if is_bad]
        shown = ", ".join(map(str, gone[:ROWS_NAMED])) + (
            f" and {len(gone) - ROWS_NAMED} more" if len(gone) > ROWS_NAMED else ""
        )
        plural = "s" if len(gone) > 1 else ""
        self.notes.append(
            f"{self.source}: {len(gone)} of {len(self.rows)} rows left out, {why} (row{plural} {shown})"
        )
        keep = [not is_bad for is_bad in bad]
        self.rows = [row for row, kept in zip(self.rows, keep, strict=True) if kept]
        self.columns = {
            name: [value for value, kept in zip(values, keep, strict=True) if kept]
            for name, values in self.columns.items()
        }


def read(
    *paths: StrPath,
    columns: Mapping[str, str] = MappingProxyType({}),
    about: StrPath | None = None,
    tokens_per_step: float = 0.0,
    duplicates: Duplicates = "refuse",
    architecture: Architecture | UnknownArchitecture = UNKNOWN,
) -> Reading:
    """A table from files or folders of files, with a sentence for all that was done.

    Args:
        paths: `.csv`, `.tsv`, `.jsonl` or `.parquet` files; a folder stands for all such files in it.
        columns: column of the file, or a number for all rows, by our name of it; the others are guessed.
        about: a second table with a row for each run: its size, shape, tokens a step.
        tokens_per_step: tokens of one optimizer step, where the file counts steps; 0 where it does not.
        duplicates: which of several losses at one token count of a run to take.
        architecture: the way to count FLOPs and embedding tables.

    Raises:
        ValueError: A file is absent or of another kind, a name is no column, rows contradict each other, or
            the table's own rules refuse them. The message names row, column and the way out.

    Warns:
        RunsWarning: No column names the runs.
    """
    unknown = sorted(set(columns) - {*NUMERIC, "run"})
    if unknown:
        raise ValueError(f"columns={unknown} are none of ours; those are run, {', '.join(NUMERIC)}")
    files = [file for path in paths for file in _files(Path(path))]
    digest = hashlib.sha256()
    sheets = []
    for file in files:
        data = file.read_bytes()
        digest.update(data)
        sheets.append(_named(_raw(file, data), columns))
    several = len(sheets) > 1
    merged = _merged(sheets) if several else sheets[0]
    if about is not None:
        _join(merged, _named(_raw(Path(about), Path(about).read_bytes()), {}))
    _constants(merged, columns)
    _clean(merged, tokens_per_step, duplicates)
    source = f"{len(sheets)} files" if several else files[0].name
    header = tuple(dict.fromkeys(name for sheet in sheets for name in sheet.header))
    given = merged.columns if header else {name: [] for name in ("run", "tokens", "loss_nats")}
    warn_without_run(given, source)
    table = RunTable.from_columns(
        given,
        architecture=architecture,
        source=source,
        header=header,
        digest=digest.hexdigest(),
    )
    said = [note for sheet in (*sheets, merged) for note in sheet.notes]
    return Reading(table=table, notes=tuple(dict.fromkeys(said)))


def read_table(
    path: StrPath,
    *,
    columns: Mapping[str, str] = MappingProxyType({}),
    architecture: Architecture | UnknownArchitecture = UNKNOWN,
) -> RunTable:
    """The table of `read`, from a file or a folder.

    Raises:
        ValueError: As `read` does.

    Warns:
        RunsWarning: No column names the runs, or rows were left out.
    """
    done = read(path, columns=columns, architecture=architecture)
    for note in done.notes:
        if "left out" in note:
            warnings.warn(note, RunsWarning, stacklevel=2)
    return done.table


def _files(path: Path) -> list[Path]:
    kinds = {".csv", ".tsv", ".jsonl", ".ndjson", ".parquet"}
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in kinds)
        if not files:
            raise ValueError(f"no .csv, .jsonl or .parquet file in {path}")
        return files
    if not path.is_file():
        raise ValueError(f"no file {path}; give the path of a .csv, .jsonl or .parquet table")
    if path.suffix not in kinds:
        raise ValueError(
            f"{path.name} ends in {path.suffix!r}, and .csv, .jsonl and .parquet can be read; convert it to "
            "one of these"
        )
    return [path]


def _raw(path: Path, data: bytes) -> _Sheet:
    """The columns of one file under its own names."""
    comma = False
    match path.suffix:
        case ".csv" | ".tsv":
            columns, delimiter = _separated(_text(data, path), path)
            comma = delimiter != ","
        case ".parquet":
            import pyarrow.parquet

            columns = pyarrow.parquet.read_table(path).to_pydict()
        case _:
            columns = _objects(_text(data, path), path)
    length = len(next(iter(columns.values()), []))
    sheet = _Sheet(
        columns=columns,
        rows=list(range(length)),
        source=path.name,
        header=tuple(columns),
        decimal_comma=comma,
    )
    return _tensorboard(_chart(sheet), path)


def _chart(sheet: _Sheet) -> _Sheet:
    """A chart of Weights & Biases, whose columns are runs, as rows: "Step", "<run> - <metric>"."""
    steps = [
        name
        for name in sheet.columns
        if plain_name(name) in ("step", "global step", "trainer global step")
    ]
    pattern = re.compile(r"(.+) - (.+?)(__MIN|__MAX)?$")
    matches = {name: match for name in sheet.columns if (match := pattern.match(name))}
    curves = {
        name: match for name, match in matches.items() if not match[3] and match[2] != "_step"
    }
    if len(steps) != 1 or not curves or len(matches) + 1 < len(sheet.columns):
        return sheet
    metrics = {match[2] for match in curves.values()}
    if len(metrics) > 1:
        raise ValueError(
            f"{sheet.source} holds the metrics {', '.join(sorted(metrics))}; export the chart of one loss"
        )
    tall: Columns = {"run": [], "step": [], "loss_nats": []}
    rows, holes = [], 0
    for name, match in curves.items():
        for row, (step, value) in enumerate(
            zip(sheet.columns[steps[0]], sheet.columns[name], strict=True)
        ):
            if _hole(value):
                holes += 1
                continue
            for key, entry in (("run", match[1]), ("step", step), ("loss_nats", value)):
                tall[key].append(entry)
            rows.append(row)
    note = f"{sheet.source}: a chart of {len(curves)} runs, {metrics.pop()} as loss_nats"
    if holes:
        note += f"; {holes} cells are blank, at steps at which a run was not evaluated"
    return replace(sheet, columns=tall, rows=rows, notes=[note])


def _tensorboard(sheet: _Sheet, path: Path) -> _Sheet:
    """TensorBoard's CSV of one scalar: wall time, step, value; the run is named by the file."""
    names = {plain_name(name): name for name in sheet.columns}
    if set(names) != {"wall time", "step", "value"}:
        return sheet
    run = re.sub(r"^run-|-tag-.*$", "", path.stem)
    sheet.notes.append(f"{path.name}: a scalar of TensorBoard, of the run {run}")
    columns = {
        "run": [run] * len(sheet.rows),
        "step": sheet.columns[names["step"]],
        "loss_nats": sheet.columns[names["value"]],
    }
    return replace(sheet, columns=columns)


def _unit(name: str) -> tuple[str, float]:
    """A name without the unit that it ends in or has in brackets, and the factor: "tokens (B)"."""
    bracket = re.search(r"[(\[]\s*([A-Za-z]+)\s*(?:tokens|params|parameters)?\s*[)\]]\s*$", name)
    if bracket and bracket[1].lower() in WORDS:
        return name[: bracket.start()], WORDS[bracket[1].lower()]
    tail = re.search(r"^(.+?)[ _](?:in[ _])?([A-Za-z]+)$", name)
    if tail and (tail[2] in ("B", "M", "K", "T") or tail[2].lower() in WORDS.keys() - UNITS.keys()):
        return tail[1], WORDS[tail[2].lower()]
    return name, 1.0


def _guess(name: str) -> tuple[str, int, float]:
    """Our name of a column, the rank of the guess, and its unit; "" where it is none of ours.

    A name counts before one that is ours after a stroke or a point, and a validation loss before that of
    training. Names of runs and steps, of which logs have several, are ranked one by one.
    """
    bare, factor = _unit(name)
    for text, unit in ((bare, factor), (name, 1.0)):
        plain = plain_name(text)
        tail = plain_name(re.split(r"[./:]", text)[-1])
        for ours, aliases in NAMES.items():
            for spelling in dict.fromkeys((plain, tail)):
                if spelling not in aliases or (unit != 1 and ours not in COUNTS):
                    continue
                rank = (spelling != plain) + ("train" in plain and ours == "loss_nats")
                if ours in ("run", "step"):
                    rank = 100 * rank + aliases.index(spelling)
                return ours, rank, unit
    return "", 0, 1.0


def _named(sheet: _Sheet, chosen: Mapping[str, str]) -> _Sheet:
    """The columns under our names: those that were chosen, then the best guesses, which are shown."""
    taken = {**_chosen(sheet, chosen), **_guessed(sheet, chosen)}
    known: Columns = {}
    for ours, (theirs, factor) in taken.items():
        if factor != 1:
            sheet.notes.append(f"{sheet.source}: {theirs!r} is counted in units of {factor:g}")
        known[ours] = (
            sheet.columns[theirs] if ours == "run" else _numbers(ours, sheet, theirs, factor)
        )
    renamed = [f"{ours} from {theirs!r}" for ours, (theirs, _) in taken.items() if theirs != ours]
    if renamed:
        sheet.notes.append(f"{sheet.source}: {', '.join(renamed)}")
    if len(WANDB_TABLE & {plain_name(name) for name in sheet.columns}) > 2:
        known["state"] = next(
            values for name, values in sheet.columns.items() if plain_name(name) == "state"
        )
    return replace(sheet, columns=known)


def _chosen(sheet: _Sheet, chosen: Mapping[str, str]) -> dict[str, tuple[str, float]]:
    """Columns, and their units, that the user named."""
    for ours, theirs in chosen.items():
        if theirs not in sheet.columns and _number_or_none(theirs) is None:
            raise ValueError(
                f"{sheet.source} has no column {theirs!r} for {ours}; its columns are "
                f"{', '.join(sheet.columns)}"
            )
    return {
        ours: (theirs, _unit(theirs)[1])
        for ours, theirs in chosen.items()
        if theirs in sheet.columns
    }


def _guessed(sheet: _Sheet, chosen: Mapping[str, str]) -> dict[str, tuple[str, float]]:
    """Columns, and their units, that are called what people call ours."""
    guesses: dict[str, list[tuple[int, str, float]]] = {}
    for theirs in sheet.columns:
        ours, rank, factor = _guess(theirs)
        if ours and ours not in chosen and not all(_hole(value) for value in sheet.columns[theirs]):
            guesses.setdefault(ours, []).append((rank, theirs, factor))
    taken = {}
    for ours, candidates in guesses.items():
        (best, theirs, factor), *others = sorted(candidates, key=lambda candidate: candidate[0])
        alike = [theirs, *(name for rank, name, _ in others if rank == best)]
        if len(alike) > 1:
            raise ValueError(
                f"columns {alike} of {sheet.source} all mean {ours!r}; drop all but one, or choose: "
                f"--columns {ours}={theirs!r}"
            )
        if others:
            names = ", ".join(name for _, name, _ in others)
            sheet.notes.append(
                f"{sheet.source}: {ours} is {theirs!r} (not {names}; choose with --columns {ours}=...)"
            )
        taken[ours] = (theirs, factor)
    return taken


def _hole(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().lower() in HOLES - {"nan"}
    return value is None


def _number_or_none(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _numbers(ours: str, sheet: _Sheet, theirs: str, factor: float) -> list[Any]:
    """Numbers of a column; text that is none stays, for the table to refuse when it is read."""
    values = sheet.columns[theirs]
    texts = [value.strip() for value in values if isinstance(value, str) and not _hole(value)]
    comma_decimal = _comma_is_decimal(ours, texts, sheet, theirs)
    numbers: list[Any] = []
    for value in values:
        number = _number(value, comma_decimal) if isinstance(value, str) else value
        usable = isinstance(number, int | float | np.number) and not isinstance(number, bool)
        numbers.append(float(number) * factor if usable else number)
    return numbers


def _comma_is_decimal(ours: str, texts: list[str], sheet: _Sheet, theirs: str) -> bool:
    """Whether a column's comma stands before a fraction; else it separates thousands."""
    marked = [re.sub(r"[^0-9.,]", "", text) for text in texts]
    for text in marked:
        if "," in text and "." in text:
            return text.rfind(",") > text.rfind(".")
    if any(text.count(",") > 1 for text in marked):
        return False
    if any(text.count(".") > 1 for text in marked):
        return True
    commas = [text for text in marked if "," in text]
    if not commas:
        dots = [text for text in marked if "." in text]
        thousands = [text for text in dots if re.fullmatch(r"[1-9]\d{0,2}\.\d{3}", text)]
        return bool(sheet.decimal_comma and ours in COUNTS and dots and len(thousands) == len(dots))
    if not all(re.fullmatch(r"[1-9]\d{0,2},\d{3}", text) for text in commas):
        return True
    if ours in COUNTS and not sheet.decimal_comma:
        return False
    if ours not in COUNTS:
        return True
    row = next(row for row, value in enumerate(sheet.columns[theirs]) if "," in str(value))
    raise ValueError(
        f"column {theirs!r} is {sheet.columns[theirs][row]!r} in row {sheet.rows[row]} of {sheet.source}: "
        "the comma may separate thousands or a fraction; write plain digits"
    )


def _number(text: str, comma_decimal: bool) -> Any:
    """A number as people write it, or the text where it is none."""
    bare = re.sub(r"[\s_'’\u00a0\u202f]", "", text)
    scale = 1.0
    if re.fullmatch(r"[-+]?[\d.,]+(?:[eE][-+]?\d+)?[kKmMbBgGtT]", bare):
        scale = UNITS[bare[-1].lower()]
        bare = bare[:-1]
    thousands, fraction = (".", ",") if comma_decimal else (",", ".")
    whole, _, part = bare.partition(fraction)
    grouped = re.fullmatch(rf"[-+]?\d{{1,3}}(\{thousands}\d{{3}})+", whole)
    if (thousands in whole and not grouped) or thousands in part:
        return text
    bare = whole.replace(thousands, "") + ("." + part if part else "")
    try:
        return float(bare) * scale
    except ValueError:
        return text


def _merged(sheets: Sequence[_Sheet]) -> _Sheet:
    """The rows of all files under one another; a column that a file lacks is blank there."""
    names = list(dict.fromkeys(name for sheet in sheets for name in sheet.columns))
    columns: Columns = {name: [] for name in names}
    rows: list[int] = []
    for sheet in sheets:
        for name in names:
            default = Path(sheet.source).stem if name == "run" else None
            columns[name] += sheet.columns.get(name, [default] * len(sheet.rows))
        rows += sheet.rows
    if "run" not in columns:
        columns["run"] = [Path(sheet.source).stem for sheet in sheets for _ in sheet.rows]
    return _Sheet(columns=columns, rows=rows, source=f"{len(sheets)} files")


def _join(sheet: _Sheet, about: _Sheet) -> None:
    """Columns of a second table, by run."""
    if "run" not in sheet.columns or "run" not in about.columns:
        raise ValueError(
            f"{sheet.source} and {about.source} must both have a column 'run' to be put together"
        )
    names = [str(name) for name in about.columns["run"]]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{about.source} has more than one row for the runs {twice[:ROWS_NAMED]}")
    missing = sorted({str(run) for run in sheet.columns["run"]} - set(names))
    if missing:
        raise ValueError(
            f"{about.source} has no row for the runs {missing[:ROWS_NAMED]} of {sheet.source}; its runs are "
            f"{', '.join(names[:ROWS_NAMED])}"
        )
    at = [names.index(str(run)) for run in sheet.columns["run"]]
    added = [name for name in about.columns if name not in sheet.columns]
    for name in added:
        sheet.columns[name] = [about.columns[name][row] for row in at]
    sheet.notes += about.notes
    sheet.notes.append(f"{about.source}: {', '.join(added)} of each run")


def _constants(sheet: _Sheet, chosen: Mapping[str, str]) -> None:
    for ours, text in chosen.items():
        number = _number_or_none(text)
        if ours not in sheet.columns and number is not None:
            sheet.columns[ours] = [number] * len(sheet.rows)
            sheet.notes.append(f"{sheet.source}: {ours} is {number:g} in all rows, as chosen")


def _clean(sheet: _Sheet, tokens_per_step: float, duplicates: Duplicates) -> None:
    """Leave out rows that are no evaluation, fill tokens in, order the rows of each run."""
    if "loss_nats" in sheet.columns:
        loss = sheet.columns["loss_nats"]
        sheet.drop(
            [_hole(value) for value in loss], "which have no loss: nothing was evaluated there"
        )
        loss = sheet.columns["loss_nats"]
        sheet.drop(
            [_is_diverged(value) for value in loss],
            "whose loss is not finite: diverged, or not evaluated",
        )
    if "state" in sheet.columns:
        states = [str(state).lower() for state in sheet.columns.pop("state")]
        sheet.drop(
            [state in ("crashed", "failed", "killed") for state in states],
            "of runs that crashed, failed or were killed",
        )
    if "tokens" in sheet.columns:
        sheet.drop([_hole(value) for value in sheet.columns["tokens"]], "which have no token count")
    _tokens(sheet, tokens_per_step)
    _order(sheet, duplicates)


def _is_diverged(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().lower() in DIVERGED
    return isinstance(value, int | float | np.floating) and not np.isfinite(value)


def _tokens(sheet: _Sheet, tokens_per_step: float) -> None:
    """Tokens from steps, where the file has no tokens and they can be counted."""
    if "tokens" in sheet.columns or "step" not in sheet.columns:
        return
    steps = sheet.columns["step"]
    if tokens_per_step > 0:
        each = [tokens_per_step] * len(steps)
        said = f"{tokens_per_step:g}"
    elif "batch_tokens" in sheet.columns:
        each = sheet.columns["batch_tokens"]
        said = "batch_tokens"
    else:
        raise ValueError(
            f"{sheet.source} counts steps and no tokens; say how many tokens a step has: --tokens-per-step, "
            "or a column batch_tokens"
        )
    if not all(isinstance(value, float) for value in (*steps, *each)):
        return
    sheet.columns["tokens"] = [step * size for step, size in zip(steps, each, strict=True)]
    sheet.notes.append(f"{sheet.source}: tokens are steps times {said}")
    sheet.drop([step == 0 for step in steps], "at step 0, before any training")


def _order(sheet: _Sheet, duplicates: Duplicates) -> None:
    """Rows of each run by tokens; rows that say the same twice left out, those that disagree settled."""
    needed = ("run", "tokens", "loss_nats")
    if not all(name in sheet.columns for name in needed):
        return
    if not all(isinstance(value, float) for name in needed[1:] for value in sheet.columns[name]):
        return  # the table refuses what is no number, and names the row
    _settle(sheet, duplicates)
    runs, tokens = [str(run) for run in sheet.columns["run"]], sheet.columns["tokens"]
    first = {run: number for number, run in reversed(list(enumerate(runs)))}
    order = sorted(range(len(runs)), key=lambda row: (first[runs[row]], tokens[row]))
    if any(
        tokens[row] < tokens[row - 1] and runs[row] == runs[row - 1] for row in range(1, len(runs))
    ):
        sheet.notes.append(f"{sheet.source}: rows of a run are put in the order of their tokens")
    sheet.columns = {name: [values[row] for row in order] for name, values in sheet.columns.items()}
    sheet.rows = [sheet.rows[row] for row in order]


def _settle(sheet: _Sheet, duplicates: Duplicates) -> None:
    """Leave out all but one of the rows of a run at one token count."""
    keys = zip(map(str, sheet.columns["run"]), sheet.columns["tokens"], strict=True)
    losses = sheet.columns["loss_nats"]
    by_key: dict[tuple[str, float], list[int]] = {}
    for position, key in enumerate(keys):
        by_key.setdefault(key, []).append(position)
    again, settled = ([False] * len(losses) for _ in range(2))
    for (run, tokens), positions in by_key.items():
        values = [losses[position] for position in positions]
        agree = len(set(values)) == 1
        if not agree and duplicates == "refuse":
            rows = ", ".join(str(sheet.rows[position]) for position in positions[:ROWS_NAMED])
            raise ValueError(
                f"rows {rows} of {sheet.source} are of one run ({run}) at one token count ({tokens:g}), "
                f"with losses {', '.join(f'{value:g}' for value in values[:ROWS_NAMED])}: the overlap of a "
                "stitched log, or evaluations of several texts. Keep the rows of one, or choose: "
                "--duplicates last, or mean"
            )
        if duplicates == "mean":
            losses[positions[-1]] = float(np.mean(values))
        for position in positions[:-1]:
            (again if agree else settled)[position] = True
    sheet.drop(
        [a or b for a, b in zip(again, settled, strict=True)],
        f"which repeat a token count of their run: {sum(again)} say the same, for {sum(settled)} the "
        f"{duplicates} of several losses was taken",
    )


def _text(data: bytes, path: Path) -> str:
    """The text of a file: UTF-16 where it begins with that mark, else UTF-8."""
    marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    encoding = "utf-16" if data.startswith(marks) else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path.name} is not {encoding} text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error


DELIMITERS = (",", ";", "\t", "|")
"""Between the fields of a .csv file, as spreadsheets of several countries write it."""


def _separated(text: str, path: Path) -> tuple[Columns, str]:
    """Columns of separated fields, and the separator: that under which most of the header is known."""
    first = next((line for line in text.splitlines() if line.strip()), "")

    def rows(delimiter: str, some: str) -> list[list[str]]:
        parsed = csv.reader(
            io.StringIO(some, newline=""), delimiter=delimiter, skipinitialspace=True
        )
        return [row for row in parsed if any(cell.strip() for cell in row)]

    def known(delimiter: str) -> tuple[int, int]:
        names = [name for row in rows(delimiter, first) for name in row]
        return sum(bool(_guess(name)[0]) for name in names), len(names)

    delimiter = max(DELIMITERS, key=known)
    header, *cells = rows(delimiter, text) or [[]]
    names = [name.strip() for name in header]
    _refuse_twice(names, path.name)
    for number, row in enumerate(cells):
        if len(row) != len(names):
            raise ValueError(
                f"row {number} of {path.name} has {len(row)} fields, and its header has {len(names)} "
                f"({', '.join(names)}); mend the row"
            )
    columns = {name: [row[at] for row in cells] for at, name in enumerate(names) if name}
    return columns, delimiter


def _objects(text: str, path: Path) -> Columns:
    """Columns of JSON lines, by every name that occurs; None where a row lacks one."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _refuse_twice([name for name, _ in pairs], path.name)
        return dict(pairs)

    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line, object_pairs_hook=unique)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"line {number} of {path.name} is not JSON ({error.msg}); mend or remove it"
                ) from error
            if not isinstance(row, dict):
                raise ValueError(
                    f"line {number} of {path.name} is {line[:40]!r}; give one object per row"
                )
            rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _refuse_twice(names: Sequence[str], source: str) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1 and name.strip()]
    if twice:
        raise ValueError(
            f"{source} has more than one column {twice}, and its columns are {', '.join(names)}; drop or "
            "rename all but one"
        )
