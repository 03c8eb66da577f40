"""Training at every exit: the mean loss after each recurrence, by a learned gate or evenly.

    L = sum_t p_t L_t - beta H(p),   p_t = lambda_t prod_{j<t} (1 - lambda_j),   the last takes the rest

as Ouro was trained (arXiv 2510.25741, section 3.3): L_t is the loss of a token read after recurrence t,
lambda_t what the gate says there, and the entropy H keeps every depth in use. A family without a gate takes
p_t = 1 / T: plain deep supervision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from fourfold_parallel.run.data import Batch
from fourfold_parallel.run.objective import IGNORE, MicrobatchLoss, token_nats
from fourfold_recurrent_depth.analysis.flops import Costs
from fourfold_recurrent_depth.retrofit import Retrofitted
from fourfold_recurrent_depth.training.random_depth import Supervision, beginning


def exit_log_probabilities(
    gates: Sequence[Float[Tensor, "batch token"]],
) -> Float[Tensor, "depth batch token"]:
    """The logarithm of p_t, from the gate's logits behind each recurrence; the last one's is not asked."""
    stop, go_on = F.logsigmoid(torch.stack([*gates])), F.logsigmoid(-torch.stack([*gates]))
    survived = torch.cat([torch.zeros_like(go_on[:1]), go_on[:-1].cumsum(0)])
    return survived + torch.cat([stop[:-1], torch.zeros_like(stop[:1])])


@dataclass(frozen=True, slots=True, kw_only=True)
class EveryExit:
    """The mean cross-entropy over all exits of a pass, all of whose recurrences carry gradient."""

    recurrences: int
    """T, in every microbatch."""
    supervision: Supervision
    entropy: float = 0.05
    """beta: nats of loss that a nat of the gate's entropy is worth; nothing where there is no gate."""

    def __post_init__(self) -> None:
        if self.recurrences < 1 or not 0 <= self.entropy < math.inf:
            raise ValueError(
                f"recurrences={self.recurrences}, entropy={self.entropy} average over no exits; use 1 or "
                "more recurrences, and an entropy from 0 on"
            )

    def flops(self, price: Costs, number: int) -> float:  # noqa: ARG002 - every microbatch costs the same
        """Of a token of microbatch `number`, forward and backward."""
        return price.training(0, self.recurrences, exits=self.recurrences)

    def targets(self, batch: Batch) -> Int[Tensor, "batch token"]:
        """The supervision's."""
        return self.supervision.targets(batch)

    def loss(
        self, model: nn.Module, batch: Batch, targets: Int[Tensor, "batch token"]
    ) -> MicrobatchLoss:
        """Summed over tokens; telemetry sums each token's loss at the first and last exit, and its mean exit.

        Raises:
            ValueError: the model is a retrofit, which reads its state after the last recurrence alone.
        """
        inner: Any = getattr(model, "module", model)
        if isinstance(inner, Retrofitted):
            raise ValueError(
                f"{type(inner).__name__} predicts after its last recurrence alone; train it with RandomDepth"
            )
        depths = range(1, self.recurrences + 1)
        out = model(
            input_ids=batch.tokens[:, :-1],
            use_cache=False,
            num_steps=(0, self.recurrences),
            depths=depths,
            **beginning(inner.config.form, batch),
        )
        nats = torch.stack([token_nats(logits, targets, model) for logits in out.logits_by_depth])
        shares, price = torch.full_like(nats, 1 / self.recurrences), nats
        if out.gates_by_depth is not None:
            log_p = exit_log_probabilities(out.gates_by_depth).to(nats.dtype)
            shares, price = log_p.exp(), nats + self.entropy * log_p
        shares = shares * (targets != IGNORE)
        order = torch.arange(1, self.recurrences + 1, device=nats.device, dtype=nats.dtype)
        with torch.no_grad():
            telemetry = {
                "first_nats_sum": nats[0].sum(),
                "last_nats_sum": nats[-1].sum(),
                "exits_sum": torch.einsum("dbt,d->", shares, order),
            }
        return MicrobatchLoss(nats_sum=(shares * price).sum(), telemetry=telemetry)
