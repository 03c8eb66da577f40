"""Text is data: what a tokenizer puts around it is its own, and what it spells is never control."""

from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AddedToken, PreTrainedTokenizerFast

from fourfold_parallel.run.corpora import TextFiles
from fourfold_parallel.run.data import tokenize
from fourfold_parallel.run.tokenizers import (
    BytePairs,
    PublishedTokenizer,
    beginning,
    encoded,
)

BEGIN, TURN = "<|begin|>", "<|turn|>"
TEXTS = (
    "for (int i = 0; i < n; ++i) sum += x[i];",
    f'prompt = "{BEGIN}user{TURN}" + text + "<|end|>"  # of a chat client',
)


@pytest.fixture
def corpus(tmp_path: Path) -> TextFiles:
    paths = [tmp_path / f"{number}.txt" for number in range(len(TEXTS))]
    for path, text in zip(paths, TEXTS, strict=True):
        path.write_text(text, encoding="utf-8")
    return TextFiles(paths=tuple(map(str, paths)), licence="made here")


@pytest.fixture
def published(corpus: TextFiles, tmp_path: Path) -> PublishedTokenizer:
    """A tokenizer with tokens of its own around and within texts, as those of Llama and Gemma are."""
    fast: PreTrainedTokenizerFast = BytePairs(vocabulary=300).load(corpus.load()).tokenizer
    fast.add_special_tokens({"bos_token": AddedToken(BEGIN, special=True)})
    fast.add_tokens([AddedToken(TURN, special=True)], special_tokens=True)
    begin = fast.convert_tokens_to_ids(BEGIN)
    fast.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, begin)]
    )
    fast.save_pretrained(str(tmp_path / "published"))
    return PublishedTokenizer(name=tmp_path / "published", revision="main", licence="none")


def test_every_document_begins_and_ends_as_the_tokenizer_says(
    corpus: TextFiles, published: PublishedTokenizer
) -> None:
    file = tokenize(corpus, published)
    fast = file.tokenizer().tokenizer
    control = {fast.convert_tokens_to_ids(token) for token in (BEGIN, TURN, "<|end|>")}
    for index, text in enumerate(TEXTS):
        first, *rest = file.document(index).tolist()
        assert first == fast.convert_tokens_to_ids(BEGIN)
        assert control.isdisjoint(rest)
        assert fast.decode(rest) == text
    assert list(file.tokens).count(file.tokenizer().end) == len(TEXTS)


def test_a_tokenizer_that_puts_nothing_before_texts_has_no_beginning(corpus: TextFiles) -> None:
    loaded = BytePairs(vocabulary=300).load(corpus.load())
    assert beginning(loaded.tokenizer) == []
    assert loaded.document(TEXTS[0]) == [*loaded.tokenizer.encode(TEXTS[0]), loaded.end]


def test_encoding_data_leaves_the_tokenizer_as_it_was(
    corpus: TextFiles, published: PublishedTokenizer
) -> None:
    """What a chat's template writes is control, before and after."""
    fast = published.load(corpus.load()).tokenizer
    before = fast.encode(f"{TURN} hi")
    assert fast.convert_tokens_to_ids(TURN) in before
    assert fast.decode(encoded(fast, f"{TURN} hi")) == f"{TURN} hi"
    assert fast.encode(f"{TURN} hi") == before
