"""When a token has thought enough: criteria as values.

A criterion measures each token after each recurrence and stops it by a threshold. Those that read the
state cost a few vector operations; those that read the logits run coda and head at every check, which at
Huginn's shape costs 69 % of a recurrence (section 6.1 uses the KL divergence).

Fewer recurrences are not less time by themselves: the rows of a batch wait for the slowest, unless it
refills (`decoding/refill.py`), and checks cost; at small widths more than recurrences do, and `every=4`
then saves time where `every=1` loses it.
`benchmarks/recurrent_depth_speed.py` times them against full depth.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

Memory = tuple[Tensor, ...]
"""Memory that a criterion carries from check to check; every tensor is (token, ...)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Criterion(ABC):
    """The base of all criteria: a threshold, and when to check."""

    reads: ClassVar[Literal["state", "logits"]]
    threshold: float
    min_steps: int = 1
    """No token stops before this many recurrences."""
    every: int = 1
    """Check after every so many recurrences, which run as one call; a check compares with the one before."""
    scope: Literal["row", "token"] = "row"
    """In a prompt, the tokens of a row stop together (published), or each by itself."""
    in_prompt: bool = True
    """True where passes of more than one token may stop early."""

    def __post_init__(self) -> None:
        if self.min_steps < 1 or self.every < 1:
            raise ValueError(
                f"min_steps={self.min_steps}, every={self.every}; use 1 or more for both"
            )
        if self.scope not in ("row", "token") or math.isnan(self.threshold):
            raise ValueError(
                f"scope={self.scope!r}, threshold={self.threshold}; use 'row' or 'token', and a number"
            )

    @abstractmethod
    def begin(self, features: Float[Tensor, "token features"]) -> Memory:
        """The memory before the first check, given s_0 or, for readers of logits, zeros like them.

        Of the shapes that `measure` gives: tokens of several ages are measured together.
        """

    @abstractmethod
    def measure(
        self, now: Float[Tensor, "token features"], before: Memory
    ) -> tuple[Float[Tensor, " token"], Memory]:
        """The value that is compared with the threshold, and the memory for the next check."""

    def stops(self, value: Float[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """Below the threshold, unless a criterion says otherwise."""
        return value < self.threshold

    def of(self, model: Any) -> Criterion:  # noqa: ARG002 - most criteria need nothing of the model
        """The criterion for a model: with what it takes from the weights."""
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentDiff(Criterion):
    """||s_i - s_{i-p}|| / ||s_i||, the smallest over p = 1 .. `lags`: with lags, orbits stop too."""

    reads = "state"
    threshold: float = 0.03
    lags: int = 1

    def __post_init__(self) -> None:
        Criterion.__post_init__(self)
        if self.lags < 1:
            raise ValueError(f"lags={self.lags} leaves no state to compare with; use 1 or more")

    def begin(self, features: Float[Tensor, "token features"]) -> Memory:
        """s_0, as often as states are remembered: the nearest is the same, whatever a token's age."""
        return (features,) * self.lags

    def measure(
        self, now: Float[Tensor, "token features"], before: Memory
    ) -> tuple[Float[Tensor, " token"], Memory]:
        """Relative distance to the nearest of the last states."""
        moved = torch.stack([torch.linalg.vector_norm(now - state, dim=-1) for state in before])
        value = moved.amin(0) / torch.linalg.vector_norm(now, dim=-1)
        return value, (now, *before)[: self.lags]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cosine(Criterion):
    """1 - cos(s_i, s_{i-1})."""

    reads = "state"
    threshold: float = 1e-3

    def begin(self, features: Float[Tensor, "token features"]) -> Memory:
        """s_0."""
        return (features,)

    def measure(
        self, now: Float[Tensor, "token features"], before: Memory
    ) -> tuple[Float[Tensor, " token"], Memory]:
        """The angle's defect."""
        return 1 - F.cosine_similarity(now, before[0], dim=-1), (now,)


@dataclass(frozen=True, slots=True, kw_only=True)
class KL(Criterion):
    """KL(p_{i-1} || p_i) in nats; p_0 is uniform (section 6.1)."""

    reads = "logits"
    threshold: float = 5e-4

    def begin(self, features: Float[Tensor, "token features"]) -> Memory:
        """Log of the uniform distribution."""
        return (F.log_softmax(torch.zeros_like(features), dim=-1),)

    def measure(
        self, now: Float[Tensor, "token features"], before: Memory
    ) -> tuple[Float[Tensor, " token"], Memory]:
        """The divergence."""
        log_p = F.log_softmax(now, dim=-1)
        return (before[0].exp() * (before[0] - log_p)).sum(-1), (log_p,)


@dataclass(frozen=True, slots=True, kw_only=True)
class MinPKL(Criterion):
    """KL between distributions whose unlikely tokens (p < `floor` * max p) count as uniform."""

    reads = "logits"
    threshold: float = 1e-5
    floor: float = 0.1

    def begin(self, features: Float[Tensor, "token features"]) -> Memory:
        """The uniform distribution."""
        return (torch.full_like(features, 1 / features.shape[-1]),)

    def measure(
        self, now: Float[Tensor, "token features"], before: Memory
    ) -> tuple[Float[Tensor, " token"], Memory]:
        """The divergence of the pruned distributions."""
        p = F.softmax(now, dim=-1)
        p = torch.where(p < self.floor * p.amax(-1, keepdim=True), 1 / p.shape[-1], p)
        p = p / p.sum(-1, keepdim=True)
        return (before[0] * (before[0].log() - p.log())).sum(-1), (p,)


@dataclass(frozen=True, slots=True, kw_only=True)
class EntropyDiff(Criterion):
    """`|H(p_i) - H(p_{i-1})|` in nats."""

    reads = "logits"
    threshold: float = 1e-3

    def begin(self, features: Float[Tensor, "token features"]) -> Memory:
        """An entropy that no distribution has, so that the first check never stops."""
        return (torch.full_like(features[:, 0], 100.0),)

    def measure(
        self, now: Float[Tensor, "token features"], before: Memory
    ) -> tuple[Float[Tensor, " token"], Memory]:
        """The change of entropy."""
        log_p = F.log_softmax(now, dim=-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        return (entropy - before[0]).abs(), (entropy,)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArgmaxStability(Criterion):
    """Count of checks in a row with the same likeliest token; stops at `threshold` or more."""

    reads = "logits"
    threshold: float = 5

    def begin(self, features: Float[Tensor, "token features"]) -> Memory:
        """No token, no count."""
        none = torch.full_like(features[:, 0], -1, dtype=torch.long)
        return none, torch.zeros_like(none)

    def measure(
        self, now: Float[Tensor, "token features"], before: Memory
    ) -> tuple[Float[Tensor, " token"], Memory]:
        """The count."""
        likeliest = now.argmax(-1)
        count = torch.where(likeliest == before[0], before[1] + 1, torch.zeros_like(before[1]))
        return count.float(), (likeliest, count)

    def stops(self, value: Float[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """At the count or above."""
        return value >= self.threshold


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed(Criterion):
    """After `threshold` recurrences."""

    reads = "state"

    def begin(self, features: Float[Tensor, "token features"]) -> Memory:
        """Nothing done."""
        return (torch.zeros_like(features[:, 0]),)

    def measure(
        self, now: Float[Tensor, "token features"], before: Memory
    ) -> tuple[Float[Tensor, " token"], Memory]:
        """Checks done so far."""
        del now
        return before[0] + 1, (before[0] + 1,)

    def stops(self, value: Float[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """At the number."""
        return value * self.every >= self.threshold


@dataclass(frozen=True, slots=True, kw_only=True)
class Custom(Criterion):
    """A function (s_i, s_{i-1}) -> one number per token, compared with `threshold` (below stops)."""

    reads = "state"
    function: Callable[[Tensor, Tensor], Tensor]
    threshold: float = 0.5

    def begin(self, features: Float[Tensor, "token features"]) -> Memory:
        """s_0."""
        return (features,)

    def measure(
        self, now: Float[Tensor, "token features"], before: Memory
    ) -> tuple[Float[Tensor, " token"], Memory]:
        """The function's value.

        Raises:
            ValueError: where it does not say it for every token.
        """
        value = self.function(now, before[0])
        is_tensor = isinstance(value, Tensor) and value.dtype != torch.bool
        if not is_tensor or value.shape != now.shape[:1]:
            given = f"{value.dtype} of {tuple(value.shape)}" if isinstance(value, Tensor) else value
            raise ValueError(
                f"the exit function gave {given} for {now.shape[0]} tokens; give one number for each, below "
                f"{self.threshold} where the token stops"
            )
        return value.float(), (now,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate(Criterion):
    """The probability to have stopped by now, of the model's own learned gate; stops at `threshold`.

    sigma(gate(s_i)) is the probability to stop at i where the token has not stopped before (Ouro,
    arXiv 2510.25741). Ouro's code runs every loop and reads each token at its exit; here a token that has
    stopped costs nothing more, and others read its keys at its last loop. Recurrences between checks
    (`every`) have no probability.
    """

    reads = "state"
    threshold: float = math.inf
    """By default the configuration's `early_exit_threshold`."""
    scope: Literal["row", "token"] = "token"
    gate: Callable[[Tensor], Tensor] | None = None
    """Logits of states; by default the model's own gate, which `of` puts here."""

    def of(self, model: Any) -> Criterion:
        """With the model's gate and threshold, where there are none.

        Raises:
            ValueError: the model has no gate.
        """
        if self.gate is not None:
            return self
        if not model.config.form.has_gate:
            raise ValueError(
                f"a model of {model.config.family} has no learned gate; use another criterion, such as KL()"
            )
        is_given = self.threshold != math.inf
        threshold = self.threshold if is_given else model.config.early_exit_threshold
        return replace(self, gate=model.part("gate"), threshold=threshold)

    def begin(self, features: Float[Tensor, "token features"]) -> Memory:
        """Nothing has stopped: probabilities to have, and to have not."""
        none = torch.zeros_like(
            features[:, 0], dtype=torch.promote_types(features.dtype, torch.float32)
        )
        return none, none + 1

    def measure(
        self, now: Float[Tensor, "token features"], before: Memory
    ) -> tuple[Float[Tensor, " token"], Memory]:
        """The probability to have stopped.

        Raises:
            ValueError: nobody has put a gate in.
        """
        if self.gate is None:
            raise ValueError("this Gate is of no model; use Gate(...).of(model)")
        stopped, running = before
        share = torch.sigmoid(self.gate(now).squeeze(-1).to(stopped.dtype))
        stopped = stopped + share * running
        return stopped, (stopped, running * (1 - share))

    def stops(self, value: Float[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """At the probability or above."""
        return value >= self.threshold


NAMED: dict[str, Callable[[], Criterion]] = {
    "kl": KL,
    "minp_kl": MinPKL,
    "entropy_diff": EntropyDiff,
    "latent_diff": LatentDiff,
    "cosine": Cosine,
    "argmax_stability": ArgmaxStability,
    "gate": Gate,
}
"""Criteria by name, with the published thresholds."""


def criterion_named(choice: Criterion | str | Callable[..., Tensor]) -> Criterion:
    """The criterion of a name, of a function, or itself.

    Raises:
        ValueError: for an unknown name.
    """
    if isinstance(choice, Criterion):
        return choice
    if isinstance(choice, str):
        if choice.replace("-", "_") not in NAMED:
            raise ValueError(
                f"exit={choice!r} is not known; use one of {', '.join(NAMED)}, a criterion of "
                "fourfold_recurrent_depth.exits, or a function of (state, state before)"
            )
        return NAMED[choice.replace("-", "_")]()
    if isinstance(choice, type) or not callable(choice):
        raise ValueError(
            f"exit={choice!r} is no criterion; use one such as KL(threshold=5e-4), a name, or a function of "
            "(state, state before)"
        )
    return Custom(function=choice)
