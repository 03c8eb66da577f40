"""Rules that say what each module of a model becomes on the grid, their sources, and refusals.

Pure functions of names, shapes and a configuration: nothing here touches a process group.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fourfold_parallel.grid.whole import elementwise


@dataclass(frozen=True, slots=True, kw_only=True)
class Plain:
    """A linear layer from the residual stream to heads or hidden units: outputs over row."""

    parts: int = 1
    """Things of equal width that it computes at once, one after the other in its outputs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Latent:
    """A linear layer from the residual stream to a latent of which heads are made: whole on all ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expanding:
    """A linear layer from a latent to heads: outputs over row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Swapped:
    """A linear layer from heads or hidden units back to the residual stream: inputs over row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The linear layer from the residual stream to the vocabulary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """The embedding of tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Positions:
    """A learned embedding of positions into the residual stream."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidualNorm:
    """A norm over the residual stream."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadsNorm:
    """A norm over the features of all heads together, of which a rank has its own: statistics over row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PerHead:
    """A module that treats each head alike, such as a norm over one head's features."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OfHeads:
    """A module with parameters that hold something for each head, beside modules of its own."""

    dim: int
    """Where the parameters count heads: cut over row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixing:
    """A module from the residual stream to itself that mixes its features: whole on every rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankInput:
    """The first factor of a low-rank adapter (LoRA's A) beside a plain or swapped layer."""

    swapped: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankOutput:
    """The second factor of a low-rank adapter (LoRA's B) beside a plain or swapped layer."""

    swapped: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """A block that every rank of row and col computes alike, with what it holds (`whole.py`)."""

    reason: str = "asked for"
    """Why no other rule covers it."""
    divided: bool = False
    """Whether its products are divided all the same, but for such small ones as a router's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Divided:
    """A linear layer of a whole block: its outputs over row and col, then gathered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alike:
    """A table of a decoder that is whole: rows for every rank alike, for code outside of it too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The experts of a whole block: hidden units over row and col."""

    cuts: Mapping[str, int]
    """By parameter, the dim of its hidden units."""
    packed: tuple[str, ...]
    """Parameters that hold gate and up one after the other."""
    once: tuple[str, ...]
    """Parameters that are added to the outputs."""


Rule = (
    Plain | Latent | Expanding | Swapped | Head | Vocabulary | Positions | ResidualNorm | HeadsNorm
    | PerHead | OfHeads | Mixing | LowRankInput | LowRankOutput | Whole | Alike | Divided | Experts
)  # fmt: skip

PUBLISHED: dict[str, Rule] = {
    "colwise": Plain(),
    "rowwise": Swapped(),
    "replicated_with_grad_allreduce": PerHead(),
    "local_params": OfHeads(dim=0),
}
"""Rules for the words of transformers' `base_model_tp_plan`."""

WIDENED = frozenset(
    {
        "all_reduce", "colwise_gather_output", "embedding_colwise", "embedding_rowwise",
        "mla_kv_a_proj", "moe_identity_expert", "moe_tp_experts", "packed_colwise",
        "packed_rowwise", "replicate", "rowwise_split_input",
    }
)  # fmt: skip
"""Words whose modules are computed in a whole block, which is right whatever they mean there."""

NAMED: dict[str, Rule] = {
    "q_proj": Plain(), "k_proj": Plain(), "v_proj": Plain(), "o_proj": Swapped(),
    "out_proj": Swapped(),
    "gate_proj": Plain(), "up_proj": Plain(), "down_proj": Swapped(),
    "fc1": Plain(), "fc2": Swapped(),
    "q_a_proj": Latent(), "kv_a_proj_with_mqa": Latent(),
    "q_a_layernorm": PerHead(), "kv_a_layernorm": PerHead(),
    "q_b_proj": Expanding(), "kv_b_proj": Expanding(),
}  # fmt: skip
"""What the model files of transformers mean by a module's name, where a plan leaves it out. It holds
in blocks (attention, MLP) of which every module has a rule and the right sizes; others are whole."""

MOSTLY = 15 / 16
"""Of a block's parameters: where at least so many lie in divided products, it counts as divided."""
TOKENS_MEET = re.compile(r"att|mixer|mamba|conv|rec|rnn|(layers|h|blocks?)\.\d+$", re.IGNORECASE)
"""Blocks in which, by their name, more than linear layers is computed: heads, states, convolutions."""
GATHERING = frozenset({"colwise_gather_output", "rowwise_split_input"})
HEAD_NORMS = re.compile(r"\.(q|k|query|key)_(norm|layernorm)$")

UNPUBLISHED: dict[str, dict[str, Rule]] = {
    "gpt2": {
        "h.*.attn.c_attn": Plain(parts=3),
        "h.*.attn.c_proj": Swapped(),
        "h.*.mlp.c_fc": Plain(),
        "h.*.mlp.c_proj": Swapped(),
    },
    "opt": {
        "decoder.layers.*.self_attn.[qkv]_proj": Plain(),
        "decoder.layers.*.self_attn.out_proj": Swapped(),
        "decoder.layers.*.fc1": Plain(),
        "decoder.layers.*.fc2": Swapped(),
    },
    "huginn_raven": {
        "transformer.*.attn": OfHeads(dim=2),
        "transformer.*.attn.Wqkv": Plain(parts=3),
        "transformer.*.attn.proj": Swapped(),
        "transformer.*.mlp.fc": Plain(parts=2),
        "transformer.*.mlp.proj": Swapped(),
        "transformer.adapter": Mixing(),
    },
}
"""Rules for model types whose configuration publishes no plan, relative to the base model."""

NAMES_MISLEAD = frozenset({"moshi", "mvp", "trocr", "xglm"})
"""Model types in which a name of `NAMED` means something else: an attention that reshapes to all heads of
the configuration, a first layer that holds a gate too."""
WIDE_BETWEEN = frozenset({"ctrl", "trocr", "xglm", "xlm"})
"""Model types that compute with the whole width of the residual stream between their blocks, by code
of their decoder: it is whole where col cuts the stream."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """The form in which a parameter is kept, relative to the tensor of the published model."""

    transposed: bool = False
    """The published matrix is `[inputs, outputs]` (GPT-2's Conv1D)."""
    parts: int = 1
    """Along `dim`, published are `(part feature)`, kept `(feature part)`."""
    dim: int = 0

    def keep(self, published: Tensor) -> Tensor:
        """From the published tensor to the kept one."""
        tensor = (published.t() if self.transposed else published).movedim(self.dim, 0)
        kept = rearrange(tensor, "(part f) ... -> (f part) ...", part=self.parts)
        return kept.movedim(0, self.dim)

    def publish(self, kept: Tensor) -> Tensor:
        """From the kept tensor to the published one."""
        if kept.ndim == 0:
            return kept.contiguous()
        tensor = rearrange(
            kept.movedim(self.dim, 0), "(f part) ... -> (part f) ...", part=self.parts
        ).movedim(0, self.dim)
        return (tensor.t() if self.transposed else tensor).contiguous()

    def keep_shape(self, published: torch.Size) -> tuple[int, ...]:
        """The kept shape."""
        return tuple(reversed(published)) if self.transposed else tuple(published)

    def rectangles(
        self, piece: Tensor, slices: tuple[slice, ...], shape: tuple[int, ...]
    ) -> list[tuple[tuple[int, ...], Tensor]]:
        """The rectangles of the published tensor that a kept piece is made of, as views of it.

        The counterpart of `read` that copies nothing and works in both directions: what is written into a
        view is in the piece.

        Args:
            piece: Of the kept tensor.
            slices: Its place in the kept shape.
            shape: The kept shape.

        Returns:
            Offsets in the published tensor, and the view that lies there.
        """
        if not slices:
            return [((), piece)]
        rows, rectangles = slices[self.dim], []
        along = piece.movedim(self.dim, 0)
        for part in range(self.parts):
            skipped = (part - rows.start) % self.parts
            first = part * (shape[self.dim] // self.parts) + (rows.start + skipped) // self.parts
            offsets = tuple(
                first if dim == self.dim else place.start for dim, place in enumerate(slices)
            )
            view = along[skipped :: self.parts].movedim(0, self.dim)
            rectangles.append((offsets[::-1], view.t()) if self.transposed else (offsets, view))
        return rectangles

    def read(self, source: Any, slices: tuple[slice, ...], shape: tuple[int, ...]) -> Tensor:
        """A piece of the kept tensor, reading no more of the published one than it needs.

        Args:
            source: Something that gives a tensor when indexed with slices of the published shape.
            slices: The piece, in the kept shape.
            shape: The kept shape.
        """
        if not slices:
            return source[()]
        rows = slices[self.dim]
        features = shape[self.dim] // self.parts
        first, last = rows.start // self.parts, -(-rows.stop // self.parts)
        pieces = []
        for part in range(self.parts):
            index = [*slices]
            index[self.dim] = slice(part * features + first, part * features + last)
            piece = source[tuple(index[::-1] if self.transposed else index)]
            pieces.append((piece.t() if self.transposed else piece).movedim(self.dim, 0))
        kept = rearrange(torch.stack(pieces), "part f ... -> (f part) ...")
        skipped = rows.start - first * self.parts
        return kept[skipped : skipped + rows.stop - rows.start].movedim(0, self.dim)


def stored(module: nn.Module, rule: Rule, parameter_name: str) -> Stored:
    """The form in which a rule keeps a parameter of a module."""
    if isinstance(rule, Experts):
        packed = parameter_name in rule.packed
        return Stored(parts=2, dim=rule.cuts[parameter_name]) if packed else Stored()
    if isinstance(rule, Whole | Alike):  # gathered as it is published
        return Stored()
    parts = rule.parts if isinstance(rule, Plain) else 1
    transposed = isinstance(module, Conv1D) and parameter_name == "weight"
    return Stored(transposed=transposed, parts=parts)


def rules_for(
    model: PreTrainedModel,
    overrides: Mapping[str, Rule],
    *,
    whole: Literal["allow", "refuse"] = "allow",
) -> dict[str, Rule]:
    """A rule for every module that holds parameters itself or in a whole block, by module name.

    Overrides come first, by name pattern (`*` matches within names, as in `fnmatch`); then the
    model's published tensor-parallel plan; then what the module is. What none covers is widened to
    the block around it, which is computed whole.

    Raises:
        ValueError: An override matches no module, the plan uses a word that nobody has met, or
            `whole` is "refuse" and a block would be whole.
    """
    _check_overrides(model, overrides)
    plan = _plan(model)
    rules: dict[str, Rule] = {}
    reasons: dict[str, str] = {}
    asked = {
        name
        for name, _ in model.named_modules()
        if name and isinstance(_first_match(name, overrides), Whole)
    }
    for name, _ in _holders(model):
        if any(_within(name, block) for block in asked):
            continue
        layer = adapted(name)
        factor = layer != name and not name.endswith(".base_layer")
        rule = _first_match(name, overrides) or _first_match(layer, overrides)
        if rule is None:
            rule = _named(layer, _planned(layer, plan)) or _evident(model, layer)
            rule, reason = _checked(model, f"{layer}.base_layer" if factor else name, rule)
            if rule is None:
                reasons[name] = reason
                continue
        if factor:
            rule = _low_rank(name, rule)
        rules[name] = rule
    reasons |= dict.fromkeys(_bare_norms(model, rules), "it normalises, without parameters")
    blocks = {
        block_of(model, name): f"{name} ({type(model.get_submodule(name)).__name__}): {reason}"
        for name, reason in reversed(reasons.items())
    }
    rules = widened(model, rules, blocks | dict.fromkeys(asked, Whole().reason))
    for block, rule in rules.items():
        if whole == "refuse" and isinstance(rule, Whole) and not rule.divided:
            raise ValueError(
                f"{rule.reason}, so that every rank would compute {block!r} whole; pass whole='allow', "
                f"or rules={{'{_pattern(block)}.*': ...}}"
            )
    return rules


def widened(
    model: PreTrainedModel, rules: Mapping[str, Rule], blocks: Mapping[str, str]
) -> dict[str, Rule]:
    """The rules with these blocks whole, for the reasons given, and with what is divided in them."""
    outermost = [name for name in blocks if not any(_inside(name, other) for other in blocks)]
    result = {
        name: rule
        for name, rule in rules.items()
        if not any(_within(name, block) for block in outermost)
    }
    shared, decoder = _shared_parameters(model), decoder_name(model)
    for block in outermost:
        result[block] = Whole(reason=blocks[block])
        for name, module in model.get_submodule(block).named_modules():
            full_name = f"{block}.{name}"
            if not name or any(
                isinstance(result.get(above), Experts) for above in _above(full_name)
            ):
                continue
            if isinstance(module, nn.Embedding) and block == decoder:
                result[full_name] = Alike()
            elif (experts := _experts(module)) is not None:
                result[full_name] = experts
            elif _is_linear(module) and not any(id(p) in shared for p in module.parameters()):
                result[full_name] = Divided()
        divided = [name for name in result if _inside(name, block)]
        if divided and not TOKENS_MEET.search(block) and block != decoder:
            count = lambda names: sum(  # noqa: E731
                p.numel() for name in names for p in model.get_submodule(name).parameters()
            )
            is_divided = count(divided) >= MOSTLY * count([block])
            result[block] = Whole(reason=blocks[block], divided=is_divided)
        elif not any(p.ndim > 1 for p in model.get_submodule(block).parameters()):
            result[block] = Whole(reason=blocks[block], divided=True)  # a norm: no product at all
    return result


def block_of(model: PreTrainedModel, name: str) -> str:
    """The module that is computed whole where `name` has no rule.

    A child of a decoder layer, such as its attention; a module of the decoder outside of its layers,
    such as the last norm; or what stands beside the decoder, such as a vision tower.
    """
    decoder, parts = decoder_name(model), name.split(".")
    if name == decoder:
        return name
    if not _inside(name, decoder):
        common = 0
        while [*decoder.split("."), ""][common] == parts[common]:
            common += 1
        return _entry(model, parts, common + 1)
    layer = _layer(model, name)
    if layer is None:
        return _entry(model, parts, len(decoder.split(".")) + 1 if decoder else 1)
    return name if name == layer else _entry(model, parts, len(layer.split(".")) + 1)


def _layer(model: PreTrainedModel, name: str) -> str | None:
    """The decoder layer that a module of the decoder lies in: an entry of the first list on its path."""
    decoder, parts = decoder_name(model), name.split(".")
    for end in range(len(decoder.split(".")) + 1 if decoder else 1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:end])), nn.ModuleList):
            return ".".join(parts[: end + 1])
    return None


def _entry(model: nn.Module, parts: list[str], end: int) -> str:
    """The path up to `end`, and on to an entry where it leads to a container, which nobody calls."""
    containers = (nn.ModuleList, nn.ModuleDict)
    while end < len(parts) and isinstance(model.get_submodule(".".join(parts[:end])), containers):
        end += 1
    return ".".join(parts[:end])


def layer_of(model: PreTrainedModel, block: str) -> str:
    """The module that a block is widened to: its decoder layer, or from a layer or elsewhere the decoder."""
    layer = _layer(model, block) if _inside(block, decoder_name(model)) else None
    return layer if layer is not None and layer != block else decoder_name(model)


def decoder_name(model: Any) -> str:
    """The module that makes hidden states of tokens; the base model, but of composite models."""
    decoder = model.get_decoder()
    if decoder is model:  # some models know no base model; it is what holds the embedding of tokens
        embedding = model.get_input_embeddings()
        holders = [
            child for child in model.children() if any(m is embedding for m in child.modules())
        ]
        decoder = next((child for child in holders if child is not embedding), model)
    while len(children := [*decoder.children()]) == 1 and not isinstance(
        children[0], nn.ModuleList
    ):
        decoder = children[0]
    return next((name for name, module in model.named_modules() if module is decoder), "")


def text_config(model: PreTrainedModel) -> Any:
    """The configuration of the decoder: the model's own, or the part of a composite one."""
    return model.config.get_text_config(decoder=True)


def refuse_quantised(model: PreTrainedModel) -> None:
    """Refuse weights that are not plain numbers, of which a tile could be cut.

    Raises:
        ValueError: Naming the first such parameter and its kind.
    """
    for name, parameter in model.named_parameters():
        kind = type(parameter.data)
        if kind is not Tensor or not parameter.is_floating_point():
            what = kind.__name__ if kind is not Tensor else str(parameter.dtype)
            raise ValueError(
                f"{name} is quantised ({what}), and the grid cuts plain weights; use "
                "model.dequantize() or load without quantization_config"
            )


def check_sizes(
    model: PreTrainedModel, rules: Mapping[str, Rule], sizes: Mapping[str, int]
) -> None:
    """Refuse a grid on which heads would be cut.

    Raises:
        ValueError: Naming the layer, the sizes and the axis.
    """
    config = text_config(model)
    row = sizes["row"]
    plain = next(
        (name for name, rule in rules.items() if isinstance(rule, Plain) and "att" in name), None
    )
    # An attention that is computed whole has all heads.
    heads = (getattr(config, "num_attention_heads", None) or row) if plain else row
    kv_heads = (getattr(config, "num_key_value_heads", None) or heads) if plain else row
    if heads % row:
        raise ValueError(
            f"{plain}: heads={heads} does not divide over axis 'row' of size {row}; "
            f"use a row that divides {heads}"
        )
    if kv_heads % row and row % kv_heads:
        raise ValueError(
            f"{plain}: key_value_heads={kv_heads} neither divides over axis 'row' of size {row} nor "
            f"is shared evenly by its ranks; use a row that divides {kv_heads} or is its multiple"
        )
    for name, rule in rules.items():
        module = model.get_submodule(name)
        if isinstance(rule, Experts):
            weight = module.get_parameter("down_proj")
            units, shares = weight.shape[rule.cuts["down_proj"]], row * sizes.get("col", 1)
            if units % shares:
                raise ValueError(
                    f"{name}: hidden_units={units} of each expert do not divide over the row * col = "
                    f"{shares} ranks that share them; use sizes whose product divides {units}"
                )
        if isinstance(rule, HeadsNorm) and kv_heads % row:
            raise ValueError(
                f"{name}: it normalises all heads together, and key_value_heads={kv_heads} do not divide "
                f"over axis 'row' of size {row}; use a row that divides them, or compute the attention "
                f"whole: rules={{'{_pattern(name).rpartition('.')[0]}': Whole()}}"
            )
        if isinstance(rule, LowRankOutput) and shares_heads(name, kv_heads, row):
            raise ValueError(
                f"{name}: key_value_heads={kv_heads} are shared by ranks of axis 'row' of size "
                f"{row}, and an adapter beside a shared head is not laid out; use a row of at most "
                f"{kv_heads}, or leave {adapted(name)!r} out of target_modules"
            )
        if isinstance(rule, LowRankInput | LowRankOutput) and module.bias is not None:
            raise ValueError(
                f"{name}: an adapter with a bias of its own is not laid out; use lora_bias=False"
            )
        if isinstance(rule, Vocabulary) and not _is_lookup(module):
            raise ValueError(
                f"{name}: {type(module).__name__} does more than look up rows, and its vocabulary "
                "cannot be cut; pass rules={...: Positions()} to cut its width only"
            )
        if isinstance(rule, Plain) and rule.parts > 1:
            features = _out_features(module) // rule.parts
            if features % row:
                raise ValueError(
                    f"{name}: features={features} of each of {rule.parts} parts do not divide over "
                    f"axis 'row' of size {row}; use a row that divides {features}"
                )


def shares_heads(name: str, kv_heads: int, row: int) -> bool:
    """Whether a layer gives key or value heads that are fewer than the ranks of row."""
    return kv_heads < row and adapted(name).endswith((".k_proj", ".v_proj"))


@dataclass(frozen=True, slots=True, kw_only=True)
class NormKind:
    """The formula of a norm over the residual stream."""

    centred: bool
    """A layer norm, which subtracts the mean; else a root-mean-square norm."""
    epsilon: float
    offset: float = 0.0
    gains_wide: bool = False


def norm_kind(name: str, module: nn.Module) -> NormKind:
    """The formula of a norm, found out by asking it.

    Model files write their own RMSNorm: the gain may be stored as a difference from one, and may
    multiply before or after rounding. A small input in bfloat16 tells the variants apart. They write
    subclasses of torch's LayerNorm that compute something else, too.

    Raises:
        ValueError: The module computes something else.
    """
    if isinstance(module, nn.LayerNorm) and _is_layer_norm(module):
        return NormKind(centred=True, epsilon=module.eps)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    parameters = dict(module.named_parameters(recurse=False))
    if isinstance(epsilon, float) and list(parameters) == ["weight"]:
        generator = torch.Generator().manual_seed(0)
        width = parameters["weight"].shape[0]
        x = torch.randn(8, width, generator=generator).to(torch.bfloat16)
        weight = torch.rand(width, generator=generator).to(torch.bfloat16)
        with torch.no_grad():
            answer = functional_call(module, {"weight": weight}, (x,))
        wide = x.float()
        normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        for offset in (0.0, 1.0):
            candidates = {
                True: (normal * (offset + weight.float())).to(torch.bfloat16),
                False: (weight if offset == 0 else offset + weight) * normal.to(torch.bfloat16),
            }
            for gains_wide, candidate in candidates.items():
                if torch.equal(candidate, answer):
                    return NormKind(
                        centred=False, epsilon=epsilon, offset=offset, gains_wide=gains_wide
                    )
    raise ValueError(
        f"{name} ({type(module).__name__}) is neither a layer norm nor a root-mean-square norm that "
        "the grid knows; pass a rule that is not ResidualNorm for it"
    )


def _is_layer_norm(module: nn.LayerNorm) -> bool:
    width = module.normalized_shape[-1]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, width, generator=generator)
    values = {
        name: torch.rand(p.shape, generator=generator) for name, p in module.named_parameters()
    }
    with torch.no_grad():
        answer = functional_call(module, values, (x,))
    expected = F.layer_norm(x, (width,), values.get("weight"), values.get("bias"), module.eps)
    return torch.equal(answer, expected)


def _checked(model: PreTrainedModel, name: str, rule: Rule | str | None) -> tuple[Rule | None, str]:
    """The rule if the module has the form that it asks for, or none and the reason."""
    module, width = model.get_submodule(name), text_config(model).hidden_size
    if isinstance(rule, str):
        return None, f"the model's plan says {rule!r}"
    if rule is None:
        return None, "neither the model's tensor-parallel plan nor its kind says how to cut it"
    if isinstance(rule, Plain) and _linear_sizes(module)[0] not in (width, None):
        return (
            None,
            f"it is planned to take the residual stream, and its inputs are not {width} wide",
        )
    if isinstance(rule, Swapped) and _linear_sizes(module)[1] not in (width, None):
        return (
            None,
            f"it is planned to give the residual stream, and its outputs are not {width} wide",
        )
    if isinstance(rule, OfHeads) and not _counts_heads(model, module, rule):
        return None, "its own parameters do not count heads"
    if isinstance(rule, Head) and not _is_linear(module):
        return None, "it is a head that is more than a linear layer"
    if isinstance(rule, ResidualNorm | HeadsNorm):
        try:
            norm_kind(name, module)
        except ValueError:
            return (
                None,
                "it is neither a layer norm nor a root-mean-square norm that the grid knows",
            )
    if isinstance(rule, Vocabulary) and not _is_lookup(module):
        return None, "it does more than look up rows"
    return rule, ""


def _counts_heads(model: PreTrainedModel, module: nn.Module, rule: OfHeads) -> bool:
    heads = getattr(text_config(model), "num_attention_heads", None)
    own = [*module.parameters(recurse=False)]
    return all(p.ndim > rule.dim and p.shape[rule.dim] == heads for p in own)


def _bare_norms(model: PreTrainedModel, rules: Mapping[str, Rule]) -> Iterator[str]:
    """Modules without parameters on the residual stream that mix its features."""
    width = text_config(model).hidden_size
    decoder = decoder_name(model)
    for name, module in model.named_modules():
        leaf = not any(True for _ in module.children()) and not any(True for _ in module.buffers())
        holds = any(True for _ in module.parameters())
        if not leaf or holds or not _inside(name, decoder):
            continue
        if any(isinstance(rules.get(above), Whole) for above in _above(name)):
            continue
        if block_of(model, name) == name and not elementwise(module, width):
            yield name


def _experts(module: nn.Module) -> Experts | None:
    """The cut of a set of experts, if it is one whose form transformers declares."""
    declared: Any = module
    own = dict(module.named_parameters(recurse=False))
    if not all(hasattr(module, flag) for flag in ("has_gate", "is_transposed", "is_concatenated")):
        return None
    if getattr(module, "has_post_expert_norm", False):
        return None
    first = "gate_up_proj" if declared.has_gate else "up_proj"
    units = {first: 2, "down_proj": 1} if declared.is_transposed else {first: 1, "down_proj": 2}
    biases = {f"{first}_bias": 1} if f"{first}_bias" in own else {}
    once = tuple(name for name in own if name == "down_proj_bias")
    if {*own} != {*units, *biases, *once} or any(own[name].ndim != 3 for name in units):
        return None
    packed = (first, *biases) if declared.has_gate and declared.is_concatenated else ()
    return Experts(cuts=units | biases, packed=packed, once=once)


def _is_linear(module: nn.Module) -> bool:
    return type(module).forward in (nn.Linear.forward, Conv1D.forward)


def _linear_sizes(module: nn.Module) -> tuple[int | None, int | None]:
    """Inputs and outputs, of a linear layer."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return getattr(module, "in_features", None), getattr(module, "out_features", None)


def _shared_parameters(model: nn.Module) -> set[int]:
    """Identities of the parameters that several modules hold."""
    counts = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return {identity for identity, count in counts.items() if count > 1}


def _inside(name: str, block: str) -> bool:
    return name.startswith(f"{block}.") or (not block and bool(name))


def _within(name: str, block: str) -> bool:
    return name == block or _inside(name, block)


def _above(name: str) -> Iterator[str]:
    """The name and those of the modules around it."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _holders(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            yield name, module


def _plan(model: PreTrainedModel) -> dict[str, Rule | str]:
    """The published plan, or ours where there is none, with names from the root."""
    published: dict[str, str] = getattr(model.config, "base_model_tp_plan", None) or {}
    prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
    if not published and text_config(model) is not model.config:
        published = getattr(text_config(model), "base_model_tp_plan", None) or {}
        prefix = f"{decoder_name(model)}." if decoder_name(model) else ""
    if published:
        return {prefix + pattern: PUBLISHED.get(word, word) for pattern, word in published.items()}
    ours = UNPUBLISHED.get(model.config.model_type, {})
    return {prefix + pattern: rule for pattern, rule in ours.items()}


def _planned(name: str, plan: Mapping[str, Rule | str]) -> Rule | str | None:
    rule = next((rule for pattern, rule in plan.items() if fnmatchcase(name, pattern)), None)
    if isinstance(rule, str) and rule not in WIDENED:
        raise ValueError(
            f"{name}: the model's plan says {rule!r}, which the grid does not know; it knows "
            f"{sorted({*PUBLISHED, *WIDENED})}; pass rules={{'{_pattern(name)}': ...}}"
        )
    return rule


def _named(name: str, planned: Rule | str | None) -> Rule | str | None:
    """The plan's rule, and what it means of a latent, which it does not tell from the residual stream."""
    own = name.rpartition(".")[2]
    named = NAMED.get(own)
    if isinstance(planned, str) and planned in GATHERING and own[:2] in ("q_", "k_", "v_", "o_"):
        return (
            None  # for a norm of all heads; it need not be gathered where the norm is cut as well
        )
    return named if isinstance(named, Latent | Expanding) and planned is not None else planned


def _evident(model: PreTrainedModel, name: str) -> Rule | None:
    module, config = model.get_submodule(name), text_config(model)
    width = config.hidden_size
    if module is model.get_input_embeddings():
        return Vocabulary()
    if module is model.get_output_embeddings():
        return Head()
    if isinstance(module, nn.Embedding) and module.embedding_dim == width:
        return Positions()
    is_norm = isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")
    shapes = {tuple(p.shape) for p in module.parameters(recurse=False)}
    if HEAD_NORMS.search(name) and is_norm:
        return _head_norm(config, shapes)
    if is_norm and shapes == {(width,)} and block_of(model, name) == name:
        return ResidualNorm()  # and not one of all heads together, within an attention
    named = NAMED.get(name.rpartition(".")[2])
    linear = _is_linear(module) and _layer(model, name) is not None
    if config.model_type in NAMES_MISLEAD:
        return None
    if isinstance(named, PerHead) and is_norm and len(shapes) == 1:
        return named
    return named if linear and not isinstance(named, PerHead) else None


def _head_norm(config: Any, shapes: set[tuple[int, ...]]) -> Rule | None:
    """A norm of each head, or of all heads of the queries or of the keys together."""
    heads = getattr(config, "num_attention_heads", None) or 1
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    if heads > 1 and shapes == {(width,)}:
        return PerHead()
    return HeadsNorm() if shapes in ({(heads * width,)}, {(kv_heads * width,)}) else None


def _is_lookup(module: nn.Module) -> bool:
    """Whether an embedding is torch's own, or one with a scale."""
    return type(module).forward is nn.Embedding.forward or hasattr(module, "scalar_embed_scale")


def _first_match(name: str, rules: Mapping[str, Rule]) -> Rule | None:
    return next((rule for pattern, rule in rules.items() if fnmatchcase(name, pattern)), None)


def _check_overrides(model: nn.Module, overrides: Mapping[str, Rule]) -> None:
    names = [name for name, _ in _holders(model)]
    for pattern, rule in overrides.items():
        if isinstance(rule, Whole):
            names = [name for name, _ in model.named_modules() if name]
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"rule {pattern!r} matches no module with parameters; "
                f"names look like {names[len(names) // 2]!r}"
            )


ADAPTER = re.compile(r"\.(base_layer|lora_[AB]\.[^.]+)$")
"""What peft appends to the name of a linear layer for the layer itself and its two factors."""


def adapted(name: str) -> str:
    """The name that a module had before peft put an adapter beside it."""
    return ADAPTER.sub("", name)


def _low_rank(name: str, rule: Rule | None) -> Rule:
    if not isinstance(rule, Plain | Swapped) or (isinstance(rule, Plain) and rule.parts > 1):
        raise ValueError(
            f"{name}: a low-rank adapter is laid out beside a plain or a swapped layer, and this one "
            f"stands beside {rule}; leave {adapted(name)!r} out of target_modules"
        )
    swapped = isinstance(rule, Swapped)
    first = ".lora_A." in name
    return LowRankInput(swapped=swapped) if first else LowRankOutput(swapped=swapped)


def _pattern(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _out_features(module: nn.Module) -> int:
    assert isinstance(module, (nn.Linear, Conv1D))
    return module.nf if isinstance(module, Conv1D) else module.out_features
