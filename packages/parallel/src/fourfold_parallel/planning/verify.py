"""Short runs of the first grids of a ranking, on ranks of this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, PretrainedConfig

from fourfold_parallel.grid.engine import Fourfold
from fourfold_parallel.plan.job import Job, Layout
from fourfold_parallel.plan.search import Ranking
from fourfold_parallel.testing.ranks import run_on_ranks

WARM_STEPS = 2
TIMED_STEPS = 5
MOST_RANKS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """A grid's predicted and measured step."""

    layout: Layout
    predicted_s: float
    measured_s: float

    @property
    def error(self) -> float:
        """Of the prediction, as a part of what was measured."""
        return self.predicted_s / self.measured_s - 1


def verify(config: PretrainedConfig, ranking: Ranking, *, first: int) -> list[Verified]:
    """Measure the first grids, interleaved, with random weights and tokens.

    Args:
        config: The model's; it is built whole on every rank.
        ranking: For a machine that is this one (`fourfold probe`).
        first: How many.

    Raises:
        ValueError: The ranking is for more ranks than this machine should be asked to hold.
    """
    if ranking.ranks > MOST_RANKS:
        raise ValueError(
            f"{ranking.ranks} ranks are more than {MOST_RANKS}, which is what verification starts on one "
            "machine; plan for fewer with --gpus, or run the winner with --launch"
        )
    plans = ranking.grids[:first]
    layouts = [plan.layout for plan in plans]
    measured = run_on_ranks(
        ranking.ranks, measure, config=config, job=ranking.job, layouts=layouts, steps=TIMED_STEPS
    )[0]
    return [
        Verified(layout=plan.layout, predicted_s=plan.seconds, measured_s=statistics.median(seconds))
        for plan, seconds in zip(plans, measured, strict=True)
    ]  # fmt: skip


def measure(
    config: PretrainedConfig, job: Job, layouts: Sequence[Layout], steps: int
) -> list[list[float]]:
    """Seconds of `steps` steps of each layout, in turns; runs on every rank."""
    runs = [LayoutRun(config, job, layout) for layout in layouts]
    seconds: list[list[float]] = [[] for _ in runs]
    for round_ in range(WARM_STEPS + steps):
        for run, times in zip(runs, seconds, strict=True):
            dist.barrier()
            started_s = time.perf_counter()
            run.step()
            dist.barrier()
            if round_ >= WARM_STEPS:
                times.append(time.perf_counter() - started_s)
    return seconds


class LayoutRun:
    """A model under training on one layout."""

    def __init__(self, config: PretrainedConfig, job: Job, layout: Layout) -> None:
        self.job, self.layout = job, layout
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=job.attention)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        self._opened = Fourfold.planned(layout).open(
            model, optimizer, precision=job.precision, batch=job.batch,
            microbatch=layout.microbatch * layout.shares,
        )  # fmt: skip
        self.session = self._opened.__enter__()
        share = (job.batch // layout.shares, job.sequence)
        self.tokens = torch.randint(0, job.model.vocabulary, share)

    def step(self) -> None:
        """Forward, backward and update of the whole batch."""
        session = self.session
        parts = self.tokens.split(self.layout.microbatch)
        for index, rows in enumerate(parts):
            with session.microbatch(is_last=index == len(parts) - 1):
                session.backward(session.model(input_ids=rows, labels=rows).loss / len(parts))
        session.update(1.0)
