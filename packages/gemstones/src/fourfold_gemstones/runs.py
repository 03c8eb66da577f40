"""A table of training runs: one row per evaluated checkpoint."""

from __future__ import annotations

import csv
import os
import re
import warnings
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

NAMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "run": ("run", "run name", "run id", "name", "experiment", "model", "model name", "id"),
        "loss_nats": (
            "loss nats",
            "eval loss",
            "val loss",
            "valid loss",
            "validation loss",
            "validation loss nats",
            "final loss",
            "loss",
            "smooth loss",
            "train loss",
            "training loss",
        ),
        "tokens": (
            "tokens",
            "n tokens",
            "num tokens",
            "total tokens",
            "train tokens",
            "training tokens",
            "tokens seen",
            "tokens trained",
            "consumed tokens",
            "num input tokens seen",
            "d",
        ),
        "parameters": (
            "parameters",
            "params",
            "n params",
            "num params",
            "n parameters",
            "num parameters",
            "total params",
            "total parameters",
            "params active precise",
            "model size",
            "n",
        ),
        "step": ("step", "global step", "trainer global step", "steps", "iteration"),
        "width": ("width", "d model", "hidden size", "n embd", "embed dim", "model dim", "w"),
        "depth": ("depth", "n layers", "num layers", "n layer", "num hidden layers", "layers"),
        "learning_rate": ("learning rate", "lr", "max lr", "peak lr"),
        "batch_tokens": ("batch tokens", "tokens per step", "global batch size tokens"),
        "unique_tokens": ("unique tokens", "dataset tokens"),
        "loops": ("loops", "recurrence", "recurrences", "r"),
        "once_parameters": ("once parameters", "n once"),
        "looped_parameters": ("looped parameters", "n rec", "n looped"),
        "flops": ("flops", "training flop", "training flops", "total flops", "c"),
        "gpu_hours": ("gpu hours",),
        "seconds": ("seconds", "runtime", "relative time process"),
        "num_nodes": ("num nodes",),
        "seconds_per_step": ("seconds per step",),
        "seed": ("seed",),
    }
)
"""Names of columns, ours first and better ones before others; capitals and marks do not matter."""
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
    "batch_tokens",
    "unique_tokens",
    "loops",
    "once_parameters",
    "looped_parameters",
    "seed",
)
"""Columns that are read as numbers; others are ignored, except `run`."""
_BY_PLAIN_NAME = MappingProxyType(
    {alias: name for name, aliases in NAMES.items() for alias in aliases}
)
REQUIRED = ("tokens", "loss_nats")
"""Columns that every use of a table reads; any other is checked when it is read."""
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


UNKNOWN = UnknownArchitecture()


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
    architecture: Architecture | UnknownArchitecture = UNKNOWN
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
        architecture: Architecture | UnknownArchitecture = UNKNOWN,
        source: str = "memory",
        header: tuple[str, ...] = (),
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
            header=header or tuple(str(name) for name in columns),
            digest=digest,
        )

    @classmethod
    def from_frame(
        cls,
        frame: Frame,
        *,
        architecture: Architecture | UnknownArchitecture = UNKNOWN,
    ) -> RunTable:
        """A pandas or polars frame, without importing either.

        Warns:
            RunsWarning: It has no column `run`.
        """
        names = [str(name) for name in frame.columns]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"a frame has more than one column {twice}, and its columns are {', '.join(names)}; drop or "
                "rename all but one"
            )
        columns = {str(name): list(frame[name]) for name in frame.columns}
        warn_without_run(columns, "a frame")
        return cls.from_columns(columns, architecture=architecture, source="a frame")

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

    def beside(self, other: RunTable) -> RunTable:
        """The rows of both, with the columns that both have."""
        names = [name for name in self.columns if name in other.columns]
        columns = {
            name: np.concatenate([self.columns[name], other.columns[name]]) for name in names
        }
        return replace(
            self,
            run=np.concatenate([self.run, other.run]),
            columns=MappingProxyType(columns),
            source=f"{self.source} and {other.source}",
        )

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


def plain_name(name: str) -> str:
    """A column's name without capitals, marks and what stands in brackets."""
    bare = re.sub(r"\([^)]*\)|\[[^]]*\]", " ", name)
    bare = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", bare)
    return " ".join(re.sub(r"[^0-9a-z]+", " ", bare.lower()).split())


def _known(name: str) -> str:
    """Our name of a column, or the name itself where we read none such."""
    return _BY_PLAIN_NAME.get(plain_name(name), name)


def warn_without_run(columns: Mapping[str, Any], source: str) -> None:
    """Warn of a table in which each row counts as a run of its own."""
    if not any(_known(name) == "run" for name in columns):
        warnings.warn(
            f"{source} has no column 'run': each row counts as a run of its own, and intervals over runs "
            "are too narrow where rows are checkpoints of one run; add the column",
            RunsWarning,
            stacklevel=3,
        )


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
