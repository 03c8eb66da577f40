"""A table of training runs: one row per evaluated checkpoint."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from fourfold_gemstones.architecture import Architecture, Embeddings

Resource = Literal["flops", "flops_6nt", "gpu_hours", "seconds"]
"""What a budget is counted in: the architecture's FLOPs, 6 N T, or measured time."""
Grouping = Literal["run", "shape", "row"]
"""What is drawn as one in a bootstrap: a training run, all runs of a shape, or single rows."""

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
"""Names of columns in the published frames and in Epoch AI's file, and ours."""
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
MAY_BE_ZERO = frozenset({"seed", "step"})
"""Columns in which zero is a value like any other."""
LARGEST_LOSS_NATS = 25.0
"""A cross-entropy above this is a perplexity, a sum, or a diverged run."""
FEWEST_TOKENS = 1_000.0
"""A largest token count below this is a count of steps, or in units of millions or billions."""
ROWS_NAMED = 8
"""Offending rows named in one message."""


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
    """Checked columns of equal length; every number is float64, so that 6 N T cannot overflow.

    Raises:
        ValueError: A required column is missing, a value is not finite or not positive, a run has
            two rows at one token count, or its token counts decrease. The message names the rows.
    """

    run: Shaped[np.ndarray, " row"]
    """Name of the training run a checkpoint belongs to."""
    columns: Mapping[str, Float[np.ndarray, " row"]]
    """`tokens` and `loss_nats` (nats per token) always; `width`, `depth`, `parameters` (all
    weights, both embedding tables), `flops`, `gpu_hours`, `seconds` (cumulative) where known."""
    architecture: Architecture | UnknownArchitecture = UnknownArchitecture()
    """How to count FLOPs and embedding tables from width and depth."""
    source: str = "memory"
    """Where the rows came from: a file name."""
    digest: str = "none"
    """SHA-256 of the file's bytes."""

    def __post_init__(self) -> None:
        for name in ("tokens", "loss_nats"):
            if name not in self.columns:
                raise ValueError(
                    f"column {name!r} is missing from {self.source} (has {sorted(self.columns)}); "
                    f"add it, or rename the column that holds it"
                )
        if len(self.run) == 0:
            raise ValueError(
                f"{self.source} has no rows; a law needs at least as many as parameters"
            )
        for name, values in self.columns.items():
            self._check_values(name, values)
        self._check_units()
        self._check_order()

    def _check_values(self, name: str, values: Float[np.ndarray, " row"]) -> None:
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
        """Columns by our names or the published ones; without `run`, every row is its own run."""
        named = {ALIASES.get(str(name), str(name)): values for name, values in columns.items()}
        numbers: dict[str, Float[np.ndarray, " row"]] = {}
        for name in NUMERIC:
            if name in named:
                numbers[name] = _to_float(name, named[name], source)
        length = len(next(iter(numbers.values()))) if numbers else 0
        for name, values in numbers.items():
            if len(values) != len(named.get("run", values)):
                raise ValueError(
                    f"column {name!r} of {source} has {len(values)} rows and 'run' has "
                    f"{len(named['run'])}; give columns of equal length"
                )
        run = named.get("run", [f"row {row}" for row in range(length)])
        return cls(
            run=np.asarray([str(name) for name in run]),
            columns=MappingProxyType(numbers),
            architecture=architecture,
            source=source,
            digest=digest,
        )

    @classmethod
    def from_frame(
        cls,
        frame: Frame,
        *,
        architecture: Architecture | UnknownArchitecture = UnknownArchitecture(),
    ) -> RunTable:
        """A pandas or polars frame, without importing either."""
        columns = {str(name): list(frame[name]) for name in frame.columns}
        return cls.from_columns(columns, architecture=architecture, source="a frame")

    @classmethod
    def read(
        cls,
        path: Path | str,
        *,
        architecture: Architecture | UnknownArchitecture = UnknownArchitecture(),
    ) -> RunTable:
        """A `.csv`, `.jsonl` (one object per row) or `.parquet` file.

        Raises:
            ValueError: The file is absent, of another kind, or its rows are refused.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"no file {path}; give the path of a .csv, .jsonl or .parquet table")
        data = path.read_bytes()
        match path.suffix:
            case ".csv":
                rows = list(csv.DictReader(data.decode("utf-8-sig").splitlines()))
                columns = _columns(rows, path)
            case ".jsonl" | ".ndjson":
                rows = [json.loads(line) for line in data.decode().splitlines() if line.strip()]
                columns = _columns(rows, path)
            case ".parquet":
                columns = read_parquet(path)
            case other:
                raise ValueError(
                    f"{path.name} ends in {other!r}, and .csv, .jsonl and .parquet can be read; "
                    "convert it to one of these"
                )
        return cls.from_columns(
            columns,
            architecture=architecture,
            source=path.name,
            digest=hashlib.sha256(data).hexdigest(),
        )

    def column(self, name: str) -> Float[np.ndarray, " row"]:
        """A column by name.

        Raises:
            ValueError: The table lacks it.
        """
        if name == "parameters" and name not in self.columns:
            return self._architecture("parameters").parameters(
                self.column("width"), self.column("depth")
            )
        if name not in self.columns:
            raise ValueError(
                f"{self.source} has no column {name!r} (has {sorted(self.columns)}); add the "
                "column, "
                "or choose a law that does not read it"
            )
        return self.columns[name]

    def _architecture(self, purpose: str) -> Architecture:
        match self.architecture:
            case Architecture() as architecture:
                return architecture
            case UnknownArchitecture():
                raise ValueError(
                    f"{self.source} does not say {purpose}, and its architecture is unknown; add "
                    "the "
                    f"column, or pass architecture=Architecture(vocabulary=..., context=..., "
                    f"head_width=...)"
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
        if "flops" in self.columns:
            return self.columns["flops"]
        architecture = self._architecture("its FLOPs")
        return (
            architecture.flops_per_token(self.column("width"), self.column("depth"))
            * self.columns["tokens"]
        )

    def resource(self, kind: Resource) -> Float[np.ndarray, " row"]:
        """What each row had cost."""
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


def read_parquet(path: Path) -> dict[str, list[Any]]:
    """Columns of a Parquet file by name; needs the extra `fourfold-gemstones[parquet]`."""
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pydict()


def _to_float(name: str, values: Any, source: str) -> Float[np.ndarray, " row"]:
    """Numbers as float64; text that is no number is refused with its row."""
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


def _columns(rows: Sequence[Mapping[str, Any]], path: Path) -> dict[str, list[Any]]:
    """Rows to columns; every row must have every column of the first that we read."""
    if not rows:
        return {"tokens": [], "loss_nats": []}
    known = [name for name in rows[0] if ALIASES.get(name, name) in (*NUMERIC, "run")]
    for number, row in enumerate(rows):
        absent = [name for name in known if row.get(name) in (None, "")]
        if absent:
            raise ValueError(
                f"row {number} of {path.name} lacks {absent}; fill them or drop the row"
            )
    return {name: [row[name] for row in rows] for name in known}
