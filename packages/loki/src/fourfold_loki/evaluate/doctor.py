"""What a selection would do to a model, before anyone deploys it: one dense pass, layer by layer."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from fourfold_loki.attention import most_relevant
from fourfold_loki.huggingface.session import attending
from fourfold_loki.attention_mode import Observe, Seen, Sparse
from fourfold_loki.selectors import Candidates
from fourfold_loki.huggingface.sites import check_plan, sites


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """One layer under one arm; means over heads and queries."""

    arm: str
    layer: int
    recall: float
    """Share of the keys of largest exact score that were kept."""
    mass_recall: float
    """Attention weight (of full attention) on the kept keys: what predicts damage."""
    sink_kept: float
    """How often the first token was kept."""
    sink_mass: float
    """Attention weight of the first token under full attention."""
    kept_share: float
    """Share of the visible keys that were kept."""


@torch.no_grad()
def diagnose(
    model: PreTrainedModel,
    ids: Int[Tensor, " context"],
    arms: Mapping[str, Sparse],
    *,
    queries: int = 128,
) -> tuple[Diagnosis, ...]:
    """Every arm in every layer where it selects, for the last `queries` queries of a text.

    Raises:
        ValueError: for an arm that keeps count of earlier queries, which a single look cannot judge, or
            that the model cannot follow.
    """
    counting = [name for name, plan in arms.items() if plan.selector.keeps_count]
    if counting:
        raise ValueError(
            f"{counting[0]} keeps count of all earlier queries, and the doctor looks at the last "
            f"{queries}; leave it out"
        )
    for plan in arms.values():
        check_plan(model, plan)
    sliding = {site.layer for site in sites(model) if site.slides}
    found: list[Diagnosis] = []

    def look(seen: Seen) -> None:
        selecting = {
            name: plan
            for name, plan in arms.items()
            if seen.layer not in plan.dense_layers and seen.layer not in sliding
        }
        found.extend(_judge(seen, selecting, queries))

    with attending(model, Observe(observer=look)):
        model.base_model(ids[None].to(model.device), use_cache=False)
    return tuple(found)


def _judge(seen: Seen, arms: Mapping[str, Sparse], queries: int) -> Iterator[Diagnosis]:
    among = Candidates(
        queries=seen.queries[:, :, -queries:],
        keys=seen.keys,
        visible=seen.visible[:, :, -queries:],
        scaling=seen.scaling,
        layer=seen.layer,
        turned=False,
        past_mass=seen.queries.new_zeros(1, seen.queries.shape[1], seen.keys.shape[2]),
        allowance=seen.visible[:, :, -queries:].sum(-1),
    )
    exact = among.scores()
    weights = exact.masked_fill(~among.visible, -torch.inf).softmax(-1)
    heads = exact.shape[1]
    for name, plan in arms.items():
        keep = plan.budget.keep(
            plan.selector.scores(among),
            among.visible,
            kv_heads=seen.keys.shape[1],
            layer=seen.layer,
        )
        keep = keep.repeat_interleave(heads // keep.shape[1], dim=1)
        best = most_relevant(exact, among.visible, keep.sum(-1))
        yield Diagnosis(
            arm=name,
            layer=seen.layer,
            recall=_mean((keep & best).sum(-1) / best.sum(-1)),
            mass_recall=_mean((weights * keep).sum(-1)),
            sink_kept=_mean(keep[..., 0].float()),
            sink_mass=_mean(weights[..., 0]),
            kept_share=_mean(keep.sum(-1) / among.visible.sum(-1)),
        )


def _mean(values: Float[Tensor, "batch heads query"]) -> float:
    return float(values.mean())
