"""Make a pretrained dense model recurrent: cut its layers in three and iterate the middle (2511.07384).

The layers stay transformers' own, with their weights. New is the adapter, which begins as

    adapter([s, e]) = alpha s + beta e,

so that with s_0 = 0 and beta = 1 one recurrence is the dense model (without the layers that were left out).
Training continues with `RandomDepth` and its curriculum.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from fourfold_recurrent_depth.cache import CACHE, Assisted, RecurrentCache, Unpaged
from fourfold_recurrent_depth.stages import (
    FOR_ATTENTION,
    FOR_THE_LOSS,
    either,
    refuse_lengths_alone,
    refuse_unknown,
)

PLAIN = "use a decoder of plain layers, as Llama's or Qwen's"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Numbers of layers that read, think and speak."""

    n_layers_in_prelude: int
    n_layers_in_recurrent_block: int
    n_layers_in_coda: int


class RetrofitConfig(PreTrainedConfig):
    """The dense model's configuration and the cut, as a saved retrofit has them.

    The dense model's own type would let it be read as that model, with weights that are not there drawn anew.
    """

    model_type = "fourfold_retrofit"

    dense: dict[str, Any] | None = None
    """As the dense model's `config.json` has it."""
    prelude: int = 0
    core: int = 1
    coda: int = 0


@dataclass(slots=True)
class _Slot:
    """A cache as one call of one layer sees it, whatever number the layer had in the dense model."""

    cache: RecurrentCache
    slot: int
    is_filled: bool = False

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Write and read the slot.

        Raises:
            ValueError: the layer attends twice.
        """
        if self.is_filled:
            raise ValueError(
                "a layer keeps the keys of several attentions, and a RecurrentCache has one slot for each "
                f"layer; {PLAIN}"
            )
        self.is_filled = True
        return self.cache.update(key_states, value_states, self.slot)


class Retrofitted(Assisted, Unpaged, PreTrainedModel, GenerationMixin):
    """A decoder of the Llama family (embed_tokens, layers, norm, rotary_emb) with an iterated middle."""

    base_model_prefix = ""
    config_class = RetrofitConfig
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
        super().__init__(dense.config.get_text_config())
        self.loss_type = "ForCausalLM"
        inner: Any = dense.get_decoder()
        layers = list(inner.layers)
        self.cut = Cut(
            n_layers_in_prelude=prelude, n_layers_in_recurrent_block=core, n_layers_in_coda=coda
        )
        self.embed_tokens = inner.embed_tokens
        self.rotary_emb = inner.rotary_emb
        first = len(layers) - coda - core
        self.prelude = nn.ModuleList(layers[:prelude])
        self.core = nn.ModuleList(layers[first : len(layers) - coda])
        self.coda = nn.ModuleList(layers[len(layers) - coda :])
        kinds = tuple(getattr(self.config, "layer_types", None) or ["full_attention"] * len(layers))
        self.kinds = (
            kinds[:prelude],
            kinds[first : len(layers) - coda],
            kinds[len(layers) - coda :],
        )
        """Types of the layers of prelude, core and coda; a layer's mask and its angles go by its type."""
        self.masks_for = getattr(
            type(dense), "create_masks_for_generate", create_masks_for_generate
        )
        """The model's own way to make them."""
        self.norm = inner.norm
        self.lm_head: Any = dense.get_output_embeddings()
        if self.lm_head.weight is self.embed_tokens.weight:
            self._tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}
        width = self.config.hidden_size
        place = {"dtype": dense.dtype, "device": dense.device}
        self.adapter = nn.Linear(2 * width, width, bias=False, **place)
        self.gradient_checkpointing = False
        with torch.no_grad():
            eye = torch.eye(width, **place)
            self.adapter.weight.copy_(torch.cat([alpha * eye, beta * eye], dim=1))

    @can_return_tuple
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
        masks = self.masks_for(self.config, e, attention_mask, filled, position_ids)
        shared: dict[str, dict[str, Any]] = {
            kind: {
                "attention_mask": masks[kind] if isinstance(masks, dict) else masks,
                "position_ids": position_ids, "position_embeddings": self._angles(e, position_ids, kind),
                **{name: options[name] for name in FOR_ATTENTION if name in options},
            }
            for kind in {kind for kinds in self.kinds for kind in kinds}
        }  # fmt: skip
        if cache is not None:
            cache.open(*input_ids.shape, steps=steps)
        e = _through(self.prelude, self.kinds[0], e, shared, cache, 0)
        s = torch.zeros_like(e)
        for step in range(steps):
            with torch.set_grad_enabled(torch.is_grad_enabled() and step >= without):
                s = self.recur(s, e, shared, cache, step)
        x = _through(self.coda, self.kinds[2], s, shared, cache, len(self.prelude))
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
        shared: dict[str, dict[str, Any]],
        cache: RecurrentCache | None,
        step: int,
    ) -> Float[Tensor, "batch token width"]:
        """One recurrence; `step` counts from 0."""
        kept = step if cache is None else cache.kept(step)
        slot = len(self.prelude) + len(self.coda) + kept * len(self.core)
        x = self.adapter(torch.cat([s, e], dim=-1))
        return _through(self.core, self.kinds[1], x, shared, cache, slot)

    def _angles(self, e: Tensor, position_ids: Tensor, kind: str) -> Any:
        """The rotary embedding's, which in some models go by the type of layer."""
        by_kind = "layer_type" in inspect.signature(self.rotary_emb.forward).parameters
        return self.rotary_emb(e, position_ids, **({"layer_type": kind} if by_kind else {}))

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> bool:
        """Called by `generate`: a cache of ours, allocated once for the whole length, if none came."""
        del generation_mode, batch_size
        if model_kwargs.get(CACHE) is not None or generation_config.use_cache is False:
            return False
        steps = model_kwargs.get("num_steps", 1)
        total = steps if isinstance(steps, int) else sum(steps)
        model_kwargs[CACHE] = RecurrentCache(self.cut, steps=total, capacity=max_cache_length)
        return True

    def save_pretrained(self, save_directory: Any, *given: Any, **options: Any) -> None:
        """As in transformers; `from_pretrained` of this class or of `AutoModelForCausalLM` reads it."""
        super().save_pretrained(save_directory, *given, **options)
        RetrofitConfig(
            dense=self.config.to_dict(), prelude=len(self.prelude), core=len(self.core),
            coda=len(self.coda), architectures=[type(self).__name__], dtype=self.dtype,
        ).save_pretrained(save_directory)  # fmt: skip

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *, dtype: torch.dtype | None = None, **options: Any
    ) -> Retrofitted:
        """A saved retrofit, in evaluation.

        Args:
            pretrained_model_name_or_path: the folder.
            dtype: by default as saved.
            options: `attn_implementation`; others are not served, but for what `AutoModelForCausalLM` adds.

        Raises:
            ValueError: The folder is no retrofit's, or an option is not served.
        """
        folder = Path(pretrained_model_name_or_path)
        attention = options.pop("attn_implementation", None)
        of_auto = ("config", "adapter_kwargs")
        options = {name: value for name, value in options.items() if name not in of_auto and value}
        config = AutoConfig.from_pretrained(folder)
        if options or not isinstance(config, RetrofitConfig) or config.dense is None:
            raise ValueError(
                f"{folder} of type {config.model_type!r} with {', '.join(options) or 'no options'}; give "
                "the folder of a retrofit, and at most dtype and attn_implementation"
            )
        told = AutoConfig.for_model(**config.dense)
        built = AutoModelForCausalLM.from_config(
            told, dtype=dtype or config.dtype, attn_implementation=attention
        )
        cut = {"prelude": config.prelude, "core": config.core, "coda": config.coda}
        model = cls(built, **cut, alpha=0.0, beta=1.0)
        weights = {
            name: weight
            for file in sorted(folder.glob("*.safetensors"))
            for name, weight in load_file(file).items()
        }
        missing, unknown = model.load_state_dict(weights, strict=False)
        # Tied weights are saved once.
        head, table = model.lm_head.weight, model.embed_tokens.weight
        tied = {"lm_head.weight"} if head is table else set()
        if unknown or {*missing} - tied:
            raise ValueError(
                f"{folder} lacks {sorted({*missing} - tied)} and holds {unknown} besides; give the folder of "
                "a whole retrofit"
            )
        return model.eval()

    def get_input_embeddings(self) -> nn.Module:
        """The dense model's."""
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        """The dense model's."""
        return self.lm_head


AutoConfig.register("fourfold_retrofit", RetrofitConfig, exist_ok=True)
AutoModelForCausalLM.register(RetrofitConfig, Retrofitted, exist_ok=True)

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
        ValueError: the parts do not fit, or the model is not built of such layers or does more than they do;
            a pass over a few tokens tells, except on the meta device.
    """
    inner: Any = dense.get_decoder()
    _refuse_more_than_layers(dense, inner)
    count = len(inner.layers)
    if min(prelude, coda) < 0 or core < 1 or prelude + core + coda > count:
        raise ValueError(
            f"prelude={prelude}, core={core}, coda={coda} do not fit into {count} layers; use parts that "
            f"sum to {count} or less, with a core of 1 or more"
        )
    if dense.device.type != "meta":
        _refuse_unlike(dense, inner)
    return Retrofitted(dense, prelude=prelude, core=core, coda=coda, alpha=alpha, beta=beta)


SEEN_WHOLE = ("full_attention", "sliding_attention", "chunked_attention")
"""Types of layers whose memory is their keys and values alone, whatever part of them a mask hides."""


def _refuse_more_than_layers(dense: PreTrainedModel, inner: Any) -> None:
    """Raise for models that scale embeddings or logits, or have layers of another kind."""
    parts = ("embed_tokens", "layers", "norm", "rotary_emb")
    missing = [name for name in parts if not hasattr(inner, name)]
    if missing:
        raise ValueError(
            f"{type(dense).__name__} has no {missing[0]!r} in its decoder; retrofit takes decoders of the "
            "Llama family"
        )
    config: Any = dense.config.get_text_config()
    names = ("embedding_multiplier", "logits_scaling", "logit_scale", "final_logit_softcapping")
    beyond = {name: getattr(config, name, None) for name in names}
    beyond = {name: value for name, value in beyond.items() if value not in (None, 1, 1.0)}
    if beyond:
        named = ", ".join(f"{name}={value}" for name, value in beyond.items())
        raise ValueError(
            f"{config.model_type} computes with {named} outside of its layers, which retrofit does not take "
            f"over; {PLAIN}"
        )
    others = sorted({*(getattr(config, "layer_types", None) or [])} - {*SEEN_WHOLE})
    if others:
        raise ValueError(
            f"{config.model_type} has layers of type {', '.join(map(repr, others))}, which keep or choose "
            f"more than the keys and values that a RecurrentCache holds; {PLAIN}"
        )


PROBE_TOKENS = 8
ROUNDING = 64
"""Units in the last place of the model's format, of its largest logit."""


@torch.no_grad()
def _refuse_unlike(dense: PreTrainedModel, inner: Any) -> None:
    """Raise where embedding, layers, norm and head, called as a Llama's, are not the model.

    One recurrence through all layers must be the dense model; a few tokens tell. What the model hands its
    layers besides, what it does before them, and between the last one and its logits, is named.
    """
    name, count = type(dense).__name__, len(inner.layers)
    vocabulary = inner.embed_tokens.num_embeddings
    ids = torch.arange(PROBE_TOKENS, device=dense.device)[None] * (vocabulary // PROBE_TOKENS)
    handed: set[str] = set()
    states: dict[str, Tensor] = {}

    def into(layer: nn.Module, arguments: Any, keywords: dict[str, Any]) -> None:
        names = [*inspect.signature(layer.forward).parameters]
        given = dict(zip(names, arguments, strict=False)) | keywords
        handed.update(
            key for key, value in given.items() if value is not None and not _is_off(value)
        )
        if layer is inner.layers[0]:
            states["first"] = next(iter(given.values()))

    hooks = [layer.register_forward_pre_hook(into, with_kwargs=True) for layer in inner.layers]
    was_training = dense.training
    dense.eval()
    try:
        with torch.random.fork_rng([dense.device] if dense.device.type == "cuda" else []):
            expected = dense(input_ids=ids, use_cache=False).logits
            more = handed - HANDED
            if more:
                raise ValueError(
                    f"{name} hands its layers {', '.join(sorted(more))} besides masks and positions, which "
                    f"retrofit does not make; {PLAIN}"
                )
            [hook.remove() for hook in hooks]
            through = Retrofitted(dense, prelude=0, core=count, coda=0, alpha=0.0, beta=1.0).eval()
            ours = through(ids, use_cache=True).logits
    except (TypeError, AttributeError, RuntimeError, KeyError, IndexError) as error:
        raise ValueError(
            f"{name} does not run as embedding, layers, norm and head ({error}); {PLAIN}"
        ) from error
    finally:
        [hook.remove() for hook in hooks]
        dense.train(was_training)
    largest = expected.abs().max().item()
    tolerance = ROUNDING * torch.finfo(expected.dtype).eps * max(largest, 1.0)
    if ours.shape == expected.shape and (ours - expected).abs().max().item() <= tolerance:
        return
    before = inner.embed_tokens(ids)
    place = (
        "changes its embeddings before its first layer"
        if states["first"].shape != before.shape or not torch.equal(states["first"], before)
        else "computes something else than its layers, one norm and one product after its embeddings"
    )
    raise ValueError(
        f"{name} {place}: its logits are not those of embedding, layers, norm and head; {PLAIN}"
    )


def _is_off(value: object) -> bool:
    return isinstance(value, int) and not value  # False, or no logits to keep in particular


HANDED = {
    "hidden_states", "attention_mask", "position_ids", "position_embeddings", "use_cache", CACHE,
}  # fmt: skip
"""What a layer of the Llama family is handed."""


def _through(
    layers: nn.ModuleList,
    kinds: tuple[str, ...],
    x: Tensor,
    shared: dict[str, dict[str, Any]],
    cache: RecurrentCache | None,
    first: int,
) -> Tensor:
    """Layer after layer; their keys and values go into the slots from `first` on."""
    for slot, (layer, kind) in enumerate(zip(layers, kinds, strict=True), start=first):
        view = None if cache is None else _Slot(cache, slot)
        x = layer(x, **{CACHE: view}, **shared[kind])
    return x
