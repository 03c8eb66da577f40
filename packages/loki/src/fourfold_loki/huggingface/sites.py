"""A model of transformers as a selection sees it: which modules attend, in which order, and what is refused.

Most models number their attention modules (`layer_idx`), one call each in a forward pass. A recurrent-depth
model iterates some of its blocks, and each iteration has keys of its own: there a "layer" is a call, counted
from the start of the pass, so that a basis has a rotation for every layer and step.
"""

import inspect
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from fourfold_loki.attention_mode import Sparse
from fourfold_loki.basis import Basis, Part
from fourfold_loki.moments import CalibrationSource, fingerprint
from fourfold_loki.selectors import Loki


@dataclass(slots=True, eq=False)
class Site:
    """The place of an attention module, as it is told while its model is in a session."""

    module: nn.Module
    layer: int
    """Its place among the attention modules, as bases count; of an iterated module, not the layer."""
    slides: bool
    """True where it sees a sliding window only, and stays dense."""
    positions: tuple[Tensor, Tensor] | None = None
    """Cosines and sines of the rotary embedding, where the model hands them to its modules."""


FULL = ("full_attention", "attention")
"""Types of layers whose attention sees everything before."""


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The modules of a model that ask for an attention function, in order of their layers."""
    causal = [
        module
        for module in model.modules()
        if type(module).__name__.endswith("Attention") and getattr(module, "is_causal", True)
    ]
    numbered = [module for module in causal if isinstance(getattr(module, "layer_idx", None), int)]
    return numbered or causal


def is_iterated(model: PreTrainedModel) -> bool:
    """True where layers are calls: the attention modules bear no number."""
    return not any(hasattr(module, "layer_idx") for module in attention_modules(model))


def sites(model: PreTrainedModel) -> list[Site]:
    """Every attention module with what is known about it."""
    config = model.config.get_text_config()
    types = getattr(config, "layer_types", None)
    slides = bool(getattr(config, "sliding_window", None))
    slides = slides and getattr(config, "use_sliding_window", True)
    return [
        Site(
            module=module,
            layer=layer,
            slides=slides if types is None else types[number_of(module, layer)] not in FULL,
        )
        for layer, module in enumerate(attention_modules(model))
    ]


def number_of(module: nn.Module, layer: int) -> int:
    """The layer's number in its model, where layers without attention count too."""
    number = getattr(module, "layer_idx", None)
    return number if isinstance(number, int) else layer


def cache_name(model: PreTrainedModel) -> str:
    """The argument that takes a cache: `cache` in transformers from 5.24 on, `past_key_values` before."""
    is_new = "cache" in inspect.signature(model.forward).parameters
    return "cache" if is_new else "past_key_values"


def check_model(model: PreTrainedModel) -> None:
    """Refuse a model that would ignore a selection, or whose keys no basis fits or can be laid out for.

    Raises:
        ValueError: naming it.
    """
    name = type(model).__name__
    if not model._can_set_attn_implementation():  # noqa: SLF001 - transformers has no public question
        raise ValueError(
            f"{name} does not ask transformers' registry for its attention, so a selection would be "
            "ignored; use a model class that supports attention backends"
        )
    parts = [*dict(model.named_modules()), *dict(model.named_buffers())]
    if not any(part.endswith(("rotary_emb", "freqs_cis")) for part in parts):
        raise ValueError(
            f"{name} has no rotary embedding, and bases are fitted to rotary keys; "
            "use a rotary model (Llama, Qwen, Mistral, Gemma, ...)"
        )
    config = model.config.get_text_config()
    asked = ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    missing = [field for field in asked if getattr(config, field, None) is None]
    if missing:
        raise ValueError(
            f"the configuration of {name} states no {', '.join(missing)}, by which bases are laid out; "
            "use a model whose configuration does, as Llama's and most others"
        )
    if not attention_modules(model):
        raise ValueError(f"{name} has no causal attention modules; use a decoder model")


def check_mode(model: PreTrainedModel, mode: Sparse) -> None:
    """Refuse a mode that a model cannot follow.

    Raises:
        ValueError: naming both.
    """
    mode.budget.check_fits(int(model.config.get_text_config().max_position_embeddings))
    layers = len(attention_modules(model))
    wrong = [layer for layer in mode.dense_layers if not 0 <= layer < layers]
    if wrong and not is_iterated(model):
        raise ValueError(
            f"dense_layers={wrong} of a model of {layers} layers; use 0 to {layers - 1}"
        )
    if not is_iterated(model) and all(
        site.slides or site.layer in mode.dense_layers for site in sites(model)
    ):
        raise ValueError(
            f"no layer of {type(model).__name__} would select: layers with a sliding window and "
            f"dense_layers={mode.dense_layers} keep full attention; use a model with layers that see "
            "everything, or sliding_window=None where the context is no longer than the window"
        )
    if isinstance(mode.selector, Loki):
        check_basis(model, mode.selector.basis)


def check_basis(model: PreTrainedModel, basis: Basis) -> None:
    """Refuse a basis of another shape or another model.

    Raises:
        ValueError: naming both.
    """
    config = model.config.get_text_config()
    first = attention_modules(model)[0]
    width = getattr(first, "head_dim", None) or config.hidden_size // config.num_attention_heads
    source = basis.label.source
    heads = source.kv_heads if isinstance(source, Part) else basis.kv_heads
    # Calls of an iterated model are counted when it runs; see `Session.layer_of`.
    layers = basis.layers if is_iterated(model) else len(attention_modules(model))
    mine = (layers, config.num_key_value_heads, width)
    theirs = (basis.layers, heads, basis.head_width)
    if mine != theirs:
        raise ValueError(
            "basis of {} layers, {} key/value heads of width {} for ".format(*theirs)
            + "a model of {} layers, {} key/value heads of width {}; ".format(*mine)
            + "calibrate this model"
        )
    if isinstance(source, CalibrationSource) and source.model != (own := fingerprint(model)):
        raise ValueError(
            f"basis of model {source.model[:12]} for model {own[:12]}; calibrate this model"
        )
