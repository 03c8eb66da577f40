"""Membership inference: scores that tell passages of the training data from others, and their quality.

Every score is higher for a likelier member. `auc` and `tpr_at_fpr` judge a score on passages known to be
members and others of the same kind that are not.
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor
from transformers import PreTrainedModel

from fourfold_parallel.reproduce.claims import Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStatistics:
    """A model's view of each target of some passages."""

    log_probability: Float[Tensor, "passage token"]
    """Of the true token, in nats."""
    mean: Float[Tensor, "passage token"]
    """Expected log probability of a token drawn from the model."""
    deviation: Float[Tensor, "passage token"]
    """Standard deviation of the same."""


@torch.no_grad()
def token_statistics(
    model: PreTrainedModel, passages: Int[Tensor, "passage row"], *, batch: int
) -> TokenStatistics:
    """Teacher-forced statistics of every target, `batch` passages at a time."""
    batches: list[tuple[Tensor, Tensor, Tensor]] = []
    for first in range(0, len(passages), batch):
        rows = passages[first : first + batch].to(model.device)
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        # Of every id at every place, then of the true one, then the moments over what the model may say.
        every = logits.float().log_softmax(-1)
        true = every.gather(-1, rows[:, 1:, None]).squeeze(-1)
        chances = every.exp()
        mean = (chances * every).sum(-1)
        variance = (chances * every.square()).sum(-1) - mean.square()
        batches.append((true.cpu(), mean.cpu(), variance.clamp(min=1e-12).sqrt().cpu()))
    true, mean, deviation = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return TokenStatistics(log_probability=true, mean=mean, deviation=deviation)


def loss_score(statistics: TokenStatistics) -> Float[Tensor, " passage"]:
    """Mean log probability: text known by heart costs little (Yeom et al. 2018)."""
    return statistics.log_probability.mean(dim=-1)


def zlib_score(
    statistics: TokenStatistics, texts: Sequence[str | bytes]
) -> Float[Tensor, " passage"]:
    """Log probability over the bytes that zlib needs: cheap for its content (Carlini et al. 2021)."""
    sizes = [
        len(zlib.compress(text if isinstance(text, bytes) else text.encode())) for text in texts
    ]
    return statistics.log_probability.sum(dim=-1) / torch.tensor(sizes, dtype=torch.float32)


def reference_score(
    statistics: TokenStatistics, reference: TokenStatistics
) -> Float[Tensor, " passage"]:
    """Log probability less that of a model that did not see the passage (Carlini et al. 2021)."""
    return loss_score(statistics) - loss_score(reference)


def min_k_score(statistics: TokenStatistics, share: float = 0.2) -> Float[Tensor, " passage"]:
    """Mean log probability of the `share` of least likely tokens (Shi et al. 2024).

    These are the tokens that goldfish loss leaves unlearned, so it is the score most affected by it.
    """
    return _lowest(statistics.log_probability, share)


def min_k_plus_score(statistics: TokenStatistics, share: float = 0.2) -> Float[Tensor, " passage"]:
    """Min-k of log probabilities standardised by the model's own distribution (Zhang et al. 2025)."""
    standard = (statistics.log_probability - statistics.mean) / statistics.deviation
    return _lowest(standard, share)


def _lowest(values: Float[Tensor, "passage token"], share: float) -> Float[Tensor, " passage"]:
    if not 0 < share <= 1:
        raise ValueError(f"share={share} of the tokens is none or too many; use above 0, at most 1")
    count = max(1, math.ceil(share * values.shape[1]))
    return values.topk(count, dim=-1, largest=False).values.mean(dim=-1)


def auc(members: Float[np.ndarray, " m"], others: Float[np.ndarray, " n"]) -> float:
    """Chance that a member scores above another passage; ties count half. 0.5 tells nothing.

    The statistic of Mann and Whitney over the number of pairs.
    """
    # Its p-value is not used; "auto" would enumerate every order of small samples for one.
    wins = stats.mannwhitneyu(members, others, method="asymptotic").statistic
    return float(wins / (len(members) * len(others)))


def tpr_at_fpr(
    members: Float[np.ndarray, " m"], others: Float[np.ndarray, " n"], *, fpr: float
) -> float:
    """Share of members found by a threshold that at most a share `fpr` of the others exceed.

    Raises:
        ValueError: where there are too few others to see such a share.
    """
    allowed = math.floor(fpr * len(others) + 1e-9)
    if allowed < 1:
        raise ValueError(
            f"fpr={fpr} of {len(others)} others is less than one; use at least {1 / len(others):.3g} "
            f"or {math.ceil(1 / fpr)} others"
        )
    threshold = np.sort(others)[::-1][allowed] if allowed < len(others) else -np.inf
    return float((members > threshold).mean())


def auc_interval(
    members: Float[np.ndarray, " m"],
    others: Float[np.ndarray, " n"],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """`auc` with its 95 % bootstrap interval over passages."""
    random = np.random.default_rng(seed)
    drawn = [
        auc(random.choice(members, len(members)), random.choice(others, len(others)))
        for _ in range(resamples)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(value=auc(members, others), low=float(low), high=float(high), seeds=1)


def exposure(canary_nats: float, reference_nats: Float[np.ndarray, " reference"]) -> float:
    """Bits by which a planted secret stands out among others of its kind (Carlini et al. 2019).

    log2 of the number of sequences over the canary's rank, 1 being the likeliest. A canary that was never
    trained on has 1/ln 2 = 1.44 on average, not 0.

    Args:
        canary_nats: summed loss of the canary.
        reference_nats: summed losses of sequences drawn like the canary but never trained on.
    """
    rank = 1 + int((np.asarray(reference_nats) < canary_nats).sum())
    return math.log2((len(reference_nats) + 1) / rank)
