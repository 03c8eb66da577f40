"""Token streams: packed, memory-mapped, resumable, the same order for any number of ranks.

A corpus is tokenized once into a flat file of ids (`TokenFile`). A stream is a list of row starts into
that file; a row is `sequence + 1` ids, so that inputs and next-token targets are two views of it. Which
rows make up step `s` is a pure function of (stream, seed, s): resuming is calling it again, and every
rank computes its own share of the same global batch.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from fourfold_parallel.common.files import cache_folder, sha256_of, whole_folder, write_text
from fourfold_parallel.common.records import Material
from fourfold_parallel.common.values import digest, from_json, to_json
from fourfold_parallel.run.corpora import Corpus, files_of
from fourfold_parallel.run.tokenizers import LoadedTokenizer, Tokenizer

log = logging.getLogger(__name__)

_FORMAT = 2
"""Version of the token file; part of its cache key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenFile:
    """A tokenized corpus on disk: every document's ids followed by the end id, one after another."""

    path: Path
    tokens: Int[np.ndarray, " token"]
    """Memory-mapped ids, uint16 or uint32."""
    document_starts: Int[np.ndarray, " document"]
    """Offset of each document's first token, int64, ascending from 0."""
    vocabulary: int
    materials: tuple[Material, ...]
    characters: int
    """Characters of the corpus, so that losses can be given per byte or character."""

    def document(self, index: int) -> Int[np.ndarray, " token"]:
        """Ids of one document, without the end id."""
        starts = self.document_starts
        stop = starts[index + 1] if index + 1 < len(starts) else len(self.tokens)
        return self.tokens[starts[index] : stop - 1]

    @property
    def has_tokenizer(self) -> bool:
        """True where the tokenizer lies beside the file; it does unless somebody else made the ids."""
        return (self.path / "tokenizer").is_dir()

    def tokenizer(self) -> LoadedTokenizer:
        """The tokenizer that made the file, read from beside it."""
        from transformers import PreTrainedTokenizerFast

        fast = PreTrainedTokenizerFast.from_pretrained(self.path / "tokenizer")
        end = fast.eos_token_id
        assert isinstance(end, int)
        material = next(used for used in self.materials if used.kind == "tokenizer")
        return LoadedTokenizer(tokenizer=fast, end=end, material=material)


def tokenize(corpus: Corpus, tokenizer: Tokenizer) -> TokenFile:
    """The corpus as ids, from the cache where this corpus was tokenized this way before.

    The cache key is made of both values, of the bytes of the local files that they name, and of the
    installed versions that produce the text, so a newer wheel and an edited file are read anew.
    """
    contents = [sha256_of(path) for path in (*files_of(corpus), *files_of(tokenizer))]
    key = hashlib.sha256(
        json.dumps([_FORMAT, digest(corpus), digest(tokenizer), _producers(), *contents]).encode()
    ).hexdigest()
    folder = cache_folder() / "tokens" / key[:32]
    if not (folder / "meta.json").exists():
        log.info("tokenizing into %s", folder)
        documents = corpus.load()
        loaded = tokenizer.load(documents)
        kind = np.uint16 if loaded.vocabulary <= np.iinfo(np.uint16).max + 1 else np.uint32
        pieces = [np.asarray(loaded.document(text), dtype=kind) for text in documents.texts]
        lengths = np.asarray([len(piece) for piece in pieces], dtype=np.int64)
        with whole_folder(folder) as partial:
            np.save(partial / "tokens.npy", np.concatenate(pieces))
            np.save(partial / "document_starts.npy", np.cumsum(lengths) - lengths)
            loaded.tokenizer.save_pretrained(str(partial / "tokenizer"))
            meta = {
                "vocabulary": loaded.vocabulary,
                "materials": [to_json(documents.material), to_json(loaded.material)],
                "characters": sum(len(text) for text in documents.texts),
                "tokens_sha256": sha256_of(partial / "tokens.npy"),
            }
            write_text(partial / "meta.json", json.dumps(meta, indent=1))
    return _open(folder)


@lru_cache(maxsize=8)
def _open(folder: Path) -> TokenFile:
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    if sha256_of(folder / "tokens.npy") != meta["tokens_sha256"]:
        raise ValueError(f"{folder} was changed after it was written; remove it and run again")
    materials = from_json(meta["materials"])
    assert isinstance(materials, tuple)
    return TokenFile(
        path=folder,
        tokens=np.load(folder / "tokens.npy", mmap_mode="r"),
        document_starts=np.load(folder / "document_starts.npy"),
        vocabulary=meta["vocabulary"],
        materials=materials,
        characters=meta["characters"],
    )


def _producers() -> list[str]:
    import importlib.metadata
    import platform

    producers = [f"python {platform.python_version()}"]
    for name in ("gensim", "tokenizers"):
        try:
            producers.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return producers


@dataclass(frozen=True, slots=True, kw_only=True)
class RowParts:
    """The part of a mixture that each row of a batch is of."""

    names: tuple[str, ...] = ()
    """Of all parts, those of no row here too: the same on every rank. None where one source is read."""
    of_rows: tuple[int, ...] = ()
    """Number of each row's part among `names`."""

    def __getitem__(self, rows: slice) -> "RowParts":
        """The parts of some of the rows."""
        return RowParts(names=self.names, of_rows=self.of_rows[rows])


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows of ids of one rank at one step.

    `tokens[:, :-1]` is the model's input and `tokens[:, 1:]` are its targets.
    """

    tokens: Int[Tensor, "batch row"]
    document_ids: Int[Tensor, "batch row"]
    """Number of the document that each id belongs to; a row may straddle several."""
    addresses: tuple[int, ...]
    """Row starts in the token file, so that an offending batch can be named and found again."""
    number: int = 0
    """The step; of a microbatch, how many came before it in the run. The same on every rank."""
    parts: RowParts = RowParts()

    def to(self, device: torch.device) -> Self:
        """The same batch on a device."""
        return type(self)(
            tokens=self.tokens.to(device, non_blocking=True),
            document_ids=self.document_ids.to(device, non_blocking=True),
            addresses=self.addresses,
            number=self.number,
            parts=self.parts,
        )

    def split(self, size: int) -> tuple[Self, ...]:
        """Microbatches of `size` rows, in order; the last may be smaller."""
        parts = -(-len(self.tokens) // size)
        return tuple(
            type(self)(
                tokens=self.tokens[first : first + size],
                document_ids=self.document_ids[first : first + size],
                addresses=self.addresses[first : first + size],
                number=self.number * parts + first // size,
                parts=self.parts[first : first + size],
            )
            for first in range(0, len(self.tokens), size)
        )


def epoch_order(rows: int, *, epoch: int, seed: int) -> Int[np.ndarray, " rows"]:
    """Order of the rows in one epoch: the same on every rank, for any number of ranks."""
    return np.random.default_rng((seed, epoch)).permutation(rows)


def share_of(batch: int, ranks: int) -> int:
    """Rows of one rank.

    Raises:
        ValueError: The ranks do not divide the batch.
    """
    if batch % ranks:
        raise ValueError(
            f"batch={batch} rows do not divide over {ranks} batch ranks; use a multiple of {ranks}"
        )
    return batch // ranks


class Stream(Protocol):
    """Rows in an order that is a function of the step: what the loop reads."""

    @property
    def file(self) -> TokenFile:
        """The ids; where several sources are read the first one's, all of which have its tokenizer."""
        ...

    @property
    def materials(self) -> tuple[Material, ...]:
        """All that the ids were made of."""
        ...

    @property
    def rows(self) -> int:
        """Rows of one pass over everything."""
        ...

    @property
    def weights(self) -> Mapping[str, float]:
        """The share of each part of a mixture, by its name; empty where one source is read."""
        ...

    def batch(self, step: int, *, batch: int, rank: int = 0, ranks: int = 1) -> Batch:
        """This rank's share of a step's global batch: a contiguous `1/ranks` of its rows.

        Raises:
            ValueError: The ranks do not divide the batch.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStream:
    """Rows of a token file in a seeded order, epoch after epoch.

    A row start that stands several times in `row_starts` is seen several times per epoch: that is how
    repetition is planted.
    """

    file: TokenFile
    row_starts: Int[np.ndarray, " rows"]
    sequence: int
    """Targets in a row; a row holds `sequence + 1` ids."""
    seed: int

    def __post_init__(self) -> None:
        last = int(self.row_starts.max(initial=-1)) + self.sequence + 1
        if len(self.row_starts) == 0 or last > len(self.file.tokens):
            raise ValueError(
                f"{len(self.row_starts)} rows of {self.sequence} + 1 ids end at {last}, but the corpus "
                f"has {len(self.file.tokens)} ids; use a shorter sequence or a larger corpus"
            )

    @property
    def tokens_per_epoch(self) -> int:
        """Targets in one pass over all rows."""
        return len(self.row_starts) * self.sequence

    @property
    def materials(self) -> tuple[Material, ...]:
        """See `Stream`."""
        return self.file.materials

    @property
    def rows(self) -> int:
        """See `Stream`."""
        return len(self.row_starts)

    @property
    def weights(self) -> Mapping[str, float]:
        """None: it is one source."""
        return {}

    def rows_at(self, positions: Int[np.ndarray, " row"]) -> Int[np.ndarray, " row"]:
        """The rows that stand at some positions (0-based) of the order.

        Epochs are joined end to end, so that every row is used exactly once per epoch for any batch.
        """
        epochs, offsets = np.divmod(positions, len(self.row_starts))
        rows = np.empty(len(positions), dtype=np.int64)
        for epoch in np.unique(epochs):
            order = _cached_order(len(self.row_starts), int(epoch), self.seed)
            rows[epochs == epoch] = order[offsets[epochs == epoch]]
        return rows

    def batch(self, step: int, *, batch: int, rank: int = 0, ranks: int = 1) -> Batch:
        """This rank's share of a step's global batch: a contiguous `1/ranks` of its rows.

        Raises:
            ValueError: The ranks do not divide the batch.
        """
        share = share_of(batch, ranks)
        first = step * batch + rank * share
        return self.read(np.arange(first, first + share), step)

    def read(self, positions: Int[np.ndarray, " row"], step: int) -> Batch:
        """The rows at some positions of the order, as the batch of a step."""
        starts = self.row_starts[self.rows_at(positions)]
        positions = starts[:, None] + np.arange(self.sequence + 1)
        documents = np.searchsorted(self.file.document_starts, positions, side="right") - 1
        return Batch(
            tokens=torch.from_numpy(self.file.tokens[positions].astype(np.int64)),
            document_ids=torch.from_numpy(documents),
            addresses=tuple(int(start) for start in starts),
            number=step,
        )


@lru_cache(maxsize=16)
def _cached_order(rows: int, epoch: int, seed: int) -> Int[np.ndarray, " rows"]:
    return epoch_order(rows, epoch=epoch, seed=seed)


class TokenSource(Protocol):
    """A value that opens a token stream: what a recipe holds."""

    def open(self, *, sequence: int, seed: int) -> Stream:
        """The training stream, tokenizing the corpus on first use."""
        ...

    def validation(self, *, sequence: int) -> Stream:
        """Rows that training never sees, in a fixed order."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Documents laid end to end and cut into rows; the last `held_out` share of the rows is left out."""

    corpus: Corpus
    tokenizer: Tokenizer
    held_out: float
    """Share of the rows kept for validation, from the end of the corpus; at least one row if above 0. A run
    is validated at its end at least, so at 0 it is refused."""

    def open(self, *, sequence: int, seed: int) -> TokenStream:
        """Training rows, shuffled per epoch."""
        file = tokenize(self.corpus, self.tokenizer)
        starts, _ = self._split(file, sequence)
        return TokenStream(file=file, row_starts=starts, sequence=sequence, seed=seed)

    def validation(self, *, sequence: int) -> TokenStream:
        """The rows left out of training.

        Raises:
            ValueError: No row is left out.
        """
        if self.held_out == 0:
            raise ValueError(
                "held_out=0 leaves no row to validate on; use a share above 0, which is at least one row"
            )
        file = tokenize(self.corpus, self.tokenizer)
        _, starts = self._split(file, sequence)
        return TokenStream(file=file, row_starts=starts, sequence=sequence, seed=0)

    def _split(
        self, file: TokenFile, sequence: int
    ) -> tuple[Int[np.ndarray, " rows"], Int[np.ndarray, " rows"]]:
        if not 0 <= self.held_out < 1:
            raise ValueError(
                f"held_out={self.held_out} is not a share; use 0 or more and less than 1"
            )
        starts = packed_starts(len(file.tokens), sequence)
        trained = len(starts) - int(np.ceil(self.held_out * len(starts)))
        return starts[:trained], starts[trained:]


def packed_starts(tokens: int, sequence: int) -> Int[np.ndarray, " rows"]:
    """Starts of rows that tile a flat file so that every id but the first is a target at most once."""
    return np.arange(0, tokens - sequence, sequence, dtype=np.int64)
