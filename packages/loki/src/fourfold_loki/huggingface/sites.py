"""A model of transformers as a selection sees it: which modules attend, in which order, and what is refused.

Most models number their attention modules (`layer_idx`), one call each in a forward pass. A recurrent-depth
model iterates some of its blocks, and each iteration has keys of its own: there a "layer" is a call, counted
from the start of the pass, so that a basis has a rotation for every layer and step.
"""

import inspect
from dataclasses import dataclass
from typing import Any

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
    kind: str
    """Type of its layer, as `layer_types` of the configuration has it."""
    positions: tuple[Tensor, Tensor] | None = None
    """Cosines and sines of the rotary embedding, where the model hands them to its modules."""

    @property
    def slides(self) -> bool:
        """True where it sees a window only, and stays dense."""
        return self.kind in WINDOWS


FULL = ("full_attention", "hybrid")
"""Types of layers whose attention sees everything before; hybrid ones keep a state beside it."""
WINDOWS = ("sliding_attention", "chunked_attention", "hybrid_sliding")
"""Types of layers whose attention sees a window."""
WITHOUT = ("linear_attention", "conv", "moe")
"""Types of layers without softmax attention, whatever their modules are called."""


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The modules of a model that ask for an attention function, in order of their layers."""
    causal = [
        module
        for module in model.modules()
        if type(module).__name__.endswith(("Attention", "MLA"))
        and getattr(module, "is_causal", True)
    ]
    numbered = [module for module in causal if isinstance(getattr(module, "layer_idx", None), int)]
    types = getattr(model.config.get_text_config(), "layer_types", None)
    if types is None:
        return numbered or causal
    return [module for module in numbered if types[module.layer_idx] not in WITHOUT] or causal


def is_iterated(model: PreTrainedModel) -> bool:
    """True where layers are calls: the attention modules bear no number."""
    return not any(hasattr(module, "layer_idx") for module in attention_modules(model))


def sites(model: PreTrainedModel) -> list[Site]:
    """Every attention module with what is known about it."""
    config = model.config.get_text_config()
    types = getattr(config, "layer_types", None)
    slides = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    common = "sliding_attention" if slides else "full_attention"
    return [
        Site(
            module=module,
            layer=layer,
            kind=common if types is None else types[number_of(module, layer)],
        )
        for layer, module in enumerate(attention_modules(model))
    ]


def head_width(config: Any) -> int:
    """Coordinates of a head, of a text configuration."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


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
    parts = [type(module).__name__ for module in model.modules()]
    parts += [name for name, _ in model.named_buffers()]
    if not any("Rotary" in part or part.endswith("freqs_cis") for part in parts):
        raise ValueError(
            f"{name} has no rotary embedding, and bases are fitted to rotary keys; "
            "use a rotary model (Llama, Qwen, Mistral, Gemma, ...)"
        )
    config = model.config.get_text_config()
    asked = ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    for field in (*asked, "head_dim"):
        _refuse_differing(name, config, field)
    missing = [field for field in asked if getattr(config, field, None) is None]
    if missing:
        raise ValueError(
            f"the configuration of {name} states no {', '.join(missing)}, by which bases are laid out; "
            "use a model whose configuration does, as Llama's and most others"
        )
    if not attention_modules(model):
        raise ValueError(f"{name} has no causal attention modules; use a decoder model")


def _refuse_differing(name: str, config: Any, field: str) -> None:
    """Raise where layers have values of their own, as some configurations since transformers 5.20 state."""
    try:
        getattr(config, field, None)
    except RuntimeError as error:
        raise ValueError(
            f"{field} of {name} differs from layer to layer, and a basis has rotations of one shape; use a "
            "model whose layers are alike in it"
        ) from error


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
    if not is_iterated(model):
        _refuse_kinds(model, mode)
    if isinstance(ranking := mode.selector.ranks_by(), Loki):
        check_basis(model, ranking.basis)


def _refuse_kinds(model: PreTrainedModel, mode: Sparse) -> None:
    name = type(model).__name__
    free = [site for site in sites(model) if site.layer not in mode.dense_layers]
    other = [site for site in free if site.kind not in FULL + WINDOWS]
    if other:
        layers = tuple(site.layer for site in other)
        raise ValueError(
            f"layers {layers} of {name} are of type {other[0].kind!r}, which chooses or shortens its keys "
            "itself; list them in dense_layers, or use a model with layers of full attention"
        )
    if all(site.slides for site in free):
        kinds = ", ".join(sorted({site.kind for site in free})) or "none"
        raise ValueError(
            f"no layer of {name} would select: layers that see a window only ({kinds}) and "
            f"dense_layers={mode.dense_layers} keep their attention; use a model with layers that see "
            "everything, or sliding_window=None where the context is no longer than the window"
        )


def check_basis(model: PreTrainedModel, basis: Basis) -> None:
    """Refuse a basis of another shape or another model.

    Raises:
        ValueError: naming both.
    """
    config = model.config.get_text_config()
    first = attention_modules(model)[0]
    width = getattr(first, "head_dim", None) or head_width(config)
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
