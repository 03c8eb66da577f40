"""Other families than Llama: at one recurrence a retrofitted model is the dense one, or it is refused."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from fourfold_parallel.certify.toys import default_toy, in_float64, toy_model
from fourfold_recurrent_depth.retrofit import retrofit

FLOAT64 = 1e-12
"""Of logits of order one."""
TOKENS = 14
"""More than the toys' window of eight."""
RIGHT = [
    "doge",  # adds to a mask that must be there
    "laguna", "mellum",  # angles and masks by the type of layer
    "deepseek_v2", "deepseek_v3", "youtu",  # values narrower than keys
    "mistral", "olmo3", "gpt_oss",  # windows in all layers, in some, beside sinks
    "mixtral", "stablelm", "moss_transcribe_diarize",  # experts, centred norms, a part for speech
]  # fmt: skip


def built(model_type: str) -> PreTrainedModel:
    return toy_model(default_toy(model_type))


def whole(dense: Any) -> Any:
    """All layers kept, the first and last outside of the core where there are three."""
    count = len(getattr(dense.get_decoder(), "layers", "??"))
    return retrofit(dense, 1, max(1, count - 2), 1 if count > 2 else 0).eval()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(4, 100, (3, TOKENS), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    return tokens, mask


@pytest.mark.parametrize("model_type", RIGHT)
def test_one_recurrence_is_the_dense_model(model_type: str) -> None:
    """Logits with and without padding, beyond the window, and greedy tokens from the cache."""
    with in_float64(), torch.no_grad():
        dense: Any = built(model_type)
        recurrent = whole(dense)
        tokens, mask = batch()
        options: dict[str, Any] = {
            "attention_mask": mask, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False,
            "pad_token_id": 0, "eos_token_id": None,
        }  # fmt: skip
        for given in (None, mask):
            expected = dense(tokens, attention_mask=given).logits
            ours = recurrent(tokens, attention_mask=given).logits
            shown = slice(None) if given is None else given.bool()
            torch.testing.assert_close(ours[shown], expected[shown], rtol=0, atol=FLOAT64)
        assert recurrent.generate(tokens, **options).equal(dense.generate(tokens, **options))
        whole_pass = recurrent(tokens, num_steps=3).logits
        start = recurrent(tokens[:, :9], num_steps=3, use_cache=True)
        cache = getattr(start, "cache", None) or start.past_key_values
        rest = recurrent(tokens[:, 9:], num_steps=3, past_key_values=cache).logits
        torch.testing.assert_close(rest, whole_pass[:, 9:], rtol=0, atol=FLOAT64)


def test_the_cache_of_latent_attention_holds_narrow_values() -> None:
    """The latent of 16 and the rotary part of 4, or (older transformers) eight heads of 12 and 8."""
    with torch.no_grad():
        recurrent = whole(built("deepseek_v3"))
        tokens, _ = batch()
        out = recurrent(tokens, num_steps=2, use_cache=True)
    cache = getattr(out, "cache", None) or out.past_key_values
    slots = len(recurrent.prelude) + len(recurrent.coda) + 2 * len(recurrent.core)
    assert cache.nbytes() in [slots * 3 * each * TOKENS * 8 for each in (16 + 4, 8 * (12 + 8))]


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("qwen3_next", "layers of type 'linear_attention', which keep or choose more"),
        ("glm_moe_dsa", "layers of type 'indexed_attention'"),
        ("longcat_flash", "a layer keeps the keys of several attentions"),
        ("gemma3", "final_logit_softcapping=3.0 outside of its layers"),
        ("llama4_text", "has no 'embed_tokens' in its decoder"),
        ("gpt_neox", "has no 'embed_tokens' in its decoder"),
    ],
)
def test_refusals_say_what_is_otherwise(model_type: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        whole(built(model_type))


def test_what_no_configuration_names_is_found_by_running_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before the layers, beside them and after them."""
    config = default_toy("llama")
    config._attn_implementation = "sdpa"

    def dense() -> Any:
        return AutoModelForCausalLM.from_config(config).eval()

    scaled = dense()
    scaled.model.layers[0].register_forward_pre_hook(
        lambda _, arguments: (arguments[0] * 1.01, *arguments[1:])
    )
    whole(scaled)  # a hook of a layer is the layer's
    tail = dense()
    tail.lm_head.register_forward_hook(lambda _, __, output: output * 1.01)
    whole(tail)  # as is one of the head
    bent = dense()
    bent.register_forward_hook(lambda _, __, out: out.__setitem__("logits", out.logits * 1.01))
    with pytest.raises(
        ValueError, match="something else than its layers, one norm and one product"
    ):
        whole(bent)
    ahead = dense()
    plain = ahead.model.embed_tokens.forward
    ahead.model.register_forward_pre_hook(
        lambda _, given, named: (
            given,
            {**named, "input_ids": None, "inputs_embeds": 2 * plain(named["input_ids"])},
        ),
        with_kwargs=True,
    )
    with pytest.raises(ValueError, match="changes its embeddings before its first layer"):
        whole(ahead)
    forward = LlamaDecoderLayer.forward

    def more(self: Any, hidden_states: torch.Tensor, *, own_words: Any = None, **given: Any) -> Any:
        return forward(self, hidden_states, **given)

    beside = dense()
    monkeypatch.setattr(LlamaDecoderLayer, "forward", more)
    call = LlamaDecoderLayer.__call__
    monkeypatch.setattr(
        LlamaDecoderLayer, "__call__", lambda self, x, **given: call(self, x, own_words=x, **given)
    )
    with pytest.raises(ValueError, match="hands its layers own_words besides masks and positions"):
        whole(beside)
