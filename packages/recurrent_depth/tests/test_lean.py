"""The lean form of the blocks is the blocks; what is wrapped or mixed has none."""

from typing import Any

import pytest
import torch
from torch import nn

from fourfold_recurrent_depth import RecurrentDepthForCausalLM
from fourfold_recurrent_depth.exits import LatentDiff

ROUNDING = 1e-5
"""float32 through a few recurrences; the same products in the same order."""


def lean(model: Any, tokens: torch.Tensor) -> Any:
    return model.begin(tokens, None)[1].lean


@pytest.mark.parametrize("padded", [False, True])
def test_lean_blocks_give_what_modules_give(
    tiny: Any, tokens: torch.Tensor, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of prompts, cached tokens and rows that stop, with and without padding."""
    mask = torch.ones_like(tokens)
    mask[0, :4] = 1 - int(padded)
    options: dict[str, Any] = {"init_scale": 0.0, "use_cache": True, "num_steps": 5}

    def three_passes() -> list[torch.Tensor]:
        first = tiny(tokens, attention_mask=mask, **options)
        longer = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        more = {**options, "past_key_values": first.past_key_values, "attention_mask": longer}
        second = tiny(tokens[:, :1], exit=LatentDiff(threshold=0.3), **more)
        bare = tiny(tokens, num_steps=3, init_scale=0.0)
        return [first.logits, second.logits, second.exit_steps, bare.logits]

    with torch.no_grad():
        assert lean(tiny, tokens) is not None
        ours = three_passes()
        monkeypatch.setattr(RecurrentDepthForCausalLM, "_lean_blocks", lambda *_: None)
        assert lean(tiny, tokens) is None
        for one, other in zip(ours, three_passes(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=ROUNDING)


def test_new_weights_are_seen(tiny: Any, tokens: torch.Tensor) -> None:
    """Nothing is packed: what an optimizer or a checkpoint writes counts at the next pass."""
    with torch.no_grad():
        before = tiny(tokens, num_steps=2, init_scale=0.0).logits
        tiny.transformer["core_block"][0].mlp.fc.weight.mul_(2)
        assert not torch.allclose(tiny(tokens, num_steps=2, init_scale=0.0).logits, before)


def test_what_is_not_plain_keeps_its_modules(tiny: Any, tokens: torch.Tensor) -> None:
    """A hook, a wrapped product, another backend, mixed precision."""
    block = tiny.transformer["core_block"][1]
    handle = block.mlp.fc.register_forward_hook(lambda *_: None)
    assert lean(tiny, tokens) is None
    handle.remove()
    assert lean(tiny, tokens) is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert lean(tiny, tokens) is None
    tiny.set_attn_implementation("eager")
    assert lean(tiny, tokens) is None
    tiny.set_attn_implementation("sdpa")

    class Wrapped(nn.Linear):
        pass

    block.attn.proj.__class__ = Wrapped
    assert lean(tiny, tokens) is None
    block.attn.proj.__class__ = nn.Linear
    assert lean(tiny.to(torch.bfloat16), tokens) is None
