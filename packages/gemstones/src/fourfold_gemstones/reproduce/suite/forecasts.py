"""Forecasts of the runs of fresh seeds by laws of the suite, registered before those runs were begun."""

from __future__ import annotations

import warnings
from pathlib import Path

from fourfold_gemstones.laws import CHINCHILLA, WIDTH_DEPTH, Variable
from fourfold_gemstones.parametric import LawWarning, ParametricLaw
from fourfold_gemstones.questions.forecast import Forecast, entries, now, register, score, written
from fourfold_gemstones.reproduce.suite.cooling import Cooling
from fourfold_gemstones.reproduce.suite.train import suite_table
from fourfold_parallel.common.records import Record

LAWS: dict[str, tuple[Variable, ...]] = {"parameters": CHINCHILLA, "width-depth": WIDTH_DEPTH}
"""Variables of the laws that foretell, by name."""
DRAWS = 400


def register_all(ledger: Path, suite: Record, planned: Cooling) -> None:
    """Foretell the last loss of every run of `planned` by each law, fitted to all runs of the suite."""
    table = suite_table(suite)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LawWarning)
        for law, variables in LAWS.items():
            fit = ParametricLaw(variables=variables, delta=1e-3).fit(table)
            runs = {
                f"{member.run.name} by {law}": {
                    "width": float(member.model.width),
                    "depth": float(member.model.depth),
                    "tokens": float(member.run.steps * member.run.tokens_per_step),
                }
                for member in (*planned.members, *planned.forecast)
            }
            for told in written(fit, runs, law=law, draws=DRAWS, seed=0, when=now()):
                register(ledger, told)


def score_all(ledger: Path, fresh: Record) -> None:
    """Score each forecast by the last point of its run."""
    last = {
        str(event.values["run"]): event.number("loss_nats")
        for event in fresh.of("point")
        if event.values["schedule"] == "constant"
    }
    for entry in entries(ledger):
        if isinstance(entry, Forecast):
            score(ledger, entry.name, last[entry.name.partition(" by ")[0]], when=now())
