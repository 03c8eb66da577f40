"""Rules that say what each module of a model becomes on the grid, their sources, and refusals.

Pure functions of names, shapes and a configuration: nothing here touches a process group.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True, slots=True, kw_only=True)
class Plain:
    """A linear layer from the residual stream to heads or hidden units: outputs over row."""

    parts: int = 1
    """Things of equal width that it computes at once, one after the other in its outputs."""


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


Rule = (
    Plain | Swapped | Head | Vocabulary | Positions | ResidualNorm | PerHead | OfHeads | Mixing
    | LowRankInput | LowRankOutput
)  # fmt: skip

PUBLISHED: dict[str, Rule] = {
    "colwise": Plain(),
    "rowwise": Swapped(),
    "replicated_with_grad_allreduce": PerHead(),
}
"""Rules for the words of transformers' `base_model_tp_plan`."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """The form in which a parameter is kept, relative to the tensor of the published model."""

    transposed: bool = False
    """The published matrix is `[inputs, outputs]` (GPT-2's Conv1D)."""
    parts: int = 1
    """Published rows are `(part feature)`, kept rows are `(feature part)`."""

    def keep(self, published: Tensor) -> Tensor:
        """From the published tensor to the kept one."""
        tensor = published.t() if self.transposed else published
        return rearrange(tensor, "(part f) ... -> (f part) ...", part=self.parts)

    def publish(self, kept: Tensor) -> Tensor:
        """From the kept tensor to the published one."""
        tensor = rearrange(kept, "(f part) ... -> (part f) ...", part=self.parts)
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
        rows, *others = slices
        rectangles = []
        for part in range(self.parts):
            skipped = (part - rows.start) % self.parts
            first = part * (shape[0] // self.parts) + (rows.start + skipped) // self.parts
            offsets = (first, *(other.start for other in others))
            view = piece[skipped :: self.parts]
            rectangles.append((offsets[::-1], view.t()) if self.transposed else (offsets, view))
        return rectangles

    def read(self, source: Any, slices: tuple[slice, ...], shape: tuple[int, ...]) -> Tensor:
        """A piece of the kept tensor, reading no more of the published one than it needs.

        Args:
            source: Something that gives a tensor when indexed with slices of the published shape.
            slices: The piece, in the kept shape.
            shape: The kept shape.
        """
        rows, *others = slices
        features = shape[0] // self.parts
        first, last = rows.start // self.parts, -(-rows.stop // self.parts)
        pieces = []
        for part in range(self.parts):
            index = (slice(part * features + first, part * features + last), *others)
            piece = source[index[::-1] if self.transposed else index]
            pieces.append(piece.t() if self.transposed else piece)
        kept = rearrange(torch.stack(pieces), "part f ... -> (f part) ...")
        skipped = rows.start - first * self.parts
        return kept[skipped : skipped + rows.stop - rows.start]


def stored(module: nn.Module, rule: Rule, parameter_name: str) -> Stored:
    """The form in which a rule keeps a parameter of a module."""
    parts = rule.parts if isinstance(rule, Plain) else 1
    transposed = isinstance(module, Conv1D) and parameter_name == "weight"
    return Stored(transposed=transposed, parts=parts)


def rules_for(model: PreTrainedModel, overrides: Mapping[str, Rule]) -> dict[str, Rule]:
    """A rule for every module that holds parameters itself, by module name.

    Overrides come first, by name pattern (`*` matches within names, as in `fnmatch`); then the
    model's published tensor-parallel plan; then what the module is.

    Raises:
        ValueError: An override matches no module, the plan uses an unknown word, or a module holds
            parameters that no rule covers.
    """
    _check_overrides(model, overrides)
    plan = _plan(model)
    rules: dict[str, Rule] = {}
    for name, module in _holders(model):
        layer = adapted(name)
        rule = (
            _first_match(name, overrides)
            or _first_match(layer, overrides)
            or _planned(layer, plan)
            or _evident(model, model.get_submodule(layer))
        )
        if layer != name and not name.endswith(".base_layer"):
            rule = _low_rank(name, rule)
        if rule is None:
            kind = type(module).__name__
            raise ValueError(
                f"{name} ({kind}) holds parameters, and neither the model's tensor-parallel plan "
                f"nor its kind says how to cut them; pass rules={{'{_pattern(name)}': ...}}"
            )
        rules[name] = rule
    return rules


def check_sizes(
    model: PreTrainedModel, rules: Mapping[str, Rule], sizes: Mapping[str, int]
) -> None:
    """Refuse a grid on which heads would be cut.

    Raises:
        ValueError: Naming the layer, the sizes and the axis.
    """
    config = model.config
    row = sizes["row"]
    heads = getattr(config, "num_attention_heads", row)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    plain = next((name for name, rule in rules.items() if isinstance(rule, Plain)), "model")
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
    multiply before or after rounding. A small input in bfloat16 tells the variants apart.

    Raises:
        ValueError: The module computes something else.
    """
    if isinstance(module, nn.LayerNorm):
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


def _holders(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            yield name, module


def _plan(model: PreTrainedModel) -> dict[str, Rule | str]:
    """The published plan, or ours where there is none, with names from the root."""
    published: dict[str, str] = getattr(model.config, "base_model_tp_plan", None) or {}
    prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
    if published:
        return {prefix + pattern: PUBLISHED.get(word, word) for pattern, word in published.items()}
    ours = UNPUBLISHED.get(model.config.model_type, {})
    return {prefix + pattern: rule for pattern, rule in ours.items()}


def _planned(name: str, plan: Mapping[str, Rule | str]) -> Rule | None:
    rule = next((rule for pattern, rule in plan.items() if fnmatchcase(name, pattern)), None)
    if isinstance(rule, str):
        raise ValueError(
            f"{name}: the model's plan says {rule!r}, which the grid does not know; it knows "
            f"{sorted(PUBLISHED)}; pass rules={{'{_pattern(name)}': ...}}"
        )
    return rule


def _evident(model: PreTrainedModel, module: nn.Module) -> Rule | None:
    width = model.config.hidden_size
    if module is model.get_input_embeddings():
        return Vocabulary()
    if module is model.get_output_embeddings():
        return Head()
    if isinstance(module, nn.Embedding) and module.embedding_dim == width:
        return Positions()
    is_norm = isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")
    if is_norm and all(p.shape == (width,) for p in module.parameters(recurse=False)):
        return ResidualNorm()
    return None


def _is_lookup(module: nn.Module) -> bool:
    """Whether an embedding is torch's own, or one with a scale."""
    return type(module).forward is nn.Embedding.forward or hasattr(module, "scalar_embed_scale")


def _first_match(name: str, rules: Mapping[str, Rule]) -> Rule | None:
    return next((rule for pattern, rule in rules.items() if fnmatchcase(name, pattern)), None)


def _check_overrides(model: nn.Module, overrides: Mapping[str, Rule]) -> None:
    names = [name for name, _ in _holders(model)]
    for pattern in overrides:
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
