"""Small rotary models with peaked attention, and where the golden values are."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fourfold_loki import Statistics
from fourfold_loki.calibration import calibrate_tokens

GOLDEN = Path(__file__).parents[4] / "shared" / "golden" / "loki"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Values computed with the authors' published code."""
    if not GOLDEN.is_dir():
        pytest.skip("../shared/golden/loki is not beside this checkout")
    return GOLDEN


def small_llama(*, heads: int = 6, kv_heads: int = 2, layers: int = 2) -> PreTrainedModel:
    """Random weights; queries and keys enlarged, so that attention is not flat."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16 * heads,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=16,
        intermediate_size=64,
        vocab_size=97,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(6)
            layer.self_attn.k_proj.weight.mul_(6)
    return model


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., PreTrainedModel]:
    return small_llama


@pytest.fixture(scope="session")
def tokens() -> Callable[..., torch.Tensor]:
    return random_tokens


@pytest.fixture(scope="session")
def llama() -> PreTrainedModel:
    return small_llama()


@pytest.fixture(scope="session")
def statistics(llama: PreTrainedModel) -> Statistics:
    generator = torch.Generator().manual_seed(1)
    return calibrate_tokens(llama, torch.randint(2, 97, (8, 128), generator=generator))


def random_tokens(batch: int, length: int, seed: int = 2) -> torch.Tensor:
    """Random ids."""
    return torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(seed))
