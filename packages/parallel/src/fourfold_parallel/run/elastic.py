"""An engine that finds its grid anew for however many ranks were launched."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from fourfold_parallel.grid.engine import Fourfold
from fourfold_parallel.launch import world_size
from fourfold_parallel.plan.job import GRID, GRID_ON_CPU, Job, Layout
from fourfold_parallel.plan.machines import machine_of
from fourfold_parallel.plan.search import rank
from fourfold_parallel.plan.transformer import Transformer
from fourfold_parallel.run.engines import Session

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """Fourfold on the planner's best grid for the ranks of this launch.

    Under `torchrun --nnodes=1:8 --max-restarts=9` a run that loses a node goes on with those that are left:
    its checkpoint is read on another grid, and the order of its data does not depend on the grid. The node
    that holds torchrun's store is the one that may not be lost (`--rdzv-conf is_host=true` says which).
    """

    takes_outlines: ClassVar[bool] = True
    machine: str
    """A name that `fourfold plan` knows, or the file that `fourfold probe` wrote."""
    sequence: int
    """Tokens of a row, as the run's."""

    def layout(
        self, model: PreTrainedModel, *, precision: Literal["fp32", "bf16"], batch: int, ranks: int
    ) -> Layout:
        """The fastest grid that holds the model.

        Raises:
            ValueError: Nothing fits; says how many devices would do.
        """
        on = machine_of(self.machine)
        config: Any = model.config
        job = Job(
            model=Transformer.of(config), batch=batch, sequence=self.sequence, precision=precision,
            storage=GRID_ON_CPU if on.host_computes else GRID,
        )  # fmt: skip
        return rank(job, on, ranks).best.layout

    @contextmanager
    def open(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        precision: Literal["fp32", "bf16"],
        batch: int,
        microbatch: int,
    ) -> Iterator[Session]:
        """A session on that grid; every rank finds the same.

        Raises:
            ValueError: As `Fourfold`, or nothing fits.
        """
        if not isinstance(model, PreTrainedModel):
            raise ValueError(
                f"engine Planned lays out transformers models, not {type(model).__name__}; use another engine"
            )
        ranks = world_size()
        layout = self.layout(model, precision=precision, batch=batch, ranks=ranks)
        log.info("%d ranks: %s", ranks, layout)
        engine = Fourfold.planned(layout)
        with engine.open(
            model, optimizer, precision=precision, batch=batch, microbatch=microbatch
        ) as session:
            yield session
