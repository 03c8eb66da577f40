"""Choose widths and budgets: where coordinates pay, and the cheapest budget whose loss is bounded."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from fourfold_loki.attention_mode import AttentionCall, Observe, Sparse
from fourfold_loki.basis import Basis
from fourfold_loki.budget import Budget, Mass, Share
from fourfold_loki.evaluate.perplexity import FULL, score
from fourfold_loki.huggingface.session import attending
from fourfold_loki.huggingface.sites import check_basis
from fourfold_loki.selectors import Loki
from fourfold_parallel.common.progress import Progress, silent

CLAIMS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998, 0.999, 1.0)
"""Claimed masses among which `calibrated_mass` chooses."""


def allocate(basis: Basis, *, mean_width: int) -> tuple[int, ...]:
    """A width a layer that loses the least of the spectra, at `mean_width` coordinates in the mean.

    Coordinates go one by one to the layer whose next one holds most (mean over heads). Spectra fall, so no
    other division of the same bytes loses less.

    Raises:
        ValueError: for a mean width that no layer can have.
    """
    if not 1 <= mean_width <= basis.head_width:
        raise ValueError(
            f"mean_width={mean_width} of heads of {basis.head_width}; use 1 to {basis.head_width}"
        )
    share = (basis.spectra / basis.spectra.sum(-1, keepdim=True)).mean(1)
    # The first coordinate of every layer is given; the others compete.
    spare = share[:, 1:].flatten()
    chosen = spare.topk((mean_width - 1) * basis.layers).indices // (basis.head_width - 1)
    return tuple(int(count) + 1 for count in chosen.bincount(minlength=basis.layers))


@torch.no_grad()
def calibrated_mass(
    model: PreTrainedModel,
    ids: Int[Tensor, " context"],
    basis: Basis,
    *,
    widths: tuple[int, ...],
    target: float,
    floor: int = 16,
    queries: int = 64,
) -> Mass:
    """The claimed mass, layer by layer, at which the kept keys truly hold `target` of the attention.

    A ranking from few coordinates overrates the keys it favours; the last queries of a text tell by how
    much. A layer in which no claim below 1 suffices keeps everything.

    Raises:
        ValueError: for a target outside of (0, 1), or a basis of another model.
    """
    if not 0 < target < 1:
        raise ValueError(f"target={target} of the attention mass; use more than 0 and less than 1")
    check_basis(model, basis)
    selector = Loki(basis=basis, widths=widths)
    claimed: dict[int, float] = {}

    def look(call: AttentionCall) -> None:
        among = call.candidates(queries=queries)
        visible = among.visible
        weights = among.scores().masked_fill(~visible, -torch.inf).softmax(-1)
        scores = selector.scores(among)
        kv_heads = call.keys.shape[1]
        for claim in CLAIMS:
            budget = Budget(amount=Mass(claimed=(claim,) * basis.layers, floor=floor))
            keep = budget.keep(scores, visible, kv_heads=kv_heads, layer=call.layer)
            keep = keep.repeat_interleave(weights.shape[1] // keep.shape[1], dim=1)
            claimed[call.layer] = claim
            if float((weights * keep).sum(-1).mean()) >= target:
                return

    with attending(model, Observe(observer=look)):
        model.base_model(ids[None].to(model.device), use_cache=False)
    return Mass(claimed=tuple(claimed[layer] for layer in range(basis.layers)), floor=floor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One setting, measured."""

    share: float
    """Keys that are read in full, over those visible."""
    divisor: int
    """Head width over the coordinates that rank."""
    width: int
    """Coordinates that rank."""
    read_share: float
    """Elements read over those of dense attention."""
    nats: float
    """Added loss of a token, in the mean."""
    nats_bound: float
    """Upper end of its 95 % interval (normal, over tokens)."""


def autotune(
    model: PreTrainedModel,
    windows: Int[Tensor, "window context"],
    basis: Basis,
    *,
    max_loss: float,
    prompt: int,
    page: int = 16,
    shares: Sequence[float] = (0.0625, 0.125, 0.25, 0.5),
    divisors: Sequence[int] = (8, 4, 2),
    progress: Progress = silent,
) -> tuple[Trial, tuple[Trial, ...]]:
    """The setting that reads least while its loss is bounded, and everything that was tried.

    Settings are tried from the cheapest on, until one is good enough.

    Args:
        model: the model.
        windows: text to try on; other text than the calibration's.
        basis: of this model.
        max_loss: largest increase of perplexity, as a share: 0.01 for one percent.
        prompt: dense tokens at the beginning of each window.
        page: keys are read in pages of this many.
        shares: of keys.
        divisors: the head's width over the coordinates that rank.
        progress: told after each setting.

    Raises:
        ValueError: where no setting is good enough, with the best one.
    """
    if max_loss <= 0:
        raise ValueError(
            f"max_loss={max_loss} allows no loss at all; use full attention, or 0.01 for 1 %"
        )
    settings = sorted(
        ((share, divisor) for share in shares for divisor in divisors),
        key=lambda setting: setting[0] + 1 / setting[1] / 2,
    )
    tried: list[Trial] = []
    for share, divisor in settings:
        budget = Budget(amount=Share(of_visible=share), page=page)
        tried.append(_trial(model, windows, basis, budget, divisor=divisor, prompt=prompt))
        progress(len(tried), len(settings), f"share {share}, divisor {divisor}")
        if tried[-1].nats_bound <= math.log1p(max_loss):
            return tried[-1], tuple(tried)
    best = min(tried, key=lambda trial: trial.nats_bound)
    raise ValueError(
        f"no setting stays within +{max_loss:.1%} perplexity; the best (share {best.share}, width "
        f"{best.width}) is bounded by +{math.expm1(best.nats_bound):.1%}: allow more, or score more text"
    )


def _trial(
    model: PreTrainedModel,
    windows: Tensor,
    basis: Basis,
    budget: Budget,
    *,
    divisor: int,
    prompt: int,
) -> Trial:
    assert isinstance(budget.amount, Share)
    width = max(1, basis.head_width // divisor)
    mode = Sparse(selector=Loki(basis=basis, widths=(width,) * basis.layers), budget=budget)
    scores = list(score(model, windows, {"trial": mode}, prompt=prompt))
    full = torch.cat([each.nats for each in scores if each.arm == FULL])
    ours = [each for each in scores if each.arm != FULL]
    added = (torch.cat([each.nats for each in ours]) - full).double()
    return Trial(
        share=budget.amount.of_visible,
        divisor=divisor,
        width=width,
        read_share=sum(each.read_share for each in ours) / len(ours),
        nats=float(added.mean()),
        nats_bound=float(added.mean() + 1.96 * added.std() / math.sqrt(len(added))),
    )
