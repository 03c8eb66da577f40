"""The same function in another basis: an outlier coordinate is a statement about a basis.

A root-mean-square norm without gains gives the same length however the residual stream is turned. So gains
are folded into the matrices that read the stream, every matrix that writes to it is turned, every one that
reads it is turned back, and the model computes what it did (Ashkboos et al. 2024). Its coordinates are now
mixtures of all.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from fourfold_outliers.disabling import Norm, norms_of
from fourfold_outliers.stream import layers_of, width_of
from fourfold_parallel.grid.layout import norm_kind

READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Matrices that read what a norm gives."""
WRITERS = ("self_attn.o_proj", "mlp.down_proj")


def random_rotation(width: int, *, seed: int) -> Float[Tensor, "width width"]:
    """An orthogonal matrix, uniformly drawn, in float64."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(width, width, generator=generator, dtype=torch.float64)
    turned, upper = torch.linalg.qr(normal)
    return turned * upper.diagonal().sign()


@torch.no_grad()
def rotate(model: PreTrainedModel, rotation: Float[Tensor, "width width"]) -> None:
    """Turn the residual stream of a model, in place; its logits stay, up to rounding.

    Args:
        model: with Llama's blocks: root-mean-square norms before attention and MLP, and a last one.
        rotation: orthogonal; states `h` become `h @ rotation`.

    Raises:
        ValueError: the model has other blocks.
    """
    layers, head = layers_of(model), model.get_output_embeddings()
    _check(model, layers)
    last = next(norm for norm in norms_of(model) if norm.layer == 0)
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    assert isinstance(head, nn.Linear)
    if head.weight is embedding.weight:  # they part: the head takes the last norm's gain
        head.weight = nn.Parameter(head.weight.detach().clone())
        config: Any = model.config
        config.tie_word_embeddings = False
    q = rotation.to(embedding.weight.device)
    _write(embedding.weight, embedding.weight.double() @ q)
    for layer in layers:
        for name, readers in READERS.items():
            gain = _effective(layer.get_submodule(name))
            for reader in readers:
                weight = _weight(layer, reader)
                _write(weight, (weight.double() * gain) @ q)
        for writer in WRITERS:
            weight = _weight(layer, writer)
            _write(weight, q.T @ weight.double())
            bias = getattr(layer.get_submodule(writer), "bias", None)
            if bias is not None:
                _write(bias, bias.double() @ q)
    _write(head.weight, (head.weight.double() * (last.gain.double() + last.offset)) @ q)
    for norm in norms_of(model):
        norm.gain.fill_(1 - norm.offset)


def _weight(layer: nn.Module, name: str) -> nn.Parameter:
    weight = layer.get_submodule(name).weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _effective(norm: nn.Module) -> Float[Tensor, " width"]:
    weight = norm.weight
    assert isinstance(weight, Tensor)
    return weight.double() + norm_kind("norm", norm).offset


def _write(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value.to(parameter.dtype))


def _check(model: PreTrainedModel, layers: list[nn.Module]) -> None:
    needed = {*READERS, *(name for names in READERS.values() for name in names), *WRITERS}
    norms: tuple[Norm, ...] = norms_of(model)
    width, embedding = width_of(model), model.get_input_embeddings()
    fits = (
        all(needed <= {name for name, _ in layer.named_modules()} for layer in layers)
        and len(norms) == 2 * len(layers) + 1
        and all(not norm_kind(norm.name, norm.module).centred for norm in norms)
        and isinstance(embedding, nn.Embedding)
        and embedding.embedding_dim == width
        and isinstance(model.get_output_embeddings(), nn.Linear)
    )
    if not fits:
        raise ValueError(
            f"{type(model).__name__} has other blocks than Llama's (root-mean-square norms before "
            "attention and MLP, and a last one), whose stream this turns; use a model of that form, such "
            "as Llama, Mistral or Qwen"
        )
