"""Laws and envelope fitted to our own suite, with the spread between seeds as the yardstick."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from fourfold_gemstones.architecture import Embeddings
from fourfold_gemstones.envelope import EnvelopeLaw
from fourfold_gemstones.laws import WIDTH_DEPTH, PowerLaw, Variable
from fourfold_gemstones.parametric import LawWarning, ParametricFit, ParametricLaw
from fourfold_gemstones.questions.allocation import Compute, Free, Planner
from fourfold_gemstones.questions.simulate import balanced, noisy
from fourfold_gemstones.reproduce.stages import SUITE
from fourfold_gemstones.reproduce.suite.train import Suite, suite_table
from fourfold_gemstones.runs import RunTable
from fourfold_gemstones.uncertainty import (
    bootstrap,
    paired_bootstrap,
    percentile_interval,
    slope,
)
from fourfold_parallel.common.records import RecordWriter
from fourfold_parallel.common.values import formerly
from fourfold_parallel.reproduce.experiment import Workplace

EXPONENTS = ((0.34, 0.34), (0.25, 0.58))
"""alpha and beta of two laws, of slope .50 and .70, that an envelope ought to tell apart."""
BUDGETS = (1e11, 1e12)
"""FLOPs over which the growth of the optimal shape is measured: a decade that the runs cover."""
CURVE = 12
"""Points of each fitted curve that is recorded for the figure."""


@formerly(without=("suite_sha256",))
@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteLaws:
    """Amounts of resampling in the analysis of our own suite."""

    draws: int
    """Bootstrap draws of two-term laws, and simulated suites of each noise-free law."""
    shaped_draws: int
    """Bootstrap draws of the width-depth law."""
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A standard deviation pooled over shapes that were trained with several seeds."""

    sd: float
    freedom: int


def pooled(groups: Sequence[Sequence[float]]) -> Spread:
    """The spread within groups.

    Raises:
        ValueError: No group has two values.
    """
    freedom = sum(len(values) - 1 for values in groups)
    if freedom < 1:
        raise ValueError("no shape has two seeds; train some shapes with three")
    squares = sum(float(np.square(np.asarray(v) - np.mean(v)).sum()) for v in groups)
    return Spread(sd=math.sqrt(squares / freedom), freedom=freedom)


def final_losses(table: RunTable) -> dict[str, list[float]]:
    """Last loss of every run, by shape, in the order of the seeds."""
    names, index = table.groups("run")
    losses: dict[str, list[float]] = {}
    for run in range(len(names)):
        last = np.flatnonzero(index == run)[-1]
        shape = f"{table.column('width')[last]:g}x{table.column('depth')[last]:g}"
        losses.setdefault(shape, []).append(float(table.column("loss_nats")[last]))
    return losses


def seed_spread(table: RunTable) -> Spread:
    """Spread between seeds of the log of the last loss."""
    finals = final_losses(table).values()
    return pooled([np.log(losses).tolist() for losses in finals if len(losses) > 1])


def analyse_suite(run: SuiteLaws, workplace: Workplace) -> None:
    """Write the record of every analysis of the finished suite."""
    trained = workplace.finished[SUITE]
    suite = trained.run
    assert isinstance(suite, Suite)
    every = suite_table(trained)
    first = every.where(every.column("seed") == suite.seed)
    with workplace.recording(run, seed=run.seed) as records, warnings.catch_warnings():
        warnings.simplefilter("ignore", LawWarning)
        spread = seed_spread(every)
        records.write("spread", log_loss_sd=spread.sd, freedom=spread.freedom)
        law = _write_slopes(records, run, first)
        _write_surface(records, run, law)
        _write_null(records, run, first, spread)
        _write_growth(records, run, first, suite)


def _write_slopes(records: RecordWriter, run: SuiteLaws, table: RunTable) -> ParametricFit:
    """The law's slope for each way of counting embeddings, over shared draws of runs."""
    fits = [ParametricLaw(embeddings=kind, delta=1e-3).fit(table) for kind in Embeddings]
    draws = paired_bootstrap(
        fits, draws=run.draws, generator=np.random.default_rng(run.seed), groups="run"
    )
    for kind, fit, drawn in zip(Embeddings, fits, draws, strict=True):
        interval = drawn.interval(slope)
        above = percentile_interval(drawn.values(slope) - draws[0].values(slope), 0.95)
        records.write(
            "embedding",
            counted=kind.value,
            slope=fit.estimate.slope,
            low=interval.low,
            high=interval.high,
            above_both_low=above.low,
            above_both_high=above.high,
            hull_slope=EnvelopeLaw(embeddings=kind).fit(table).estimate.slope,
            agreeing=fit.certificate.agreeing,
            starts=fit.certificate.starts,
            at_bound=fit.certificate.at_bound,
            r_squared=fit.score(table),
        )
    return fits[0]


def _write_surface(records: RecordWriter, run: SuiteLaws, fit: ParametricFit) -> None:
    """The fitted law along every run's tokens, with the band of its draws over runs."""
    draws = bootstrap(fit, draws=run.draws, generator=np.random.default_rng(run.seed))
    names, index = fit.table.groups("run")
    for number, name in enumerate(names):
        rows = np.flatnonzero(index == number)
        begun, ended = (float(fit.table.column("tokens")[rows[end]]) for end in (0, -1))
        tokens = np.geomspace(begun, ended, CURVE)
        inputs: dict[Variable, Float[np.ndarray, " point"]] = {
            "parameters": np.full(CURVE, fit.table.column("parameters")[rows[0]]),
            "tokens": tokens,
        }

        def curve(law: PowerLaw) -> Float[np.ndarray, " point"]:
            return law.loss(inputs)  # noqa: B023

        low, high = np.quantile([curve(law) for law in draws.estimates], [0.025, 0.975], axis=0)
        records.write(
            "curve",
            run=name,
            tokens=tokens.tolist(),
            loss_nats=curve(fit.estimate).tolist(),
            low=low.tolist(),
            high=high.tolist(),
        )


def _write_null(records: RecordWriter, run: SuiteLaws, table: RunTable, spread: Spread) -> None:
    """The hull's slope here, and on laws of known slope with the spread of the seeds as noise."""
    law = EnvelopeLaw()
    fit = law.fit(table)
    drawn = bootstrap(fit, draws=run.draws, generator=np.random.default_rng(run.seed))
    measured = drawn.interval(slope)
    for alpha, beta in EXPONENTS:
        truth = balanced(table, alpha=alpha, beta=beta)
        generator = np.random.default_rng(run.seed)
        slopes = np.asarray(
            [
                law.fit(
                    noisy(table, truth, run_sd=spread.sd, correlation=1.0, generator=generator)
                ).estimate.slope
                for _ in range(run.draws)
            ]
        )
        interval = percentile_interval(slopes, 0.95)
        records.write(
            "null",
            true_slope=truth.slope,
            mean=float(slopes.mean()),
            low=interval.low,
            high=interval.high,
            measured=fit.estimate.slope,
            measured_low=measured.low,
            measured_high=measured.high,
        )


def _write_growth(records: RecordWriter, run: SuiteLaws, table: RunTable, suite: Suite) -> None:
    """Growth of the width-depth law's optimal width over depth with compute."""
    planner = Planner(architecture=suite.architecture, cost=Compute(), shapes=Free())
    fit = ParametricLaw(variables=WIDTH_DEPTH, delta=1e-3).fit(table)
    draws = bootstrap(fit, draws=run.shaped_draws, generator=np.random.default_rng(run.seed))
    low, high = BUDGETS

    def growth(law: PowerLaw) -> tuple[float, bool]:
        ends = [planner.allocate(law, budget) for budget in BUDGETS]
        exponent = math.log(ends[1].aspect / ends[0].aspect) / math.log(high / low)
        return exponent, any(end.at_edge for end in ends)

    drawn = [growth(law) for law in draws.estimates]
    interval = percentile_interval(np.asarray([exponent for exponent, _ in drawn]), 0.95)
    records.write(
        "growth",
        exponent=growth(fit.estimate)[0],
        low=interval.low,
        high=interval.high,
        share_at_edge=float(np.mean([edge for _, edge in drawn])),
        agreeing=fit.certificate.agreeing,
        starts=fit.certificate.starts,
        at_bound=fit.certificate.at_bound,
    )
