"""Laws of token streams."""

import hashlib
import importlib.metadata
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement

from fourfold_parallel.common.values import from_json, to_json
from fourfold_parallel.run import data, models
from fourfold_parallel.run.corpora import WIKIPEDIA_REMEDY, Hub, TextFiles
from fourfold_parallel.run.data import Packed, TokenStream, epoch_order, tokenize
from fourfold_parallel.run.models import SMOLLM2_REMEDY, Gemma3, SmolLM2, model_place
from fourfold_parallel.run.tokenizers import BytePairs, PublishedTokenizer


@pytest.fixture
def packed(corpus: TextFiles) -> Packed:
    return Packed(corpus=corpus, tokenizer=BytePairs(vocabulary=320), held_out=0.1)


@pytest.fixture
def stream(packed: Packed) -> TokenStream:
    return packed.open(sequence=24, seed=5)


def test_tokens_are_the_corpus(packed: Packed) -> None:
    """Decoding every document of the token file gives the texts back, character for character."""
    file = tokenize(packed.corpus, packed.tokenizer)
    texts = packed.corpus.load().texts
    tokenizer = file.tokenizer()
    for index, text in enumerate(texts):
        assert tokenizer.decode(file.document(index).tolist()) == text
    assert file.characters == sum(len(text) for text in texts)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_any_number_of_ranks_sees_the_same_order(stream: TokenStream, ranks: int) -> None:
    """The ranks' shares, laid side by side, are the one-rank batch, at every step, epochs included."""
    for step in (0, 1, 7, 40, 41):
        whole = stream.batch(step, batch=8)
        shares = [stream.batch(step, batch=8, rank=rank, ranks=ranks) for rank in range(ranks)]
        assert torch.equal(torch.cat([share.tokens for share in shares]), whole.tokens)
        assert sum((share.addresses for share in shares), ()) == whole.addresses


def test_microbatches_are_counted_through_the_run_alike_on_every_rank(stream: TokenStream) -> None:
    """An objective that draws something per microbatch draws the same on every rank, in any step."""
    for rank in range(2):
        shares = [stream.batch(step, batch=8, rank=rank, ranks=2) for step in range(3)]
        assert [share.number for share in shares] == [0, 1, 2]
        numbers = [part.number for share in shares for part in share.split(2)]
        assert numbers == list(range(6))
        assert [part.to(torch.device("cpu")).number for part in shares[2].split(2)] == [4, 5]


def test_every_row_is_used_once_an_epoch(stream: TokenStream) -> None:
    """For a batch that does not divide the epoch, too."""
    rows = len(stream.row_starts)
    used = np.concatenate(
        [stream.rows_at(np.arange(7 * step, 7 * step + 7)) for step in range(3 * rows // 7 + 1)]
    )
    for epoch in range(3):
        assert sorted(used[epoch * rows : (epoch + 1) * rows].tolist()) == list(range(rows))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    """Epoch 1 of seed 0 is not epoch 0 of seed 1."""
    orders = {tuple(epoch_order(50, epoch=e, seed=s).tolist()) for e in range(3) for s in range(3)}
    assert len(orders) == 9


def test_targets_and_validation_share_no_token(packed: Packed) -> None:
    """No id is a target both in training and in validation, and within each at most once."""
    training = packed.open(sequence=24, seed=0).row_starts[:, None] + np.arange(1, 25)
    validation = packed.validation(sequence=24).row_starts[:, None] + np.arange(1, 25)
    targets = np.concatenate([training.ravel(), validation.ravel()])
    assert len(np.unique(targets)) == len(targets)


def test_document_ids_change_exactly_after_an_end(stream: TokenStream) -> None:
    end = stream.file.tokenizer().end
    for step in range(20):
        batch = stream.batch(step, batch=8)
        changes = batch.document_ids.diff(dim=1) != 0
        assert torch.equal(changes, batch.tokens[:, :-1] == end)


def test_tokenizing_twice_reads_the_cache(packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tokenize(packed.corpus, packed.tokenizer)
    monkeypatch.setattr(TextFiles, "load", lambda _: pytest.fail("the corpus was read again"))
    assert tokenize(packed.corpus, packed.tokenizer) == first


def test_paths_are_text_or_paths(corpus: TextFiles) -> None:
    """One corpus, one digest, and a record rebuilds it."""
    paths = TextFiles(paths=tuple(map(Path, corpus.paths)), licence=corpus.licence)
    assert paths == corpus == from_json(to_json(paths))
    assert paths.load() == corpus.load()


def test_an_edited_text_file_is_read_again(tmp_path: Path) -> None:
    """Under the same name, with other words: other tokens, and another material in the record."""
    text = tmp_path / "mine.txt"
    corpus = TextFiles(paths=(str(text),), licence="made here")
    digests = []
    for words in ("alpha beta gamma " * 30, "delta epsilon zeta " * 50):
        text.write_text(words, encoding="utf-8")
        file = tokenize(corpus, BytePairs(vocabulary=300))
        assert file.tokenizer().decode(file.document(0).tolist()) == words
        digests.append(file.materials[0].sha256)
    assert digests[0] != digests[1]


def test_a_text_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.txt", tmp_path / "latin.txt"
    good.write_text("alpha", encoding="utf-8")
    bad.write_bytes("caf\u00e9 au lait".encode("latin-1"))
    corpus = TextFiles(paths=(good, bad), licence="made here")
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8 text \(.* at byte 3\)"):
        corpus.load()


def test_the_files_of_a_local_tokenizer_count(tmp_path: Path, packed: Packed) -> None:
    """A tokenizer trained anew into the same folder tokenizes anew."""
    folder = str(tmp_path / "tokenizer")
    kept = PublishedTokenizer(name=folder, revision="main", licence="as the corpus")
    for vocabulary in (300, 310):
        trained = BytePairs(vocabulary=vocabulary).load(packed.corpus.load())
        trained.tokenizer.save_pretrained(folder)
        assert tokenize(packed.corpus, kept).vocabulary == vocabulary


@pytest.mark.parametrize(
    ("line", "extra"), [(WIKIPEDIA_REMEDY, "corpora"), (SMOLLM2_REMEDY, "gguf")]
)
def test_the_line_that_is_named_asks_for_what_the_extra_asks_for(line: str, extra: str) -> None:
    """In pip's words; a wheel that is taken without its libraries is pinned."""
    declared = {
        str(Requirement(text.partition(";")[0]))
        for text in importlib.metadata.requires("fourfold-parallel") or ()
        if f"extra == '{extra}'" in text
    }
    for command in line.split(" && "):
        pip, install, *words = shlex.split(command)
        assert (pip, install) == ("pip", "install")
        if words[0] == "--no-deps":
            [pinned] = words[1:]
            assert importlib.metadata.version(pinned.partition("==")[0]) == pinned.split("==")[1]
        else:
            assert {str(Requirement(word)) for word in words} <= declared


def test_a_model_whose_reader_is_missing_names_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wheel is here, and gguf is not."""
    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match="gguf is not installed") as caught:
        SmolLM2().folder()
    assert SMOLLM2_REMEDY in str(caught.value)


def test_a_model_in_parts_is_put_together_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In their order; and parts of another file are refused, leaving nothing."""
    parts = {f"part{n:02d}": bytes([n]) * 3 for n in range(4)}

    def part(distribution: str, name: str, remedy: str) -> Path:
        assert distribution == f"{Gemma3.wheel}-part{int(name[-2:]) + 1}"
        assert remedy == Gemma3.remedy
        path = tmp_path / name.rpartition(".")[2]
        path.write_bytes(parts[path.name])
        return path

    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "packaged_file", part)
    with pytest.raises(ValueError, match="another file; pip install"):
        Gemma3().gguf()
    whole = b"".join(parts.values())
    monkeypatch.setattr(Gemma3, "sha256", hashlib.sha256(whole).hexdigest())
    assert Gemma3().gguf().read_bytes() == whole
    parts["part00"] = b"gone"
    assert Gemma3().gguf().read_bytes() == whole


def test_an_altered_token_file_is_refused(packed: Packed, tmp_path: Path) -> None:
    file = tokenize(packed.corpus, packed.tokenizer)
    data._open.cache_clear()
    path = file.path / "tokens.npy"
    content = path.read_bytes()
    path.write_bytes(content[:-2] + b"\x01\x00")
    try:
        with pytest.raises(ValueError, match="was changed after it was written"):
            tokenize(packed.corpus, packed.tokenizer)
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda stream, _: stream.batch(0, batch=9, ranks=2), "batch=9"),
        (lambda _, packed: packed.open(sequence=10**6, seed=0), "1000000 + 1"),
        (lambda *_: TextFiles(paths=("/nowhere.txt",), licence="none").load(), "/nowhere.txt"),
        (lambda *_: TextFiles(paths="mine.txt", licence="none"), "paths=('mine.txt',)"),
        (lambda *_: BytePairs(vocabulary=9).load(None), "vocabulary=9"),
        (
            lambda *_: Hub(
                dataset="a/b",
                subset="c",
                split="train",
                column="text",
                revision="main",
                licence="MIT",
            ).load(),
            "revision='main'",
        ),
    ],
)
def test_bad_input_is_refused_with_its_value(
    make: object, words: str, stream: TokenStream, packed: Packed
) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        make(stream, packed)  # type: ignore[operator]
    assert words in str(caught.value)


def test_smollm2_is_a_name_and_any_other_stays_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SmolLM2, "folder", lambda _: Path("converted"))
    assert model_place("smollm2") == "converted"
    assert model_place(Path("models/mine")) == "models/mine"
    assert model_place("someone/model") == "someone/model"
