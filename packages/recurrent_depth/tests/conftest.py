"""A model small enough to test every path, with weights under which every parameter matters."""

import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fourfold_recurrent_depth import RecurrentDepthConfig, RecurrentDepthForCausalLM
from fourfold_recurrent_depth.retrofit import retrofit


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def tiny_config(**changes: object) -> RecurrentDepthConfig:
    shape: dict[str, object] = {
        "n_embd": 32, "n_heads": 2, "n_layers_in_prelude": 1, "n_layers_in_recurrent_block": 2,
        "n_layers_in_coda": 1, "intermediate_size": 48, "vocab_size": 64, "padding_multiple": 64,
        "block_size": 64, "mean_recurrence": 6, "mean_backprop_depth": 3,
    }  # fmt: skip
    return RecurrentDepthConfig(**{**shape, **changes})


@torch.no_grad()
def stir(model: RecurrentDepthForCausalLM) -> RecurrentDepthForCausalLM:
    """Weights of gain about one, so that attention, biases and gains are felt in the output."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.copy_(0.7 + 0.6 * torch.rand(parameter.shape, generator=generator))
        elif name.endswith("qk_bias"):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        elif "wte" not in name and "lm_head" not in name:
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn / math.sqrt(parameter.shape[1]))
        else:
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[1])
            )
    adapter = model.transformer["adapter"]
    assert isinstance(adapter, nn.Linear)
    adapter.weight[:, : model.config.n_embd] *= 0.6
    return model


def made(**changes: object) -> RecurrentDepthForCausalLM:
    config = tiny_config(**changes)
    config._attn_implementation = "sdpa"
    return stir(RecurrentDepthForCausalLM(config)).eval()


@pytest.fixture
def make() -> Callable[..., RecurrentDepthForCausalLM]:
    """A stirred model, with changes to its shape."""
    return made


@pytest.fixture
def tiny() -> RecurrentDepthForCausalLM:
    return made()


@pytest.fixture
def dense() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, vocab_size=64, max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(params=["recurrent", "retrofitted"])
def iterated(
    request: pytest.FixtureRequest, tiny: RecurrentDepthForCausalLM, dense: LlamaForCausalLM
) -> Any:
    """A model that iterates its middle, of either class."""
    return tiny if request.param == "recurrent" else retrofit(dense, 1, 2, 1, alpha=0.5).eval()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 64, (3, 12), generator=torch.Generator().manual_seed(2))


def drawn(name: str, shape: list[int]) -> Tensor:
    """Weights of one name: products of gain one, gains about one, biases and logarithms about zero."""
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) == 1:
        is_gain = not name.endswith(("bias", "A_log"))
        values = 1 + 0.3 * np.tanh(values) if is_gain else 0.5 * values
    else:
        values = values / np.sqrt(shape[-1])
    return torch.from_numpy(values).float()


def published_folder(name: str, folder: Path) -> Path:
    """A folder as the family publishes it: Parcae's weights are a pickle, the others' safetensors."""
    known = json.loads((Path(__file__).parent / "published_families.json").read_text())[name]
    (folder / "config.json").write_text(json.dumps(known["config"]))
    weights = {
        key: drawn(key, shape)
        for key, shape in known["shapes"].items()
        if key not in ("freqs_cis", "lm_head.weight" if name == "parcae" else "")
    }
    if name == "parcae":
        torch.save(weights, folder / "model.pt")
    else:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def draw() -> Callable[[str, list[int]], Tensor]:
    """Weights by their published name."""
    return drawn


@pytest.fixture
def publish() -> Callable[[str, Path], Path]:
    """A folder as a family of `published_families.json` publishes it."""
    return published_folder
