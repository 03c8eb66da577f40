"""A table of training runs: one row per evaluated checkpoint."""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from fourfold_gemstones.architecture import Architecture, Embeddings
from fourfold_parallel.common.files import whole_file

StrPath = str | os.PathLike[str]
"""A path as a user writes it."""
Resource = Literal["flops", "flops_6nt", "gpu_hours", "seconds"]
"""Units of a budget: the architecture's FLOPs, 6 N T, or measured time."""
Grouping = Literal["run", "shape", "row"]
"""Units of a bootstrap: a training run, all runs of a shape, or single rows."""

ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "run_name": "run",
        "params_active_precise": "parameters",
        "params": "parameters",
        "Model Size": "parameters",
        "final_loss": "loss_nats",
        "loss": "loss_nats",
        "FLOPs": "flops",
        "Training FLOP": "flops",
    }
)
"""Names of columns in the published frames and in Epoch AI's file, and ours; capitals do not matter."""
NUMERIC = (
    "width",
    "depth",
    "parameters",
    "tokens",
    "loss_nats",
    "flops",
    "gpu_hours",
    "seconds",
    "step",
    "num_nodes",
    "seconds_per_step",
    "learning_rate",
    "seed",
)
"""Columns that are read as numbers; others are ignored, except `run`."""
_BY_LOWER_CASE = MappingProxyType(
    {name.lower(): name for name in (*NUMERIC, "run")}
    | {alias.lower(): name for alias, name in ALIASES.items()}
)
REQUIRED = ("tokens", "loss_nats")
"""Columns that every use of a table reads; any other is checked when it is read."""
DELIMITERS = (",", ";", "\t", "|")
"""Between the fields of a .csv file, as spreadsheets of several countries write it."""
MAY_BE_ZERO = frozenset({"seed", "step"})
"""Columns in which zero is a value like any other."""
LARGEST_LOSS_NATS = 25.0
"""A cross-entropy above this is a perplexity, a sum, or a diverged run."""
FEWEST_TOKENS = 1_000.0
"""A largest token count below this is a count of steps, or in units of millions or billions."""
ROWS_NAMED = 8
"""Offending rows named in one message."""


class RunsWarning(UserWarning):
    """A table that can be used, with a weakness that its user must know."""


@runtime_checkable
class Frame(Protocol):
    """The part of a pandas or polars frame that is used: column names, and columns by name."""

    @property
    def columns(self) -> Iterable[Any]:
        """Names of the columns."""
        ...

    def __getitem__(self, name: Any, /) -> Any:
        """One column."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class UnknownArchitecture:
    """The runs' architecture was not told: FLOPs and embedding tables cannot be counted."""


def _rows(mask: Bool[np.ndarray, " row"]) -> str:
    """The numbers of the offending rows, from zero, shortened."""
    rows = np.flatnonzero(mask)
    tail = f" and {len(rows) - ROWS_NAMED} more" if len(rows) > ROWS_NAMED else ""
    return f"row{'s' if len(rows) > 1 else ''} " + ", ".join(map(str, rows[:ROWS_NAMED])) + tail


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunTable:
    """Columns of equal length; every number is float64, so that 6 N T cannot overflow.

    A column is checked when it is read, tokens and losses at once: one that a law does not read may have
    holes.

    Raises:
        ValueError: A required column is missing, a value in it is not finite or not positive, a run has
            two rows at one token count, or its token counts decrease. The message names the rows.
    """

    run: Shaped[np.ndarray, " row"]
    """Name of the training run a checkpoint belongs to."""
    columns: Mapping[str, Float[np.ndarray, " row"]]
    """`tokens` and `loss_nats` (nats per token) always; `width`, `depth`, `parameters` (all
    weights, both embedding tables), `flops`, `gpu_hours`, `seconds` (cumulative) where known."""
    faults: Mapping[str, str] = field(default_factory=dict)
    """Why a column that the file has cannot be read, by name; it is not in `columns`."""
    architecture: Architecture | UnknownArchitecture = UnknownArchitecture()
    """The way to count FLOPs and embedding tables from width and depth."""
    source: str = "memory"
    """File name of the rows."""
    header: tuple[str, ...] = ()
    """Names of all columns of the file, those that are not read included; for messages."""
    digest: str = "none"
    """SHA-256 of the file's bytes."""

    def __post_init__(self) -> None:
        for name in REQUIRED:
            if name in self.faults:
                raise ValueError(self.faults[name])
            if name not in self.columns:
                raise ValueError(
                    f"column {name!r} is missing from {self.source}, whose columns are {self._names}; "
                    "add it, or rename the column that holds it"
                )
        if len(self.run) == 0:
            raise ValueError(
                f"{self.source} has no rows; a law needs at least as many as parameters"
            )
        for name in REQUIRED:
            self._check_values(name)
        self._check_units()
        self._check_order()

    @property
    def _names(self) -> str:
        return ", ".join(self.header or sorted(self.columns)) or "none"

    def _check_values(self, name: str) -> None:
        values = self.columns[name]
        assert len(values) == len(self.run), name
        bad = ~np.isfinite(values)
        if bad.any():
            raise ValueError(
                f"column {name!r} is not finite in {_rows(bad)} of {self.source}; drop these rows"
            )
        bad = values < 0 if name in MAY_BE_ZERO else values <= 0
        if bad.any():
            raise ValueError(
                f"column {name!r} is {values[bad][0]:g} in {_rows(bad)} of {self.source}, and must "
                "be positive because laws use its logarithm; drop these rows or mend the unit"
            )

    def _check_units(self) -> None:
        loss, tokens = self.columns["loss_nats"], self.columns["tokens"]
        high = loss > LARGEST_LOSS_NATS
        if high.any():
            raise ValueError(
                f"loss_nats is {loss.max():g} in {_rows(high)} of {self.source}, above "
                f"{LARGEST_LOSS_NATS:g}: a perplexity or a diverged run; give nats per token and drop "
                "diverged checkpoints"
            )
        if tokens.max() < FEWEST_TOKENS:
            raise ValueError(
                f"the largest token count in {self.source} is {tokens.max():g}, below "
                f"{FEWEST_TOKENS:g}: steps, or millions, or billions; give a plain count of tokens"
            )

    def _check_order(self) -> None:
        tokens = self.columns["tokens"]
        order = np.argsort(self.run, kind="stable")
        same = self.run[order][1:] == self.run[order][:-1]
        change = np.diff(tokens[order])
        for offence, bad in (
            ("repeats the token count of an earlier row of its run", same & (change == 0)),
            ("has fewer tokens than the row before it in its run", same & (change < 0)),
        ):
            if bad.any():
                rows = np.zeros(len(tokens), dtype=bool)
                rows[order[1:][bad]] = True
                raise ValueError(
                    f"{_rows(rows)} of {self.source} {offence} ({self.run[rows][0]}); stitched job "
                    "logs need their overlap removed, and rows of a run sorted by tokens"
                )

    def __len__(self) -> int:
        return len(self.run)

    @classmethod
    def from_columns(
        cls,
        columns: Mapping[str, Sequence[Any] | Shaped[np.ndarray, " row"]],
        *,
        architecture: Architecture | UnknownArchitecture = UnknownArchitecture(),
        source: str = "memory",
        digest: str = "none",
    ) -> RunTable:
        """Columns by our names or the published ones, in any case; without `run`, each row is a run.

        Raises:
            ValueError: Two columns mean the same, or the rows are refused.
        """
        named = {}
        for name, values in columns.items():
            known = _known(str(name))
            if known in named:
                given = [str(other) for other in columns if _known(str(other)) == known]
                raise ValueError(
                    f"columns {given} of {source} all mean {known!r}; drop or rename all but one"
                )
            named[known] = values
        read = [name for name in NUMERIC if name in named]
        length = len(named.get("run", named[read[0]] if read else ()))
        for name in read:
            if len(named[name]) != length:
                raise ValueError(
                    f"column {name!r} of {source} has {len(named[name])} rows and "
                    f"{'run' if 'run' in named else read[0]!r} has {length}; give columns of equal length"
                )
        run = named.get("run", [f"row {row}" for row in range(length)])
        _refuse_holes("run", run, source)
        numbers: dict[str, Float[np.ndarray, " row"]] = {}
        faults: dict[str, str] = {}
        for name in read:
            if length and all(_is_hole(value) for value in named[name]):
                continue  # an optional column that nobody filled in is none
            try:
                numbers[name] = _to_float(name, named[name], source)
            except ValueError as error:
                faults[name] = str(error)
        return cls(
            run=np.asarray([str(name) for name in run]),
            columns=MappingProxyType(numbers),
            faults=MappingProxyType(faults),
            architecture=architecture,
            source=source,
            header=tuple(str(name) for name in columns),
            digest=digest,
        )

    @classmethod
    def from_frame(
        cls,
        frame: Frame,
        *,
        architecture: Architecture | UnknownArchitecture = UnknownArchitecture(),
    ) -> RunTable:
        """A pandas or polars frame, without importing either.

        Warns:
            RunsWarning: It has no column `run`.
        """
        names = [str(name) for name in frame.columns]
        _refuse_twice(names, "a frame")
        columns = {str(name): list(frame[name]) for name in frame.columns}
        _warn_without_run(columns, "a frame")
        return cls.from_columns(columns, architecture=architecture, source="a frame")

    @classmethod
    def read(
        cls,
        path: StrPath,
        *,
        architecture: Architecture | UnknownArchitecture = UnknownArchitecture(),
    ) -> RunTable:
        """A `.csv` or `.tsv`, `.jsonl` (one object per row) or `.parquet` file.

        Fields of a .csv may be separated by commas, semicolons, tabs or bars, with blanks after them; text is
        UTF-8, or UTF-16 with the mark that spreadsheets write.

        Raises:
            ValueError: The file is absent, of another kind, or its rows are refused.

        Warns:
            RunsWarning: It has no column `run`.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"no file {path}; give the path of a .csv, .jsonl or .parquet table")
        data = path.read_bytes()
        match path.suffix:
            case ".csv" | ".tsv":
                columns = _separated(_text(data, path), path)
            case ".jsonl" | ".ndjson":
                columns = _objects(_text(data, path), path)
            case ".parquet":
                columns = read_parquet(path)
            case other:
                raise ValueError(
                    f"{path.name} ends in {other!r}, and .csv, .jsonl and .parquet can be read; "
                    "convert it to one of these"
                )
        columns = columns or {name: [] for name in ("run", *REQUIRED)}
        _warn_without_run(columns, path.name)
        return cls.from_columns(
            columns,
            architecture=architecture,
            source=path.name,
            digest=hashlib.sha256(data).hexdigest(),
        )

    def column(self, name: str) -> Float[np.ndarray, " row"]:
        """A column by name.

        Raises:
            ValueError: The table lacks it, or a value in it is no number, not finite or not positive.
        """
        if name == "parameters" and not self.has(name):
            return self._architecture("parameters").parameters(
                self.column("width"), self.column("depth")
            )
        if name in self.faults:
            raise ValueError(self.faults[name])
        if name not in self.columns:
            raise ValueError(
                f"{self.source} has no column {name!r}, its columns are {self._names}; add the column, "
                "or choose a law that does not read it"
            )
        self._check_values(name)
        return self.columns[name]

    def has(self, name: str) -> bool:
        """True where the rows tell a column, even one that `column` refuses."""
        return name in self.columns or name in self.faults

    def _architecture(self, purpose: str) -> Architecture:
        match self.architecture:
            case Architecture() as architecture:
                return architecture
            case UnknownArchitecture():
                raise ValueError(
                    f"{self.source} does not say {purpose}, and its architecture is unknown; add the "
                    "column, or pass architecture=Architecture(vocabulary=..., context=..., head_width=...)"
                )

    def parameters(self, embeddings: Embeddings) -> Float[np.ndarray, " row"]:
        """Parameters under a convention of counting the two embedding tables."""
        total = self.column("parameters")
        dropped = Embeddings.BOTH.tables - embeddings.tables
        if not dropped:
            return total
        vocabulary = self._architecture("how large its vocabulary is").vocabulary
        return total - dropped * vocabulary * self.column("width")

    def flops(self) -> Float[np.ndarray, " row"]:
        """Training FLOPs up to each row: the column where given, else counted from the shape."""
        if self.has("flops"):
            return self.column("flops")
        architecture = self._architecture("its FLOPs")
        return (
            architecture.flops_per_token(self.column("width"), self.column("depth"))
            * self.columns["tokens"]
        )

    def resource(self, kind: Resource) -> Float[np.ndarray, " row"]:
        """The cost of the training up to each row."""
        match kind:
            case "flops":
                return self.flops()
            case "flops_6nt":
                return 6 * self.column("parameters") * self.columns["tokens"]
            case "gpu_hours" | "seconds":
                return self.column(kind)

    def where(self, keep: Bool[np.ndarray, " row"]) -> RunTable:
        """The rows for which `keep` is true."""
        columns = {name: values[keep] for name, values in self.columns.items()}
        return replace(self, run=self.run[keep], columns=MappingProxyType(columns))

    def repeated(self, counts: Int[np.ndarray, " row"]) -> RunTable:
        """Each row as often as its count; a further copy belongs to a run of its own."""
        copies = [np.flatnonzero(counts > copy) for copy in range(int(counts.max()))]
        rows = np.concatenate(copies)
        names = [
            f"{self.run[row]}, copy {copy + 1}" if copy else str(self.run[row])
            for copy, of_copy in enumerate(copies)
            for row in of_copy
        ]
        columns = {name: values[rows] for name, values in self.columns.items()}
        return replace(self, run=np.asarray(names), columns=MappingProxyType(columns))

    def write(self, path: StrPath) -> None:
        """Write run and columns as CSV, which `read` takes."""
        with whole_file(Path(path)) as partial, partial.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("run", *self.columns))
            for run, *values in zip(self.run, *self.columns.values(), strict=True):
                writer.writerow((run, *(f"{value:.12g}" for value in values)))

    def with_losses(self, loss_nats: Float[np.ndarray, " row"]) -> RunTable:
        """The same runs with other losses."""
        columns = MappingProxyType({**self.columns, "loss_nats": loss_nats})
        return replace(self, columns=columns, source=f"{self.source} (other losses)")

    def groups(self, by: Grouping) -> tuple[tuple[str, ...], Int[np.ndarray, " row"]]:
        """Names of the groups in sorted order, and the number of each row's group."""
        match by:
            case "row":
                keys = np.asarray([f"{row:07d}" for row in range(len(self))])
            case "run":
                keys = self.run
            case "shape":
                width, depth = self.column("width"), self.column("depth")
                keys = np.asarray([f"{w:g}x{d:g}" for w, d in zip(width, depth, strict=True)])
        names, index = np.unique(keys, return_inverse=True)
        return tuple(str(name) for name in names), index


def _known(name: str) -> str:
    """Our name of a column, or the name itself where we read none such."""
    return _BY_LOWER_CASE.get(name.strip().lower(), name)


def _warn_without_run(columns: Mapping[str, Any], source: str) -> None:
    if not any(_known(name) == "run" for name in columns):
        warnings.warn(
            f"{source} has no column 'run': each row counts as a run of its own, and intervals over runs "
            "are too narrow where rows are checkpoints of one run; add the column",
            RunsWarning,
            stacklevel=3,
        )


def read_parquet(path: Path) -> dict[str, list[Any]]:
    """Columns of a Parquet file by name; needs the extra `fourfold-gemstones[parquet]`."""
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pydict()


def _is_hole(value: Any) -> bool:
    """True for what files and frames write where there is no value."""
    if isinstance(value, str):
        return value.strip().lower() in ("", "nan")
    return value is None or (isinstance(value, float | np.floating) and bool(np.isnan(value)))


def _to_float(name: str, values: Any, source: str) -> Float[np.ndarray, " row"]:
    """Numbers as float64; a hole or text that is no number is refused with its row."""
    _refuse_holes(name, values, source)
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        for row, value in enumerate(values):
            try:
                float(value)
            except (TypeError, ValueError):
                raise ValueError(
                    f"column {name!r} is {value!r} in row {row} of {source}, which is no number; "
                    "mend or drop the row"
                ) from None
        raise


def _refuse_holes(name: str, values: Any, source: str) -> None:
    holes = np.asarray([_is_hole(value) for value in values], dtype=bool)
    if holes.any():
        raise ValueError(
            f"column {name!r} has no value in {_rows(holes)} of {source}; fill it or drop these rows"
        )


def _refuse_twice(names: Sequence[str], source: str) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1 and name.strip()]
    if twice:
        raise ValueError(
            f"{source} has more than one column {twice}, and its columns are {', '.join(names)}; drop or "
            "rename all but one"
        )


def _text(data: bytes, path: Path) -> str:
    """The text of a file: UTF-16 where it begins with that mark, else UTF-8."""
    encoding = (
        "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    )
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path.name} is not {encoding} text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error


def _separated(text: str, path: Path) -> dict[str, list[Any]]:
    """Columns of separated fields; the separator is that under which most of the header is known."""
    first = next((line for line in text.splitlines() if line.strip()), "")

    def rows(delimiter: str, some: str) -> list[list[str]]:
        parsed = csv.reader(
            io.StringIO(some, newline=""), delimiter=delimiter, skipinitialspace=True
        )
        return [row for row in parsed if any(field.strip() for field in row)]

    def known(delimiter: str) -> tuple[int, int]:
        names = [name for row in rows(delimiter, first) for name in row]
        return sum(_known(name) in (*NUMERIC, "run") for name in names), len(names)

    header, *fields = rows(max(DELIMITERS, key=known), text) or [[]]
    names = [name.strip() for name in header]
    _refuse_twice(names, path.name)
    for number, row in enumerate(fields):
        if len(row) != len(names):
            raise ValueError(
                f"row {number} of {path.name} has {len(row)} fields, and its header has {len(names)} "
                f"({', '.join(names)}); mend the row"
            )
    return {name: [row[at] for row in fields] for at, name in enumerate(names) if name}


def _objects(text: str, path: Path) -> dict[str, list[Any]]:
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
