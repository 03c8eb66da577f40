"""Make a pretrained dense model recurrent: cut its layers in three and iterate the middle (2511.07384).

The layers stay transformers' own, with their weights. New is the adapter, which begins as

    adapter([s, e]) = alpha s + beta e,

so that with s_0 = 0 and beta = 1 one recurrence is the dense model (without the layers that were left out).
Training continues with `RandomDepth` and its curriculum.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from fourfold_recurrent_depth.cache import CACHE, RecurrentCache, Unpaged
from fourfold_recurrent_depth.stages import (
    FOR_ATTENTION,
    FOR_THE_LOSS,
    either,
    refuse_lengths_alone,
    refuse_unknown,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Numbers of layers that read, think and speak."""

    n_layers_in_prelude: int
    n_layers_in_recurrent_block: int
    n_layers_in_coda: int


@dataclass(frozen=True, slots=True)
class _Slot:
    """A cache as one call of one layer sees it, whatever number the layer had in the dense model."""

    cache: RecurrentCache
    slot: int

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Write and read the slot."""
        return self.cache.update(key_states, value_states, self.slot)


class Retrofitted(Unpaged, PreTrainedModel, GenerationMixin):
    """A decoder of the Llama family (embed_tokens, layers, norm, rotary_emb) with an iterated middle."""

    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(
        self,
        dense: PreTrainedModel,
        *,
        prelude: int,
        core: int,
        coda: int,
        alpha: float,
        beta: float,
    ) -> None:
        super().__init__(dense.config)
        self.loss_type = "ForCausalLM"
        inner: Any = dense.get_decoder()
        layers = list(inner.layers)
        self.cut = Cut(
            n_layers_in_prelude=prelude, n_layers_in_recurrent_block=core, n_layers_in_coda=coda
        )
        self.embed_tokens = inner.embed_tokens
        self.rotary_emb = inner.rotary_emb
        self.prelude = nn.ModuleList(layers[:prelude])
        self.core = nn.ModuleList(layers[len(layers) - coda - core : len(layers) - coda])
        self.coda = nn.ModuleList(layers[len(layers) - coda :])
        self.norm = inner.norm
        self.lm_head: Any = dense.get_output_embeddings()
        width = dense.config.hidden_size
        place = {"dtype": dense.dtype, "device": dense.device}
        self.adapter = nn.Linear(2 * width, width, bias=False, **place)
        self.gradient_checkpointing = False
        with torch.no_grad():
            eye = torch.eye(width, **place)
            self.adapter.weight.copy_(torch.cat([alpha * eye, beta * eye], dim=1))

    def forward(
        self,
        input_ids: Int[Tensor, "batch token"],
        attention_mask: Tensor | None = None,
        labels: Int[Tensor, "batch token"] | None = None,
        num_steps: int | tuple[int, int] = 1,
        past_key_values: Cache | None = None,
        position_ids: Int[Tensor, "#batch token"] | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Recur n times without gradient, then k with it; s_0 is zero.

        Args:
            input_ids: tokens.
            attention_mask: 0 for padding.
            labels: the inputs, as everywhere in transformers.
            num_steps: r, all with gradient, or (n, k).
            past_key_values: a `RecurrentCache`; made where `use_cache` asks for one.
            position_ids: by default counted on from what is cached.
            use_cache: give a cache back.
            cache: what transformers calls `past_key_values` from 5.24 on.
            options: of transformers' losses and attention functions; any other is refused.

        Raises:
            TypeError: an argument is unknown.
            ValueError: fewer than one recurrence, or another cache, which has one slot a layer.
        """
        refuse_unknown(options, PARAMETERS)
        refuse_lengths_alone(options, position_ids, str(self.config._attn_implementation))  # noqa: SLF001
        without, with_gradient = (0, num_steps) if isinstance(num_steps, int) else num_steps
        steps = without + with_gradient
        if min(without, with_gradient) < 0 or steps < 1:
            raise ValueError(
                f"num_steps={num_steps} asks for fewer than 1 recurrence; use 1 or more"
            )
        cache = either(past_key_values, cache, ("past_key_values", "cache"))
        if cache is None and use_cache:
            cache = RecurrentCache(self.cut, steps=steps)
        if cache is not None and not isinstance(cache, RecurrentCache):
            raise ValueError(
                f"a {type(cache).__name__} has one slot for each layer; leave past_key_values out, or "
                "pass a RecurrentCache"
            )
        e = self.embed_tokens(input_ids)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=e.device)[None]
            position_ids = position_ids + (0 if cache is None else cache.length)
        # Beside a cache transformers does not look for packed texts in the positions.
        filled = cache if cache is not None and cache.length else None
        mask = create_causal_mask(self.config, e, attention_mask, filled, position_ids)
        shared: dict[str, Any] = {
            "attention_mask": mask, "position_ids": position_ids,
            "position_embeddings": self.rotary_emb(e, position_ids=position_ids),
            **{name: options[name] for name in FOR_ATTENTION if name in options},
        }  # fmt: skip
        if cache is not None:
            cache.open(*input_ids.shape, steps=steps)
        e = _through(self.prelude, e, shared, cache, 0)
        s = torch.zeros_like(e)
        for step in range(steps):
            with torch.set_grad_enabled(torch.is_grad_enabled() and step >= without):
                s = self.recur(s, e, shared, cache, step)
        x = _through(self.coda, s, shared, cache, len(self.prelude))
        if cache is not None:
            cache.close(state=s, steps=None)
        logits = self.lm_head(self.norm(x))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size,
                **{k: options[k] for k in FOR_THE_LOSS if options.get(k) is not None},
            )  # fmt: skip
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, **{CACHE: cast(Any, cache if use_cache else None)}
        )

    def recur(
        self,
        s: Float[Tensor, "batch token width"],
        e: Float[Tensor, "batch token width"],
        shared: dict[str, Any],
        cache: RecurrentCache | None,
        step: int,
    ) -> Float[Tensor, "batch token width"]:
        """One recurrence; `step` counts from 0."""
        kept = step if cache is None else cache.kept(step)
        slot = len(self.prelude) + len(self.coda) + kept * len(self.core)
        return _through(self.core, self.adapter(torch.cat([s, e], dim=-1)), shared, cache, slot)

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> bool:
        """Called by `generate`: none of transformers' caches; `forward` makes one."""
        del generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        return False

    def get_input_embeddings(self) -> nn.Module:
        """The dense model's."""
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        """The dense model's."""
        return self.lm_head


PARAMETERS = tuple(inspect.signature(Retrofitted.forward).parameters)[1:-1]
"""Arguments of the forward pass by name."""


def retrofit(
    dense: PreTrainedModel,
    prelude: int,
    core: int,
    coda: int,
    *,
    alpha: float = 0.0,
    beta: float = 1.0,
) -> Retrofitted:
    """A recurrent model from a dense one, whose layers it takes over (they are not copied).

    The first `prelude` layers read, the last `coda` speak, the `core` before those is iterated; layers
    between prelude and core are left out.

    Raises:
        ValueError: the parts do not fit, or the model is not built of such layers or does more than they do.
    """
    _refuse_more_than_layers(dense.config)
    inner: Any = dense.get_decoder()
    parts = ("embed_tokens", "layers", "norm", "rotary_emb")
    missing = [name for name in parts if not hasattr(inner, name)]
    if missing:
        raise ValueError(
            f"{type(dense).__name__} has no {missing[0]!r} in its decoder; retrofit takes decoders of the "
            "Llama family"
        )
    count = len(inner.layers)
    if min(prelude, coda) < 0 or core < 1 or prelude + core + coda > count:
        raise ValueError(
            f"prelude={prelude}, core={core}, coda={coda} do not fit into {count} layers; use parts that "
            f"sum to {count} or less, with a core of 1 or more"
        )
    return Retrofitted(dense, prelude=prelude, core=core, coda=coda, alpha=alpha, beta=beta)


def _refuse_more_than_layers(config: Any) -> None:
    """Raise for models that scale embeddings or logits, or hide tokens beyond a window."""
    beyond = {
        name: getattr(config, name, None)
        for name in (
            "embedding_multiplier",
            "logits_scaling",
            "logit_scale",
            "final_logit_softcapping",
        )
    }
    window = getattr(config, "sliding_window", None)
    kinds = set(
        getattr(config, "layer_types", None) or ["full_attention" if window is None else "sliding"]
    )
    beyond = {name: value for name, value in beyond.items() if value not in (None, 1, 1.0)}
    if kinds != {"full_attention"}:
        beyond["sliding_window"] = window
    if beyond:
        named = ", ".join(f"{name}={value}" for name, value in beyond.items())
        raise ValueError(
            f"{config.model_type} computes with {named} outside of its layers, which retrofit does not take "
            "over; use a model of plain layers, as Llama's or Qwen's without windows"
        )


def _through(
    layers: nn.ModuleList,
    x: Tensor,
    shared: dict[str, Any],
    cache: RecurrentCache | None,
    first: int,
) -> Tensor:
    """Layer after layer; their keys and values go into the slots from `first` on."""
    for slot, layer in enumerate(layers, start=first):
        view = None if cache is None else _Slot(cache, slot)
        x = layer(x, **{CACHE: view}, **shared)
    return x
