"""A transformer as the planner sees it: sizes alone, from a configuration, without weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fourfold_parallel.grid import layout as grid
from fourfold_parallel.grid.layout import decoder_name, rules_for, text_config
from fourfold_parallel.grid.whole import takes_choices

Form = Literal["plain", "swapped", "latent", "expanding", "divided", "alike"]
"""As the rules of the grid: `divided` and `alike` are what lies in a block that is computed whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """A matrix `outputs x inputs` that every token is multiplied with.

    From the residual stream (plain), back to it (swapped), to or from a latent of which heads are made;
    in a whole block with its outputs over row and col (divided), or computed on every rank (alike).
    """

    name: str
    outputs: int
    inputs: int
    form: Form = "plain"
    bias: bool = False

    @property
    def lies_whole(self) -> bool:
        """It lies in a whole block, and its gathered tile is kept for backward."""
        return self.form in {"divided", "alike"}

    @property
    def swapped(self) -> bool:
        """It leads back to the residual stream, and its inputs are cut over row."""
        return self.form == "swapped"

    @property
    def parameters(self) -> int:
        """Elements of the matrix, without the bias."""
        return self.outputs * self.inputs

    @property
    def active(self) -> int:
        """Elements that one token is multiplied with."""
        return self.parameters

    def tile(self, row: int, col: int) -> tuple[int, int]:
        """Rows and columns that a rank computes with."""
        match self.form:
            case "divided":
                return -(-self.outputs // (row * col)), self.inputs
            case "alike":
                return self.outputs, self.inputs
            case "swapped":
                return -(-self.outputs // col), -(-self.inputs // row)
            case "plain" | "latent" | "expanding":
                return -(-self.outputs // row), -(-self.inputs // col)

    def tile_elements(self, row: int, col: int) -> int:
        """Elements that a rank gathers over depth."""
        if self.form == "alike":
            return -(-self.parameters // (row * col))
        return math.prod(self.tile(row, col))


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """A set of experts, of which each token is sent through a few. Hidden units are cut over row and col."""

    name: str
    number: int
    chosen: int
    """Experts a token."""
    width: int
    """Of what they are given."""
    hidden: int
    """Units of one expert."""
    matrices: int
    """Of one expert: three with a gate, else two."""
    exchangeable: bool = True
    """Tokens can be sent to where its experts lie (`Fourfold(experts="exchanged")`)."""

    @property
    def lies_whole(self) -> bool:
        """It lies in a whole block, and its gathered tile is kept for backward."""
        return True

    @property
    def parameters(self) -> int:
        """Elements of all experts' matrices."""
        return self.number * self.matrices * self.hidden * self.width

    @property
    def active(self) -> int:
        """Elements that one token is multiplied with."""
        return self.parameters * self.chosen // self.number

    def units(self, row: int, col: int) -> int:
        """Hidden units of an expert on one rank."""
        return -(-self.hidden // (row * col))

    def tile_elements(self, row: int, col: int) -> int:
        """Elements that a rank gathers over depth."""
        return self.number * self.matrices * self.units(row, col) * self.width

    def crowding(self, depth: int) -> float:
        """Experts of the fullest rank of depth over an even share: they are not cut apart."""
        return -(-self.number // depth) * depth / self.number


Part = Linear | Mixture


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Attention, an MLP or something else between two touches of the residual stream."""

    parts: tuple[Part, ...]
    """In the order of use."""
    attends: bool
    whole: bool = False
    """Every rank of row and col computes alike what is not a product."""

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Without experts and what is computed alike."""
        return tuple(p for p in self.parts if isinstance(p, Linear) and p.form != "alike")

    @property
    def last(self) -> Linear | None:
        """The linear layer before which attention or the activation is computed."""
        return self.linears[-1] if self.linears else None

    @property
    def hidden(self) -> int:
        """Hidden units of an MLP."""
        return self.last.inputs if self.last is not None else 0

    @property
    def gated(self) -> bool:
        """The MLP multiplies two of its matrices' outputs."""
        return sum(linear.outputs for linear in self.linears[:-1]) == 2 * self.hidden


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLayer:
    """The sizes of one decoder layer."""

    blocks: tuple[Block, ...]
    """Each but a whole one ends with its swapped layer."""
    norms: int
    """Of the residual stream."""
    small: int
    """Elements of its other parameters: norms, biases, what belongs to heads or channels."""
    tensors: int
    """Parameters by number, not by elements."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """Of all blocks, in the order of use."""
        return tuple(part for block in self.blocks for part in block.parts)

    @property
    def parameters(self) -> int:
        """All its elements."""
        return self.small + sum(part.parameters for part in self.parts)

    @classmethod
    def of_linears(cls, linears: Sequence[Linear], *, width: int, norms: int = 2) -> DecoderLayer:
        """A layer whose first block attends, cut after each swapped linear layer."""
        blocks: list[Block] = []
        parts: list[Linear] = []
        for linear in linears:
            parts.append(linear)
            if linear.swapped:
                blocks.append(Block(parts=tuple(parts), attends=not blocks))
                parts = []
        biased = [linear.outputs for linear in linears if linear.bias]
        return cls(
            blocks=tuple(blocks), norms=norms, small=norms * width + sum(biased),
            tensors=len(linears) + len(biased) + norms,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Transformer:
    """The sizes of a decoder."""

    name: str
    width: int
    heads: int
    kv_heads: int
    head_width: int
    stack: tuple[tuple[DecoderLayer, int], ...]
    """Kinds of decoder layers, and how many there are of each."""
    vocabulary: int
    tied: bool
    """The head shares the embedding's weight."""
    positions: int = 0
    """Rows of a learned table of positions."""
    beside: int | Literal["one norm"] = "one norm"
    """Elements that belong to no decoder layer and are neither embedding, positions nor head."""
    beside_tensors: int = 1
    unmodelled: tuple[str, ...] = ()
    """Kinds of modules whose time is not predicted, such as a state space's scan."""

    @classmethod
    def llama(
        cls,
        *,
        name: str,
        layers: int,
        width: int,
        hidden: int,
        heads: int,
        kv_heads: int,
        vocabulary: int,
        tied: bool = False,
    ) -> Transformer:
        """Gated MLP, root-mean-square norms, rotary positions, no bias."""
        head_width = width // heads
        keys = kv_heads * head_width
        linears = (
            Linear(name="q", outputs=width, inputs=width),
            Linear(name="k", outputs=keys, inputs=width),
            Linear(name="v", outputs=keys, inputs=width),
            Linear(name="o", outputs=width, inputs=width, form="swapped"),
            Linear(name="gate", outputs=hidden, inputs=width),
            Linear(name="up", outputs=hidden, inputs=width),
            Linear(name="down", outputs=width, inputs=hidden, form="swapped"),
        )
        return cls(
            name=name, width=width, heads=heads, kv_heads=kv_heads, head_width=head_width,
            stack=((DecoderLayer.of_linears(linears, width=width), layers),),
            vocabulary=vocabulary, tied=tied,
        )  # fmt: skip

    @classmethod
    def gpt(
        cls,
        *,
        name: str,
        layers: int,
        width: int,
        heads: int,
        vocabulary: int,
        hidden: int | Literal["four widths"] = "four widths",
        positions: int = 0,
        tied: bool = True,
        bias: bool = True,
    ) -> Transformer:
        """One matrix for queries, keys and values, an MLP of two matrices, layer norms."""
        inner = 4 * width if hidden == "four widths" else hidden
        linears = (
            Linear(name="qkv", outputs=3 * width, inputs=width, bias=bias),
            Linear(name="out", outputs=width, inputs=width, form="swapped", bias=bias),
            Linear(name="fc1", outputs=inner, inputs=width, bias=bias),
            Linear(name="fc2", outputs=width, inputs=inner, form="swapped", bias=bias),
        )
        return cls(
            name=name, width=width, heads=heads, kv_heads=heads, head_width=width // heads,
            stack=((DecoderLayer.of_linears(linears, width=width), layers),),
            vocabulary=vocabulary, tied=tied, positions=positions,
        )  # fmt: skip

    @classmethod
    def of(cls, config: PretrainedConfig) -> Transformer:
        """The sizes of a configuration of transformers.

        The model is built without memory (torch's meta device) and read by the rules of the grid, so
        what the grid takes is planned, without weights.

        Raises:
            ValueError: A field is missing, or there is no list of decoder layers.
        """
        text = config.get_text_config(decoder=True)
        missing = [field for field in REQUIRED if getattr(text, field, None) is None]
        if missing:
            raise ValueError(
                f"the configuration of type {text.model_type!r} lacks {', '.join(missing)}; "
                "the planner needs them"
            )
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        return _Reading(model).transformer()

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return sum(number for _, number in self.stack)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Of one decoder layer of each kind, in the order of use."""
        parts = [part for layer, _ in self.stack for part in layer.parts]
        return tuple(part for part in parts if isinstance(part, Linear))

    @property
    def parts(self) -> tuple[Part, ...]:
        """Of one decoder layer of each kind, and the head."""
        return (*(part for layer, _ in self.stack for part in layer.parts), self.head)

    @property
    def head(self) -> Linear:
        """The linear layer to the vocabulary."""
        return Linear(name="head", outputs=self.vocabulary, inputs=self.width)

    @property
    def gated(self) -> bool:
        """The MLP of the first decoder layer multiplies two of its matrices' outputs."""
        return self.stack[0][0].blocks[-1].gated

    @property
    def splits_heads(self) -> bool:
        """Heads are cut over row, so row must divide them."""
        return any(b.attends and not b.whole for layer, _ in self.stack for b in layer.blocks)

    @property
    def attentions(self) -> int:
        """Blocks that attend, in all layers."""
        return sum(n * sum(b.attends for b in layer.blocks) for layer, n in self.stack)

    @property
    def tensors(self) -> int:
        """Parameters by number, not by elements."""
        apart = 1 + (not self.tied) + bool(self.positions)
        return sum(n * layer.tensors for layer, n in self.stack) + self.beside_tensors + apart

    @property
    def matrix_parameters(self) -> int:
        """Elements of all matrices, all experts' and the head included."""
        layers = sum(n * sum(p.parameters for p in layer.parts) for layer, n in self.stack)
        return layers + self.head.parameters

    @property
    def active_parameters(self) -> int:
        """Elements of the matrices that one token is multiplied with, the head included."""
        layers = sum(n * sum(p.active for p in layer.parts) for layer, n in self.stack)
        return layers + self.head.parameters

    @property
    def others(self) -> int:
        """Elements that belong to no decoder layer and are neither embedding, positions nor head."""
        return self.width if self.beside == "one norm" else self.beside

    @property
    def parameters(self) -> int:
        """All parameters."""
        small = sum(n * layer.small for layer, n in self.stack) + self.others
        embeddings = (self.positions + (0 if self.tied else self.vocabulary)) * self.width
        return self.matrix_parameters + small + embeddings

    def crowded(self, depth: int) -> float:
        """Elements beyond the model's, if each rank of depth held as many as the fullest one."""
        return sum(
            n * part.parameters * (part.crowding(depth) - 1)
            for layer, n in self.stack
            for part in layer.parts
            if isinstance(part, Mixture)
        )

    def flops(self, *, tokens: int, sequence: int, recomputes: bool) -> float:
        """Operations of a step: 6 for each token and element of a matrix, 8 with recomputation.

        Attention is counted in full (12 per layer, width and token of the sequence), as in Megatron-LM
        and most reports, although a causal kernel computes half of it. Of experts the chosen ones count.
        """
        attention = 2 * self.attentions * self.heads * self.head_width * sequence
        head = self.head.parameters
        recomputed = (self.active_parameters - head + attention) * 2 if recomputes else 0
        return float(tokens) * (6 * (self.active_parameters + attention) + recomputed)


REQUIRED = ("hidden_size", "vocab_size")


class _Reading:
    """Reads a model on the meta device, of whose decoder layers one of each kind is kept."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.config: Any = text_config(model)
        self.total = {id(p): p.numel() for p in model.parameters()}
        self.path, layers = _decoder_layers(model)
        alike = [(key, [*same]) for key, same in groupby(layers, key=_signature)]
        self.counts: dict[str, int] = {}
        firsts: dict[str, nn.Module] = {}
        for key, same in alike:
            firsts.setdefault(key, same[0])
            self.counts[key] = self.counts.get(key, 0) + len(same)
        self.in_layers = {id(p) for layer in layers for p in layer.parameters()}
        model.set_submodule(self.path, nn.ModuleList(firsts.values()))
        self.model, self.rules = model, rules_for(model, {})

    def transformer(self) -> Transformer:
        """The sizes.

        Raises:
            ValueError: A good part of the parameters lies in modules of a kind that is not planned.
        """
        model, config = self.model, self.config
        heads = _first_of(config, "num_attention_heads", "n_head", "num_heads") or 1
        stack = [(self._layer(index), number) for index, number in enumerate(self.counts.values())]
        embedding: Any = model.get_input_embeddings()
        head: Any = model.get_output_embeddings()
        tied = head is None or head.weight is embedding.weight
        positions = sum(self._positions(embedding))
        apart = [p for p in self.total if p not in self.in_layers]
        named = config.vocab_size * config.hidden_size * (2 - tied) + positions * config.hidden_size
        layers = sum(number * layer.parameters for layer, number in stack)
        small = sum(number * layer.small for layer, number in stack)
        if small > MOST_SMALL * layers:
            raise ValueError(
                f"{config.model_type}: {small / layers:.0%} of the decoder layers' elements lie in modules "
                f"that are neither linear layers nor experts whose form transformers declares "
                f"({', '.join(dict.fromkeys(self._unmodelled())) or 'none of them whole'}); their products "
                "would be left out. Plan a dense model of its size instead"
            )
        return Transformer(
            name=config.model_type,
            width=config.hidden_size,
            heads=heads,
            kv_heads=_first_of(config, "num_key_value_heads") or heads,
            head_width=_first_of(config, "head_dim", "v_head_dim") or config.hidden_size // heads,
            stack=tuple(stack),
            vocabulary=config.vocab_size,
            tied=tied,
            positions=positions,
            beside=sum(self.total.values()) - layers - named,
            beside_tensors=max(0, len(apart) - (2 - tied) - bool(positions)),
            unmodelled=tuple(dict.fromkeys(self._unmodelled())),
        )

    def _layer(self, index: int) -> DecoderLayer:
        path = f"{self.path}.{index}"
        layer = self.model.get_submodule(path)
        blocks = list(self._blocks(layer, path))
        blocks.sort(key=lambda block: not block.attends)
        norms = sum(
            isinstance(rule, grid.ResidualNorm) and name.startswith(f"{path}.")
            for name, rule in self.rules.items()
        )
        matrices = sum(part.parameters for block in blocks for part in block.parts)
        parameters = list(layer.parameters())
        return DecoderLayer(
            blocks=tuple(blocks), norms=norms,
            small=sum(p.numel() for p in parameters) - matrices, tensors=len(parameters),
        )  # fmt: skip

    def _blocks(self, layer: nn.Module, path: str) -> Iterator[Block]:
        """By the child of the layer in which they lie; linear layers of the layer itself are an MLP."""
        parts: dict[str, list[Part]] = {}
        for name, module in layer.named_modules():
            part = self._part(f"{path}.{name}", module)
            if part is not None:
                child = name.partition(".")[0]
                parts.setdefault(child if "." in name or child != name else "", []).append(part)
        for child, held in parts.items():
            full = f"{path}.{child}" if child else path
            around = [full, path, self.path, decoder_name(self.model), ""]
            yield Block(
                parts=tuple(held),
                attends="att" in f"{child} {type(self.model.get_submodule(full)).__name__}".lower()
                if child
                else False,
                whole=any(isinstance(self.rules.get(name), grid.Whole) for name in around),
            )

    def _part(self, name: str, module: nn.Module) -> Part | None:
        rule = self.rules.get(name)
        if isinstance(rule, grid.Experts):
            return self._experts(name, module, rule)
        matrix = getattr(module, "weight", None)
        form = FORMS.get(type(rule)) if rule is not None else None
        if form is None and self._lies_whole(name) and _is_matrix(matrix, self.config.hidden_size):
            form = "alike"  # such as a router
        if form is None or matrix is None:
            return None
        rows, columns = matrix.shape
        if isinstance(module, Conv1D):
            rows, columns = columns, rows
        bias = getattr(module, "bias", None) is not None
        return Linear(
            name=name.rpartition(".")[2], outputs=rows, inputs=columns, form=form, bias=bias
        )

    def _experts(self, name: str, module: nn.Module, rule: grid.Experts) -> Mixture:
        weights = {own: getattr(module, own).shape for own in rule.cuts if "bias" not in own}
        shape, dim = weights["down_proj"], rule.cuts["down_proj"]
        number, hidden, width = shape[0], shape[dim], shape[3 - dim]
        elements = sum(math.prod(shape) for shape in weights.values())
        chosen = _first_of(self.config, *CHOSEN) or 1
        return Mixture(
            name=name.rpartition(".")[2], number=number, chosen=min(chosen, number), width=width,
            hidden=hidden, matrices=elements // (number * hidden * width),
            exchangeable=takes_choices(module),
        )  # fmt: skip

    def _lies_whole(self, name: str) -> bool:
        above = [name[:end] for end, letter in enumerate(name) if letter == "."]
        if any(isinstance(self.rules.get(n), grid.Experts) for n in above):
            return False
        return any(isinstance(self.rules.get(n), grid.Whole) for n in (*above, name))

    def _unmodelled(self) -> Iterator[str]:
        """Whole blocks whose name says that tokens meet in another way than attention."""
        for name, rule in self.rules.items():
            if isinstance(rule, grid.Whole) and not rule.divided and name.startswith(self.path):
                kind = type(self.model.get_submodule(name)).__name__
                if "att" not in kind.lower() or "linear" in kind.lower():
                    yield kind

    def _positions(self, embedding: nn.Module) -> Iterator[int]:
        """Rows of the learned tables beside the vocabulary."""
        for module in self.model.get_submodule(decoder_name(self.model)).modules():
            if (
                isinstance(module, nn.Embedding)
                and module is not embedding
                and module.embedding_dim == self.config.hidden_size
                and id(module.weight) not in self.in_layers
            ):
                yield module.num_embeddings


FORMS: Mapping[type, Form] = {
    grid.Plain: "plain", grid.Swapped: "swapped", grid.Latent: "latent",
    grid.Expanding: "expanding", grid.Divided: "divided",
}  # fmt: skip
MOST_SMALL = 0.2
"""Of a decoder layer's elements, that norms, biases, scans and the like make up."""
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")
"""Names of the number of experts a token."""


def _first_of(config: Any, *names: str) -> int | None:
    """The first of these fields that is one number."""
    values = (config.to_dict().get(name) for name in names)
    return next((value for value in values if isinstance(value, int) and value), None)


def _signature(layer: nn.Module) -> str:
    """Equal for layers of equal modules and sizes."""
    kinds = [f"{name}:{type(module).__name__}" for name, module in layer.named_modules()]
    return " ".join([*kinds, *(f"{name}{tuple(p.shape)}" for name, p in layer.named_parameters())])


def _is_matrix(weight: Any, width: int) -> bool:
    return isinstance(weight, nn.Parameter) and weight.ndim == 2 and width in weight.shape


def _decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The decoder's list with the most parameters, and its name."""
    decoder = decoder_name(model)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    ]
    inside = [entry for entry in lists if entry[0].startswith(f"{decoder}." if decoder else "")]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of decoder layers")
    return max(inside or lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
