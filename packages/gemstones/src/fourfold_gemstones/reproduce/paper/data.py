"""The published measurements and parameters, read from a copy of them that the user has.

Measurements: folder `wandb_dfs` of the paper's repository (MIT). Parameters: its folders
`parameters*`. Epoch AI's digitised Chinchilla points (Besiroglu et al. 2024): `data/` of the same.
Nothing of this is part of this package.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import warnings
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from types import MappingProxyType

import numpy as np

from fourfold_gemstones.architecture import GEMSTONES, Embeddings
from fourfold_gemstones.laws import CHINCHILLA, SHAPE_ONLY, WIDTH_DEPTH, PowerLaw, Variable
from fourfold_gemstones.parametric import ParametricLaw
from fourfold_gemstones.runs import RunsWarning, RunTable, StrPath, read_parquet

TOKENS_PER_STEP = 2_048 * 2_048
"""Tokens per optimizer step of every published run."""
DEVICES_PER_NODE = 8
"""Graphics dies per Frontier node."""
OUTLIERS = 5
"""Points with the largest loss that Epoch AI leaves out of its 245."""
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
FITTED = ("parameters_delta-3", "parameters_delta-4")
"""Folders of approach-3 parameters; the name ends in the exponent of the Huber threshold."""


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


def published_frame(folder: StrPath, name: str) -> RunTable:
    """Rows of `wandb_df_for_fitting_<name>.jsonl`, for example `hot_100b+`.

    Raises:
        ValueError: There is no such frame; the message lists those there are.
    """
    path = Path(folder) / "wandb_dfs" / f"wandb_df_for_fitting_{name}.jsonl"
    if not path.is_file():
        prefix = "wandb_df_for_fitting_"
        frames = sorted(file.stem.removeprefix(prefix) for file in path.parent.glob(f"{prefix}*"))
        raise ValueError(
            f"no published frame {name!r} under {folder} (there are {frames}); give the path of a "
            "copy of the paper's repository"
        )
    with warnings.catch_warnings():
        # The frames of Chinchilla's points name no runs: each of its points is one.
        warnings.simplefilter("ignore", RunsWarning)
        table = RunTable.read(path)
    if not table.has("width"):
        return table
    columns = dict(table.columns)
    columns["seconds"] = columns["seconds_per_step"] * columns["step"]
    columns["gpu_hours"] = columns["seconds"] * columns["num_nodes"] * DEVICES_PER_NODE / 3600
    return replace(table, columns=MappingProxyType(columns), architecture=GEMSTONES)


def chinchilla_points(folder: StrPath, *, outliers: int = OUTLIERS) -> RunTable:
    """Epoch AI's points of Hoffmann et al. 2022, figure 4, less those of largest loss."""
    name = "epoch_chinchilla_svg_extracted_data.csv"
    path = next(
        (at for at in (Path(folder) / name, Path(folder) / "data" / name) if at.is_file()), None
    )
    if path is None:
        raise ValueError(
            f"no {name} in {folder} or its data/; give the path of a copy of the paper's repository"
        )
    data = path.read_bytes()
    rows = list(csv.DictReader(StringIO(data.decode(), newline=None)))
    parameters = np.asarray([float(row["Model Size"]) for row in rows])
    flops = np.asarray([float(row["Training FLOP"]) for row in rows])
    table = RunTable.from_columns(
        {
            "run": [f"row {row}" for row in range(len(rows))],
            "parameters": parameters,
            "tokens": flops / (6 * parameters),
            "flops": flops,
            "loss_nats": np.asarray([float(row["loss"]) for row in rows]),
        },
        source=name,
        digest=hashlib.sha256(data).hexdigest(),
    )
    rank = np.argsort(np.argsort(table.column("loss_nats")))
    return table.where(rank < len(table) - outliers)


def _jsons(folder: StrPath, group: str, pattern: str) -> list[Path]:
    """Files of one folder of parameters, which may lie in the root or in `published_parameters`."""
    files = sorted(Path(folder).glob(f"{group}/{pattern}"))
    files = files or sorted(Path(folder).glob(f"published_parameters/{group}/{pattern}"))
    if not files:
        raise ValueError(
            f"no {group}/{pattern} under {folder}; give the path of a copy of the paper's repository"
        )
    return files


def published_fits(folder: StrPath) -> tuple[PublishedFit, ...]:
    """All approach-3 files, in the order of their names."""
    kinds: dict[str, tuple[Variable, ...]] = {
        "width_depth_parameters": WIDTH_DEPTH,
        "width_depth": SHAPE_ONLY,
        "parameters": CHINCHILLA,
    }
    fits = []
    for group in FITTED:
        for path in _jsons(folder, group, "approach_3_*.json"):
            kind, frame = path.stem.removeprefix("approach_3_").split("_grid_search_0_")
            content = json.loads(path.read_text())
            variables = kinds[kind]
            estimate = PowerLaw(
                variables=variables,
                log_coefficients=tuple(content["coefficients"]["0"]),
                exponents=tuple(content["exponents"]["0"]),
                log_floor=content["irreducible_error"]["0"],
            )
            less_one = frame.endswith("_no_embeds")
            law = ParametricLaw(
                variables=variables,
                delta=float(f"1e{group.removeprefix('parameters_delta')}"),
                embeddings=Embeddings.ONE if less_one else Embeddings.BOTH,
            )
            fits.append(
                PublishedFit(
                    name=f"{group.removeprefix('parameters_')}/{path.stem}",
                    frame=frame.removesuffix("_no_embeds"),
                    law=law,
                    estimate=estimate,
                    objective=content["loss"]["0"],
                )
            )
    return tuple(fits)


def published_lines(folder: StrPath) -> tuple[PublishedLine, ...]:
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
    for path in _jsons(folder, "parameters", "approach_1_*.json"):
        label = path.stem.removeprefix("approach_1_linear_regression_")
        target = next(name for name in targets if label.startswith(name))
        rest = label.removeprefix(target).strip("_")
        none = rest.endswith("no_embeds")
        content = json.loads(path.read_text())
        lines.append(
            PublishedLine(
                name=path.stem,
                frame=frames[rest.removesuffix("no_embeds").strip("_")],
                target=target,
                embeddings=Embeddings.NONE if none else Embeddings.BOTH,
                slope=content["coef"][0],
                intercept=content["intercept"],
            )
        )
    return tuple(lines)


def preflight(folder: StrPath) -> tuple[tuple[int, int, float, float], ...]:
    """Width, depth, learning rate and loss of the 24 runs of the learning-rate preflight.

    Raises:
        ValueError: The file is absent.
    """
    name = "preflight_mup_olmo_variant.csv"
    path = next(
        (at for at in (Path(folder) / name, Path(folder) / "data" / name) if at.is_file()), None
    )
    if path is None:
        raise ValueError(
            f"no {name} in {folder} or its data/; give the path of a copy of the paper's repository"
        )
    runs = []
    for row in csv.DictReader(StringIO(path.read_text(), newline=None)):
        words = re.match(r"PyGemma-(\d+)x(\d+)_.*_lr([0-9.e+-]+)_", row["Name"])
        if words is not None:
            loss = float(row["scaling/global_loss"])
            runs.append((int(words[1]), int(words[2]), float(words[3]), loss))
    return tuple(runs)


Checkpoint = tuple[int, int, int]
"""Width, depth and step of an evaluated checkpoint."""
LAST_STEP = 83_475
"""The step that the repository calls "main"."""
TEXTS = ("fineweb_edu", "fineweb_dclm")
"""Texts other than the suite's own on which every checkpoint was scored, as their files are named."""
TASKS = ("mmlu", "arce", "arcc", "hellaswag")
"""Tasks whose losses the paper averages."""


def _either(folder: StrPath, *names: str) -> Path | None:
    """The first of some files that is there, in the root of the copy or where the repository has it."""
    places = [Path(folder) / at / name for name in names for at in ("benchmarks", ".")]
    return next((path for path in places if path.is_file()), None)


def _checkpoint(revision: str) -> Checkpoint:
    """Of "Gemstone-256x23-main" or "Gemstone-256x23-step_00002385"."""
    words = re.fullmatch(r"Gemstone-(\d+)x(\d+)[-/](?:step_(\d+)|main)", revision)
    if words is None:
        raise ValueError(
            f"{revision!r} names no checkpoint; expected Gemstone-256x23-step_00002385 or -main"
        )
    return int(words[1]), int(words[2]), int(words[3]) if words[3] else LAST_STEP


def benchmark_accuracy(folder: StrPath) -> dict[Checkpoint, float]:
    """Mean accuracy of the nine benchmarks by checkpoint; empty where the file is not there."""
    path = _either(folder, "light_eval_df.parquet", "light_eval_df.csv")
    if path is None:
        return {}
    if path.suffix == ".parquet":
        columns = read_parquet(path)
    else:
        rows = list(csv.DictReader(StringIO(path.read_text(), newline=None)))
        columns = {name: [row[name] for row in rows] for name in rows[0]}
    revisions = next(values for name, values in columns.items() if "Gemstone" in str(values[0]))
    scores = [values for values in columns.values() if values is not revisions]
    means = np.asarray(scores, dtype=np.float64).mean(axis=0)
    return {_checkpoint(str(at)): float(mean) for at, mean in zip(revisions, means, strict=True)}


def task_losses(folder: StrPath) -> dict[Checkpoint, float]:
    """Mean answer loss of four tasks by checkpoint; empty where the files are not there.

    From the repository's 3,080 files of single answers, or from `task_losses_mean.csv`, a table of
    their means.
    """
    path = _either(folder, "task_losses_mean.csv")
    if path is not None:
        means: dict[Checkpoint, float] = {}
        for row in csv.DictReader(StringIO(path.read_text(), newline=None)):
            width, depth = row["run"].split("x")
            at = (int(width), int(depth), int(row["step"]))
            means[at] = float(np.mean([float(row[task]) for task in TASKS]))
        return means
    by_task: dict[Checkpoint, list[float]] = {}
    for file in sorted((Path(folder) / "benchmarks/bhagia_task_losses").glob("*/*/losses_*.json")):
        if file.stem.removeprefix("losses_") in TASKS:
            answers = [loss for losses in json.loads(file.read_text()).values() for loss in losses]
            at = _checkpoint(f"{file.parent.parent.name}/{file.parent.name}")
            by_task.setdefault(at, []).append(float(np.mean(answers)))
    return {at: float(np.mean(means)) for at, means in by_task.items()}


def text_losses(folder: StrPath, text: str) -> dict[Checkpoint, float]:
    """Loss of every checkpoint on another text; empty where the file is not there."""
    path = _either(folder, f"{text}_losses_combined.jsonl")
    if path is None:
        return {}
    rows = [json.loads(line) for line in path.read_text().split("\n") if line]
    return {(row["width"], row["depth"], row["step"]): row["final_loss"] for row in rows}
