"""A model while it attends by a mode: `with loki(model, basis, budget): model.generate(...)`.

A session sets the model's attention function to "loki" (`forward.py`), tells each attention module its place,
and puts everything back when its block ends.

With an ordinary cache the numbers are those of Loki and nothing is saved. `session.cache()` gives a
`LokiCache`, which keeps keys in the basis, so that ranking reads only the leading coordinates.
"""

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import StaticLayer

from fourfold_loki.attention_mode import AttentionMode, Observe, Sparse
from fourfold_loki.basis import Basis
from fourfold_loki.budget import Adaptive, Budget, Share, WhereItPays
from fourfold_loki.cache import LokiCache, LokiLayer
from fourfold_loki.huggingface.reads import Reads
from fourfold_loki.huggingface.sites import (
    WITHOUT,
    Site,
    cache_name,
    check_mode,
    check_model,
    is_iterated,
    number_of,
    sites,
)
from fourfold_loki.kernels.choice import Heads, forms_for
from fourfold_loki.paged import BlockTable, PagedCache, PagedLayer
from fourfold_loki.selectors import Loki

NAME = "loki"


@dataclass(slots=True, eq=False)
class Session:
    """A model while it attends through this module."""

    model: PreTrainedModel
    mode: AttentionMode
    reads: Reads
    iterates: bool
    """True where the model's layers are calls of iterated modules."""
    mass: dict[int, Float[Tensor, "batch heads token"]] = field(default_factory=dict)
    """For selectors that keep count: what each layer's keys have been given so far."""
    calls: int = 0
    """Attention calls of the forward pass so far."""
    is_inside: bool = False
    """True in the model's forward pass; its caches may be filled only then."""
    caches: weakref.WeakSet[LokiCache] = field(default_factory=weakref.WeakSet)

    def cache(self, *, capacity: int = 0) -> LokiCache:
        """An empty cache in the basis of this session.

        Args:
            capacity: tokens to make room for at once; it grows by doubling.

        Raises:
            ValueError: where the selector is not Loki, or the model needs a cache of its own.
        """
        selector, roles = self._cacheable()
        cache = LokiCache(
            selector.basis,
            selector.widths,
            capacity=capacity,
            is_turned=[not self.is_dense(site, site.layer) for site in roles],
            is_open=lambda: self.is_inside,
        )
        self.caches.add(cache)
        return cache

    def paged_cache(
        self, *, rows: int, capacity: int, block: int = 64, blocks: int | None = None
    ) -> LokiCache:
        """An empty cache in blocks: fixed shapes, appended to and never moved; see `paged`.

        Every pass appends to all rows. `reserve` on `cache.table` hands out blocks ahead of a pass; without
        `blocks` every row has its own from the beginning.

        Args:
            rows: sequences.
            capacity: tokens of each, at most.
            block: tokens of a block.
            blocks: of all rows together; fewer than they need at capacity where sequences come and go.

        Raises:
            ValueError: as `cache`.
        """
        selector, roles = self._cacheable()
        table = BlockTable(rows=rows, capacity=capacity, block=block, blocks=blocks)
        if blocks is None:
            for row in range(rows):
                table.reserve(row, capacity)
        cache = PagedCache(
            [
                StaticLayer(max_cache_len=table.capacity)
                if self.is_dense(site, site.layer)
                else PagedLayer(
                    selector.basis.rotation(site.layer),
                    selector.widths[site.layer],
                    table=table,
                    is_open=lambda: self.is_inside,
                )
                for site in roles
            ],
            table,
        )
        self.caches.add(cache)
        return cache

    def _cacheable(self) -> tuple[Loki, list[Site]]:
        """The selector of a session that may have a cache of its own, and its sites."""
        if not isinstance(self.mode, Sparse) or not isinstance(self.mode.selector, Loki):
            who = type(self.mode.selector if isinstance(self.mode, Sparse) else self.mode).__name__
            raise ValueError(
                f"{who} ranks by no basis, and only Loki's session has a LokiCache, paged or not, and "
                "lossless drafts over it; pass no cache, or a cache of transformers"
            )
        if self.iterates:
            raise ValueError(
                f"{type(self.model).__name__} iterates its layers and has a cache of its own for them; "
                "pass that one"
            )
        roles = sites(self.model)
        types = getattr(self.model.config.get_text_config(), "layer_types", None) or ()
        beside = any(kind in WITHOUT or kind.startswith("hybrid") for kind in types)
        if beside or any(number_of(site.module, site.layer) != site.layer for site in roles):
            raise ValueError(
                f"{type(self.model).__name__} has layers without attention or hybrid ones, whose state a "
                "LokiCache does not hold; pass no cache, or the model's own"
            )
        return self.mode.selector, roles

    def cached(self, *, capacity: int = 0) -> dict[str, LokiCache]:
        """`cache` as `generate` takes it, under the name that the installed transformers has for it."""
        return {cache_name(self.model): self.cache(capacity=capacity)}

    @contextmanager
    def reading_everything(self) -> Iterator[None]:
        """Single queries read all keys too in this block, as longer blocks do."""
        mode = self.mode
        assert isinstance(mode, Sparse)
        self.mode = replace(mode, budget=Budget(amount=Share(of_visible=1.0)))
        try:
            yield
        finally:
            self.mode = mode

    def is_dense(self, site: Site, layer: int) -> bool:
        """True where a layer keeps full attention."""
        dense = self.mode.dense_layers if isinstance(self.mode, Sparse) else ()
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
        ranking = self.mode.selector.ranks_by() if isinstance(self.mode, Sparse) else None
        if not isinstance(ranking, Loki):
            return
        layers = ranking.basis.layers
        if self.calls > layers or (self.calls < layers and not at_most):
            raise ValueError(
                f"{self.calls} attention calls in a pass, and a basis of {layers} layers and steps; "
                "run as many recurrences as it was calibrated with"
            )

    def refuse_changed(self, site: Site) -> None:
        """Refuse keys that a model changed after a `LokiCache` gave them: they are in the basis, queries not.

        Raises:
            ValueError: naming the module.
        """
        for cache in self.caches:
            own = cache.layers[site.layer]
            if isinstance(own, LokiLayer) and own.is_new:
                raise ValueError(
                    f"{type(site.module).__name__} attends to other keys than its cache gave, and a "
                    "LokiCache gives them in the basis; pass no cache, or a cache of transformers"
                )

    def layer_that_gave(self, keys: Tensor) -> LokiLayer | None:
        """The cache layer that these very keys came from, if they came from a `LokiCache`.

        Some models let later layers read the keys of an earlier one.
        """
        for cache in self.caches:
            for layer in cache.layers:
                if isinstance(layer, LokiLayer) and layer.gave is keys:
                    return layer
        return None


_SESSIONS = "_fourfold_loki_session"
SITE = "_fourfold_loki_site"
"""Attribute of an attention module that holds its session and site."""


@contextmanager
def attending(model: PreTrainedModel, mode: AttentionMode) -> Iterator[Session]:
    """Let a model attend by a mode, for the length of a block.

    Raises:
        ValueError: where the model would ignore the mode, has no rotary keys, or is not the mode's.
    """
    check_model(model)
    if isinstance(mode, Sparse):
        check_mode(model, mode)
        mode = timed(model, mode)
    if getattr(model, _SESSIONS, None) is not None:
        raise ValueError(
            "this model is in a session already; leave that `with` before entering another"
        )
    config = model.config.get_text_config()
    reads = (
        Reads.of(config, mode.selector, mode.budget.amount)
        if isinstance(mode, Sparse)
        else Reads(ranking=0.0)
    )
    session = Session(model=model, mode=mode, reads=reads, iterates=is_iterated(model))
    # transformers' own switch. Its method for it would set the other parts of a model too (vision).
    before = config._attn_implementation  # noqa: SLF001
    roles = sites(model)
    handles = [
        model.base_model.register_forward_pre_hook(_enter(session), with_kwargs=True),
        model.base_model.register_forward_hook(_leave(session), always_call=True),
    ]
    for site in roles:
        setattr(site.module, SITE, (session, site))
        if isinstance(mode, Observe):
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
            delattr(site.module, SITE)
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


def timed(
    model: PreTrainedModel,
    mode: Sparse,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> Sparse:
    """The mode with a number in place of `WhereItPays`, and the forms that the number was found with.

    Raises:
        ValueError: for a selection that no kernel takes, so that there is nothing to time.
    """
    budget, selector = mode.budget, mode.selector
    if not isinstance(budget.dense_below, WhereItPays):
        return mode
    config = model.config.get_text_config()
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    in_groups = budget.selection == "shared in groups" or heads == kv_heads
    if isinstance(budget.amount, Adaptive) or not isinstance(selector, Loki) or not in_groups:
        raise ValueError(
            f"dense_below=WhereItPays() of {type(selector).__name__} with {budget.amount} and "
            f"selection={budget.selection!r}: only Loki with a Share or a Count, shared in groups, is "
            "decoded by a kernel that can be timed; give a number of keys"
        )
    length = int(config.max_position_embeddings)
    forms = forms_for(
        Heads(
            heads=heads,
            kv_heads=kv_heads,
            head_width=selector.basis.head_width,
            width=max(selector.widths),
            page=budget.page,
            share=budget.units(length) * budget.page / length,
            dtype=model.dtype,
            device=model.device,
            threads=torch.get_num_threads(),
        ),
        clock=clock,
    )
    return replace(mode, budget=replace(budget, dense_below=forms.pays_from), forms=forms)


def _enter(session: Session) -> Callable[..., None]:
    def hook(module: nn.Module, arguments: Any, keywords: dict[str, Any]) -> None:
        del module, arguments
        named = session.model.config.get_text_config()._attn_implementation  # noqa: SLF001
        if named != NAME:
            raise ValueError(
                f"attn_implementation was set to {named!r} inside a session of {NAME!r}, which would "
                "ignore the selection; leave the session first"
            )
        cache = keywords.get("cache", keywords.get("past_key_values"))
        if isinstance(cache, LokiCache) and cache not in session.caches:
            raise ValueError(
                "this LokiCache was filled in the basis of another session; use session.cache() of "
                "this one, or the session that filled it"
            )
        session.is_inside = True
        session.calls = 0
        for own in session.caches:
            own.begin_pass()

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
