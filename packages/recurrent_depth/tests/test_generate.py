"""Decoders for `generate`, retrofitting, the harness: each equals what it stands for."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from fourfold_recurrent_depth import state_table
from fourfold_recurrent_depth.decoding.diffusion import Diffusion
from fourfold_recurrent_depth.decoding.refill import Refill
from fourfold_recurrent_depth.decoding.speculate import Speculation
from fourfold_recurrent_depth.exits import LatentDiff
from fourfold_recurrent_depth.retrofit import Retrofitted, retrofit


@pytest.mark.parametrize("exits", [None, LatentDiff(threshold=0.2)])
def test_rows_that_end_leave_and_change_nothing(
    tiny: Any, tokens: torch.Tensor, exits: Any
) -> None:
    """Tokens equal transformers' own loop, with ends at different places and left padding."""
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    options: dict[str, Any] = {
        "attention_mask": mask, "max_new_tokens": 14, "do_sample": False, "pad_token_id": 0,
        "num_steps": 5, "exit": exits, "initial_state": state_table(64, 32, seed=0),
    }  # fmt: skip
    free = tiny.generate(tokens, **options)[:, 12:]
    ends = [int(free[0, 3]), int(free[1, 7])]
    expected = tiny.generate(tokens, eos_token_id=ends, **options)
    for slots in (1, 2, 8):
        found = tiny.generate(
            tokens, eos_token_id=ends, custom_generate=Refill(slots=slots), **options
        )
        assert found.tolist() == expected.tolist()


@pytest.mark.parametrize(
    "options",
    [{"repetition_penalty": 3.0}, {"min_new_tokens": 6}, {"bad_words_ids": [[5], [9, 11]]}],
    ids=str,
)
def test_processors_see_a_row_as_generate_shows_it(
    tiny: Any, tokens: torch.Tensor, options: dict[str, Any]
) -> None:
    """Its padding, its prompt and its answer; sampled tokens are drawn from what they leave."""
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    free = tiny.generate(tokens, attention_mask=mask, max_new_tokens=8, do_sample=False)
    how: dict[str, Any] = {
        "attention_mask": mask, "max_new_tokens": 8, "pad_token_id": 0, "num_steps": 5, "exit": "latent_diff",
        "eos_token_id": int(free[0, 14]), "do_sample": False, **options,
    }  # fmt: skip
    expected = tiny.generate(tokens, **how)
    assert (
        tiny.generate(tokens, custom_generate=Refill(slots=2), **how).tolist() == expected.tolist()
    )
    drawn = tiny.generate(
        tokens, custom_generate=Refill(), **{**how, "do_sample": True, "top_k": 1}
    )
    assert drawn.tolist() == expected.tolist()


@pytest.mark.parametrize(
    "way",
    [Speculation(draft_steps=2), Diffusion(threshold=0.0, smoothing=0.0)],
    ids=lambda way: type(way).__name__,
)
def test_decoders_serve_generate(tiny: Any, tokens: torch.Tensor, way: Any) -> None:
    """`custom_generate` takes them; end tokens and padding as in transformers; sampling is refused."""
    tiny.transformer["adapter"].weight.data[:, :32] *= 0.2
    options: dict[str, Any] = {
        "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "num_steps": 24,
        "kv_budget": 1 if isinstance(way, Diffusion) else None,
    }  # fmt: skip
    free = tiny.generate(tokens, **options)[:, 12:]
    options["eos_token_id"] = int(free[0, 2])
    for scale in (1.0, 0.0):
        options["init_scale"] = scale
        expected = tiny.generate(tokens, **options)
        assert tiny.generate(tokens, custom_generate=way, **options).tolist() == expected.tolist()
    for wrong, message in (
        ({"do_sample": True}, "greedy"),
        ({"repetition_penalty": 3.0}, "RepetitionPenalty"),
        ({"max_time": 60.0}, "MaxTimeCriteria"),
        ({"exit": "kl"}, "exit=kl"),
        ({"warm_start": True}, "warm_start=True"),
        ({"kv_budget": 3}, "kv_budget=3"),
        ({"return_dict_in_generate": True}, "tokens alone"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny.generate(tokens, custom_generate=way, **{**options, **wrong})


@pytest.mark.parametrize("way", [Speculation(draft_steps=2), Diffusion(), Refill()])
def test_decoders_take_bfloat16_and_prompts_without_a_mask(
    tiny: Any, tokens: torch.Tensor, way: Any
) -> None:
    made = tiny.to(torch.bfloat16).generate(
        tokens, custom_generate=way, max_new_tokens=4, do_sample=False, num_steps=3
    )
    assert made.shape == (3, 16)
    if not isinstance(way, Refill):
        with pytest.raises(ValueError, match="asks for no token"):
            way.decode(
                tiny, tokens, max_new_tokens=0, num_steps=3, initial_state=None, init_scale=1.0
            )


def test_refilling_refuses_what_it_cannot_do(tiny: Any, tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="without streamer"):
        tiny.generate(
            tokens, custom_generate=Refill(), num_beams=2, max_new_tokens=2, pad_token_id=0
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix_allowed_tokens_fn": lambda *_: [1]}, "do not follow rows that leave"),
        ({"initial_state": torch.zeros(3, 1, 32)}, "by token or by position"),
        ({"return_dict_in_generate": True}, "tokens alone"),
    ],
)
def test_refilling_refuses_what_belongs_to_places_in_the_batch(
    tiny: Any, tokens: torch.Tensor, options: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.generate(tokens, custom_generate=Refill(), max_new_tokens=2, **options)


def test_refilling_refuses_a_cache_that_holds_the_prompt(tiny: Any, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        held = tiny(tokens, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="a cache of its own"):
        tiny.generate(tokens, custom_generate=Refill(), max_new_tokens=2, past_key_values=held)


def test_one_recurrence_of_a_retrofitted_model_is_the_dense_model(
    dense: LlamaForCausalLM, tokens: torch.Tensor
) -> None:
    """With all layers kept, and with one left out, which equals the dense model without it."""
    model = dense
    with torch.no_grad():
        expected = model(tokens).logits
        recurrent = retrofit(model, 1, 2, 1)
        assert torch.allclose(recurrent(tokens).logits, expected, atol=1e-5)
        shorter = retrofit(model, 1, 1, 1)
        kept = model.model.layers
        model.model.layers = torch.nn.ModuleList([kept[0], kept[2], kept[3]])
        model.config.num_hidden_layers = 3
        assert torch.allclose(
            shorter(tokens).logits, model(tokens, use_cache=False).logits, atol=1e-5
        )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("Gemma2", "softcapping=30"),
        ("Granite", "embedding_multiplier=3"), ("Cohere", "logit_scale=0.0625"),
    ],
)  # fmt: skip
def test_models_that_are_more_than_layers_are_refused(model: str, message: str) -> None:
    """Their retrofit would not be the dense model at one recurrence."""
    shape: dict[str, Any] = {
        "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 48, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    if model == "Granite":
        shape["embedding_multiplier"] = 3.0
    built = getattr(transformers, f"{model}ForCausalLM")
    with pytest.raises(ValueError, match=message):
        retrofit(built(getattr(transformers, f"{model}Config")(**shape)), 1, 2, 1)


def test_microbatches_of_a_retrofitted_model_share_a_step(
    dense: LlamaForCausalLM, tokens: torch.Tensor
) -> None:
    """The trainer divides by the labels of the step, and leaves the division to the model."""
    recurrent = retrofit(dense, 1, 2, 1)
    whole = recurrent(tokens, labels=tokens).loss
    half = recurrent(tokens, labels=tokens, num_items_in_batch=torch.tensor(66)).loss
    assert float(half.detach()) == pytest.approx(float(whole.detach()) / 2, rel=1e-5)


def test_a_retrofitted_model_trains_and_uses_depth(
    dense: LlamaForCausalLM, tokens: torch.Tensor
) -> None:
    """Gradients reach every part; with alpha > 0 the second recurrence sees the first."""
    recurrent = retrofit(dense, 1, 2, 1, alpha=0.5)
    with torch.no_grad():
        one, two = (recurrent(tokens, num_steps=r).logits for r in (1, 2))
    assert (one - two).abs().max() > 1e-3
    recurrent(tokens, labels=tokens, num_steps=(1, 2)).loss.backward()
    assert all(p.grad is not None for p in recurrent.parameters())
    for wrong, message in (((1, 4, 1), "do not fit"), ((1, 0, 1), "do not fit")):
        with pytest.raises(ValueError, match=message):
            retrofit(dense, *wrong)
    with pytest.raises(ValueError, match="one slot for each layer"):
        recurrent(tokens, past_key_values=DynamicCache())


def test_a_retrofitted_models_cache_changes_nothing(
    dense: LlamaForCausalLM, tokens: torch.Tensor
) -> None:
    """Token by token and in chunks, and in `generate` beside rows of other lengths."""
    recurrent = retrofit(dense, 1, 2, 1, alpha=0.5).eval()
    with torch.no_grad():
        whole = recurrent(tokens, num_steps=3).logits
        for chunks in ((5, 1, 1, 5), (1,) * 12):
            cache, parts = None, []
            for part in tokens.split(chunks, dim=1):
                out = recurrent(part, num_steps=3, use_cache=True, past_key_values=cache)
                cache = out.past_key_values
                parts.append(out.logits)
            assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "num_steps": 3}
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    made = recurrent.generate(tokens, attention_mask=mask, pad_token_id=0, **options)
    slow = recurrent.generate(
        tokens, attention_mask=mask, pad_token_id=0, use_cache=False, **options
    )
    assert made.tolist() == slow.tolist()


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_retrofit_is_read_as_one(tokens: torch.Tensor, tmp_path: Path, tied: bool) -> None:
    """With the same logits, by its class and by transformers' own; never as the dense model it was."""
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, vocab_size=64, max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
        tie_word_embeddings=tied,
    )  # fmt: skip
    recurrent = retrofit(LlamaForCausalLM(config).eval(), 1, 1, 1, alpha=0.5).eval()
    recurrent.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = recurrent(tokens, num_steps=3).logits
        for read in (Retrofitted, AutoModelForCausalLM):
            found: Any = read.from_pretrained(tmp_path)
            assert isinstance(found, Retrofitted)
            assert torch.equal(found(tokens, num_steps=3).logits, expected)
    assert (found.lm_head.weight is found.embed_tokens.weight) == tied
    assert read.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="device_map"):
        Retrofitted.from_pretrained(tmp_path, device_map="cpu")
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="type 'llama'"):
        Retrofitted.from_pretrained(tmp_path / "dense")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="lacks"):
        Retrofitted.from_pretrained(tmp_path)


def test_prompts_have_huginns_format() -> None:
    """Byte for byte: a system message and an example, asked on; and a finished text."""
    pytest.importorskip("lm_eval")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    from fourfold_recurrent_depth.harness import CHAT_TEMPLATE, SYSTEM

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")), chat_template=CHAT_TEMPLATE
    )
    chat = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": " Question: 2+2?\nAnswer: "},
        {"role": "assistant", "content": "#### 4"},
    ]
    text = (
        "<|begin_text|><|begin_header|>system<|end_header|>\n\nYou are a helpful assistant that can assist "
        "users with mathematical reasoning.<|end_turn|><|begin_header|>user<|end_header|>\n\nQuestion: 2+2?\n"
        "Answer:<|end_turn|><|begin_header|>Huginn<|end_header|>\n\n#### 4<|end_turn|>"
    )
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    assert whole == text + "<|end_text|>"
    asked = tokenizer.apply_chat_template(chat[:2], tokenize=False, add_generation_prompt=True)
    assert asked == text.removesuffix("#### 4<|end_turn|>")


def test_the_harness_scores_as_the_model_does(tiny: Any) -> None:
    """Log-likelihoods at a depth are sums of the model's own, and recurrences are counted."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    from fourfold_recurrent_depth.harness import RecurrentDepthLM

    words = {f"w{n}": n for n in range(63)} | {"<end>": 63}
    made = Tokenizer(WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<end>", pad_token="<end>", unk_token="w0"
    )
    lm = RecurrentDepthLM(
        pretrained=tiny, tokenizer=tokenizer, num_steps=4, batch_size=2, max_length=32,
        exit=LatentDiff(threshold=1e-9, every=2, lags=3),
    )  # fmt: skip
    assert lm._options["exit"] == LatentDiff(threshold=1e-9, every=2, lags=3, scope="token")
    with pytest.raises(ValueError, match="num_steps=0"):
        RecurrentDepthLM(pretrained=tiny, tokenizer=tokenizer, num_steps=0)
    lm._options["init_scale"] = 0.0
    pairs = [("w5 w6 w7", " w8 w9"), ("w3", " w4"), ("w10 w11", " w12 w13 w14")]
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in pairs
    ]
    for (context, continuation), (score, _) in zip(pairs, lm.loglikelihood(requests), strict=True):
        first = tokenizer(context, return_tensors="pt").input_ids
        whole = tokenizer(context + continuation, return_tensors="pt").input_ids
        with torch.no_grad():
            logits = tiny(whole, num_steps=4, init_scale=0.0).logits.log_softmax(-1)
        cut = first.shape[1]
        expected = logits[0, cut - 1 : -1].gather(1, whole[0, cut:, None]).sum()
        assert score == pytest.approx(float(expected), abs=1e-3)
    assert int(lm.steps_taken.sum()) > 0
    assert int(lm.steps_taken[:4].sum()) == 0


@pytest.mark.parametrize("use_cache", [False, True])
def test_packed_texts_do_not_see_each_other(
    iterated: Any, tokens: torch.Tensor, use_cache: bool
) -> None:
    """Each text of a row is as it is alone, with a cache and without."""
    starts = ((0, 5), (5, 8), (8, 12))
    positions = torch.cat([torch.arange(stop - start) for start, stop in starts])[None]
    with torch.no_grad():
        packed = iterated(tokens, position_ids=positions, num_steps=3, use_cache=use_cache).logits
        for start, stop in starts:
            alone = iterated(tokens[:, start:stop], num_steps=3).logits
            # float32, as in test_model.py.
            torch.testing.assert_close(packed[:, start:stop], alone, rtol=0, atol=3e-5)
