"""The rotation law: the same function in another basis, with no outlier left."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fourfold_outliers.geometry import by_share
from fourfold_outliers.rotation import random_rotation, rotate
from fourfold_outliers.stream import Documents, measure, width_of
from fourfold_parallel.certify.toys import default_toy, toy_model
from fourfold_parallel.testing.grids import in_float64

ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Of logits of order one, through six layers and two matrix products more each."""


def ids() -> Tensor:
    return torch.randint(2, 128, (4, 40), generator=torch.Generator().manual_seed(0))


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids(), use_cache=False).logits


def planted(family: str, dtype: torch.dtype) -> PreTrainedModel:
    """Coordinate 5 of every token's embedding is large, as a trained model's is."""
    model = toy_model(default_toy(family, telling=False), dtype=dtype)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 5] = 20.0
    return model


def wide(model: PreTrainedModel) -> PreTrainedModel:
    """With norms that stay in float64."""
    if model.dtype == torch.float64:
        in_float64(model)
    return model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_a_turned_model_is_the_same_function_without_outliers(
    family: str, dtype: torch.dtype
) -> None:
    model = planted(family, dtype)
    turned = copy.deepcopy(model)
    rotate(turned, random_rotation(width_of(model), seed=1))
    model, turned = wide(model), wide(turned)
    torch.testing.assert_close(logits(turned), logits(model), atol=ROUNDING[dtype], rtol=0)
    read = Documents.each_once(ids())
    before, after = (measure(each, read).sums for each in (model, turned))
    torch.testing.assert_close(
        before.pooled().cosines(), after.pooled().cosines(), atol=10 * ROUNDING[dtype], rtol=0
    )
    assert bool(by_share(before)[:, 5].all())
    assert not by_share(after)[1:].any()


def test_gains_and_a_tied_head_are_folded() -> None:
    """Norms end at one, and a head that shared the embedding's weight has its own."""
    model = toy_model(default_toy("llama", telling=False))
    config = model.config
    assert config.tie_word_embeddings is False
    tied = copy.deepcopy(model)
    tied.lm_head.weight = tied.model.embed_tokens.weight
    expected = logits(wide(copy.deepcopy(tied)))
    rotate(tied, random_rotation(64, seed=0))
    assert tied.lm_head.weight is not tied.model.embed_tokens.weight
    assert all(
        torch.equal(p, torch.ones_like(p)) for name, p in tied.named_parameters() if "norm" in name
    )
    torch.testing.assert_close(logits(wide(tied)), expected, atol=1e-9, rtol=0)


def test_rotations_are_orthogonal_and_drawn() -> None:
    one_way, other = random_rotation(16, seed=0), random_rotation(16, seed=1)
    torch.testing.assert_close(
        one_way @ one_way.T, torch.eye(16, dtype=torch.float64), atol=1e-12, rtol=0
    )
    assert not torch.allclose(one_way, other)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma3_text"])
def test_other_blocks_are_refused(family: str) -> None:
    model = toy_model(default_toy(family, telling=False))
    with pytest.raises(ValueError, match="has other blocks than Llama's"):
        rotate(model, random_rotation(width_of(model), seed=0))
