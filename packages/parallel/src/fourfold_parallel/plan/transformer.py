"""A transformer as the planner sees it: sizes alone, from a configuration, without weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """A linear layer: `outputs x inputs`, from the residual stream (plain) or back to it (swapped)."""

    name: str
    outputs: int
    inputs: int
    swapped: bool
    bias: bool = False

    @property
    def parameters(self) -> int:
        """Elements of the matrix, without the bias."""
        return self.outputs * self.inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Transformer:
    """The sizes of a decoder. All its layers are alike."""

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    linears: tuple[Linear, ...]
    """Of one decoder layer, in the order of use; each block ends with its swapped layer."""
    vocabulary: int
    tied: bool
    """The head shares the embedding's weight."""
    norms: int = 2
    """Norms of the residual stream in a decoder layer."""
    positions: int = 0
    """Rows of a learned table of positions."""

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
            Linear(name="q", outputs=width, inputs=width, swapped=False),
            Linear(name="k", outputs=keys, inputs=width, swapped=False),
            Linear(name="v", outputs=keys, inputs=width, swapped=False),
            Linear(name="o", outputs=width, inputs=width, swapped=True),
            Linear(name="gate", outputs=hidden, inputs=width, swapped=False),
            Linear(name="up", outputs=hidden, inputs=width, swapped=False),
            Linear(name="down", outputs=width, inputs=hidden, swapped=True),
        )
        return cls(
            name=name, layers=layers, width=width, heads=heads, kv_heads=kv_heads,
            head_width=head_width, linears=linears, vocabulary=vocabulary, tied=tied,
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
            Linear(name="qkv", outputs=3 * width, inputs=width, swapped=False, bias=bias),
            Linear(name="out", outputs=width, inputs=width, swapped=True, bias=bias),
            Linear(name="fc1", outputs=inner, inputs=width, swapped=False, bias=bias),
            Linear(name="fc2", outputs=width, inputs=inner, swapped=True, bias=bias),
        )
        return cls(
            name=name, layers=layers, width=width, heads=heads, kv_heads=heads,
            head_width=width // heads, linears=linears, vocabulary=vocabulary, tied=tied,
            positions=positions,
        )  # fmt: skip

    @classmethod
    def of(cls, config: PretrainedConfig) -> Transformer:
        """The sizes of a configuration of transformers.

        One decoder layer is built without memory (torch's meta device) and read, so every family is
        planned whose linear layers lead from the residual stream and back.

        Raises:
            ValueError: A field is missing, or a layer is of a kind that the grid does not cut.
        """
        text = config.get_text_config()
        missing = [field for field in REQUIRED if getattr(text, field, None) is None]
        if missing:
            raise ValueError(
                f"the configuration of type {text.model_type!r} lacks {', '.join(missing)}; "
                "the planner needs them"
            )
        model = _one_layer(text)
        layer = _decoder_layer(model)
        heads = text.num_attention_heads
        return cls(
            name=text.model_type,
            layers=text.num_hidden_layers,
            width=text.hidden_size,
            heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_width=getattr(text, "head_dim", None) or text.hidden_size // heads,
            linears=tuple(_linears(layer, text)),
            vocabulary=text.vocab_size,
            tied=bool(text.tie_word_embeddings),
            norms=sum(_is_residual_norm(m, text.hidden_size) for m in layer.modules()),
            positions=sum(_positions(model, text)),
        )

    @property
    def head(self) -> Linear:
        """The linear layer to the vocabulary."""
        return Linear(name="head", outputs=self.vocabulary, inputs=self.width, swapped=False)

    @property
    def mlp_inputs(self) -> int:
        """Hidden units, the inputs of the last swapped layer."""
        return self.linears[-1].inputs

    @property
    def tensors(self) -> int:
        """Parameters by number, not by elements."""
        biased = sum(linear.bias for linear in self.linears)
        apart = 1 + (not self.tied) + bool(self.positions)
        return self.layers * (len(self.linears) + biased + self.norms) + 1 + apart

    @property
    def gated(self) -> bool:
        """The MLP multiplies two of its matrices' outputs."""
        before = [linear.swapped for linear in self.linears[:-1]]
        return before[::-1].index(True) == 2 if True in before else len(before) == 2

    @property
    def matrix_parameters(self) -> int:
        """Elements of all matrices that every token is multiplied with, the head included."""
        return self.layers * sum(m.parameters for m in self.linears) + self.head.parameters

    @property
    def parameters(self) -> int:
        """All parameters: matrices, biases, norms (one vector each), embeddings."""
        biases = sum(linear.outputs for linear in self.linears if linear.bias)
        small = self.layers * (self.norms * self.width + biases) + self.width
        embeddings = (self.positions + (0 if self.tied else self.vocabulary)) * self.width
        return self.matrix_parameters + small + embeddings

    def flops(self, *, tokens: int, sequence: int, recomputes: bool) -> float:
        """Operations of a step: 6 for each token and element of a matrix, 8 with recomputation.

        Attention is counted in full (12 per layer, width and token of the sequence), as in Megatron-LM
        and most reports, although a causal kernel computes half of it.
        """
        attention = 2 * self.layers * self.heads * self.head_width * sequence
        head = self.head.parameters
        recomputed = (self.matrix_parameters - head + attention) * 2 if recomputes else 0
        return float(tokens) * (6 * (self.matrix_parameters + attention) + recomputed)


REQUIRED = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
)  # fmt: skip


def _one_layer(config: PretrainedConfig) -> PreTrainedModel:
    small: Any = copy.deepcopy(config)
    small.num_hidden_layers = 1
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:1]
    if getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None):
        raise ValueError(
            f"{config.model_type} holds experts, which the grid does not cut; plan a dense model"
        )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(small)


def _decoder_layer(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and any(_is_linear(m) for m in module.modules()):
            return module[0]
    raise ValueError(f"{type(model).__name__} has no list of decoder layers with linear layers")


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _linears(layer: nn.Module, config: PretrainedConfig) -> Iterator[Linear]:
    """The linear layers of a decoder layer; the last of each block is swapped."""
    plan: Mapping[str, str] = getattr(config, "base_model_tp_plan", None) or {}
    words = {key.rpartition("layers.*.")[2]: word for key, word in plan.items()}
    named = [(name, m) for name, m in layer.named_modules() if _is_linear(m)]
    last = {name.rpartition(".")[0]: name for name, _ in named}
    blocks = list(dict.fromkeys(name.rpartition(".")[0] for name, _ in named))
    attention_first = sorted(
        blocks, key=lambda block: "attn" not in block and "attention" not in block
    )
    for name, module in sorted(
        named, key=lambda item: attention_first.index(item[0].rpartition(".")[0])
    ):
        word = next((w for pattern, w in words.items() if fnmatchcase(name, pattern)), None)
        weight: Any = module.weight
        rows, columns = weight.shape if isinstance(module, nn.Linear) else reversed(weight.shape)
        swapped = "rowwise" in word if word else last[name.rpartition(".")[0]] == name
        yield Linear(
            name=name.rpartition(".")[2], outputs=rows, inputs=columns, swapped=swapped,
            bias=module.bias is not None,
        )  # fmt: skip


def _is_residual_norm(module: nn.Module, width: int) -> bool:
    shapes = [tuple(p.shape) for p in module.parameters(recurse=False)]
    return "norm" in type(module).__name__.lower() and set(shapes) == {(width,)}


def _positions(model: PreTrainedModel, config: PretrainedConfig) -> Iterator[int]:
    """Rows of the learned tables beside the vocabulary."""
    for module in model.modules():
        if not isinstance(module, nn.Embedding) or module is model.get_input_embeddings():
            continue
        if module.embedding_dim == config.hidden_size:
            yield module.num_embeddings
