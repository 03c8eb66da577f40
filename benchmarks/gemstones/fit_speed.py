"""CPU time of a fit beside the field's multi-start grid and beside vpnls, on the same rows, in one run.

The grid is written from its description (Besiroglu et al. 2024; McLeish et al. 2025): L-BFGS-B with scipy's
default tolerances and finite differences from every node, 4,500 nodes for a law in N and T. By default a
random share of the nodes is run and the time scaled up; `--starts 4500` runs them all. It is timed on the
paper's own objective and frame, of 770 rows.

vpnls (Czech et al. 2026, arXiv 2603.22339) minimises Huber's function of residuals in nats, so that ours is
asked for the same: 240 points of Chinchilla, threshold 1e-3, its grid of resolution .01 and that grid with
L-BFGS-B after it. It is a package of its own, called in a process of its own, whose python is named:

    OMP_NUM_THREADS=1 python benchmarks/gemstones/fit_speed.py --vpnls path/to/python/with/vpnls
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import huber

from fourfold_gemstones.parametric import ParametricLaw
from fourfold_gemstones.published import chinchilla_points, published_frame
from fourfold_gemstones.uncertainty import bootstrap, slope
from fourfold_parallel.common.records import commit, hardware, versions

NODES = list(
    itertools.product(
        *[[0, 5, 10, 15, 20, 25]] * 2, *[[0, 0.5, 1, 1.5, 2]] * 2, [-1, -0.5, 0, 0.5, 1]
    )
)
DELTA = 1e-3
REPEATS = 5
PEER = """
import json, sys, time
import numpy as np
from vpnls.api import fit_vpnls, huber
size, tokens, loss = np.load(sys.argv[1])
for method in ("grid", "scipy"):
    times = []
    for _ in range(int(sys.argv[2])):
        began = time.process_time()
        fit = fit_vpnls(size, tokens, loss, method=method, loss=huber(float(sys.argv[3])))
        times.append(time.process_time() - began)
    print(json.dumps({"method": method, "cpu_s": float(np.median(times)), "status": fit.status.value,
        "parameters": [float(fit.E), float(fit.A), float(fit.B), float(fit.alpha), float(fit.beta)]}))
"""


def grid(law: ParametricLaw, log_inputs: np.ndarray, log_loss: np.ndarray, starts: int) -> float:
    """Best objective over a random share of the grid's nodes."""

    def objective(theta: np.ndarray) -> float:
        terms = theta[:2] - theta[2:4] * log_inputs
        predicted = np.logaddexp(np.logaddexp(terms[:, 0], terms[:, 1]), theta[4])
        return float(huber(law.delta, log_loss - predicted).sum())

    chosen = np.random.default_rng(0).choice(len(NODES), size=starts, replace=False)
    results = [
        minimize(objective, np.asarray(NODES[node], dtype=float), method="L-BFGS-B")
        for node in chosen
    ]
    return min(float(result.fun) for result in results)


def median_s(call: Callable[[], Any]) -> tuple[float, Any]:
    """Median CPU seconds of a call, and what it last gave."""
    given = call()
    times = []
    for _ in range(REPEATS):
        began_s = time.process_time()
        given = call()
        times.append(time.process_time() - began_s)
    return float(np.median(times)), given


def say(what: str, **fields: Any) -> None:
    """A line of the record."""
    print(json.dumps({"what": what, **fields, "load": round(os.getloadavg()[0], 2)}), flush=True)


def beside_the_grid(starts: int) -> None:
    """The paper's law, frame and objective."""
    law, table = ParametricLaw(), published_frame("hot_100b+")
    problem = law.problem(table)
    ours_s, fit = median_s(lambda: law.fit(table))
    began_s = time.process_time()
    best = grid(law, problem.log_inputs, problem.log_loss, starts)
    grid_s = (time.process_time() - began_s) * len(NODES) / starts
    say(
        "fit of N, T to 770 rows",
        cpu_s=round(ours_s, 4),
        starts=fit.certificate.starts,
        objective=fit.objective,
        grid_cpu_s=round(grid_s, 1),
        grid_starts_run=starts,
        grid_starts=len(NODES),
        grid_objective=best,
        ratio=round(grid_s / ours_s),
    )


def beside_vpnls(python: Path) -> None:
    """Chinchilla's points in millions of parameters and billions of tokens, as its authors give them."""
    table = chinchilla_points()
    size, tokens = table.column("parameters") / 1e6, table.column("tokens") / 1e9
    loss = table.column("loss_nats")
    law = ParametricLaw(delta=DELTA, residuals="nats")
    ours_s, fit = median_s(lambda: law.fit(table))
    few = ParametricLaw(delta=DELTA, residuals="nats", starts=3)
    few_s, few_fit = median_s(lambda: few.fit(table))
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.npy"
        np.save(rows, np.stack([size, tokens, loss]))
        said = subprocess.run(
            [python, "-c", PEER, rows, str(REPEATS), str(DELTA)],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    for line in said.splitlines():
        peer = json.loads(line)
        floor, a, b, alpha, beta = peer["parameters"]
        told = floor + a * size**-alpha + b * tokens**-beta
        theirs = float(huber(DELTA, loss - told).sum())
        say(
            f"fit of N, T to {len(table)} rows beside vpnls, {peer['method']}",
            cpu_s=round(ours_s, 4),
            starts=fit.certificate.starts,
            objective=fit.objective,
            cpu_of_3_starts_s=round(few_s, 4),
            objective_of_3_starts=few_fit.objective,
            vpnls_cpu_s=round(peer["cpu_s"], 4),
            vpnls_objective=theirs,
            vpnls_status=peer["status"],
            vpnls_above_percent=round(100 * (theirs / fit.objective - 1), 4),
            ratio=round(peer["cpu_s"] / ours_s, 2),
            ratio_of_3_starts=round(peer["cpu_s"] / few_s, 2),
        )


def refits(draws: int) -> None:
    """A bootstrap over the rows of Chinchilla's points."""
    points = ParametricLaw(delta=DELTA).fit(chinchilla_points())
    bootstrap(points, draws=64, generator=np.random.default_rng(1), groups="row")
    began_s, wall_s = time.process_time(), time.perf_counter()
    drawn = bootstrap(points, draws=draws, generator=np.random.default_rng(0), groups="row")
    say(
        f"{draws:,} refits of 240 points",
        cpu_s=round(time.process_time() - began_s, 2),
        wall_s=round(time.perf_counter() - wall_s, 2),
        slope_low=drawn.interval(slope).low,
        slope_high=drawn.interval(slope).high,
    )


def main() -> None:
    """Time all and print one JSON line per measurement."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--starts", type=int, default=90, help="nodes of the grid to run")
    options.add_argument("--draws", type=int, default=10_000, help="refits")
    options.add_argument("--vpnls", type=Path, help="a python that has vpnls")
    chosen = options.parse_args()
    say("machine", commit=commit(), versions=dict(versions()), hardware=hardware())
    beside_the_grid(chosen.starts)
    if chosen.vpnls is not None:
        beside_vpnls(chosen.vpnls)
    refits(chosen.draws)


if __name__ == "__main__":
    main()
