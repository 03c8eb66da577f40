"""When a token has thought enough: criteria as values, and the loop that lets finished rows leave.

A criterion measures each token after each recurrence and stops it by a threshold. Those that read the
state cost a few vector operations; those that read the logits run coda and head at every check, which at
Huginn's shape costs 69 % of a recurrence (section 6.1 uses the KL divergence).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from fourfold_recurrent_depth.cache import RecurrentCache
    from fourfold_recurrent_depth.interface import Pass
    from fourfold_recurrent_depth.model import RecurrentDepthForCausalLM

Memory = tuple[Tensor, ...]
"""What a criterion carries from check to check; every tensor is (token, ...)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Criterion(ABC):
    """What all criteria share."""

    reads: ClassVar[Literal["state", "logits"]]
    threshold: float
    min_steps: int = 1
    """No token stops before this many recurrences."""
    every: int = 1
    """Check after every so many recurrences."""
    scope: Literal["row", "token"] = "row"
    """In a prompt, the tokens of a row stop together (published), or each by itself."""
    in_prompt: bool = True
    """Whether passes of more than one token may stop early."""

    def __post_init__(self) -> None:
        if self.min_steps < 1 or self.every < 1:
            raise ValueError(
                f"min_steps={self.min_steps}, every={self.every}; use 1 or more for both"
            )

    @abstractmethod
    def begin(self, features: Float[Tensor, "token features"]) -> Memory:
        """The memory before the first check, given s_0 or, for readers of logits, zeros like them."""

    @abstractmethod
    def measure(
        self, now: Float[Tensor, "token features"], before: Memory
    ) -> tuple[Float[Tensor, " token"], Memory]:
        """The value that is compared with the threshold, and the memory for the next check."""

    def stops(self, value: Float[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """Below the threshold, unless a criterion says otherwise."""
        return value < self.threshold


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentDiff(Criterion):
    """||s_i - s_{i-p}|| / ||s_i||, the smallest over p = 1 .. `lags`: with lags, orbits stop too."""

    reads = "state"
    threshold: float = 0.03
    lags: int = 1

    def begin(self, features: Float[Tensor, "token features"]) -> Memory:
        """s_0."""
        return (features,)

    def measure(
        self, now: Float[Tensor, "token features"], before: Memory
    ) -> tuple[Float[Tensor, " token"], Memory]:
        """Relative distance to the nearest of the last states."""
        moved = torch.stack([torch.linalg.vector_norm(now - one, dim=-1) for one in before])
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
    """|H(p_i) - H(p_{i-1})| in nats."""

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
    """How many checks in a row the likeliest token was the same; stops at `threshold` or more."""

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
        """What the function says.

        Raises:
            ValueError: where it does not say it for every token.
        """
        value = self.function(now, before[0])
        if value.shape != now.shape[:1]:
            raise ValueError(
                f"the exit function gave shape {tuple(value.shape)} for {now.shape[0]} tokens; "
                "give one number for each"
            )
        return value.float(), (now,)


NAMED: dict[str, Callable[[], Criterion]] = {
    "kl": KL,
    "minp_kl": MinPKL,
    "entropy_diff": EntropyDiff,
    "latent_diff": LatentDiff,
    "cosine": Cosine,
    "argmax_stability": ArgmaxStability,
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
    return Custom(function=choice)


@dataclass(slots=True, kw_only=True)
class Found:
    """Where the tokens of a pass stopped."""

    state: Float[Tensor, "batch token width"]
    steps: Int[Tensor, "batch token"]
    logits: Float[Tensor, "batch kept vocabulary"] | None
    """Of each row's last token, where the criterion read logits; else nobody has computed them."""


@torch.no_grad()
def iterate_until_exit(
    model: RecurrentDepthForCausalLM,
    e: Float[Tensor, "batch token width"],
    s: Float[Tensor, "batch token width"],
    where: Pass,
    cache: RecurrentCache,
    criterion: Criterion,
    *,
    steps: int,
    real: Bool[Tensor, "batch token"] | None,
) -> Found:
    """Recur until every token has stopped, or `steps` times.

    Rows leave the loop when all their tokens have stopped, and the core runs on the others alone. What a
    token computes, and what others see of it, does not depend on its company: it attends to itself and
    to earlier tokens, and each of these is read at the recurrence in question or at its last one.

    Args:
        model: whose core, coda and head.
        e: the prelude's output.
        s: s_0.
        where: positions and mask of the whole batch.
        cache: opened for this pass.
        criterion: when to stop.
        steps: recurrences at most.
        real: False for padding, which stops at once and counts for nothing.
    """
    batch, tokens = e.shape[:2]
    whole_rows = criterion.scope == "row"
    final, stopped_at = s.clone(), torch.full((batch, tokens), steps, device=e.device)
    logits: Tensor | None = None
    # The survivors: their rows in the batch, and which of their tokens still run.
    rows = torch.arange(batch, device=e.device)
    running = torch.ones_like(stopped_at, dtype=torch.bool) if real is None else real.clone()
    injected, here, memory = model.inject(e), where, None
    if real is not None:
        cache.select(None, running)
    for done in range(1, steps + 1):
        new = model.recur(s, injected, here, done - 1)
        s = new if tokens == 1 else torch.where(running.unsqueeze(-1), new, s)
        is_checked = (tokens == 1 or criterion.in_prompt) and done % criterion.every == 0
        if not is_checked and done < steps:
            continue
        features = s
        if criterion.reads == "logits":
            features = model.predict(model.transformer["ln_f"](s), here, 1 if whole_rows else 0)
        stops = running
        if is_checked:
            memory = memory or criterion.begin(_start(criterion, final[rows], features))
            value, memory = criterion.measure(features.flatten(0, 1), memory)
            value = _of_rows(value.unflatten(0, features.shape[:2]), running, whole=whole_rows)
            if done < steps:
                stops = running & criterion.stops(value) & (done >= criterion.min_steps)
        if criterion.reads == "logits":
            logits = features.new_zeros((batch, *features.shape[1:])) if logits is None else logits
            leaving = stops if features.shape[1] == tokens else stops.any(1, keepdim=True)
            logits[rows] = torch.where(leaving.unsqueeze(-1), features, logits[rows])
        row, token = stops.nonzero(as_tuple=True)
        if not len(row):
            continue
        final[rows[row], token], stopped_at[rows[row], token] = s[row, token], done
        cache.stop(rows[row], token, depth=done)
        running = running & ~stops
        keep = running.any(1).nonzero().flatten()
        if not len(keep):
            break
        if len(keep) < len(rows):
            memory = _memory_of(memory, keep, features.shape[1])
            rows, s, injected, running = rows[keep], s[keep], injected[keep], running[keep]
            here = where.of_rows(rows)
        cache.select(
            None if len(rows) == batch else rows,
            None if bool(running.all()) else running,
        )
    cache.select(None, None)
    if tokens > 1 and not whole_rows:
        # A token's coda keys were provisional for later ones as long as it ran: nobody has the logits.
        logits = None
    return Found(state=final, steps=stopped_at, logits=logits)


def _start(criterion: Criterion, first: Tensor, features: Tensor) -> Tensor:
    """What `begin` is given: s_0, or zeros like the logits, by token."""
    start = first if criterion.reads == "state" else torch.zeros_like(features)
    return start.flatten(0, 1)


def _of_rows(
    value: Float[Tensor, "row kept"], running: Bool[Tensor, "row token"], *, whole: bool
) -> Float[Tensor, "row judged"]:
    """Each token's value, or the mean over a row's running tokens where the row stops as one."""
    if not whole or value.shape[1] == 1:
        return value
    weight = running.to(value.dtype)
    return (value * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)


def _memory_of(memory: Memory | None, keep: Int[Tensor, " kept"], tokens: int) -> Memory | None:
    """The memory of some rows."""
    if memory is None:
        return None
    return tuple(one.unflatten(0, (-1, tokens))[keep].flatten(0, 1) for one in memory)
