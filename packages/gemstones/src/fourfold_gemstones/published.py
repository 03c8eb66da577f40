"""The paper's measurements and parameters, and Chinchilla's digitised points, which come with the package.

The tables lie in `measured/`, whose README names their source, licence and checksums. A frame is a
selection of them under the name that the paper's repository gives it, for example `hot_100b+`: all tokens,
every tenth billion.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from io import StringIO
from pathlib import Path
from types import MappingProxyType

import numpy as np

from fourfold_gemstones.architecture import GEMSTONES, Embeddings
from fourfold_gemstones.laws import CHINCHILLA, SHAPE_ONLY, WIDTH_DEPTH, PowerLaw, Variable
from fourfold_gemstones.parametric import ParametricLaw
from fourfold_gemstones.runs import RunTable

FOLDER = Path(__file__).with_name("measured")
TOKENS_PER_STEP = 2_048 * 2_048
"""Tokens per optimizer step of every published run."""
DEVICES_PER_NODE = 8
"""Graphics dies per Frontier node."""
OUTLIERS = 5
"""Points with the largest loss that Epoch AI leaves out of its 245."""
COARSE = 2_385
"""Steps between the checkpoints of the frames that are not called `_477`: ten billion tokens."""
NAMES = {
    "hot_100b+": "all tokens",
    "hot": "up to 100 B tokens",
    "hot_120b+_only": "from 120 B tokens",
    "lr_ablation_hot": "half the learning rate",
    "cool_begin": "before cooldown",
    "cool_end": "after cooldown",
    "hot_sampled_like_chinchilla": "5 models, 24 points",
    "slim_chinchilla": "Chinchilla, 28 points",
}
"""Frames by the name of their file, as documents and figures call them."""

Checkpoint = tuple[int, int, int]
"""Width, depth and step of an evaluated checkpoint."""
LAST_STEP = 83_475
"""The last step of a run, which the repository calls "main"."""
TEXTS = ("fineweb_edu", "fineweb_dclm")
"""Texts other than the suite's own on which every checkpoint was scored, as their columns are named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The checkpoints of a frame: a column of losses, and the widths and steps that belong to it."""

    losses: str = "loss"
    width: int = 0
    """Of all models, or 0."""
    every: int = 1
    first: int = 0
    last: int = LAST_STEP
    also: int = 0
    """A step that belongs to it too, or 0: runs at half the rate end ten steps early."""

    def holds(self, width: int, step: int) -> bool:
        """True for a checkpoint of the frame."""
        in_time = step % self.every == 0 and self.first <= step <= self.last
        return self.width in (0, width) and (in_time or step == self.also)


FRAMES: Mapping[str, Selection] = MappingProxyType(
    {
        "hot_477": Selection(last=23_850),
        "hot": Selection(last=23_850, every=COARSE),
        "hot_100b+_477": Selection(),
        "hot_100b+": Selection(every=COARSE),
        "hot_100b+_512x": Selection(every=COARSE, width=512),
        "hot_120b+_only_477": Selection(first=28_620),
        "hot_120b+_only": Selection(first=28_620, every=COARSE),
        "lr_ablation_hot_477": Selection(losses="half_rate"),
        "lr_ablation_hot": Selection(losses="half_rate", every=COARSE, also=23_840),
        "cool_begin": Selection(losses="before_cooldown"),
        "cool_end": Selection(losses="after_cooldown"),
    }
)
"""Frames that are cut from `checkpoints.csv`; others stand in `samples.csv` and `chinchilla.csv`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedFit:
    """One of the 42 approach-3 files: a law, the frame it was fitted to, its objective."""

    name: str
    frame: str
    law: ParametricLaw
    estimate: PowerLaw
    objective: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedLine:
    """One of the 24 approach-1 files: the line through a hull, in natural logarithms."""

    name: str
    frame: str
    target: str
    embeddings: Embeddings
    slope: float
    intercept: float


@cache
def _rows(name: str) -> tuple[Mapping[str, str], ...]:
    """Rows of one of the tables."""
    text = (FOLDER / f"{name}.csv").read_text(encoding="utf-8")
    return tuple(csv.DictReader(StringIO(text)))


@cache
def digest() -> str:
    """SHA-256 over the names and bytes of all tables."""
    total = hashlib.sha256()
    for path in sorted(FOLDER.glob("*.csv")):
        total.update(path.name.encode())
        total.update(path.read_bytes())
    return total.hexdigest()


@cache
def _models() -> Mapping[tuple[str, str], Mapping[str, str]]:
    return {(row["width"], row["depth"]): row for row in _rows("models")}


def _suite(name: str, rows: list[tuple[Mapping[str, str], str, float]]) -> RunTable:
    """Checkpoints of the paper's models as a table: rows, their losses and their tokens."""
    columns: dict[str, list[float]] = {
        key: [float(row[key]) for row, _, _ in rows] for key in ("width", "depth", "step")
    }
    models = [_models()[row["width"], row["depth"]] for row, _, _ in rows]
    nodes, pace, size = (
        np.asarray([float(model[key]) for model in models])
        for key in ("nodes", "seconds_per_step", "parameters")
    )
    seconds = pace * np.asarray(columns["step"])
    return RunTable.from_columns(
        {
            "run": [f"{row['width']}x{row['depth']}" for row, _, _ in rows],
            **columns,
            "parameters": size,
            "tokens": [tokens for _, _, tokens in rows],
            "loss_nats": [float(loss) for _, loss, _ in rows],
            "num_nodes": nodes,
            "seconds_per_step": pace,
            "seconds": seconds,
            "gpu_hours": seconds * nodes * DEVICES_PER_NODE / 3600,
        },
        architecture=GEMSTONES,
        source=f"the published frame {name}",
        digest=digest(),
    )


@cache
def published_frame(name: str) -> RunTable:
    """Rows of the paper's frame `wandb_df_for_fitting_<name>.jsonl`, for example `hot_100b+`.

    Raises:
        ValueError: There is no such frame; the message lists those there are.
    """
    if name in FRAMES:
        chosen = FRAMES[name]
        rows = [
            (row, row[chosen.losses], float(int(row["step"]) * TOKENS_PER_STEP))
            for row in _rows("checkpoints")
            if row[chosen.losses] and chosen.holds(int(row["width"]), int(row["step"]))
        ]
        return _suite(name, rows)
    sampled = [row for row in _rows("samples") if row["frame"] == name]
    if sampled:
        return _suite(name, [(row, row["loss_nats"], float(row["tokens"])) for row in sampled])
    points = [row for row in _rows("chinchilla") if row["frame"] == name and row["tokens"]]
    if points:
        return RunTable.from_columns(
            {
                "run": [f"point {number}" for number in range(len(points))],
                **{
                    key: [float(row[key]) for row in points]
                    for key in ("parameters", "tokens", "flops", "loss_nats")
                },
            },
            source=f"the published frame {name}",
            digest=digest(),
        )
    others = {row["frame"] for table in ("samples", "chinchilla") for row in _rows(table)}
    names = sorted({*FRAMES, *others} - {"chinchilla"})
    raise ValueError(f"no published frame {name!r}; there are {', '.join(names)}")


def chinchilla_points(*, outliers: int = OUTLIERS) -> RunTable:
    """Epoch AI's points of Hoffmann et al. 2022, figure 4, less those of largest loss."""
    rows = [row for row in _rows("chinchilla") if row["frame"] == "chinchilla"]
    parameters, flops, loss = (
        np.asarray([float(row[key]) for row in rows])
        for key in ("parameters", "flops", "loss_nats")
    )
    table = RunTable.from_columns(
        {
            "run": [f"row {row}" for row in range(len(rows))],
            "parameters": parameters,
            "tokens": flops / (6 * parameters),
            "flops": flops,
            "loss_nats": loss,
        },
        source="Chinchilla's points",
        digest=digest(),
    )
    return table.where(np.argsort(np.argsort(loss)) < len(table) - outliers)


def published_fits() -> tuple[PublishedFit, ...]:
    """All approach-3 files, in the order of their names."""
    kinds: dict[str, tuple[Variable, ...]] = {
        "width_depth_parameters": WIDTH_DEPTH,
        "width_depth": SHAPE_ONLY,
        "parameters": CHINCHILLA,
    }
    fits = []
    for row in _rows("fits"):
        group, _, stem = row["name"].partition("/")
        kind, frame = stem.removeprefix("approach_3_").split("_grid_search_0_")
        variables = kinds[kind]
        less_one = frame.endswith("_no_embeds")
        fits.append(
            PublishedFit(
                name=row["name"],
                frame=frame.removesuffix("_no_embeds"),
                law=ParametricLaw(
                    variables=variables,
                    delta=float(f"1e{group.removeprefix('delta')}"),
                    embeddings=Embeddings.ONE if less_one else Embeddings.BOTH,
                ),
                estimate=PowerLaw(
                    variables=variables,
                    log_coefficients=tuple(map(float, row["log_coefficients"].split())),
                    exponents=tuple(map(float, row["exponents"].split())),
                    log_floor=float(row["log_floor"]),
                ),
                objective=float(row["objective"]),
            )
        )
    return tuple(fits)


def published_lines() -> tuple[PublishedLine, ...]:
    """All approach-1 files, in the order of their names."""
    frames = {
        "": "hot_477",
        "100b+": "hot_100b+_477",
        "120b+_only": "hot_120b+_only_477",
        "lr_ablation": "lr_ablation_hot_477",
        "cooldown": "cool_end",
    }
    targets = ("tokens_per_param", "tokens", "params")
    lines = []
    for row in _rows("lines"):
        label = row["name"].removeprefix("approach_1_linear_regression_")
        target = next(name for name in targets if label.startswith(name))
        rest = label.removeprefix(target).strip("_")
        lines.append(
            PublishedLine(
                name=row["name"],
                frame=frames[rest.removesuffix("no_embeds").strip("_")],
                target=target,
                embeddings=Embeddings.NONE if rest.endswith("no_embeds") else Embeddings.BOTH,
                slope=float(row["slope"]),
                intercept=float(row["intercept"]),
            )
        )
    return tuple(lines)


def preflight() -> tuple[tuple[int, int, float, float], ...]:
    """Width, depth, learning rate and loss of the 24 runs of the learning-rate preflight."""
    return tuple(
        (int(row["width"]), int(row["depth"]), float(row["learning_rate"]), float(row["loss_nats"]))
        for row in _rows("rates")
    )


def _evaluated(value: Callable[[Mapping[str, str]], float | None]) -> dict[Checkpoint, float]:
    """A number of every checkpoint that has it."""
    values = {
        (int(row["width"]), int(row["depth"]), int(row["step"])): value(row)
        for row in _rows("checkpoints")
    }
    return {at: number for at, number in values.items() if number is not None}


def _mean(row: Mapping[str, str], prefix: str) -> float | None:
    values = [float(text) for name, text in row.items() if name.startswith(prefix) and text]
    return float(np.mean(values)) if values else None


def benchmark_accuracy() -> dict[Checkpoint, float]:
    """Mean accuracy of the nine benchmarks of 770 checkpoints."""
    return _evaluated(lambda row: _mean(row, "accuracy:"))


def task_losses() -> dict[Checkpoint, float]:
    """Mean answer loss of four tasks of 770 checkpoints."""
    return _evaluated(lambda row: _mean(row, "answer:"))


def text_losses(text: str) -> dict[Checkpoint, float]:
    """Loss of 770 checkpoints on another text, one of `TEXTS`.

    Raises:
        ValueError: It is none of them.
    """
    if text not in TEXTS:
        raise ValueError(f"no losses on {text!r}; the checkpoints were scored on {TEXTS}")
    return _evaluated(lambda row: float(row[text]) if row[text] else None)
