"""CPU time of a fit against the field's multi-start grid, side by side in one process.

The baseline is written from its description (Besiroglu et al. 2024; McLeish et al. 2025): L-BFGS-B with
scipy's default tolerances and finite differences from every node of a grid, 4,500 nodes for a law in N
and T. By default a random share of the nodes is run and the time scaled up; `--starts 4500` runs them all.

    OMP_NUM_THREADS=1 python benchmarks/gemstones/fit_speed.py ../shared/data/gemstones
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from pathlib import Path

import numpy as np
from scipy.optimize import minimize
from scipy.special import huber

from fourfold_gemstones.parametric import ParametricLaw
from fourfold_gemstones.published import chinchilla_points, published_frame
from fourfold_gemstones.uncertainty import bootstrap, slope

NODES = list(
    itertools.product(
        *[[0, 5, 10, 15, 20, 25]] * 2, *[[0, 0.5, 1, 1.5, 2]] * 2, [-1, -0.5, 0, 0.5, 1]
    )
)


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
    return min(float(one.fun) for one in results)


def main() -> None:
    """Time both and print one JSON line per measurement."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("data", type=Path)
    options.add_argument("--starts", type=int, default=90)
    chosen = options.parse_args()
    law = ParametricLaw()
    table = published_frame(chosen.data, "hot_100b+")
    problem = law.problem(table)
    fit = law.fit(table)
    times_s = []
    for _ in range(5):
        began_s = time.process_time()
        fit = law.fit(table)
        times_s.append(time.process_time() - began_s)
    ours_s = float(np.median(times_s))
    began_s = time.process_time()
    found = grid(law, problem.log_inputs, problem.log_loss, chosen.starts)
    grid_s = (time.process_time() - began_s) * len(NODES) / chosen.starts
    load = os.getloadavg()[0]
    print(
        json.dumps(
            {
                "what": "fit of N, T to 770 rows",
                "cpu_s": round(ours_s, 4),
                "starts": fit.certificate.starts,
                "objective": fit.objective,
                "grid_cpu_s": round(grid_s, 1),
                "grid_starts_run": chosen.starts,
                "grid_starts": len(NODES),
                "grid_objective": found,
                "ratio": round(grid_s / ours_s),
                "load": load,
            }
        )
    )
    points = ParametricLaw(delta=1e-3).fit(chinchilla_points(chosen.data))
    began_s, wall_s = time.process_time(), time.perf_counter()
    draws = bootstrap(points, draws=4000, generator=np.random.default_rng(0), groups="row")
    print(
        json.dumps(
            {
                "what": "4,000 refits of 240 points",
                "cpu_s": round(time.process_time() - began_s, 2),
                "wall_s": round(time.perf_counter() - wall_s, 2),
                "slope_low": draws.interval(slope).low,
                "slope_high": draws.interval(slope).high,
                "load": load,
            }
        )
    )


if __name__ == "__main__":
    main()
