"""Passkeys: where they are hidden, and that an arm that reads everything finds what full attention finds."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Digits, Sequence, Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fourfold_loki import Budget, Share, Sparse
from fourfold_loki.calibration import windows
from fourfold_loki.evaluate.passkey import NEEDLE, QUESTION, TASK, hide, retrieve
from fourfold_loki.evaluate.perplexity import FULL
from fourfold_loki.selectors import Exact


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Words, and digits one by one."""
    words = sorted({*(TASK + NEEDLE + QUESTION).replace("?", " ?").replace(".", " .").split()})
    known = {word: place for place, word in enumerate(["?w", *words, *"0123456789"])}
    made = Tokenizer(WordLevel(known, unk_token="?w"))
    made.pre_tokenizer = Sequence([Whitespace(), Digits(individual_digits=True)])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?w", eos_token="?w")


def test_a_key_lies_at_its_depth_and_the_answer_at_the_end(
    tokenizer: Any, tokens: Callable[..., Tensor]
) -> None:
    hidden = hide(
        tokenizer, tokens(1, 600)[0] + 50, context=120, depths=(0.0, 0.5, 1.0), keys=(123, 456)
    )
    assert hidden.ids.shape == (6, 120)
    assert hidden.depths == (0.0, 0.0, 0.5, 0.5, 1.0, 1.0)
    for window, key in zip(hidden.ids, (123, 456) * 3, strict=True):
        digits = tokenizer.encode(str(key))
        assert window[hidden.prompt :].tolist() == digits
    places = []
    for window in hidden.ids[::2]:
        at = [i for i in range(118) if window[i : i + 3].tolist() == tokenizer.encode("123")]
        places.append(at[0])
    begin = len(tokenizer.encode(TASK))
    assert places[0] < begin + 10
    assert abs(places[1] - (places[0] + places[2]) / 2) <= 1


@pytest.fixture
def begun(tokenizer: Any) -> Any:
    """The same, with a token of its own before every text, as Llama's and Gemma's have."""
    begin = tokenizer.convert_tokens_to_ids("9")
    made = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    made.post_processor = TemplateProcessing(single="9 $A", special_tokens=[("9", begin)])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?w", eos_token="?w")


def test_every_window_begins_as_the_tokenizer_begins_a_text(
    tokenizer: Any, begun: Any, tokens: Callable[..., Tensor]
) -> None:
    begin = begun.convert_tokens_to_ids("9")
    texts = ["the key 1 2 3 is hidden. ", "Remember the text below 4 5 6"] * 4
    cut = windows(begun, texts, tokens=30, context=10)
    assert cut.shape == (3, 10)
    assert set(cut[:, 0].tolist()) == {begin}
    ids = [place for text in texts for place in tokenizer.encode(text)]
    assert cut[:, 1:].flatten().tolist() == ids[:27]
    assert windows(tokenizer, texts, tokens=30, context=10).flatten().tolist() == ids[:30]
    hidden = hide(begun, tokens(1, 600)[0], context=100, depths=(0.0, 1.0), keys=(123, 456))
    assert hidden.ids.shape == (4, 100)
    assert set(hidden.ids[:, 0].tolist()) == {begin}
    assert (
        hidden.ids[:, 1 : 1 + len(tokenizer.encode(TASK))] == torch.tensor(tokenizer.encode(TASK))
    ).all()


def test_reading_everything_finds_what_full_attention_finds(
    llama: PreTrainedModel, tokenizer: Any, tokens: Callable[..., Tensor]
) -> None:
    """A model of random weights "says" what its own greedy decoding says, so let that be the answer."""
    hidden = hide(tokenizer, tokens(1, 600)[0], context=100, depths=(0.5,), keys=(123, 456))
    prompts = hidden.ids[:1, : hidden.prompt]
    said = llama.generate(
        prompts, max_new_tokens=3, do_sample=False, attention_mask=torch.ones_like(prompts)
    )
    hidden.ids[0] = said[0]
    arms = {"all": Sparse(selector=Exact(), budget=Budget(amount=Share(of_visible=1.0)))}
    answers = [(each.arm, each.is_found) for each in retrieve(llama, hidden, arms)]
    assert (FULL, True) in answers
    assert [told for arm, told in answers if arm == FULL] == [
        told for arm, told in answers if arm == "all"
    ]


def test_too_little_text_is_refused(tokenizer: Any, tokens: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="longer context, or more text"):
        hide(tokenizer, tokens(1, 50)[0], context=120, depths=(0.5,), keys=(123,))
    with pytest.raises(ValueError, match="as many digits"):
        hide(tokenizer, tokens(1, 600)[0], context=120, depths=(0.5,), keys=(1, 23))
