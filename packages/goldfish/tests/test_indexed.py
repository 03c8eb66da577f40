"""Masks of indexed data sets: files of megatron-core 0.16.1's own writer are read, and ours are its files."""

import base64
from pathlib import Path

import numpy as np
import pytest
import torch

from fourfold_goldfish import Goldfish
from fourfold_goldfish.dropins.indexed import (
    IndexedTokens,
    MaskedSamples,
    write_indexed,
    write_mask,
)

INDEX = """
TU1JRElEWAAAAQAAAAAAAAAIBgAAAAAAAAAGAAAAAAAAACgAAAADAAAAGQAAAB4AAAASAAAAQAAAAAAAAAAAAAAAUAAAAAAAAABW
AAAAAAAAAIgAAAAAAAAAxAAAAAAAAADoAAAAAAAAAAAAAAAAAAAAAQAAAAAAAAACAAAAAAAAAAQAAAAAAAAABQAAAAAAAAAGAAAA
AAAAAA==
"""
"""`small.idx` as `IndexedDatasetBuilder` of megatron-core 0.16.1 wrote it, for uint16 ids: documents of
sequences of 40, of 3, of 25 and 30, of 18 and of 64 ids."""
MASK = """
TU1JRElEWAAAAQAAAAAAAAABBgAAAAAAAAAGAAAAAAAAACgAAAADAAAAGQAAAB4AAAASAAAAQAAAAAAAAAAAAAAAKAAAAAAAAAAr
AAAAAAAAAEQAAAAAAAAAYgAAAAAAAAB0AAAAAAAAAAAAAAAAAAAAAQAAAAAAAAACAAAAAAAAAAQAAAAAAAAABQAAAAAAAAAGAAAA
AAAAAAAAAAAAAAAAAAEAAAAAAAABAAAAAAEAAAAAAQAAAAAAAAAAAAEAAAAAAQAAAAAAAAAAAQABAAEAAAAAAAAAAQABAAEAAQAB
AAABAQAAAQABAAAAAAAAAQAAAAAAAAAAAAEAAAEAAAAAAAAAAQEBAAABAAAAAAEAAAAAAQEBAAAAAQEAAQAAAAAAAQAAAAAAAAAA
AAAAAAAAAAABAQAAAAEAAAAAAAAAAAAAAAAAAQABAAEBAQ==
"""
"""What it wrote for the decisions of `Goldfish(k=4, context=5, boundary="prefix")` on them, as uint8."""
DOCUMENTS = ((40,), (3,), (25, 30), (18,), (64,))
GOLDFISH = Goldfish(k=4, context=5, boundary="prefix")


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """The data set, its ids drawn as they were when the files were written."""
    random = np.random.default_rng(0)
    ids = [random.integers(0, 50_000, count) for lengths in DOCUMENTS for count in lengths]
    (tmp_path / "small.bin").write_bytes(np.concatenate(ids).astype(np.uint16).tobytes())
    (tmp_path / "small.idx").write_bytes(base64.b64decode(INDEX))
    return tmp_path / "small"


def test_documents_are_read_as_they_were_written(prefix: Path) -> None:
    data = IndexedTokens.open(prefix)
    assert [len(document) for document in data.documents()] == [sum(d) for d in DOCUMENTS]
    assert data.tokens.dtype == np.uint16
    flat = [np.asarray(document) for document in data.documents()]
    write_indexed(prefix.parent / "flat", flat)
    again = IndexedTokens.open(prefix.parent / "flat")
    assert np.array_equal(again.tokens, data.tokens)
    assert again.lengths.tolist() == [len(document) for document in flat]
    with pytest.raises(ValueError, match="float64"):
        write_indexed(prefix.parent / "flat", [np.zeros(3)])
    assert data.lengths.tolist() == [count for lengths in DOCUMENTS for count in lengths]


def test_a_mask_has_the_bytes_of_megatron_s_own_writer(prefix: Path) -> None:
    """Index and decisions, bit for bit."""
    target = write_mask(prefix, GOLDFISH)
    written = Path(f"{target}.idx").read_bytes() + Path(f"{target}.bin").read_bytes()
    assert written == base64.b64decode(MASK)


def test_each_document_is_decided_by_itself_and_whole(prefix: Path) -> None:
    """Sequences of one document are joined; a document too short for the mask is supervised whole."""
    for goldfish in (
        GOLDFISH,
        Goldfish(k=2, context=4),
        Goldfish(k=2, context=5, hash="reference"),
    ):
        data = IndexedTokens.open(prefix)
        masks = IndexedTokens.open(write_mask(prefix, goldfish, to=prefix.parent / "m"))
        for document, mask in zip(data.documents(), masks.documents(), strict=True):
            tokens = torch.from_numpy(document.astype(np.int64))[None]
            short = len(document) < goldfish.shortest
            expected = np.zeros(len(document)) if short else goldfish.drop(tokens)[0].numpy()
            np.testing.assert_array_equal(mask, expected)


def test_samples_lose_the_labels_that_are_left_out(prefix: Path) -> None:
    """As GPTDataset cuts them: windows of ids, labels one further, from any place of the file."""
    data = IndexedTokens.open(prefix)
    masks = IndexedTokens.open(write_mask(prefix, GOLDFISH))

    def cut(values: np.ndarray) -> list[dict[str, torch.Tensor]]:
        rows = [torch.from_numpy(values[i : i + 17].astype(np.int64)) for i in range(0, 160, 16)]
        return [{"tokens": r[:-1], "labels": r[1:], "loss_mask": torch.ones(16)} for r in rows]

    samples, flags = cut(data.tokens), cut(masks.tokens)
    masked = MaskedSamples(samples, flags)
    assert len(masked) == 10
    for index, sample in enumerate(samples):
        assert torch.equal(masked[index]["loss_mask"], 1.0 - flags[index]["labels"])
        assert torch.equal(masked[index]["labels"], sample["labels"])
        assert bool(sample["loss_mask"].all())
    with pytest.raises(ValueError, match="10 samples do not match 9 masks"):
        MaskedSamples(samples, flags[:9])


def test_what_cannot_be_masked_is_refused(prefix: Path) -> None:
    with pytest.raises(ValueError, match="which shuffling changes"):
        write_mask(prefix, Goldfish(k=4, context=5, boundary="straddle"))
    with pytest.raises(ValueError, match="which shuffling changes"):
        write_mask(prefix, Goldfish(k=4, context=5, hash="random"))
    index = prefix.with_suffix(".idx")
    whole = index.read_bytes()
    index.write_bytes(whole[:9] + b"\x02" + whole[10:])
    with pytest.raises(ValueError, match="has version 2"):
        IndexedTokens.open(prefix)
    index.write_bytes(b"TNTIDX" + whole[6:])
    with pytest.raises(ValueError, match=r"no index of megatron\.core"):
        IndexedTokens.open(prefix)
    index.write_bytes(whole)
    prefix.with_suffix(".bin").write_bytes(b"\x00" * 10)
    with pytest.raises(ValueError, match="written together"):
        IndexedTokens.open(prefix)
