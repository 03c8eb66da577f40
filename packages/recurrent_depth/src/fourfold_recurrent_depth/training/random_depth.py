"""Training at a random depth: one draw of recurrences per microbatch, gradients through the last k.

    r ~ Poisson(rate) + 1,   rate ~ LogNormal(ln mean - sigma^2 / 2, sigma)      (section 3.3)

The draw is a function of the microbatch's number alone, so every rank makes the same one and none waits
for a deeper neighbour ("locked step", section 4.1). Initial states are functions of the number and the row.
So a run does not depend on its ranks, and a resumed one goes on as if it had not stopped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Int
from torch import Tensor, nn

from fourfold_parallel.run.data import Batch
from fourfold_parallel.run.objective import MicrobatchLoss, token_nats
from fourfold_recurrent_depth.analysis.flops import Costs
from fourfold_recurrent_depth.configuration import Family
from fourfold_recurrent_depth.retrofit import Retrofitted
from fourfold_recurrent_depth.states import RowStates

MODULUS = 2**31 - 1
"""Seeds are taken modulo this, as published."""
_PRIME = 1_000_003
"""Spreads the numbers of microbatches over the seeds of rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogNormalPoisson:
    """The paper's law Lambda: heavy-tailed, so that the model meets every depth."""

    mean: int = 32
    """Mean of the Poisson rate; recurrences are one more on average."""
    sigma: float = 0.5
    backprop: int = 8
    """Recurrences at the end of a pass that carry gradient, at most."""
    seed: int = 514_229
    ramp: int = 0
    """Microbatches over which mean and backprop rise linearly from 1 (curriculum); 0 for none."""

    def __post_init__(self) -> None:
        if self.mean < 1 or not self.sigma > 0 or self.ramp < 0:
            raise ValueError(
                f"mean={self.mean}, sigma={self.sigma}, ramp={self.ramp} give no law of recurrences; use a "
                "mean of 1 or more, a sigma above 0, and a ramp of 0 or more microbatches"
            )

    def draw(self, number: int, *, row: int = 0) -> tuple[int, int]:
        """(without gradient, with gradient) of microbatch `number`, counted from 0, or of a row of it."""
        risen = min(1.0, (number + 1) / self.ramp) if self.ramp else 1.0
        mean, backprop = max(1.0, risen * self.mean), max(1, round(risen * self.backprop))
        # Rows lie far apart, so that a row's draw is not the next microbatch's.
        seed = (self.seed + number + 1 + row * _PRIME) % MODULUS
        generator = torch.Generator().manual_seed(seed)
        location = math.log(mean) - self.sigma**2 / 2
        rate = torch.zeros(1).log_normal_(location, self.sigma, generator=generator)
        drawn = int(torch.poisson(rate, generator=generator)) + 1
        return max(drawn - backprop, 0), min(backprop, drawn)


@dataclass(frozen=True, slots=True, kw_only=True)
class Always:
    """The same recurrences in every microbatch."""

    recurrences: int
    backprop: int

    def __post_init__(self) -> None:
        if self.recurrences < 1:
            raise ValueError(f"recurrences={self.recurrences}; use 1 or more")

    def draw(self, number: int, *, row: int = 0) -> tuple[int, int]:  # noqa: ARG002 - the law's signature
        """(without gradient, with gradient)."""
        with_gradient = min(self.backprop, self.recurrences)
        return self.recurrences - with_gradient, with_gradient


Recurrences = LogNormalPoisson | Always


def beginning(form: Family | None, batch: Batch) -> dict[str, Any]:
    """Arguments that give each row of a batch its initial states, by its address and the batch's number.

    None for a retrofit, which begins with zeros, and for families that begin with the embedding.
    """
    if form is None or form.begins != "noise":
        return {}
    seeds = tuple((batch.number * _PRIME + address) % MODULUS for address in batch.addresses)
    return {"initial_state": RowStates(seeds)}


class Supervision(Protocol):
    """Says what is to be predicted at each input."""

    def targets(self, batch: Batch) -> Int[Tensor, "batch token"]:
        """Targets of `batch.tokens[:, :-1]`, -100 where nothing is asked."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomDepth:
    """Cross-entropy at a drawn depth."""

    recurrences: Recurrences
    supervision: Supervision
    per: Literal["microbatch", "row"] = "microbatch"
    """One draw for all rows, or one for each (the paper writes the latter and trains with the former)."""

    def __post_init__(self) -> None:
        backprop = self.recurrences.backprop
        if backprop < 1:
            raise ValueError(
                f"backprop={backprop} lets no gradient reach prelude and core; use 1 or more"
            )

    def flops(self, price: Costs, number: int) -> float:
        """Of a token of microbatch `number`, forward and backward, at the depth of all rows."""
        return price.training(*self.recurrences.draw(number))

    def targets(self, batch: Batch) -> Int[Tensor, "batch token"]:
        """The supervision's."""
        return self.supervision.targets(batch)

    def loss(
        self, model: nn.Module, batch: Batch, targets: Int[Tensor, "batch token"]
    ) -> MicrobatchLoss:
        """Summed cross-entropy of one microbatch; telemetry counts recurrences over its rows.

        Raises:
            ValueError: recurrences without gradient cut the tokens off, which only the first one sees.
        """
        rows = len(batch.tokens)
        draw, number = self.recurrences.draw, batch.number
        if self.per == "row":
            draws = [draw(number, row=address) for address in batch.addresses]
        else:
            draws = [draw(number)] * rows
        totals = torch.tensor([sum(draw) for draw in draws], device=batch.tokens.device)
        steps: Any = draws[0]
        if self.per == "row" and rows > 1:
            steps = (totals, max(with_gradient for _, with_gradient in draws))
        inner: Any = getattr(model, "module", model)
        form = None if isinstance(inner, Retrofitted) else inner.config.form
        if form is not None and form.injects is None and any(without for without, _ in draws):
            raise ValueError(
                f"recurrences of {inner.config.family} without gradient, and it sees its tokens in the first "
                "alone: its embedding would learn nothing; use a backprop of all recurrences"
            )
        begin = beginning(form, batch)
        logits = model(
            input_ids=batch.tokens[:, :-1], use_cache=False, num_steps=steps, **begin
        ).logits
        return MicrobatchLoss(
            nats_sum=token_nats(logits, targets, model).sum(),
            telemetry={"recurrences_times_rows": totals.sum().to(logits.dtype)},
        )
