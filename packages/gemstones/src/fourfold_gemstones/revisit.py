"""The published measurements analysed again: what the paper reports, with how sure it is.

Every function here yields events of a record: plain numbers, derived from the measurements and
never the measurements themselves.
"""

from __future__ import annotations

import csv
import hashlib
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float
from scipy.optimize import curve_fit
from scipy.stats import spearmanr

from fourfold_gemstones import solve
from fourfold_gemstones.allocate import Compute, Free, Planner
from fourfold_gemstones.compare import GEMSTONE_SPLITS, mean_error
from fourfold_gemstones.counting import GEMSTONES, Embeddings
from fourfold_gemstones.envelope import Bins, EnvelopeLaw, Hull, Target, frontier
from fourfold_gemstones.laws import (
    SHAPE_ONLY,
    WIDTH_DEPTH,
    LawWarning,
    ParametricFit,
    ParametricLaw,
)
from fourfold_gemstones.null import EPOCH, HALF, coverage, noise_free
from fourfold_gemstones.published import (
    chinchilla_points,
    preflight,
    published_fits,
    published_frame,
    published_lines,
)
from fourfold_gemstones.table import RunTable
from fourfold_gemstones.uncertainty import (
    bootstrap,
    difference,
    leave_one_out,
    paired_bootstrap,
    percentile_interval,
    profile,
    shared_groups,
    slope,
)

Fields = Mapping[str, object]
"""Values of one event, by key."""
Events = Iterator[tuple[str, Fields]]
"""Kind and fields of each event of a record."""

SELECTIONS = (
    "hot_100b+",
    "hot",
    "hot_120b+_only",
    "lr_ablation_hot",
    "cool_begin",
    "cool_end",
    "hot_sampled_like_chinchilla",
    "slim_chinchilla",
)
"""The selections of data whose slopes the paper compares; the first is its baseline."""
DIFFERENCES = (
    ("lr_ablation_hot", "hot"),
    ("cool_end", "hot"),
    ("cool_end", "cool_begin"),
    ("hot", "hot_100b+"),
    ("hot_120b+_only", "hot_100b+"),
    ("cool_end", "hot_100b+"),
)
"""Pairs of selections over the same shapes, as the paper contrasts them."""
TOKEN_FLOORS = (0.0, 5e9, 1e10, 2e10, 5e10, 1.2e11)
"""Least tokens of the rows an envelope sees: the selection that moves approach 1 most."""
BUDGETS = (1e18, 1e19, 1e20, 1e21, 1e22)
"""FLOPs; the largest published run spent 4.5e21."""
FACTORS = (1 / 16, 1 / 4, 1.0, 4.0, 16.0)
"""Multiples of the optimal ratio of tokens to parameters."""


QUICK = (
    "published fits",
    "published lines",
    "Chinchilla points",
    "slopes and intervals",
    "paired differences",
    "envelopes and their null",
    "left-out models",
    "overtraining",
    "overspending",
    "cooldown",
    "learning rates",
    "benchmarks",
)
"""Parts that take seconds."""
WHOLE = (
    *QUICK[:7],
    "Huber thresholds",
    "embeddings",
    *QUICK[7:],
    "held-out error",
    "prescriptions",
    "coverage",
)
"""Every part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Revisit:
    """How much to resample in the analysis of the published measurements."""

    data_sha256: str
    """Over the names and bytes of every file that is read."""
    parts: tuple[str, ...]
    """Names of the analyses to do."""
    draws: int
    """Bootstrap draws of two-term laws."""
    shaped_draws: int
    """Bootstrap draws of the width-depth law, which takes ten times as long."""
    suites: int
    """Simulated suites of the coverage check."""
    seed: int


READ = (
    "wandb_dfs/wandb_df_for_fitting_*.jsonl",
    "**/parameters*/approach_*.json",
    "**/epoch_chinchilla_svg_extracted_data.csv",
    "**/preflight_mup_olmo_variant.csv",
    "**/light_eval_df.csv",
)
"""Every file that the analysis reads, as patterns under a copy of the paper's repository."""


def digest_of(folder: Path) -> str:
    """SHA-256 over the names and bytes of the files that are read."""
    found = hashlib.sha256()
    for path in sorted({path for pattern in READ for path in folder.glob(pattern)}):
        found.update(path.name.encode())
        found.update(path.read_bytes())
    return found.hexdigest()


def analyse(run: Revisit, folder: Path, name: str) -> tuple[tuple[str, Fields], ...]:
    """The events of one part, by name; for a worker process."""
    return tuple(dict(analyses(run, folder))[name]())


def analyses(run: Revisit, folder: Path) -> tuple[tuple[str, Callable[[], Events]], ...]:
    """Every part of the analysis by name, in order."""
    return (
        ("published fits", lambda: refits(folder)),
        ("published lines", lambda: lines(folder)),
        ("Chinchilla points", lambda: chinchilla(run, folder)),
        ("slopes and intervals", lambda: slopes(run, folder)),
        ("paired differences", lambda: paired(run, folder)),
        ("envelopes and their null", lambda: envelopes(run, folder)),
        ("left-out models", lambda: left_out(folder)),
        ("Huber thresholds", lambda: thresholds(folder)),
        ("embeddings", lambda: embeddings(run, folder)),
        ("held-out error", lambda: held_out(folder)),
        ("prescriptions", lambda: prescriptions(run, folder)),
        ("overtraining", lambda: overtraining(folder)),
        ("overspending", lambda: overspending(folder)),
        ("cooldown", lambda: cooldown(folder)),
        ("learning rates", lambda: learning_rates(folder)),
        ("benchmarks", lambda: benchmarks(folder)),
        ("coverage", lambda: simulated_coverage(run, folder)),
    )


def fitted(law: ParametricLaw, table: RunTable) -> ParametricFit:
    """The fit, without the warnings, whose content the events carry."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LawWarning)
        return law.fit(table)


def refits(folder: Path) -> Events:
    """All 42 published parametric fits beside the global optimum of the same objective."""
    for one in published_fits(folder):
        table = published_frame(folder, one.frame)
        fit = fitted(one.law, table)
        problem = one.law.problem(table)
        ones = np.ones((1, len(table)))
        theirs = float(solve.objective(problem, one.estimate.vector()[None], ones)[0])
        two = len(one.law.variables) == 2
        yield (
            "refit",
            {
                "name": one.name,
                "frame": one.frame,
                "terms": len(one.law.variables),
                "delta": one.law.delta,
                "embeddings": one.law.embeddings.value,
                "rows": len(table),
                "published_objective": theirs,
                "objective": fit.objective,
                "published_above_percent": 100 * (theirs / fit.objective - 1),
                "published_slope": one.estimate.slope if two else math.nan,
                "slope": fit.estimate.slope if two else math.nan,
                "exponents": fit.estimate.exponents,
                "log_coefficients": fit.estimate.log_coefficients,
                "log_floor": fit.estimate.log_floor,
                "starts": fit.certificate.starts,
                "agreeing": fit.certificate.agreeing,
                "relative_gradient": fit.certificate.relative_gradient,
                "condition": fit.certificate.condition,
                "at_bound": fit.certificate.at_bound,
                "nearest_grid_log_coefficient": _nearest_node(one.estimate.log_coefficients),
            },
        )


def _nearest_node(log_coefficients: Sequence[float]) -> float:
    """Least distance of a log coefficient to a node 5, 10, ... 25 of the reference's start grid."""
    nodes = np.arange(5, 30, 5)
    return float(min(np.abs(nodes - value).min() for value in log_coefficients))


def lines(folder: Path) -> Events:
    """All 24 published envelope lines beside ours."""
    targets: dict[str, Target] = {
        "params": "parameters",
        "tokens": "tokens",
        "tokens_per_param": "tokens_per_parameter",
    }
    for one in published_lines(folder):
        law = EnvelopeLaw(target=targets[one.target], embeddings=one.embeddings)
        found = law.fit(published_frame(folder, one.frame)).estimate
        yield (
            "line",
            {
                "name": one.name,
                "published_slope": one.slope,
                "slope": found.slope,
                "difference": max(
                    abs(found.slope - one.slope), abs(found.intercept - one.intercept)
                ),
            },
        )


def chinchilla(run: Revisit, folder: Path) -> Events:
    """Besiroglu et al.'s refit of Chinchilla: its objective at 1e-3, and its L1 limit."""
    table = chinchilla_points(folder)
    for delta in (1e-3, 4.7e-9):
        fit = fitted(ParametricLaw(delta=delta), table)
        draws = bootstrap(
            fit, draws=run.draws, generator=np.random.default_rng(run.seed), groups="row"
        )
        interval = draws.interval(slope)
        yield (
            "chinchilla",
            {
                "delta": delta,
                "rows": len(table),
                "objective": fit.objective,
                "A": float(np.exp(fit.estimate.log_coefficients[0])),
                "B": float(np.exp(fit.estimate.log_coefficients[1])),
                "E": float(np.exp(fit.estimate.log_floor)),
                "alpha": fit.estimate.exponents[0],
                "beta": fit.estimate.exponents[1],
                "slope": fit.estimate.slope,
                "low": interval.low,
                "high": interval.high,
                "draws": run.draws,
            },
        )


def slopes(run: Revisit, folder: Path) -> Events:
    """Slope of every selection with intervals over models, over rows, and by profile."""
    published = {
        one.frame: one.estimate.slope
        for one in published_fits(folder)
        if one.name.startswith("delta-4")
        and len(one.law.variables) == 2
        and one.law.embeddings is Embeddings.BOTH
    }
    for frame in SELECTIONS:
        table = published_frame(folder, frame)
        fit = fitted(ParametricLaw(), table)
        found: dict[str, float] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LawWarning)
            clusters = bootstrap(fit, draws=run.draws, generator=np.random.default_rng(run.seed))
            rows = bootstrap(
                fit, draws=run.draws, generator=np.random.default_rng(run.seed), groups="row"
            )
        for name, draws in (("model", clusters), ("row", rows)):
            interval = draws.interval(slope)
            found |= {f"{name}_low": interval.low, f"{name}_high": interval.high}
        by_profile = profile(fit, slope, clusters, points=15).interval
        yield (
            "slope",
            {
                "frame": frame,
                "rows": len(table),
                "models": clusters.number_of_groups,
                "published_slope": published[frame],
                "slope": fit.estimate.slope,
                **found,
                "profile_low": by_profile.low,
                "profile_high": by_profile.high,
                "draws": run.draws,
            },
        )


def paired(run: Revisit, folder: Path) -> Events:
    """Differences in slope between selections, over shared shapes and shared draws."""
    frames = sorted({frame for pair in DIFFERENCES for frame in pair})
    tables = shared_groups([published_frame(folder, frame) for frame in frames])
    fits = [fitted(ParametricLaw(), table) for table in tables]
    draws = paired_bootstrap(fits, draws=run.draws, generator=np.random.default_rng(run.seed))
    number = {frame: index for index, frame in enumerate(frames)}
    for first, second in DIFFERENCES:
        i, j = number[first], number[second]
        apart = difference((fits[i], fits[j]), (draws[i], draws[j]), slope)
        yield (
            "difference",
            {
                "first": first,
                "second": second,
                "first_slope": fits[i].estimate.slope,
                "second_slope": fits[j].estimate.slope,
                "difference": apart.estimate,
                "low": apart.interval.low,
                "high": apart.interval.high,
                "share_above_zero": apart.share_above_zero,
                "shapes": draws[i].number_of_groups,
                "draws": run.draws,
            },
        )


def envelopes(run: Revisit, folder: Path) -> Events:
    """Hull slopes against the token floor, and what they are on noise-free laws of known slope."""
    whole = published_frame(folder, "hot_100b+_477")
    ours = fitted(ParametricLaw(), published_frame(folder, "hot_100b+")).estimate
    truths = (HALF, EPOCH, ours)
    selections = {
        **{f"T >= {floor / 1e9:g}B": (floor, math.inf) for floor in TOKEN_FLOORS},
        "T <= 100B": (0.0, 1.001e11),
    }
    for label, (low, high) in selections.items():
        tokens = whole.column("tokens")
        table = whole.where((tokens >= low) & (tokens <= high))
        for name, law in (
            ("hull", EnvelopeLaw()),
            ("hull, 6NT", EnvelopeLaw(resource="flops_6nt")),
            ("20 bins", EnvelopeLaw(method=Bins(count=20))),
        ):
            fit = law.fit(table)
            draws = bootstrap(fit, draws=run.draws, generator=np.random.default_rng(run.seed))
            interval = draws.interval(slope)
            null = [law.fit(noise_free(table, truth)).estimate.slope for truth in truths]
            yield (
                "envelope",
                {
                    "selection": label,
                    "estimator": name,
                    "token_floor": low,
                    "slope": fit.estimate.slope,
                    "low": interval.low,
                    "high": interval.high,
                    "true_slopes": [truth.slope for truth in truths],
                    "null_slopes": null,
                },
            )
    ratio = EnvelopeLaw(target="tokens_per_parameter")
    table = published_frame(folder, "hot_477")
    fit = ratio.fit(table)
    draws = bootstrap(fit, draws=run.draws, generator=np.random.default_rng(run.seed))
    interval = draws.interval(slope)
    yield (
        "ratio",
        {
            "slope": fit.estimate.slope,
            "low": interval.low,
            "high": interval.high,
            "mean_tokens_per_parameter": float(
                np.exp(np.log(ratio.targets(table)[fit.rows]).mean())
            ),
            "true_slopes": [truth.slope for truth in truths],
            "null_slopes": [ratio.fit(noise_free(table, one)).estimate.slope for one in truths],
        },
    )


def left_out(folder: Path) -> Events:
    """Slopes without each model in turn: the law's, the hull's, and the binned envelope's."""
    table = published_frame(folder, "hot_477")
    ours = fitted(ParametricLaw(), published_frame(folder, "hot_100b+")).estimate
    for name, law in (
        ("hull", EnvelopeLaw(method=Hull())),
        ("750 bins", EnvelopeLaw(method=Bins(count=750))),
        ("20 bins", EnvelopeLaw(method=Bins(count=20))),
    ):
        fit = law.fit(table)
        found = leave_one_out(fit, slope)
        clean = law.fit(noise_free(table, ours)).estimate.slope
        yield (
            "left_out",
            {
                "estimator": name,
                "slope": fit.estimate.slope,
                "low": min(found.values()),
                "high": max(found.values()),
                "bias_on_fitted_law": clean - ours.slope,
            },
        )
    fit = fitted(ParametricLaw(), published_frame(folder, "hot_100b+"))
    found = leave_one_out(fit, slope)
    low, high = min(found, key=lambda name: found[name]), max(found, key=lambda name: found[name])
    yield (
        "left_out",
        {
            "estimator": "law in N and T",
            "slope": fit.estimate.slope,
            "low": found[low],
            "high": found[high],
            "lowest_without": low.removeprefix("PyGemma-").removesuffix("_pretrain"),
            "highest_without": high.removeprefix("PyGemma-").removesuffix("_pretrain"),
        },
    )


def thresholds(folder: Path) -> Events:
    """The slope at the global optimum for Huber thresholds from 1e-2 to 1e-6."""
    for frame in ("hot_100b+", "hot", "lr_ablation_hot", "cool_end"):
        table = published_frame(folder, frame)
        for delta in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
            fit = fitted(ParametricLaw(delta=delta), table)
            yield (
                "threshold",
                {
                    "frame": frame,
                    "delta": delta,
                    "slope": fit.estimate.slope,
                    "agreeing": fit.certificate.agreeing,
                    "starts": fit.certificate.starts,
                },
            )


def embeddings(run: Revisit, folder: Path) -> Events:
    """Slopes under the three conventions of counting embeddings, both approaches, paired."""
    table = published_frame(folder, "hot_100b+")
    whole = published_frame(folder, "hot_100b+_477")
    laws = [ParametricLaw(embeddings=kind) for kind in Embeddings]
    fits = [fitted(law, table) for law in laws]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LawWarning)
        draws = paired_bootstrap(fits, draws=run.draws, generator=np.random.default_rng(run.seed))
    for kind, fit, drawn in zip(Embeddings, fits, draws, strict=True):
        apart = drawn.values(slope) - draws[0].values(slope)
        interval = drawn.interval(slope)
        yield (
            "embedding",
            {
                "counted": kind.value,
                "hull_slope": EnvelopeLaw(embeddings=kind).fit(whole).estimate.slope,
                "slope": fit.estimate.slope,
                "low": interval.low,
                "high": interval.high,
                "above_both_low": percentile_interval(apart, 0.95).low,
                "above_both_high": percentile_interval(apart, 0.95).high,
            },
        )


def held_out(folder: Path) -> Events:
    """Mean error of five laws where runs were held out, and in sample."""
    table = published_frame(folder, "hot_100b+")
    laws = {
        "N, T": ParametricLaw(delta=1e-3),
        "N without embeddings, T": ParametricLaw(delta=1e-3, embeddings=Embeddings.NONE),
        "FLOPs per token, T": ParametricLaw(
            delta=1e-3, variables=("effective_parameters", "tokens")
        ),
        "w, d, T": ParametricLaw(delta=1e-3, variables=SHAPE_ONLY),
        "w, d, N, T": ParametricLaw(delta=1e-3, variables=WIDTH_DEPTH),
    }
    for name, law in laws.items():
        fit = fitted(law, table)
        residual = np.abs(np.log(table.column("loss_nats") / fit.predict(table)))
        inside = float(residual.mean())
        yield "held_out", {"law": name, "split": "in sample", "error_percent": 100 * inside}
        for split in GEMSTONE_SPLITS:
            error = mean_error(law, table, split)
            yield "held_out", {"law": name, "split": split.name, "error_percent": 100 * error}


def prescriptions(run: Revisit, folder: Path) -> Events:
    """Compute-optimal shapes of the width-depth law, with bands, on hot and on cooled checkpoints."""
    planner = Planner(architecture=GEMSTONES, cost=Compute(), shapes=Free())
    published = {
        one.frame: one.estimate
        for one in published_fits(folder)
        if one.name.startswith("delta-4") and len(one.law.variables) == 4
    }
    for frame in ("hot_100b+", "cool_end"):
        fit = fitted(ParametricLaw(variables=WIDTH_DEPTH), published_frame(folder, frame))
        draws = bootstrap(fit, draws=run.shaped_draws, generator=np.random.default_rng(run.seed))
        found = [[planner.allocate(law, budget) for budget in BUDGETS] for law in draws.estimates]
        for number, budget in enumerate(BUDGETS):
            best = planner.allocate(fit.estimate, budget)
            theirs = planner.allocate(published[frame], budget)
            fields: dict[str, object] = {
                "frame": frame,
                "budget_flops": budget,
                "published_aspect": theirs.aspect,
                "published_tokens_per_parameter": theirs.tokens_per_parameter,
                "draws": run.shaped_draws,
                "share_at_edge": float(np.mean([one[number].at_edge for one in found])),
            }
            for name in ("width", "depth", "aspect", "parameters", "tokens_per_parameter"):
                values = np.asarray([getattr(one[number], name) for one in found])
                interval = percentile_interval(values, 0.95)
                fields |= {
                    name: getattr(best, name),
                    f"{name}_low": interval.low,
                    f"{name}_high": interval.high,
                }
            yield "prescription", fields
        # Growth over the budgets that were measured, 1e19 to the largest run's 4.5e21.
        span = math.log(BUDGETS[3] / BUDGETS[1])
        for name in ("aspect", "tokens_per_parameter"):
            growth = [
                math.log(getattr(one[3], name) / getattr(one[1], name)) / span for one in found
            ]
            interval = percentile_interval(np.asarray(growth), 0.95)
            ends = [planner.allocate(fit.estimate, BUDGETS[at]) for at in (1, 3)]
            yield (
                "growth",
                {
                    "frame": frame,
                    "quantity": name,
                    "exponent": math.log(getattr(ends[1], name) / getattr(ends[0], name)) / span,
                    "low": interval.low,
                    "high": interval.high,
                },
            )


def overtraining(folder: Path) -> Events:
    """What it costs to train longer or shorter than optimal at the same FLOPs."""
    planner = Planner(architecture=GEMSTONES, cost=Compute(), shapes=Free())
    for frame in ("hot_100b+", "cool_end"):
        fit = fitted(ParametricLaw(variables=WIDTH_DEPTH), published_frame(folder, frame))
        for budget in (1e20, 1e21, 1e22):
            best = planner.allocate(fit.estimate, budget)
            for factor, one in zip(
                FACTORS, planner.overtrained(fit.estimate, budget, FACTORS), strict=True
            ):
                yield (
                    "overtraining",
                    {
                        "frame": frame,
                        "budget_flops": budget,
                        "factor": factor,
                        "cost_nats": one.loss_nats - best.loss_nats,
                    },
                )


def overspending(folder: Path) -> Events:
    """FLOPs and device-hours at 300 B tokens over what the hull needs for the same loss.

    The frontier is interpolated in logarithms; the reference takes its nearest vertex, which gives
    negative overspending.
    """
    table = published_frame(folder, "hot_100b+_477")
    tokens = table.column("tokens")
    late = table.where((tokens > 2.99e11) & (tokens < 3.01e11))
    last = late.where(np.r_[late.run[1:] != late.run[:-1], True])
    aspect = last.column("width") / last.column("depth")
    over: dict[str, Float[np.ndarray, " model"]] = {}
    for kind in ("flops", "gpu_hours"):
        resource, loss = last.resource(kind), last.column("loss_nats")
        rows = frontier(resource, loss, Hull())
        needed = np.interp(-np.log(loss), -np.log(loss[rows]), np.log(resource[rows]))
        over[kind] = np.log(resource) - needed
    for row in range(len(last)):
        yield (
            "overspending",
            {
                "width": float(last.column("width")[row]),
                "depth": float(last.column("depth")[row]),
                "flops_percent": float(100 * np.expm1(over["flops"][row])),
                "gpu_hours_percent": float(100 * np.expm1(over["gpu_hours"][row])),
            },
        )
    correlation = {kind: _spearman(aspect, values) for kind, values in over.items()}
    yield (
        "overspending_correlation",
        {
            "models": len(last),
            **{f"{kind}_spearman": one[0] for kind, one in correlation.items()},
            **{f"{kind}_p": one[1] for kind, one in correlation.items()},
        },
    )


def _spearman(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """Rank correlation and its p-value."""
    found = np.asarray(spearmanr(x, y))
    return float(found[0]), float(found[1])


def cooldown(folder: Path) -> Events:
    """What cooling down gains, against size and tokens."""
    begin, end = published_frame(folder, "cool_begin"), published_frame(folder, "cool_end")
    gain = np.log(begin.column("loss_nats")) - np.log(end.column("loss_nats"))
    nats = begin.column("loss_nats") - end.column("loss_nats")
    last = begin.column("tokens") > 9.9e10
    sizes = _spearman(begin.column("parameters")[last], gain[last])
    first = begin.column("tokens") < 1.1e10
    yield (
        "cooldown",
        {
            "pairs": len(gain),
            "mean_nats": float(nats.mean()),
            "at_10b_nats": float(nats[first].mean()),
            "at_100b_nats": float(nats[last].mean()),
            "size_spearman_at_100b": sizes[0],
            "size_p_at_100b": sizes[1],
        },
    )


def learning_rates(folder: Path) -> Events:
    """Best rate of each preflight shape, as it is and times width times the root of depth."""
    best: dict[tuple[int, int], tuple[float, float]] = {}
    for width, depth, rate, loss in preflight(folder):
        if loss < best.get((width, depth), (math.inf, 0.0))[0]:
            best[width, depth] = (loss, rate)
    rates = np.asarray([rate for _, rate in best.values()])
    bases = np.asarray([rate * w * math.sqrt(d) for (w, d), (_, rate) in best.items()])
    yield (
        "learning_rates",
        {
            "shapes": len(best),
            "best_rates": rates.tolist(),
            "best_bases": bases.tolist(),
            "rate_ratio": float(rates.max() / rates.min()),
            "base_ratio": float(bases.max() / bases.min()),
        },
    )


def benchmarks(folder: Path) -> Events:
    """Mean benchmark error against loss (Gadre et al. 2024), and whether shape adds anything."""
    path = next(
        (
            at
            for at in (folder / "light_eval_df.csv", folder / "benchmarks/light_eval_df.csv")
            if at.is_file()
        ),
        None,
    )
    if path is None:
        return
    table = published_frame(folder, "hot_100b+")
    steps = np.round(table.column("step")).astype(int)
    losses = {
        (f"{w:g}x{d:g}", int(step)): (float(loss), float(w / d))
        for w, d, step, loss in zip(
            table.column("width"),
            table.column("depth"),
            steps,
            table.column("loss_nats"),
            strict=True,
        )
    }
    last = int(steps.max())
    points = []
    for row in csv.DictReader(path.read_text().splitlines()):
        found = re.fullmatch(r"Gemstone-(\d+x\d+)-(?:step_(\d+)|main)", row["model_revision"])
        if found is None:
            continue
        key = (found[1], int(found[2]) if found[2] else last)
        if key in losses:
            scores = [float(value) for name, value in row.items() if name != "model_revision"]
            points.append((*losses[key], 1 - float(np.mean(scores))))
    loss, aspect, error = np.asarray(points).T

    def gadre(
        x: Float[np.ndarray, " point"], ceiling: float, k: float, gamma: float
    ) -> Float[np.ndarray, " point"]:
        return ceiling - k * np.exp(-gamma * x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        fit = curve_fit(gadre, loss, error, p0=(0.7, 10.0, 1.5), maxfev=20_000)[0]
    residual = error - gadre(loss, *fit)
    shape = _spearman(residual, aspect)
    yield (
        "benchmarks",
        {
            "checkpoints": len(points),
            "ceiling": float(fit[0]),
            "k": float(fit[1]),
            "gamma": float(fit[2]),
            "rmse": float(np.sqrt(np.square(residual).mean())),
            "r_squared": 1
            - float(np.square(residual).sum() / np.square(error - error.mean()).sum()),
            "shape_spearman": shape[0],
            "shape_p": shape[1],
        },
    )


def simulated_coverage(run: Revisit, folder: Path) -> Events:
    """How often nominal 95 % intervals hold the true slope, on suites of the published design."""
    table = published_frame(folder, "hot_100b+")
    truth = fitted(ParametricLaw(), table).estimate
    # Every 50 B tokens: noise that persists along a run leaves little to the rows between.
    thinned = table.where(np.round(table.column("tokens") / 1e10) % 5 == 0)
    found = coverage(
        thinned,
        replace(ParametricLaw(delta=1e-3), starts=4),
        truth,
        suites=run.suites,
        draws=200,
        run_sd=0.01,
        # 0.95 between neighbours 10 B tokens apart, to the fifth between those 50 B apart.
        correlation=0.95**5,
        groups=("run", "row"),
        seed=run.seed,
    )
    for groups, one in zip(("run", "row"), found, strict=True):
        yield (
            "coverage",
            {
                "groups": groups,
                "suites": one.suites,
                "covered": one.covered,
                "share": one.share,
                "mean_width": one.mean_width,
            },
        )
