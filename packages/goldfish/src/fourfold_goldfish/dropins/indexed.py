"""The mask of an indexed data set of Megatron-LM or NeMo, as an indexed data set beside it.

Both train on pairs of files that megatron.core's `IndexedDataset` reads: `.bin`, all ids end to end, and
`.idx`, where each sequence begins and which end a document. `write_mask` decides every token of each document
once, and writes the decisions as such a pair of the same shape. A data set class that is opened on both with
one configuration draws the same samples from both, so masks do not depend on how samples are cut, shuffled or
sharded. The format is that of megatron-core 0.16, version 1 of the index.
"""

import itertools
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool, Int
from torch.utils.data import Dataset

from fourfold_goldfish.loss import Goldfish
from fourfold_parallel.common.files import whole_file
from fourfold_parallel.common.progress import Progress, silent

HEADER = b"MMIDIDX\x00\x00"
VERSION = 1
TYPES: Mapping[int, type[np.generic]] = {
    1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16,
}  # fmt: skip
"""Types of ids by their code in the index; those of floats are left out."""
_FIXED = struct.Struct("<QBQQ")
"""Version, type, number of sequences, number of document ends and the leading 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexedTokens:
    """The ids of an indexed data set, memory-mapped."""

    tokens: Int[np.ndarray, " token"]
    lengths: Int[np.ndarray, " sequence"]
    """Ids of each sequence, in the order of the file."""
    document_ends: Int[np.ndarray, " document+1"]
    """Sequences before the end of each document, from 0 on."""

    @classmethod
    def open(cls, prefix: str | os.PathLike[str]) -> "IndexedTokens":
        """Open `prefix.idx` and `prefix.bin`.

        Raises:
            ValueError: where the index is of another format, or the files do not fit together.
        """
        index = Path(f"{prefix}.idx").read_bytes()
        if not index.startswith(HEADER) or len(index) < len(HEADER) + _FIXED.size:
            raise ValueError(
                f"{prefix}.idx is no index of megatron.core; name the files without ending"
            )
        version, code, sequences, ends = _FIXED.unpack_from(index, len(HEADER))
        if version != VERSION or code not in TYPES:
            raise ValueError(
                f"{prefix}.idx has version {version} and type {code}; version {VERSION} and types "
                f"{sorted(TYPES)} (integers) are read"
            )
        place = len(HEADER) + _FIXED.size
        lengths = np.frombuffer(index, np.int32, sequences, place)
        begins = np.frombuffer(index, np.int64, sequences, place + 4 * sequences)
        document_ends = np.frombuffer(index, np.int64, ends, place + 12 * sequences)
        kind = np.dtype(TYPES[code])
        tokens = np.memmap(f"{prefix}.bin", kind, "r") if lengths.sum() else np.zeros(0, kind)
        expected = (np.cumsum(lengths, dtype=np.int64) - lengths) * kind.itemsize
        if len(tokens) != lengths.sum() or not np.array_equal(begins, expected):
            raise ValueError(
                f"{prefix}.bin has {len(tokens)} ids, its index {lengths.sum()} end to end; were the files "
                "written together?"
            )
        return cls(tokens=tokens, lengths=lengths, document_ends=document_ends)

    def documents(self) -> Iterator[Int[np.ndarray, " token"]]:
        """The ids of each document, its sequences joined."""
        ends = np.append(0, np.cumsum(self.lengths, dtype=np.int64))[self.document_ends]
        for begin, end in itertools.pairwise(ends):
            yield self.tokens[begin:end]


def write_mask(
    prefix: str | os.PathLike[str],
    goldfish: Goldfish,
    *,
    to: str | os.PathLike[str] | None = None,
    progress: Progress = silent,
) -> Path:
    """Write the mask of an indexed data set as one of the same shape: 1 where a target is left out.

    Args:
        prefix: the data set, without ending.
        goldfish: what is left out; decided within each document.
        to: the mask's files, without ending; `prefix` with `_goldfish` behind it where it is not given.
        progress: told after each document.

    Returns:
        The mask's prefix.

    Raises:
        ValueError: for a mask that is no function of a document (`straddle`, `random`, `static`).
    """
    if goldfish.boundary == "straddle" or goldfish.hash in ("random", "static"):
        raise ValueError(
            f"boundary={goldfish.boundary!r}, hash={goldfish.hash!r} decide by neighbours or places, which "
            "shuffling changes; use boundary='reset' or 'prefix' and a hash of tokens"
        )
    data = IndexedTokens.open(prefix)
    target = Path(f"{prefix}_goldfish" if to is None else to)
    total = len(data.document_ends) - 1
    with whole_file(Path(f"{target}.bin")) as partial, partial.open("wb") as file:
        for done, document in enumerate(data.documents(), start=1):
            file.write(_dropped(goldfish, document).astype(np.uint8).tobytes())
            progress(done, total, "documents masked")
    _write_index(target, np.dtype(np.uint8), data.lengths, data.document_ends)
    return target


def write_indexed(
    prefix: str | os.PathLike[str], documents: Sequence[Int[np.ndarray, " token"]]
) -> None:
    """Write documents of ids of one integer type, a sequence each, as an indexed data set.

    Raises:
        ValueError: for no document, or ids of a type that the format does not have.
    """
    kinds = {document.dtype for document in documents}
    if len(kinds) != 1 or not kinds & set(map(np.dtype, TYPES.values())):
        names = sorted(map(str, kinds)) or "no type"
        raise ValueError(
            f"documents of {names} are not written; use one of the integer types, such as uint16"
        )
    [kind] = kinds
    with whole_file(Path(f"{prefix}.bin")) as partial, partial.open("wb") as file:
        for document in documents:
            file.write(document.tobytes())
    lengths = np.asarray([len(document) for document in documents], dtype=np.int32)
    _write_index(Path(prefix), kind, lengths, np.arange(len(documents) + 1))


def _write_index(
    prefix: Path,
    kind: np.dtype[Any],
    lengths: Int[np.ndarray, " sequence"],
    document_ends: Int[np.ndarray, " document+1"],
) -> None:
    """Write the `.idx` file: type, lengths, byte offsets and document ends."""
    [code] = [code for code, known in TYPES.items() if np.dtype(known) == kind]
    begins = (np.cumsum(lengths, dtype=np.int64) - lengths) * kind.itemsize
    with whole_file(Path(f"{prefix}.idx")) as partial:
        partial.write_bytes(
            HEADER
            + _FIXED.pack(VERSION, code, len(lengths), len(document_ends))
            + lengths.astype(np.int32).tobytes()
            + begins.astype(np.int64).tobytes()
            + document_ends.astype(np.int64).tobytes()
        )


def _dropped(goldfish: Goldfish, document: Int[np.ndarray, " token"]) -> Bool[np.ndarray, " token"]:
    """The decisions of a document; one too short for the mask is supervised whole."""
    if len(document) < max(1, goldfish.shortest):
        return np.zeros(len(document), dtype=bool)
    return goldfish.drop(document[None])[0]


class Samples(Protocol):
    """A data set of samples with `labels` and `loss_mask`, as megatron.core's `GPTDataset` has them."""

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...

    def __len__(self) -> int: ...


class MaskedSamples(Dataset[dict[str, Any]]):
    """Samples whose loss mask is also 0 where goldfish leaves the label out.

    Args:
        samples: a data set of ids.
        masks: the same class opened with the same configuration on the files of `write_mask`.
    """

    def __init__(self, samples: Samples, masks: Samples) -> None:
        if len(samples) != len(masks):
            raise ValueError(
                f"{len(samples)} samples do not match {len(masks)} masks; open both with one "
                "configuration, on a data set and on what write_mask made of it"
            )
        self.samples, self.masks = samples, masks

    def __len__(self) -> int:
        """Samples."""
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The sample, its `loss_mask` narrowed; everything else is as it was."""
        sample, mask = dict(self.samples[index]), self.masks[index]
        sample["loss_mask"] = sample["loss_mask"] * (mask["labels"] != 1)
        return sample
