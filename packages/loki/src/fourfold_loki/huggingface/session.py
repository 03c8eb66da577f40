"""Loki in rotary models of transformers: `with loki(model, basis, budget): model.generate(...)`.

transformers asks a registry for the attention function named by `config._attn_implementation`, and another
registry for the mask that goes with it. This module adds the name "loki" to both when it is imported (with
one of the two alone, models run without a causal mask), and changes nothing else. Keys arrive after the
rotary embedding and after the cache was updated.

With an ordinary cache the numbers are those of Loki and nothing is saved. `session.cache()` gives a
`LokiCache`, which keeps keys in the basis, so that ranking reads only the leading coordinates.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fourfold_loki.attention import attend, scores_of
from fourfold_loki.basis import Basis
from fourfold_loki.budget import Budget
from fourfold_loki.cache import LokiCache, LokiLayer
from fourfold_loki.kernels.dispatch import can_decode, decode
from fourfold_loki.attention_mode import Observe, Plan, Seen, Sparse
from fourfold_loki.selectors import Candidates, Exact, Loki
from fourfold_loki.huggingface.sites import Site, check_model, check_plan, is_iterated, number_of, sites
from fourfold_loki.evaluate.traffic import Reads

NAME = "loki"
UNSUPPORTED = ("softcap", "s_aux", "position_bias", "cache")
"""Arguments of other attention functions that would be ignored here, so they are refused."""
BLOCK = 1 << 20
"""Scores that are ranked at a time: 4 MB of float32."""


@dataclass(slots=True, eq=False)
class Session:
    """A model while it attends through this module."""

    model: PreTrainedModel
    plan: Plan
    reads: Reads
    iterates: bool
    """Whether the model's layers are calls of iterated modules."""
    mass: dict[int, Float[Tensor, "batch heads token"]] = field(default_factory=dict)
    """For selectors that keep count: what each layer's keys have been given so far."""
    calls: int = 0
    """Attention calls of the forward pass so far."""
    is_inside: bool = False
    """Whether the model is in its forward pass; its caches may be filled only then."""
    caches: weakref.WeakSet[LokiCache] = field(default_factory=weakref.WeakSet)

    def cache(self, *, capacity: int = 0) -> LokiCache:
        """An empty cache in the basis of this session.

        Args:
            capacity: tokens to make room for at once; it grows by doubling.

        Raises:
            ValueError: where the selector is not Loki, or the model needs a cache of its own.
        """
        if not isinstance(self.plan, Sparse) or not isinstance(self.plan.selector, Loki):
            raise ValueError(
                "only Loki ranks by a basis, so only its session has a LokiCache; "
                "pass no cache, or a cache of transformers"
            )
        if self.iterates:
            raise ValueError(
                f"{type(self.model).__name__} iterates its layers and has a cache of its own for them; "
                "pass that one"
            )
        roles = sites(self.model)
        if any(number_of(site.module, site.layer) != site.layer for site in roles):
            raise ValueError(
                f"{type(self.model).__name__} has layers without attention, whose state a LokiCache does "
                "not hold; pass no cache, or the model's own"
            )
        cache = LokiCache(
            self.plan.selector.basis,
            self.plan.selector.widths,
            capacity=capacity,
            is_turned=[not self.is_dense(site, site.layer) for site in roles],
            is_open=lambda: self.is_inside,
        )
        self.caches.add(cache)
        return cache

    def is_dense(self, site: Site, layer: int) -> bool:
        """Whether a layer keeps full attention."""
        dense = self.plan.dense_layers if isinstance(self.plan, Sparse) else ()
        return site.slides or layer in dense

    def layer_of(self, site: Site) -> int:
        """The layer of this call: the module's number, or how many calls of this pass came before.

        Raises:
            ValueError: for more calls than the basis has layers.
        """
        if not self.iterates:
            return site.layer
        layer = self.calls
        self.calls += 1
        self.check_calls(at_most=True)
        return layer

    def check_calls(self, *, at_most: bool = False) -> None:
        """Refuse a pass of another depth than the basis was fitted to.

        Raises:
            ValueError: naming both.
        """
        if not isinstance(self.plan, Sparse) or not isinstance(self.plan.selector, Loki):
            return
        layers = self.plan.selector.basis.layers
        if self.calls > layers or (self.calls < layers and not at_most):
            raise ValueError(
                f"{self.calls} attention calls in a pass, and a basis of {layers} layers and steps; "
                "run as many recurrences as it was calibrated with"
            )

    def layer_that_gave(self, keys: Tensor) -> LokiLayer | None:
        """The cache layer that these very keys came from, if they came from a `LokiCache`.

        Some models let later layers read the keys of an earlier one.
        """
        for cache in self.caches:
            for held in cache.layers:
                if isinstance(held, LokiLayer) and held.gave is keys:
                    return held
        return None


_SESSIONS = "_fourfold_loki_session"
_SITE = "_fourfold_loki_site"


@contextmanager
def attending(model: PreTrainedModel, plan: Plan) -> Iterator[Session]:
    """Let a model attend by a plan, for the length of a block.

    Raises:
        ValueError: where the model would ignore the plan, has no rotary keys, or is not the plan's.
    """
    check_model(model)
    if isinstance(plan, Sparse):
        check_plan(model, plan)
    if getattr(model, _SESSIONS, None) is not None:
        raise ValueError(
            "this model is in a session already; leave that `with` before entering another"
        )
    config = model.config.get_text_config()
    watched = plan.selector if isinstance(plan, Sparse) else Exact()
    session = Session(
        model=model, plan=plan, reads=Reads.of(config, watched), iterates=is_iterated(model)
    )
    # transformers' own switch. Its method for it would set the other parts of a model too (vision).
    before = config._attn_implementation  # noqa: SLF001
    roles = sites(model)
    handles = [
        model.base_model.register_forward_pre_hook(_enter(session), with_kwargs=True),
        model.base_model.register_forward_hook(_leave(session), always_call=True),
    ]
    for site in roles:
        setattr(site.module, _SITE, (session, site))
        if isinstance(plan, Observe):
            handles.append(
                site.module.register_forward_pre_hook(_note_positions(site), with_kwargs=True)
            )
    setattr(model, _SESSIONS, session)
    try:
        config._attn_implementation = NAME  # noqa: SLF001
        yield session
    finally:
        config._attn_implementation = before  # noqa: SLF001
        delattr(model, _SESSIONS)
        for handle in handles:
            handle.remove()
        for site in roles:
            delattr(site.module, _SITE)
        session.is_inside = False


@contextmanager
def loki(
    model: PreTrainedModel,
    basis: Basis,
    budget: Budget,
    *,
    width: int | tuple[int, ...] | None = None,
) -> Iterator[Session]:
    """Let a model attend to few keys, found in `basis`, for the length of a block.

    Args:
        model: a causal language model of transformers with rotary keys.
        basis: fitted to this model; see `calibrate` and `fit`.
        budget: what each query may read.
        width: coordinates that rank, one number or one a layer; without it a quarter of the head.

    Raises:
        ValueError: where basis, budget or model do not go together.
    """
    widths = basis.head_width // 4 if width is None else width
    if isinstance(widths, int):
        widths = (widths,) * basis.layers
    selector = Loki(basis=basis.to(model.device), widths=widths)
    with attending(model, Sparse(selector=selector, budget=budget)) as session:
        yield session


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
    held = module.__dict__.get(_SITE)
    if held is None:
        raise ValueError(
            f"attn_implementation={NAME!r} of {type(module).__name__} without a basis; run the model "
            "inside `with loki(model, basis, budget):`"
        )
    session, site = held
    layer = session.layer_of(site)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    plan = session.plan
    _refuse_unsupported(module, kwargs)
    turned = session.layer_that_gave(key)
    if turned is not None:
        query = turned.rotation.turn_queries(query)
    if session.is_dense(site, layer) or isinstance(plan, Observe):
        if isinstance(plan, Observe):
            visible = visible_keys(module, query, key, attention_mask)
            plan.observer(
                Seen(
                    layer=layer,
                    queries=query,
                    keys=key[:, :, : visible.shape[-1]],
                    visible=visible,
                    scaling=scale,
                    positions=site.positions,
                )
            )
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scale, **kwargs
        )
    _refuse_unfit(plan, layer, kv_heads=key.shape[1], dropout=dropout)
    if query.shape[2] > 1 and plan.reach == "decode":
        if plan.selector.keeps_count:
            _count_block(session, plan, layer, site.module, query, key, attention_mask, scale)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scale, **kwargs
        )
    if turned is not None and attention_mask is None and can_decode(plan, query, turned):
        output, kept = decode(plan, query, turned, scaling=scale)
        stacks = query.shape[0] * key.shape[1]
        session.reads.add(kept=kept * stacks, seen=key.shape[2] * stacks, rows=query.shape[0])
        return output.transpose(1, 2).contiguous(), None
    visible = visible_keys(module, query, key, attention_mask)
    key, value = key[:, :, : visible.shape[-1]], value[:, :, : visible.shape[-1]]
    mass = _past_mass(session, plan, layer, query, key)
    outputs = []
    # Blocks of queries whose scores fit a processor's cache; a prompt's whole square would not fit memory.
    rows = max(1, BLOCK // (query.shape[0] * query.shape[1] * key.shape[2]))
    for first in range(0, query.shape[2], rows):
        among = Candidates(
            queries=query[:, :, first : first + rows],
            keys=key,
            visible=visible[:, :, first : first + rows],
            scaling=scale,
            layer=layer,
            turned=turned is not None,
            past_mass=mass,
            allowance=plan.budget.allowance(visible[:, :, first : first + rows]),
        )
        scores, mass = plan.selector.follow(among)
        keep = plan.budget.keep(scores, among.visible, kv_heads=key.shape[1], layer=layer)
        if not torch.compiler.is_compiling():
            session.reads.add_masks(keep, among.visible, kv_heads=key.shape[1])
        queries, keys = plan.selector.compared(among)
        outputs.append(attend(queries, keys, value, keep, scaling=scale))
    if plan.selector.keeps_count:
        session.mass[layer] = mass
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _refuse_unsupported(module: nn.Module, arguments: dict[str, Any]) -> None:
    refused = [name for name in UNSUPPORTED if arguments.get(name) is not None]
    if refused:
        raise ValueError(
            f"{refused[0]} of {type(module).__name__} would be ignored by {NAME!r}, in layers that stay "
            "dense too; use a model whose attention is the softmax of scaled scores"
        )


def _refuse_unfit(plan: Sparse, layer: int, *, kv_heads: int, dropout: float) -> None:
    if dropout:
        raise ValueError(
            f"dropout={dropout} would be ignored by {NAME!r}; list layer {layer} in dense_layers, or use "
            "model.eval()"
        )
    if isinstance(plan.selector, Loki) and kv_heads != plan.selector.basis.kv_heads:
        raise ValueError(
            f"layer {layer} has {kv_heads} key/value heads here, and the basis has "
            f"{plan.selector.basis.kv_heads}; use basis.heads(first, last) for a rank's part of a split "
            "model, and the whole basis for a whole model"
        )


def _past_mass(
    session: Session, plan: Sparse, layer: int, query: Tensor, key: Tensor
) -> Float[Tensor, "batch heads token"]:
    batch, heads, queries, _ = query.shape
    if not plan.selector.keeps_count or key.shape[2] == queries:
        return query.new_zeros(batch, heads, key.shape[2])
    past = session.mass.get(layer)
    length = 0 if past is None else past.shape[-1]
    # Beams change places between single queries, and nobody tells the account.
    may_reorder = batch > 1 and queries == 1
    if past is None or may_reorder or length != key.shape[2] - queries or len(past) != batch:
        raise ValueError(
            f"{type(plan.selector).__name__} counted {length} keys of layer {layer}, and the cache "
            f"holds {key.shape[2] - queries} in a batch of {batch}; it follows one sequence from its "
            "first token, without beams, cropping or padding"
        )
    return torch.cat([past, past.new_zeros(batch, heads, queries)], dim=-1)


def _count_block(
    session: Session,
    plan: Sparse,
    layer: int,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scaling: float,
) -> None:
    """Add the mass that a dense block of queries gives to its keys."""
    visible = visible_keys(module, query, key, mask)
    past = _past_mass(session, plan, layer, query, key)
    scores = scores_of(query, key, scaling=scaling)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    session.mass[layer] = past + weights.sum(2)


def visible_keys(
    module: nn.Module,
    query: Float[Tensor, "batch heads query head_width"],
    key: Float[Tensor, "batch kv_heads token head_width"],
    attention_mask: Tensor | None,
) -> Bool[Tensor, "batch mask_heads query token"]:
    """What causality and padding allow, from the mask that transformers made for us (None: causal).

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
    if attention_mask.dtype == torch.bool:
        return attention_mask.expand(batch, -1, -1, -1)
    lowest = torch.finfo(attention_mask.dtype).min / 2
    visible = attention_mask > lowest
    if not torch.compiler.is_compiling() and bool((attention_mask[visible] != 0).any()):
        raise ValueError(
            "the attention mask adds a bias to scores, which a selection would lose; "
            "pass a mask of zeros and the type's least value, or a boolean one"
        )
    return visible.expand(batch, -1, -1, -1)


def _enter(session: Session) -> Callable[..., None]:
    def hook(module: nn.Module, arguments: Any, keywords: dict[str, Any]) -> None:
        del module, arguments
        named = session.model.config.get_text_config()._attn_implementation  # noqa: SLF001
        if named != NAME:
            raise ValueError(
                f"attn_implementation was set to {named!r} inside a session of {NAME!r}, which would "
                "ignore the selection; leave the session first"
            )
        cache = keywords.get("past_key_values")
        if isinstance(cache, LokiCache) and cache not in session.caches:
            raise ValueError(
                "this LokiCache was filled in the basis of another session; use session.cache() of "
                "this one, or the session that filled it"
            )
        session.is_inside = True
        session.calls = 0

    return hook


def _leave(session: Session) -> Callable[..., None]:
    def hook(module: nn.Module, arguments: Any, output: Any) -> None:
        del module, arguments
        session.is_inside = False
        if output is not None and session.iterates:
            session.check_calls()

    return hook


def _note_positions(site: Site) -> Callable[..., None]:
    def hook(module: nn.Module, arguments: Any, keywords: dict[str, Any]) -> None:
        del module, arguments
        positions = keywords.get("position_embeddings")
        # Llama 4 hands over complex numbers, as one tensor.
        site.positions = positions if isinstance(positions, tuple) else None

    return hook


AttentionInterface.register(NAME, loki_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
