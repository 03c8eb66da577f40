"""A recipe says which attention its model runs; a machine that cannot is refused by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers.utils.import_utils import is_flash_attn_2_available

from fourfold_parallel import Llama, Published
from fourfold_parallel.common.attention import Attention

SMALL = Llama(
    width=32, depth=1, heads=2, kv_heads=1, hidden=64, vocabulary=64, context=16, tied=True
)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_model_runs_the_attention_that_is_asked_for(attention: Attention) -> None:
    """And computes the same."""
    model = replace(SMALL, attention=attention).build(seed=0)
    assert model.config._attn_implementation == attention
    tokens = torch.arange(16).unsqueeze(0)
    torch.testing.assert_close(
        model(input_ids=tokens).logits, SMALL.build(seed=0)(input_ids=tokens).logits
    )


@pytest.mark.skipif(
    is_flash_attn_2_available(),
    reason="the refusal is for a machine without flash-attn, and it is installed here",
)
def test_a_machine_without_flash_attention_is_told_the_way_out(tmp_path: object) -> None:
    """Fresh or published, before anything is read."""
    flash: Attention = "flash_attention_2"
    published = Published(name=str(tmp_path), revision="main", licence="mine", attention=flash)
    for model in (replace(SMALL, attention=flash), published):
        with pytest.raises(
            ValueError, match=r"pip install --no-build-isolation flash-attn; or take"
        ):
            model.build(seed=0)
