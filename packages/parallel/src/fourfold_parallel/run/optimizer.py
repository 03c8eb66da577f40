"""Optimizers and learning-rate schedules as values."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn


class Optimizer(Protocol):
    """Something that gives a torch optimizer for a model."""

    @property
    def learning_rate(self) -> float:
        """Peak rate, multiplied by the schedule's factor at each step."""
        ...

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer over the model's trainable parameters."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamW:
    """Adam with decoupled weight decay on matrices; vectors (norms, biases) are not decayed."""

    learning_rate: float
    """Peak rate, multiplied by the schedule's factor at each step."""
    weight_decay: float
    beta1: float
    beta2: float
    epsilon: float

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Torch's AdamW with two parameter groups."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=self.learning_rate,
            betas=(self.beta1, self.beta2),
            eps=self.epsilon,
        )


class Schedule(Protocol):
    """The learning rate's factor as a function of progress."""

    def factor(self, step: int, steps: int) -> float:
        """Multiplier of the peak rate at 0-based `step` of `steps`."""
        ...


def _warmup(step: int, warmup_steps: int) -> float:
    """Linear from 1/warm-up to 1, so that no step is spent at rate zero."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """Warm up linearly, then hold the peak rate."""

    warmup_steps: int

    def factor(self, step: int, steps: int) -> float:  # noqa: ARG002 - the protocol's
        """1 after the warm-up."""
        return _warmup(step, self.warmup_steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cosine:
    """Warm up linearly, then half a cosine from the peak to `floor` of it at the last step."""

    warmup_steps: int
    floor: float
    """Final rate over peak rate."""

    def factor(self, step: int, steps: int) -> float:
        """Warm-up factor, then the cosine."""
        if step < self.warmup_steps:
            return _warmup(step, self.warmup_steps)
        span = steps - 1 - self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / span) if span > 0 else 1.0
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Cooldown:
    """Warm up, hold, and fall linearly to zero over the last `cooldown_steps` (trapezoid).

    Until the cooldown begins the factor does not depend on `steps`, so a longer run with a cooldown can
    fork from a checkpoint of a shorter or constant one.
    """

    warmup_steps: int
    cooldown_steps: int

    def factor(self, step: int, steps: int) -> float:
        """Warm-up factor, 1, then the fall; the last step has factor 1/cooldown_steps."""
        falling = (steps - step) / self.cooldown_steps if self.cooldown_steps else 1.0
        return min(_warmup(step, self.warmup_steps), falling, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A schedule, the steps that it is laid over, and its peak beside the optimizer's."""

    schedule: Schedule
    steps: int
    peak: float = 1.0
    """Multiplies the schedule: a phase that warms up again to a lower rate has less than 1."""

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.peak >= 0:
            raise ValueError(
                f"steps={self.steps} and peak={self.peak} of a phase; use 1 or more steps, no negative peak"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Phases:
    """Schedules one after another, each with its own warm-up; together they last as long as the run."""

    phases: tuple[Phase, ...]

    def __post_init__(self) -> None:
        if not self.phases:
            raise ValueError("phases=() hold nothing; name a Phase")

    @property
    def steps(self) -> int:
        """Steps of all phases."""
        return sum(phase.steps for phase in self.phases)

    def factor(self, step: int, steps: int) -> float:
        """The factor of the phase that the step lies in, at its place within it.

        Raises:
            ValueError: The step lies behind the last phase.
        """
        first = 0
        for phase in self.phases:
            if step < first + phase.steps:
                return phase.peak * phase.schedule.factor(step - first, phase.steps)
            first += phase.steps
        raise ValueError(
            f"step {step} of {steps} lies behind the phases, which last {first} steps; make them as long "
            "as the run"
        )


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every parameter group this rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
