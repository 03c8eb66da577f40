"""Loki inside transformers: `generate` in its many ways, and everything that must be refused."""

import re
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    AttentionInterface,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    StaticCache,
)
from transformers.masking_utils import AttentionMaskInterface

from fourfold_loki import (
    Basis,
    Budget,
    Count,
    Share,
    Sparse,
    Statistics,
    attending,
    calibrate,
    fit,
    loki,
)
from fourfold_loki.calibration import calibrate_tokens
from fourfold_loki.selectors import H2O

Tokens = Callable[..., torch.Tensor]

EVERYTHING = Budget(amount=Share(of_visible=1.0))
QUARTER = Budget(amount=Share(of_visible=0.25))
FLOAT32 = 2e-4
"""Logits of order ten after two layers."""


@pytest.fixture(scope="module")
def basis(statistics: Statistics) -> Basis:
    return fit(statistics)


GENERATIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8},
    "beams": {"num_beams": 3},
    "chunked prompt": {"prefill_chunk_size": 16},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


def generated(model: PreTrainedModel, ids: torch.Tensor, **ways: Any) -> list[list[int]]:
    torch.manual_seed(5)
    ways = {"do_sample": False, "max_new_tokens": 12, **ways}
    return model.generate(
        ids, attention_mask=ways.pop("mask", torch.ones_like(ids)), **ways
    ).tolist()


@pytest.mark.parametrize("way", GENERATIONS, ids=str)
@pytest.mark.parametrize("kind", ["their cache", "our cache"])
def test_reading_everything_generates_what_full_attention_generates(
    llama: PreTrainedModel, basis: Basis, tokens: Tokens, way: str, kind: str
) -> None:
    """Token for token, at any width, for one sequence and for two."""
    for batch in (1, 2):
        if way == "prompt lookup" and batch > 1:
            continue  # transformers looks up for one sequence only
        ids = tokens(batch, 40)
        full = generated(llama, ids, **GENERATIONS[way])
        with loki(llama, basis, EVERYTHING, width=3) as session:
            cache = {"past_key_values": session.cache()} if kind == "our cache" else {}
            assert generated(llama, ids, **GENERATIONS[way], **cache) == full


def test_left_padding_changes_nothing(llama: PreTrainedModel, basis: Basis, tokens: Tokens) -> None:
    """A padded batch generates what each of its rows generates alone; padding takes no budget."""
    long, short = tokens(1, 40, seed=3), tokens(1, 25, seed=4)
    padded = torch.cat([torch.zeros(1, 15, dtype=torch.long), short], dim=1)
    ids = torch.cat([long, padded])
    mask = (torch.arange(40) >= torch.tensor([[0], [15]])).long()
    with loki(llama, basis, replace(QUARTER, sinks=2, window=3), width=4) as session:
        together = generated(llama, ids, mask=mask, past_key_values=session.cache())
        alone = [
            generated(llama, row, past_key_values=session.cache())[0][row.shape[1] :]
            for row in (long, short)
        ]
    assert [row[40:] for row in together] == alone


def test_our_cache_and_theirs_select_alike(
    llama: PreTrainedModel, basis: Basis, tokens: Tokens
) -> None:
    """Turned keys, the transposed copy and the kernel change no logit."""
    ids = tokens(2, 70)
    for budget in (QUARTER, replace(QUARTER, page=16, sinks=1, window=2), EVERYTHING):
        logits = []
        for is_ours in (False, True):
            with loki(llama, basis, budget, width=4) as session, torch.no_grad():
                cache = session.cache() if is_ours else DynamicCache(config=llama.config)
                llama(ids[:, :50], past_key_values=cache)
                steps = [
                    llama(ids[:, i : i + 1], past_key_values=cache).logits for i in range(50, 70)
                ]
                logits.append(torch.cat(steps, 1))
        torch.testing.assert_close(*logits, atol=FLOAT32, rtol=0)


def test_a_static_cache_selects_alike(llama: PreTrainedModel, basis: Basis, tokens: Tokens) -> None:
    """Unfilled places of a static cache are neither selected nor counted."""
    ids = tokens(1, 48)
    results = []
    for static in (False, True):
        with loki(llama, basis, QUARTER, width=4), torch.no_grad():
            cache = (
                StaticCache(config=llama.config, max_cache_len=64)
                if static
                else DynamicCache(config=llama.config)
            )
            llama(ids[:, :40], past_key_values=cache)
            results.append(
                torch.cat(
                    [llama(ids[:, i : i + 1], past_key_values=cache).logits for i in range(40, 48)]
                )
            )
    torch.testing.assert_close(*results, atol=FLOAT32, rtol=0)


def test_decoding_token_by_token_is_the_masked_block(
    llama: PreTrainedModel, basis: Basis, tokens: Tokens
) -> None:
    """What the evaluation scores as one block is what generation would see."""
    ids = tokens(1, 60)
    with loki(llama, basis, QUARTER, width=4) as session, torch.no_grad():
        cache = DynamicCache(config=llama.config)
        llama(ids[:, :40], past_key_values=cache)
        steps = [llama(ids[:, i : i + 1], past_key_values=cache).logits for i in range(40, 60)]
        mode = session.mode
    assert isinstance(mode, Sparse)
    cache = DynamicCache(config=llama.config)
    with torch.no_grad():
        llama(ids[:, :40], past_key_values=cache)
        with attending(llama, replace(mode, reach="every query")):
            block = llama(ids[:, 40:], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat(steps, 1), block, atol=FLOAT32, rtol=0)


def test_h2o_follows_a_sequence_token_by_token(llama: PreTrainedModel, tokens: Tokens) -> None:
    """Its account after a dense prompt and single steps is that of one masked block."""
    ids = tokens(1, 40)
    mode = Sparse(selector=H2O(), budget=Budget(amount=Count(keys=12), selection="per head"))
    with torch.no_grad():
        cache = DynamicCache(config=llama.config)
        with attending(llama, mode) as session:
            llama(ids[:, :30], past_key_values=cache)
            mass = dict(session.mass)
            steps = [llama(ids[:, i : i + 1], past_key_values=cache).logits for i in range(30, 40)]
        cache.crop(-10)
        with attending(llama, replace(mode, reach="every query")) as session:
            session.mass.update(mass)
            block = llama(ids[:, 30:], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat(steps, 1), block, atol=FLOAT32, rtol=0)


def test_sliding_layers_stay_as_they_are(tokens: Tokens) -> None:
    """Only layers with full attention select; where all slide, a budget of one key changes nothing."""
    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=97,
        sliding_window=16,
        max_position_embeddings=128,
        eos_token_id=None,
    )
    config.layer_types = ["sliding_attention", "full_attention"]
    model = MistralForCausalLM(config).eval()
    basis = fit(calibrate_tokens(model, tokens(4, 64)))
    one = Budget(amount=Count(keys=1))
    ids = tokens(1, 40)
    with loki(model, basis, one) as session:
        generated(model, ids, past_key_values=session.cache())
        assert session.reads.queries == 11  # one layer, every token after the first
    config.layer_types = ["sliding_attention", "sliding_attention"]
    with refused("no layer of MistralForCausalLM would select"), loki(model, basis, one):
        pass
    del config.layer_types
    with refused("sliding_window=None"), loki(model, basis, one):
        pass
    config.sliding_window = None
    with loki(model, basis, one) as session:
        generated(model, ids)
        assert session.reads.queries == 22


def test_a_part_of_a_basis_is_refused_by_the_whole_model(
    llama: PreTrainedModel, basis: Basis, tokens: Tokens
) -> None:
    with loki(llama, basis.heads(0, 1), QUARTER), refused("2 key/value heads here", "has 1"):
        generated(llama, tokens(1, 20))


def test_a_session_leaves_the_model_as_it_was(
    llama: PreTrainedModel, basis: Basis, tokens: Tokens
) -> None:
    ids = tokens(1, 30)
    before = llama(ids).logits
    attributes = [dict(module.__dict__) for module in llama.modules()]
    with loki(llama, basis, QUARTER):
        assert llama.config._attn_implementation == "loki"
    assert llama.config._attn_implementation == "sdpa"
    assert [sorted(module.__dict__) for module in llama.modules()] == [
        sorted(own) for own in attributes
    ]
    assert torch.equal(llama(ids).logits, before)


def test_both_registries_know_the_name() -> None:
    """With the attention function alone, transformers makes no mask and models see the future."""
    assert "loki" in AttentionInterface()
    assert "loki" in AttentionMaskInterface()


@contextmanager
def refused(*words: str):  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=re.escape(words[0])) as caught:
        yield
    for word in words[1:]:
        assert word in str(caught.value), str(caught.value)


def test_what_would_go_wrong_silently_is_refused(
    llama: PreTrainedModel,
    basis: Basis,
    make_llama: Callable[..., PreTrainedModel],
    tokens: Tokens,
) -> None:
    ids = tokens(1, 20)
    other = make_llama(heads=4)
    with refused("model", "calibrate this model"), loki(other, basis, QUARTER):
        pass
    deeper = make_llama(layers=3)
    with refused("2 layers", "3 layers"), loki(deeper, basis, QUARTER):
        pass
    retrained = make_llama()
    with torch.no_grad():
        retrained.model.norm.weight.mul_(2)
    with refused("basis of model", "calibrate this model"), loki(retrained, basis, QUARTER):
        pass
    with refused("300 keys", "context of 256"), loki(llama, basis, Budget(amount=Count(keys=300))):
        pass
    with refused("keys=0"):
        Count(keys=0)
    with refused("of_visible=0"):
        Share(of_visible=0)
    with refused("width=17", "1 to 16"), loki(llama, basis, QUARTER, width=17):
        pass
    gpt = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=97))
    with refused("rotary"), loki(gpt, basis, QUARTER):
        pass
    with loki(llama, basis, QUARTER) as session:
        with refused("in a session already"), loki(llama, basis, QUARTER):
            pass
        cache = session.cache()
        generated(llama, ids, past_key_values=cache)
        llama.set_attn_implementation("sdpa")
        with refused("'sdpa'", "ignore"):
            llama(ids)
        llama.set_attn_implementation("loki")
        with refused("elsewhere"):
            make_llama()(ids, past_key_values=cache)
    with refused("elsewhere"):
        llama(ids, past_key_values=cache)
    with loki(llama, basis, QUARTER), refused("another session"):
        llama(ids, past_key_values=cache)
    other.set_attn_implementation("loki")
    with refused("without a basis"):
        other(ids)
    with loki(llama, basis, QUARTER), refused("bias"):
        llama(ids, attention_mask=torch.full((1, 1, 20, 20), -1.0))
        llama(ids[:, :1], attention_mask=torch.full((1, 1, 1, 1), -1.0))


def test_a_text_that_is_too_short_is_refused(llama: PreTrainedModel, tokens: Tokens) -> None:
    class Letters:
        def encode(self, text: str, **_: Any) -> list[int]:
            return [2] * len(text)

    for texts in (["short"], "short"):  # a string is one document, not five
        with refused("5 tokens", "8192"):
            calibrate(llama, Letters(), texts)  # type: ignore[arg-type]
    with refused("exceed", "256"):
        calibrate_tokens(llama, tokens(1, 300))
    with refused("cannot fix 16 directions"):
        fit(calibrate_tokens(llama, tokens(1, 8)))
