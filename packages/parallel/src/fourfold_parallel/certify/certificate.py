"""A model's certificate: its toy on every grid of a number of ranks, and from grid to grid."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from fourfold_parallel.certify.compare import QUANTITIES, ROWS, GridOutcome, on_grids, worst_of
from fourfold_parallel.certify.reshard import resharded
from fourfold_parallel.certify.toys import toy
from fourfold_parallel.common.axes import AXES
from fourfold_parallel.common.files import StrPath, write_text
from fourfold_parallel.common.progress import DONE, Progress, silent
from fourfold_parallel.planning.jobs import config_of
from fourfold_parallel.testing.grids import Sizes, factorisations
from fourfold_parallel.testing.ranks import LawBrokenError, close_ranks, run_on_ranks

DtypeName = Literal["float64", "bfloat16"]
MOST_RANKS = 16
"""Processes that one machine should be asked to hold."""
UNCHECKED: dict[str, Any] = {"checks": False}
"""The grid's own check looks at what is compared here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """The results of every grid."""

    model: str
    model_type: str
    ranks: int
    dtypes: tuple[DtypeName, ...]
    grids: Mapping[DtypeName, Mapping[Sizes, GridOutcome]]
    pairs: Mapping[tuple[Sizes, Sizes], GridOutcome] = field(
        default_factory=dict[tuple[Sizes, Sizes], GridOutcome]
    )
    """Of the grid that saved and the one that loaded."""
    toy: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The configuration that was run."""
    elapsed_s: float = 0.0

    @property
    def outcomes(self) -> list[GridOutcome]:
        """All of them."""
        grids = [outcome for by_grid in self.grids.values() for outcome in by_grid.values()]
        return [*grids, *self.pairs.values()]

    @property
    def holds(self) -> bool:
        """True where some grid is right, and none is wrong or crashes."""
        results = {outcome.result for outcome in self.outcomes}
        return "equal" in results and not results & {"wrong", "crash"}

    @property
    def verdict(self) -> str:
        """In a sentence."""
        counts = {
            result: sum(outcome.result == result for outcome in self.outcomes)
            for result in ("equal", "refused", "wrong", "crash")
        }
        said = ", ".join(f"{count} {result}" for result, count in counts.items() if count)
        return f"{'holds' if self.holds else 'does not hold'}: {said}"

    def largest(self, dtype: DtypeName) -> dict[str, float]:
        """The largest difference of each quantity over all grids."""
        by_grid = self.grids[dtype].values()
        return {
            name: max((o.differences[name] for o in by_grid if name in o.differences), default=0.0)
            for name in QUANTITIES
        }

    def own(self) -> Mapping[str, float]:
        """The distance of one process in bfloat16 from float64."""
        by_grid = self.grids.get("bfloat16", {}).values()
        return next((outcome.own for outcome in by_grid if outcome.own), {})

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model": self.model,
            "model_type": self.model_type,
            "holds": self.holds,
            "verdict": self.verdict,
            "ranks": self.ranks,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "elapsed_s": round(self.elapsed_s, 1),
            "grids": {
                dtype: {named(sizes): outcome.as_dict() for sizes, outcome in by_grid.items()}
                for dtype, by_grid in self.grids.items()
            },
            "pairs": {
                f"{named(source)} to {named(target)}": outcome.as_dict()
                for (source, target), outcome in self.pairs.items()
            },
            "toy": self.toy,
        }

    def save(self, path: Path) -> None:
        """As JSON."""
        write_text(path, json.dumps(self.as_dict(), indent=1) + "\n")


def named(sizes: Sizes) -> str:
    """A grid by the axes that it uses."""
    used = [f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True) if size > 1]
    return ",".join(used) or "one rank"


def certify(
    model: StrPath | PretrainedConfig,
    *,
    ranks: int = 8,
    dtypes: Sequence[DtypeName] = ("float64", "bfloat16"),
    progress: Progress = silent,
) -> Certificate:
    """Compare a model's toy with itself on every grid, and carry it from grid to grid.

    Args:
        model: A hub id, a folder, a `config.json`, or a configuration; no weights are read.
        ranks: Processes of this machine; every ordered factorisation is tried.
        dtypes: In which it is computed.
        progress: Told after each grid and each pair.

    Raises:
        ValueError: There is no such configuration, it is of no causal language model, or there are more
            ranks than one machine should hold.
    """
    started_s = time.perf_counter()
    config = model if isinstance(model, PretrainedConfig) else config_of(model)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{config.model_type} is no causal language model of transformers {transformers.__version__}; "
            "name one that AutoModelForCausalLM makes"
        )
    if not 1 <= ranks <= MOST_RANKS:
        raise ValueError(
            f"ranks={ranks} is none or more than the {MOST_RANKS} that this machine should hold; use 8"
        )
    small, grids = toy(config), factorisations(ranks)
    pairs = [*zip(grids, [*grids[1:], grids[0]], strict=True)] if ranks > 1 else []
    total, done = len(grids) * len(dtypes) + len(pairs), 0
    rows = ranks * -(-ROWS // ranks)
    by_grid: dict[DtypeName, dict[Sizes, GridOutcome]] = {dtype: {} for dtype in dtypes}
    for dtype in dtypes:
        for sizes in grids:
            [by_grid[dtype][sizes]] = _on_ranks(
                ranks, on_grids, config=small, grids=[sizes], dtype=getattr(torch, dtype),
                how=UNCHECKED, rows=rows,
            )  # fmt: skip
            done += 1
            progress(done, total, f"{dtype} {named(sizes)}")
    carried = {}
    for source, target, folder in _folders(pairs):
        [carried[source, target]] = _on_ranks(
            ranks, resharded, config=small, source=source, target=target, dtype=getattr(torch, dtypes[0]),
            how=UNCHECKED, rows=rows, folder=folder,
        )  # fmt: skip
        done += 1
        progress(done, total, f"{named(source)} to {named(target)}")
    progress(total, total, DONE)
    return Certificate(
        model=config.model_type if isinstance(model, PretrainedConfig) else str(model),
        model_type=config.model_type,
        ranks=ranks,
        dtypes=tuple(dtypes),
        grids=by_grid,
        pairs=carried,
        toy=json.loads(small.to_json_string()),
        elapsed_s=time.perf_counter() - started_s,
    )


def _folders(pairs: Sequence[tuple[Sizes, Sizes]]) -> Iterator[tuple[Sizes, Sizes, str]]:
    for source, target in pairs:
        with tempfile.TemporaryDirectory() as folder:
            yield source, target, folder


def _on_ranks(ranks: int, law: Any, **arguments: Any) -> list[GridOutcome]:
    """The outcomes over all ranks; they are started anew after a crash, which may leave them apart."""
    try:
        by_rank = run_on_ranks(ranks, law, **arguments)
    except LawBrokenError as error:
        return [GridOutcome(result="crash", message=str(error)[-400:])]
    by_rank = [given if isinstance(given, list) else [given] for given in by_rank]
    outcomes = [worst_of(of_ranks) for of_ranks in zip(*by_rank, strict=True)]
    if any(outcome.result == "crash" for outcome in outcomes):
        close_ranks(ranks)
    return outcomes
