"""What is configured, resized or cast is what comes back from a folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fourfold_recurrent_depth import RecurrentDepthConfig, RecurrentDepthForCausalLM


def test_transformers_names_are_the_published_ones() -> None:
    config = RecurrentDepthConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=99, num_hidden_layers=8
    )
    found = (config.n_embd, config.n_heads, config.num_key_value_heads, config.block_size)
    assert found == (64, 4, 4, 99)
    config.tie_word_embeddings = False
    assert config.tie_embeddings is False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 66, "num_attention_heads": 4}, "not an even head width"),
        ({"n_layers_in_prelude": -1}, "n_layers_in_prelude=-1"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"padding_multiple": 0}, "padding_multiple=0"),
        ({"n_heads": 0}, "n_heads=0"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
    ],
)
def test_shapes_of_no_model_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RecurrentDepthConfig(**changes)


def test_other_models_are_refused_by_name(tmp_path: Path) -> None:
    """Transformers would take their widths, warn, and draw all weights anew."""
    file = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(file))
    for read in (RecurrentDepthConfig, RecurrentDepthForCausalLM):
        with pytest.raises(ValueError, match="'llama'; this package reads huginn_raven, parcae"):
            read.from_pretrained(tmp_path)


def test_a_tie_can_be_undone_when_a_configuration_is_read(tiny: Any, tmp_path: Path) -> None:
    tiny.config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path, tie_word_embeddings=False).tie_embeddings is False


@pytest.mark.parametrize("size", [60, 70])
def test_a_resized_model_comes_back(tiny: Any, tmp_path: Path, size: int) -> None:
    """The vocabulary is no multiple of what the published one is padded to."""
    tiny.resize_token_embeddings(size, mean_resizing=False)
    tiny.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.weight, tiny.lm_head.weight)
    assert again.config.vocab_size == size


def test_a_cast_model_saves_exact_angles(tiny: Any, tmp_path: Path) -> None:
    """Bit for bit the logits that it had, and angles in float32, as published."""
    tokens = torch.arange(12)[None]
    tiny.to(torch.bfloat16).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert again.freqs_cis.dtype == torch.float32
    with torch.no_grad():
        ours, theirs = (one(tokens, init_scale=0.0).logits for one in (tiny, again))
    assert torch.equal(ours, theirs)
