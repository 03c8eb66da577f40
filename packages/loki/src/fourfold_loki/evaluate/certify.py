"""The price of a certificate: what has to be read for an error, and how far the bound is from the truth."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from einops import rearrange
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from fourfold_loki.attention_mode import AttentionCall, Observe, Sparse
from fourfold_loki.budget import Error
from fourfold_loki.certificate import Certificate, Scene, read_until, scene_of
from fourfold_loki.huggingface.reads import Reads
from fourfold_loki.huggingface.session import attending
from fourfold_loki.huggingface.sites import cache_name, check_mode
from fourfold_parallel.common.progress import Progress, silent


@dataclass(slots=True, kw_only=True)
class Certified:
    """One arm on one text; a list holds a number a layer."""

    ranking: float
    """As in `Reads`: what bounds read of all keys."""
    kept_share: list[float] = field(default_factory=list)
    """Visible keys that were read in full, a key once for its group; mean over queries."""
    bound: list[float] = field(default_factory=list)
    """Largest bound on a query's relative error."""
    error: list[float] = field(default_factory=list)
    """Largest relative error."""
    unread_bound: list[float] = field(default_factory=list)
    """Largest bound on the weight that a head did not read."""
    unread: list[float] = field(default_factory=list)
    """Largest weight that a head did not read."""

    @property
    def read_share(self) -> float:
        """Elements of the cache that were read over those of dense attention, mean over layers."""
        return sum(self.kept_share) / len(self.kept_share) + self.ranking / 2


@torch.no_grad()
def certify(
    model: PreTrainedModel,
    ids: Int[Tensor, "one token"],
    arms: Mapping[str, Sparse],
    *,
    queries: int,
    progress: Progress = silent,
) -> dict[str, Certified]:
    """Every arm in every layer for the last queries of a text, beside dense attention in float64.

    Each layer sees the dense output of the one before, so that its error is its own.

    Raises:
        ValueError: for an arm whose budget is no Error.
    """
    for name, mode in arms.items():
        check_mode(model, mode)
        if not isinstance(mode.budget.amount, Error):
            raise ValueError(
                f"{name} keeps {mode.budget.amount}, which bounds nothing; use an Error"
            )
    config = model.config.get_text_config()
    seen = {
        name: Certified(ranking=Reads.of(config, mode.selector, mode.budget.amount).ranking)
        for name, mode in arms.items()
    }
    cache = DynamicCache(config=model.config)
    cached = {cache_name(model): cache, "use_cache": True}

    def look(call: AttentionCall) -> None:
        among = call.candidates(queries=queries)
        for place, (name, mode) in enumerate(arms.items()):
            compared = mode.selector.compared(among)
            bounds = mode.selector.bounds(among)
            scene = scene_of(*compared, call.values, bounds, among.visible, scaling=among.scaling)
            assert isinstance(mode.budget.amount, Error)
            read, certificate = read_until(mode.budget.amount, scene, mode.budget)
            _note(seen[name], scene, read, certificate)
            progress(call.layer * len(arms) + place + 1, config.num_hidden_layers * len(arms), name)

    ids = ids.to(model.device)
    model.base_model(ids[:, :-queries], **cached)
    with attending(model, Observe(observer=look)):
        model.base_model(ids[:, -queries:], **cached)
    return seen


def _note(
    arm: Certified,
    scene: Scene,
    read: Bool[Tensor, "batch heads query token"],
    certificate: Certificate,
) -> None:
    weights = scene.scores.masked_fill(~scene.visible, -torch.inf).softmax(-1)
    kv_heads = scene.values.shape[1]
    dense = scene.weighed(weights)
    error = (certificate.output - dense).square().sum((1, 3)).sqrt()
    size = dense.square().sum((1, 3)).sqrt()
    of_group = rearrange(read, "b (h g) q t -> b h g q t", h=kv_heads).any(2)
    seen = scene.visible[:, :kv_heads].sum()
    arm.kept_share.append(float(of_group.sum() / seen))
    arm.bound.append(float(certificate.relative().amax()))
    arm.error.append(float((error / size).amax()))
    arm.unread_bound.append(float(certificate.unread.amax()))
    arm.unread.append(float((weights * ~read).sum(-1).amax()))
