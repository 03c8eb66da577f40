"""The mask in C++ gives, bit for bit, what torch's operations give."""

import itertools
import shutil

import pytest
import torch

from fourfold_goldfish import Goldfish, compiled_mask
from fourfold_parallel.common import native

needs_compiler = pytest.mark.skipif(
    native.compiler() is None, reason="needs a C++ compiler, as Debian's g++"
)


def texts(*, rows: int, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids up to the largest that int32 holds, and documents of which one comes back."""
    generator = torch.Generator().manual_seed(rows * row)
    tokens = torch.randint(0, 2**31 - 1, (rows, row), generator=generator)
    tokens[:, ::3] %= 5
    documents = torch.randint(0, 2, (rows, row), generator=generator).cumsum(1) // 5 % 3
    return tokens, documents


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("context", [1, 2, 13])
@pytest.mark.parametrize("boundary", ["reset", "prefix", "straddle"])
@pytest.mark.parametrize("window", ["exclusive", "inclusive"])
def test_both_forms_drop_the_same(
    dtype: torch.dtype, context: int, boundary: str, window: str
) -> None:
    """For several rates and keys, with documents and without, in the shortest rows and in longer ones."""
    for k, key in ((2, 0), (5, 77)):
        mask = Goldfish(k=k, context=context, boundary=boundary, window=window, key=key)  # type: ignore[arg-type]
        for rows, row in itertools.product((1, 3), (max(1, mask.shortest), 40)):
            tokens, documents = texts(rows=rows, row=row)
            for of in (None, documents):
                assert compiled_mask.takes(tokens.to(dtype))
                dropped = mask.drop(tokens.to(dtype), of)
                assert torch.equal(dropped, mask._by_operations(tokens, of))
                assert row < 40 or bool(dropped.any())


@needs_compiler
def test_threads_share_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, documents = texts(rows=7, row=64)
    mask = Goldfish(k=3, context=4)
    alone = mask.drop(tokens, documents)
    monkeypatch.setattr(compiled_mask, "WORTH_SHARING", 0)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(mask.drop(tokens, documents), alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_negative_id_is_refused_wherever_it_stands(
    is_compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_compiled:
        monkeypatch.setattr(compiled_mask, "library", lambda: None)
    elif not any(map(shutil.which, native.COMPILERS)):
        pytest.skip("needs a C++ compiler, as Debian's g++")
    for place in (0, 5, 19):
        for boundary in ("reset", "prefix"):
            tokens = torch.ones(2, 20, dtype=torch.int32)
            tokens[1, place] = -100
            with pytest.raises(ValueError, match="hash the input ids, before any label"):
                Goldfish(k=4, context=3, boundary=boundary).drop(tokens)  # type: ignore[arg-type]


def test_without_a_compiler_operations_stand_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, documents = texts(rows=2, row=30)
    mask = Goldfish(k=4, context=3, exempt=(1, 2))
    ours = mask.drop(tokens, documents)
    monkeypatch.setattr(compiled_mask, "library", lambda: None)
    assert not compiled_mask.takes(tokens)
    assert torch.equal(mask.drop(tokens, documents), ours)
