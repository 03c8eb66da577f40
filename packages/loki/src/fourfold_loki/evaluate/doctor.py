"""A diagnosis of a selection before anyone deploys it: one dense pass, layer by layer, and it in words."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from fourfold_loki.attention import most_relevant
from fourfold_loki.attention_mode import AttentionCall, Observe, Sparse
from fourfold_loki.huggingface.session import attending
from fourfold_loki.huggingface.sites import check_mode, sites


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
    """Share of the queries that keep the first token."""
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
    counting = [name for name, mode in arms.items() if mode.selector.keeps_count]
    if counting:
        raise ValueError(
            f"{counting[0]} keeps count of all earlier queries, and the doctor looks at the last "
            f"{queries}; leave it out"
        )
    for mode in arms.values():
        check_mode(model, mode)
    sliding = {site.layer for site in sites(model) if site.slides}
    diagnoses: list[Diagnosis] = []

    def look(call: AttentionCall) -> None:
        selecting = {
            name: mode
            for name, mode in arms.items()
            if call.layer not in mode.dense_layers and call.layer not in sliding
        }
        diagnoses.extend(_judge(call, selecting, queries))

    with attending(model, Observe(observer=look)):
        model.base_model(ids[None].to(model.device), use_cache=False)
    return tuple(diagnoses)


ENOUGH = 0.93
"""Attention mass, mean over layers. In our records selections that keep it add at most 5 % perplexity."""
TOO_LITTLE = 0.9
"""Those that keep less than this add 7 to 56 % where they rank at all (a test compares both)."""
SINK = 0.1
"""Attention on the first token from which it is called a sink."""


def explain(ours: Sequence[Diagnosis], exact: Sequence[Diagnosis]) -> tuple[str, ...]:
    """A diagnosis in sentences: the damage to expect, where it comes from and what to change.

    Args:
        ours: every layer under the selection.
        exact: the same layers under exact ranking with the same budget.
    """
    mass, best = (
        math.fsum(layer.mass_recall for layer in layers) / len(layers) for layers in (ours, exact)
    )
    weakest = min(ours, key=lambda layer: layer.mass_recall)
    dropped = [layer for layer in ours if layer.sink_mass > SINK and layer.sink_kept < TOO_LITTLE]
    said = [
        f"The selection keeps {mass:.3f} of the attention mass, mean over layers; exact ranking under the "
        f"same budget would keep {best:.3f}. Least in layer {weakest.layer}: {weakest.mass_recall:.3f}."
    ]
    if dropped:
        worst = min(dropped, key=lambda layer: layer.sink_kept)
        said.append(
            f"Layers {', '.join(str(layer.layer) for layer in dropped)} drop the attention sink: the first "
            f"token holds {worst.sink_mass:.2f} of the attention of layer {worst.layer}, where "
            f"{worst.sink_kept:.0%} of the queries keep it. Keep it by --sinks 4 (Budget(sinks=4)), or "
            "calibrate a basis of --kind balanced."
        )
    if mass >= ENOUGH:
        said.append(f"Expect little damage: at {ENOUGH} and more our records show at most 5 %.")
        return tuple(said)
    damage = "7 % added perplexity or more" if mass < TOO_LITTLE else "a few percent"
    if best - mass > 1 - best:
        said.append(
            f"Expect {damage}, most of it the ranking's: rank by more coordinates (a smaller --divisor), or "
            "calibrate a balanced basis on text like that of use."
        )
    else:
        said.append(
            f"Expect {damage}, most of it the budget's: read more keys (a larger --share) or smaller pages "
            "(a smaller --page)."
        )
    return tuple(said)


def _judge(call: AttentionCall, arms: Mapping[str, Sparse], queries: int) -> Iterator[Diagnosis]:
    among = call.candidates(queries=queries)
    exact = among.scores()
    weights = exact.masked_fill(~among.visible, -torch.inf).softmax(-1)
    heads = exact.shape[1]
    for name, mode in arms.items():
        keep = mode.selector.select(among, mode.budget).keep
        keep = keep.repeat_interleave(heads // keep.shape[1], dim=1)
        best = most_relevant(exact, among.visible, keep.sum(-1))
        yield Diagnosis(
            arm=name,
            layer=call.layer,
            recall=_mean((keep & best).sum(-1) / best.sum(-1)),
            mass_recall=_mean((weights * keep).sum(-1)),
            sink_kept=_mean(keep[..., 0].float()),
            sink_mass=_mean(weights[..., 0]),
            kept_share=_mean(keep.sum(-1) / among.visible.sum(-1)),
        )


def _mean(values: Float[Tensor, "batch heads query"]) -> float:
    return float(values.mean())
