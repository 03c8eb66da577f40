"""Benchmark error, accuracy and losses on other texts, as functions of the loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.optimize import curve_fit

from fourfold_gemstones.envelope import Line
from fourfold_gemstones.published import (
    TEXTS,
    Checkpoint,
    benchmark_accuracy,
    published_frame,
    task_losses,
    text_losses,
)
from fourfold_gemstones.reproduce.paper.settings import Events, Revisit, spearman
from fourfold_gemstones.reproduce.stages import BOTH, paper_claim, published
from fourfold_parallel.reproduce.claims import Finding, Records, decide

TIGHT = 0.98
"""R² above which error counts as a function of loss."""
STABLE_RANKS = 0.95
"""Rank correlation above which two texts rank models alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A fitted curve and how much it leaves."""

    parameters: tuple[float, ...]
    residual: Float[np.ndarray, " point"]
    r_squared: float

    @property
    def rmse(self) -> float:
        """Root of the mean squared residual."""
        return float(np.sqrt(np.square(self.residual).mean()))


def fit_curve(
    form: Callable[..., Float[np.ndarray, " point"]],
    x: Float[np.ndarray, " point"],
    y: Float[np.ndarray, " point"],
    start: tuple[float, ...],
) -> Curve:
    """Least squares from a start, as the reference fits both of its forms."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        solution = curve_fit(form, x, y, p0=start, maxfev=20_000)[0]
    residual = y - form(x, *solution)
    return Curve(
        parameters=tuple(float(value) for value in solution),
        residual=residual,
        r_squared=1 - float(np.square(residual).sum() / np.square(y - y.mean()).sum()),
    )


def gadre(
    loss: Float[np.ndarray, " point"], ceiling: float, k: float, gamma: float
) -> Float[np.ndarray, " point"]:
    """Error as a function of loss (Gadre et al. 2024): ceiling - k exp(-gamma L)."""
    return ceiling - k * np.exp(-gamma * loss)


def bhagia(
    loss: Float[np.ndarray, " point"], rise: float, k: float, middle: float, chance: float
) -> Float[np.ndarray, " point"]:
    """Accuracy as a function of the tasks' own loss (Bhagia et al. 2024): a sigmoid above chance."""
    return rise / (1 + np.exp(-k * (loss - middle))) + chance


def benchmarks(run: Revisit) -> Events:
    """Mean error against validation loss, what shape adds to it, and mean accuracy against task loss."""
    del run
    accuracy = benchmark_accuracy()
    losses = _losses()
    both = sorted(losses.keys() & accuracy.keys())
    loss = np.asarray([losses[at] for at in both])
    error = 1 - np.asarray([accuracy[at] for at in both])
    curve = fit_curve(gadre, loss, error, (0.7, 10.0, 1.5))
    rho, p = spearman(curve.residual, np.asarray([at[0] / at[1] for at in both]))
    ceiling, k, gamma = curve.parameters
    yield (
        "benchmarks",
        {
            "checkpoints": len(both),
            "ceiling": ceiling,
            "k": k,
            "gamma": gamma,
            "rmse": curve.rmse,
            "r_squared": curve.r_squared,
            "shape_spearman": rho,
            "shape_p": p,
        },
    )
    tasks = task_losses()
    both = sorted(tasks.keys() & accuracy.keys())
    loss = np.asarray([tasks[at] for at in both])
    score = np.asarray([accuracy[at] for at in both])
    start = (float(np.ptp(score)), 1.0, float(np.median(loss)), float(score.min()))
    curve = fit_curve(bhagia, loss, score, start)
    rise, k, middle, chance = curve.parameters
    yield (
        "task_losses",
        {
            "checkpoints": len(both),
            "rise": rise,
            "k": k,
            "middle": middle,
            "chance": chance,
            "rmse": curve.rmse,
            "r_squared": curve.r_squared,
        },
    )


def other_texts(run: Revisit) -> Events:
    """Losses of the same checkpoints on other texts beside the suite's own."""
    del run
    ours = _losses()
    for text in TEXTS:
        theirs = text_losses(text)
        both = sorted(ours.keys() & theirs.keys())
        last = [at for at in both if at[2] == max(step for _, _, step in both)]
        x, y = (np.asarray([losses[at] for at in both]) for losses in (ours, theirs))
        ends = spearman(np.asarray([ours[a] for a in last]), np.asarray([theirs[a] for a in last]))
        yield (
            "other_text",
            {
                "text": text,
                "checkpoints": len(both),
                "spearman": spearman(x, y)[0],
                "spearman_at_end": ends[0],
                "models": len(last),
                "exponent": Line.through(x, y).slope,
            },
        )


def _losses() -> dict[Checkpoint, float]:
    """Validation loss of every checkpoint on the suite's own text."""
    table = published_frame("hot_100b+")
    keys = np.stack([table.column(name) for name in ("width", "depth", "step")], axis=1)
    return {
        (int(w), int(d), round(step)): float(loss)
        for (w, d, step), loss in zip(keys.tolist(), table.column("loss_nats"), strict=True)
    }


@paper_claim(
    "C12",
    section="6",
    says="Benchmark error is a function of loss",
    paper="R² .993",
    rule="reproduced if R² > .98 and the residual has no rank correlation with w/d at p < .01",
    scales=BOTH,
)
def benchmarks_follow_loss(records: Records) -> Finding:
    """Mean benchmark error against loss, and shape given loss."""
    record = published(records)
    event = record.last("benchmarks")
    tight = event.number("r_squared") > TIGHT
    shape = event.number("shape_p") < 0.01
    return Finding(
        decide(reproduced=tight and not shape, contradicted=not tight),
        f"R² {event.number('r_squared'):.4f}; residual against w/d: Spearman "
        f"{event.number('shape_spearman'):+.3f} (p = {event.number('shape_p'):.2g})",
        event,
        "shape adds to loss"
        if shape
        else "error follows loss, and shape adds nothing once loss is known: that depth helps "
        "benchmarks is that depth lowers loss",
    )


@paper_claim(
    "C12b",
    section="6",
    says="Accuracy against the tasks' own loss is noisier",
    paper="R² .899",
    rule="reproduced if R² of the sigmoid lies below that of C12",
    scales=BOTH,
)
def accuracy_is_noisier(records: Records) -> Finding:
    """The two forms' R²."""
    record = published(records)
    event = record.last("task_losses")
    error = record.last("benchmarks")
    noisier = event.number("r_squared") < error.number("r_squared")
    return Finding(
        decide(reproduced=noisier, contradicted=not noisier),
        f"R² {event.number('r_squared'):.4f}, root mean square {event.number('rmse'):.4f}",
        event,
        f"{event.number('checkpoints'):.0f} checkpoints, mean loss of four tasks; error against "
        f"validation loss has R² {error.number('r_squared'):.4f}",
    )


@paper_claim(
    "C13",
    section="appendix",
    says="Rankings agree across validation sets",
    paper="Spearman .9994",
    rule="reproduced if every Spearman correlation is above .95",
    scales=BOTH,
)
def texts_agree(records: Records) -> Finding:
    """Rank correlations of losses between texts."""
    record = published(records)
    least = record.last("other_text")
    for event in record.of("other_text"):
        if event.number("spearman") < least.number("spearman"):
            least = event
    agree = least.number("spearman") > STABLE_RANKS
    return Finding(
        decide(reproduced=agree, contradicted=not agree),
        "; ".join(
            f"{event.values['text']}: Spearman {event.number('spearman'):.4f}"
            for event in record.of("other_text")
        ),
        least,
        f"{least.number('checkpoints'):.0f} checkpoints; of the {least.number('models'):.0f} last ones "
        f"{least.number('spearman_at_end'):.4f}",
    )
