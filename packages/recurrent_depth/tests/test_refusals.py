"""What cannot be honoured is refused by name, before any compute."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from fourfold_recurrent_depth import RecurrentCache, RecurrentDepthForCausalLM, state_table
from fourfold_recurrent_depth.decoding.refill import Refill
from fourfold_recurrent_depth.decoding.speculate import Speculation
from fourfold_recurrent_depth.exits import KL, LatentDiff
from fourfold_recurrent_depth.retrofit import retrofit

ROUNDING = 3e-5
"""As in test_model.py."""


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    options.setdefault("init_scale", 0.0)
    return model(tokens, **options).logits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "fewer than 1 recurrence"),
        ({"num_steps": (-1, 4)}, "fewer than 1 recurrence"),
        ({"num_steps": torch.tensor([1, 0, 2])}, "fewer than 1 recurrence"),
        ({"exit": "kullback"}, "use one of kl"),
        ({"kv_budget": 0, "use_cache": True}, "keeps no recurrence"),
        ({"kv_budget": 9, "use_cache": True, "num_steps": 4}, "more recurrences than the 4"),
        (
            {
                "exit": "kl",
                "attention_mask": torch.ones(3, 12).long() * torch.tensor([[1], [0], [1]]),
            },
            r"rows \[1\] of the batch",
        ),
        ({"position_ids": torch.arange(60, 72)[None]}, "beyond the rotary table"),
        ({"inputs_embeds": torch.zeros(3, 12, 32)}, "exactly one"),
        ({"exit": lambda now, _: now}, "one number for each"),
        ({"exit": lambda now, _: now[:, 0] > 0}, "torch.bool"),
        ({"exit": lambda now, _: [0.0] * len(now)}, "one number for each"),
        ({"exit": KL}, "is no criterion"),
        ({"exit": 0.5}, "is no criterion"),
        ({"num_steps": 2.5}, "neither a number"),
        ({"num_steps": (1, 2, 3)}, "neither a number"),
        ({"num_steps": torch.tensor([2, 1])}, "each of 3 rows"),
        ({"num_steps": torch.tensor([2.5, 1.0, 2.0])}, "neither a number"),
        ({"num_steps": torch.tensor([2, 1, 2]), "use_cache": True}, "without a common depth"),
        ({"kv_budget": 2}, "this pass has none"),
        ({"warm_start": True}, "this pass has none"),
        ({"past_key_values": DynamicCache()}, "at which depth"),
        ({"attention_mask": torch.ones(3, 11).long()}, r"give \(3, 12\)"),
        ({"attention_mask": torch.ones(2, 12).long()}, r"give \(3, 12\)"),
        ({"position_ids": torch.arange(12)[None] - 1}, "from -1"),
        ({"position_ids": torch.arange(12)}, "give one row or 3"),
        ({"position_ids": torch.arange(11)[None]}, "rows of 12 tokens"),
        ({"initial_state": torch.zeros(2, 12, 32)}, r"initial_state of shape \(2, 12, 32\)"),
        ({"initial_state": "zeros"}, "initial_state='zeros'"),
    ],
)
def test_bad_input_is_refused(
    tiny: Any, tokens: torch.Tensor, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        logits(tiny, tokens, **options)


@pytest.mark.parametrize(
    ("make_one", "message"),
    [
        (lambda: LatentDiff(lags=0), "lags=0"),
        (lambda: LatentDiff(scope="rows"), "scope='rows'"),  # pyright: ignore[reportArgumentType]
        (lambda: KL(threshold=float("nan")), "threshold=nan"),
        (lambda: KL(every=0), "every=0"),
    ],
)
def test_criteria_that_cannot_judge_are_refused(make_one: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_one()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_step": 4}, "'num_step'; did you mean 'num_steps'"),
        ({"input_embeds": torch.zeros(3, 12, 32)}, "'input_embeds'; did you mean 'input"),
        ({"output_details": {"return_logits": True}}, "no argument 'output_details'"),
        ({"temperature": 0.5}, "no argument 'temperature'; it takes"),
    ],
)
def test_unknown_arguments_are_refused(
    iterated: Any, tokens: torch.Tensor, options: dict[str, Any], message: str
) -> None:
    """Two calls that differ in a misspelt name would give one result without a word."""
    with pytest.raises(TypeError, match=message):
        iterated(tokens, **options)
    iterated(tokens, **dict.fromkeys(options))  # tools of transformers hand on what is None


@pytest.mark.parametrize("labelled", [False, True])
def test_a_tuple_is_given_where_one_is_asked_for(
    iterated: Any, tokens: torch.Tensor, labelled: bool
) -> None:
    """By the argument or by the configuration, without what is None; the argument is heard first."""
    options: Any = {"num_steps": 2, "labels": tokens if labelled else None}
    with torch.no_grad():
        whole = iterated(tokens, **options)
        parts = iterated(tokens, return_dict=False, **options)
        iterated.config.return_dict = False
        configured = iterated(tokens, **options)
        asked = iterated(tokens, return_dict=True, **options)
    for found in (parts, configured):
        assert isinstance(found, tuple)
        expected = [part for part in whole.values() if isinstance(part, torch.Tensor)]
        got = [part for part in found if isinstance(part, torch.Tensor)]
        assert all(map(torch.equal, got, expected))
        assert len(got) == len(expected)
    assert torch.equal(asked.logits, whole.logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_attentions": True}, "output_attentions=True"),
        ({"cu_seq_lens_q": torch.tensor([0, 5, 12])}, "cu_seq_lens_q without position_ids"),
        ({"seq_idx": torch.zeros(3, 12).int()}, "seq_idx without position_ids"),
        (
            {"past_key_values": DynamicCache(), "cache": DynamicCache()},
            "past_key_values and cache are one argument",
        ),
    ],
)
def test_what_nothing_would_read_is_refused(
    iterated: Any, tokens: torch.Tensor, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        iterated(tokens, **options)


def test_the_published_name_of_the_first_state_is_taken(tiny: Any, tokens: torch.Tensor) -> None:
    """And both names at once are refused, in decoders of their own too."""
    state = torch.randn(3, 12, 32, generator=torch.Generator().manual_seed(5))
    ours = logits(tiny, tokens, initial_state=state)
    assert torch.equal(logits(tiny, tokens, input_states=state), ours)
    assert not torch.allclose(logits(tiny, tokens, num_steps=4), ours, atol=0.1)
    table = state_table(64, 32, seed=0)
    both: Any = {"input_states": table, "initial_state": table}
    with pytest.raises(ValueError, match="initial_state and input_states are one argument"):
        logits(tiny, tokens, **both)
    options: Any = {"max_new_tokens": 3, "do_sample": False, "num_steps": 4}
    for decoder in (None, Refill(), Speculation(draft_steps=2)):
        drawn = tiny.generate(tokens, initial_state=table, custom_generate=decoder, **options)
        named = tiny.generate(tokens, input_states=table, custom_generate=decoder, **options)
        assert named.tolist() == drawn.tolist()
        with pytest.raises(ValueError, match="are one argument"):
            tiny.generate(tokens, custom_generate=decoder, **both, **options)


def test_continuous_batching_of_a_retrofit_is_refused(dense: Any) -> None:
    """Instead of rows without a token."""
    model = retrofit(dense, 1, 2, 1)
    with pytest.raises(ValueError, match="generate_batch keeps one page"):
        model.generate_batch([[1, 2, 3], [4, 5]], max_new_tokens=4)


def test_what_a_cache_cannot_take_is_refused(tiny: Any, tokens: torch.Tensor) -> None:
    """Masks of the new tokens alone, another budget, gradients, no tokens."""
    cache = RecurrentCache(tiny.config, steps=6)
    options: Any = {"past_key_values": cache, "use_cache": True}
    logits(tiny, tokens[:, :8], **options)
    for wrong, message in (
        ({"attention_mask": torch.ones(3, 4).long()}, r"8 cached and 4 new tokens; give \(3, 12\)"),
        ({"kv_budget": 2}, "whose budget is None"),
    ):
        with pytest.raises(ValueError, match=message):
            logits(tiny, tokens[:, 8:], **options, **wrong)
    with pytest.raises(ValueError, match=r"under torch\.no_grad"):
        tiny(tokens[:, 8:], **options)
    with pytest.raises(ValueError, match="no tokens"):
        logits(tiny, tokens[:, :0])
    assert cache.get_seq_length() == 8
    rest = logits(tiny, tokens[:, 8:], **options)
    torch.testing.assert_close(rest, logits(tiny, tokens)[:, 8:], rtol=0, atol=ROUNDING)


def test_a_checkpoint_of_another_model_is_refused(tiny: Any, tmp_path: Any) -> None:
    """Missing or extra keys, named."""
    from safetensors.torch import load_file, save_file

    from fourfold_recurrent_depth.published_weights import load_published

    tiny.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, RecurrentDepthForCausalLM)
    weights = load_file(tmp_path / "model.safetensors")
    missing = {name: w for name, w in weights.items() if "coda.0.norm_1" not in name}
    for wrong, name in (
        (missing, "coda.0.norm_1"),
        ({**weights, "extra.w": torch.ones(1)}, "extra.w"),
    ):
        save_file(wrong, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=name):
            load_published(tmp_path)
