"""The attention function "loki" that transformers calls, and the refusals around it.

transformers asks a registry for the attention function named by `config._attn_implementation`, and another
registry for the mask that goes with it. This module adds the name "loki" to both when it is imported (with
one of the two alone, models run without a causal mask), and changes nothing else. Keys arrive after the
rotary embedding and after the cache was updated.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fourfold_loki.attention import attend, scores_of, shut
from fourfold_loki.attention_mode import AttentionCall, Observe, Sparse
from fourfold_loki.budget import Error
from fourfold_loki.certificate import read_until, scene_of
from fourfold_loki.huggingface.session import NAME, SITE, Session
from fourfold_loki.huggingface.sites import Site
from fourfold_loki.kernels.dispatch import can_decode, decode
from fourfold_loki.paged import PagedLayer, paged_attention
from fourfold_loki.selectors import Candidates, Loki

UNSUPPORTED = ("softcap", "s_aux", "position_bias", "cache")
"""Arguments of other attention functions that would be ignored here, so they are refused."""
FEW = 64
"""Queries of a block, at most, whose mask may be written out."""
BLOCK = 1 << 20
"""Scores that are ranked at a time: 4 MB of float32."""


def loki_forward(
    module: nn.Module,
    query: Float[Tensor, "batch heads query head_width"],
    key: Float[Tensor, "batch kv_heads token head_width"],
    value: Float[Tensor, "batch kv_heads token value_width"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch query heads value_width"], None]:
    """The attention function that transformers calls under the name "loki"."""
    bound = module.__dict__.get(SITE)
    if bound is None:
        raise ValueError(
            f"attn_implementation={NAME!r} of {type(module).__name__} without a basis; run the model "
            "inside `with loki(model, basis, budget):`"
        )
    session, site = bound
    mode, layer = session.mode, session.layer_of(site)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    _refuse_unsupported(module, kwargs)
    # A LokiCache gives keys in the basis; queries follow them, in layers that stay dense too.
    turned = session.layer_that_gave(key)
    if turned is not None:
        query = turned.rotation.turn_queries(query)
    elif not session.iterates:
        session.refuse_changed(site)
    if isinstance(turned, PagedLayer):
        return _over_pages(session, layer, site, turned, query, value, attention_mask, scale), None
    if isinstance(mode, Observe):
        visible = visible_keys(module, query, key, attention_mask)
        mode.observer(
            AttentionCall(
                layer=layer,
                queries=query,
                keys=key[:, :, : visible.shape[-1]],
                values=value[:, :, : visible.shape[-1]],
                visible=visible,
                scaling=scale,
                positions=site.positions,
            )
        )
    elif not session.is_dense(site, layer):
        _refuse_unfit(mode, layer, kv_heads=key.shape[1], dropout=dropout)
        if query.shape[2] == 1 or mode.reach == "every query":
            if (
                turned is not None
                and value is turned.gave_values  # some models rearrange them
                and attention_mask is None
                and can_decode(mode, query, turned)
            ):
                output, kept = decode(mode, query, turned, scaling=scale)
                stacks = query.shape[0] * key.shape[1]
                session.reads.add(
                    kept=kept * stacks, seen=key.shape[2] * stacks, rows=query.shape[0]
                )
            else:
                visible = visible_keys(site.module, query, key, attention_mask)
                output = _selected(
                    session, mode, layer, query, key, value, visible,
                    scaling=scale, is_turned=turned is not None,
                )  # fmt: skip
            return output.transpose(1, 2).contiguous(), None
        if (
            turned is not None
            and value is turned.gave_values  # some models rearrange them
            and attention_mask is not None
            and query.shape[2] <= FEW < key.shape[2]
        ):
            # A block behind a long cache: packed, since torch would copy keys for every head of a group.
            visible = visible_keys(site.module, query, key, attention_mask)
            output = attend(query, key, value, visible, scaling=scale)
            return output.transpose(1, 2).contiguous(), None
        if mode.selector.keeps_count:
            _count_block(session, mode, layer, site.module, query, key, attention_mask, scale)
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scale, **kwargs
    )


def _over_pages(
    session: Session,
    number: int,
    site: Site,
    layer: PagedLayer,
    query: Float[Tensor, "batch heads query head_width"],
    value: Float[Tensor, "batch kv_heads query value_width"],
    attention_mask: Tensor | None,
    scaling: float,
) -> Float[Tensor, "batch query heads value_width"]:
    """Attention over a paged cache: by selection for single queries, dense for blocks and short rows."""
    mode = session.mode
    if not isinstance(mode, Sparse) or value is not layer.gave_values:
        raise ValueError(
            f"{type(site.module).__name__} is watched, or attends to other values than its cache gave, and "
            "pools are read by selection alone; pass session.cache(), or a cache of transformers"
        )
    _refuse_unfit(mode, number, kv_heads=value.shape[1], dropout=0.0)
    visible = layer.visible(query.shape[2])
    if attention_mask is not None:
        visible = visible & allowed_by(attention_mask)
    # Rows differ, and shapes do not: as long as one row is short, all are read whole.
    is_short = mode.budget.is_dense_at(layer.shortest)
    is_dense = query.shape[2] > 1 or is_short or session.is_dense(site, number)
    output, kept = paged_attention(
        query, layer, visible, mode.budget, number=number, scaling=scaling, is_dense=is_dense
    )
    if query.shape[2] == 1 and not torch.compiler.is_compiling():
        seen = int(visible.sum()) * value.shape[1]
        session.reads.add(kept=int(kept), seen=seen, rows=query.shape[0])
    return output.transpose(1, 2).contiguous()


def _selected(
    session: Session,
    mode: Sparse,
    layer: int,
    query: Float[Tensor, "batch heads query head_width"],
    key: Float[Tensor, "batch kv_heads token head_width"],
    value: Float[Tensor, "batch kv_heads token value_width"],
    visible: Bool[Tensor, "batch mask_heads query seen"],
    *,
    scaling: float,
    is_turned: bool,
) -> Float[Tensor, "batch heads query value_width"]:
    """The reference: rank by the selector, keep by the budget, attend to what is kept."""
    key, value = key[:, :, : visible.shape[-1]], value[:, :, : visible.shape[-1]]
    mass = _past_mass(session, mode, layer, query, key)
    outputs = []
    # Blocks of queries whose scores fit a processor's cache; a prompt's whole square would not fit memory.
    rows = max(1, BLOCK // (query.shape[0] * query.shape[1] * key.shape[2]))
    for first in range(0, query.shape[2], rows):
        among = Candidates(
            queries=query[:, :, first : first + rows],
            keys=key,
            visible=visible[:, :, first : first + rows],
            scaling=scaling,
            layer=layer,
            turned=is_turned,
            past_mass=mass,
            allowance=mode.budget.allowance(visible[:, :, first : first + rows]),
        )
        queries, keys = mode.selector.compared(among)
        looked_up = 0.0
        if isinstance(mode.budget.amount, Error):
            keep, output = _certified(session, mode, mode.budget.amount, among, value)
        else:
            selection = mode.selector.select(among, mode.budget)
            keep, mass, looked_up = selection.keep, selection.mass, selection.looked_up
            output = attend(
                queries, keys, value, keep, scaling=scaling, log_weights=selection.log_weights
            )
        if not torch.compiler.is_compiling():
            session.reads.add_masks(keep, among.visible, kv_heads=key.shape[1])
            session.reads.looked_up += looked_up
        outputs.append(output)
    if mode.selector.keeps_count:
        session.mass[layer] = mass
    return torch.cat(outputs, dim=2)


def _certified(
    session: Session,
    mode: Sparse,
    error: Error,
    among: Candidates,
    values: Float[Tensor, "batch kv_heads token value_width"],
) -> tuple[Bool[Tensor, "batch heads query token"], Float[Tensor, "batch heads query value_width"]]:
    """Read until the bound on the error holds; what that reads, and the output."""
    queries, keys = mode.selector.compared(among)
    bounds = mode.selector.bounds(among)
    scene = scene_of(queries, keys, values, bounds, among.visible, scaling=among.scaling)
    read, certificate = read_until(error, scene, mode.budget)
    session.reads.certified(certificate)
    if bool((read == scene.visible).all()):
        return read, attend(queries, keys, values, among.visible, scaling=among.scaling)
    return read, certificate.output.to(values.dtype)


def _refuse_unsupported(module: nn.Module, arguments: dict[str, Any]) -> None:
    refused = [name for name in UNSUPPORTED if arguments.get(name) is not None]
    if refused:
        raise ValueError(
            f"{refused[0]} of {type(module).__name__} would be ignored by {NAME!r}, in layers that stay "
            "dense too; use a model whose attention is the softmax of scaled scores"
        )


def _refuse_unfit(mode: Sparse, layer: int, *, kv_heads: int, dropout: float) -> None:
    if dropout:
        raise ValueError(
            f"dropout={dropout} would be ignored by {NAME!r}; list layer {layer} in dense_layers, or use "
            "model.eval()"
        )
    if mode.selector.samples and torch.compiler.is_compiling():
        raise ValueError(
            f"{type(mode.selector).__name__} draws keys at random, which a compiled graph would do once; "
            "run the model uncompiled"
        )
    ranking = mode.selector.ranks_by()
    if isinstance(ranking, Loki) and kv_heads != ranking.basis.kv_heads:
        raise ValueError(
            f"layer {layer} has {kv_heads} key/value heads here, and the basis has "
            f"{ranking.basis.kv_heads}; use basis.heads(first, last) for a rank's part of a split "
            "model, and the whole basis for a whole model"
        )


def _past_mass(
    session: Session, mode: Sparse, layer: int, query: Tensor, key: Tensor
) -> Float[Tensor, "batch heads token"]:
    batch, heads, queries, _ = query.shape
    if not mode.selector.keeps_count or key.shape[2] == queries:
        return query.new_zeros(batch, heads, key.shape[2])
    past = session.mass.get(layer)
    length = 0 if past is None else past.shape[-1]
    # Beams change places between single queries, and nobody tells the account.
    may_reorder = batch > 1 and queries == 1
    if past is None or may_reorder or length != key.shape[2] - queries or len(past) != batch:
        raise ValueError(
            f"{type(mode.selector).__name__} counted {length} keys of layer {layer}, and the cache "
            f"holds {key.shape[2] - queries} in a batch of {batch}; it follows one sequence from its "
            "first token, without beams, cropping or padding"
        )
    return torch.cat([past, past.new_zeros(batch, heads, queries)], dim=-1)


def _count_block(
    session: Session,
    mode: Sparse,
    layer: int,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scaling: float,
) -> None:
    """Add the mass that a dense block of queries gives to its keys."""
    visible = visible_keys(module, query, key, mask)
    past = _past_mass(session, mode, layer, query, key)
    rows = max(1, BLOCK // (query.shape[0] * query.shape[1] * key.shape[2]))
    for first in range(0, query.shape[2], rows):
        scores = scores_of(query[:, :, first : first + rows], key, scaling=scaling)
        shown = visible[:, :, first : first + rows]
        past = past + (scores + shut(shown, scores.dtype)).softmax(-1).sum(2)
    session.mass[layer] = past


def visible_keys(
    module: nn.Module,
    query: Float[Tensor, "batch heads query head_width"],
    key: Float[Tensor, "batch kv_heads token head_width"],
    attention_mask: Tensor | None,
) -> Bool[Tensor, "batch mask_heads query token"]:
    """The keys that causality and padding allow, by the mask that transformers made for us (None: causal).

    Raises:
        ValueError: for a mask with values other than "keep" and "never", which a selection would lose.
    """
    batch, queries = query.shape[0], query.shape[2]
    if attention_mask is None:
        # As in transformers: several queries without a mask are the beginning of the sequence.
        tokens = key.shape[2] if queries == 1 else queries
        visible = torch.ones(queries, tokens, dtype=torch.bool, device=query.device)
        if queries > 1 and getattr(module, "is_causal", True):
            visible = visible.tril()
        return visible.expand(batch, 1, queries, tokens)
    return allowed_by(attention_mask).expand(batch, -1, -1, -1)


def allowed_by(
    attention_mask: Shaped[Tensor, "batch mask_heads query token"],
) -> Bool[Tensor, "batch mask_heads query token"]:
    """A mask of transformers as booleans.

    Raises:
        ValueError: for values other than "keep" and "never".
    """
    if attention_mask.dtype == torch.bool:
        return attention_mask
    lowest = torch.finfo(attention_mask.dtype).min / 2
    visible = attention_mask > lowest
    if not torch.compiler.is_compiling() and bool((attention_mask[visible] != 0).any()):
        raise ValueError(
            "the attention mask adds a bias to scores, which a selection would lose; "
            "pass a mask of zeros and the type's least value, or a boolean one"
        )
    return visible


AttentionInterface.register(NAME, loki_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
