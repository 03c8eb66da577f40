"""A run as a frozen value; a recipe is a documented function that returns one."""

from dataclasses import dataclass
from typing import Literal, assert_never

from fourfold_parallel.common.values import Difference, Json, differences, tag_of
from fourfold_parallel.run.data import TokenSource
from fourfold_parallel.run.engines import Engine
from fourfold_parallel.run.mixtures import Staged
from fourfold_parallel.run.models import Model
from fourfold_parallel.run.objective import Objective
from fourfold_parallel.run.optimizer import Optimizer, Phases, Schedule

Precision = Literal["fp32", "bf16"]
"""Compute type; weights and optimizer state stay in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Train for a number of optimizer steps."""

    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Train for a number of input tokens, rounded up to whole steps."""

    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Until:
    """Train until a validation is as good as asked for: the time that takes is the time to quality."""

    loss_nats: float
    """Of the validation that ends the run: this or less."""
    count: int
    """Optimizer steps at most; schedules are laid over these."""


Horizon = Steps | Tokens | Until


@dataclass(frozen=True, slots=True, kw_only=True)
class At:
    """After each of these steps, ascending and counted from 1."""

    steps: tuple[int, ...]

    def __post_init__(self) -> None:
        if list(self.steps) != sorted(set(self.steps)) or any(step < 1 for step in self.steps):
            raise ValueError(f"steps={self.steps} are not ascending from 1; sort them")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Everything that decides a training run's numbers, and where it runs.

    The first line of its record rebuilds it. Two runs are the same run where they differ in `name`, `engine`,
    `microbatch`, `validate_every` and `checkpoint_every` only (`departures`): an interrupted run may go on
    under another engine and on other ranks. The numbers are then equal up to the rounding of sums; what an
    objective draws for each microbatch, or dropout for each rank, is drawn anew.
    """

    name: str
    """Lower case, for file names: `plain-seed0`."""
    model: Model
    data: TokenSource
    objective: Objective
    optimizer: Optimizer
    schedule: Schedule
    horizon: Horizon
    batch: int
    """Rows per optimizer step, over all ranks."""
    microbatch: int
    """Rows per forward pass on one rank; larger ones are split and their gradients added."""
    sequence: int
    """Targets per row."""
    max_grad_norm: float
    """Gradients are scaled down to this 2-norm; `inf` never does."""
    precision: Precision
    engine: Engine
    seed: int
    """Decides fresh weights and the order of the data."""
    validate_every: int | At
    """Steps between validations on the source's held-out rows, or after which; a last one is done at the
    end."""
    checkpoint_every: int
    """Steps between checkpoints; a last one is written at the end of the run."""

    def __post_init__(self) -> None:
        for field in ("batch", "microbatch", "sequence", "validate_every", "checkpoint_every"):
            value = getattr(self, field)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{field}={value} in run {self.name!r}; use 1 or more")
        if self.horizon.count < 1:
            raise ValueError(
                f"horizon={self.horizon} in run {self.name!r}; use a count of 1 or more"
            )
        for field in ("data", "schedule"):
            value = getattr(self, field)
            if isinstance(value, Staged | Phases) and value.steps != self.steps:
                raise ValueError(
                    f"{field} of run {self.name!r} lasts {value.steps} steps, its horizon {self.steps}; make "
                    "them equal"
                )
        if not self.max_grad_norm > 0:
            raise ValueError(
                f"max_grad_norm={self.max_grad_norm} in run {self.name!r}; "
                "use a positive norm, or inf for no clipping"
            )

    @property
    def tokens_per_step(self) -> int:
        """Input tokens in one optimizer step, over all ranks."""
        return self.batch * self.sequence

    @property
    def steps(self) -> int:
        """Optimizer steps until the horizon."""
        return steps_until(self.horizon, tokens_per_step=self.tokens_per_step)


def steps_until(horizon: Horizon, *, tokens_per_step: int) -> int:
    """Optimizer steps until a horizon."""
    match horizon:
        case Steps(count=count) | Until(count=count):
            return count
        case Tokens(count=count):
            return -(-count // tokens_per_step)
        case _:
            assert_never(horizon)


_WHERE_IT_RUNS = ("name", "engine", "microbatch", "validate_every", "checkpoint_every")


def departures(described: Json, asked: object) -> tuple[Difference, ...]:
    """The fields that make `asked` another run, or another study of runs, than a description is of.

    Args:
        described: a run, or a value that holds runs, as `to_json` gave it.
        asked: the value that should be the same.
    """
    return differences(described, asked, apart_from={tag_of(Run): _WHERE_IT_RUNS})
