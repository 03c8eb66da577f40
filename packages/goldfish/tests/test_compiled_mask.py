"""The mask in C++ gives, bit for bit, what torch's operations give."""

import ctypes
import itertools
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch

from fourfold_goldfish import Goldfish, compiled_mask
from fourfold_parallel.common import native
from fourfold_parallel.testing import machine_code

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


ON_ARM = """
int main() {
    const int64_t rows = read<int64_t>(1)[0];
    const Mask mask = read<Mask>(1)[0];
    const auto tokens = read<int64_t>(rows * mask.row), documents = read<int64_t>(rows * mask.row);
    std::vector<uint8_t> dropped(rows * mask.row);
    fourfold_goldfish_drop(&mask, tokens.data(), 1, documents.data(), dropped.data(), 0, rows);
    std::fwrite(dropped.data(), 1, dropped.size(), stdout);
}
"""


class OnArm:
    """Stands for the compiled function: the same call, cross-compiled, under an emulator."""

    restype: Any = None

    def __init__(self, kind: str, folder: Path) -> None:
        text = native.whole_source("fourfold_goldfish", "mask.cpp") + machine_code.READ + ON_ARM
        self.built = machine_code.built_for_arm(text, kind, folder)
        self.calls = 0

    def __call__(
        self,
        mask: Any,
        ids: Any,
        are_long: Any,
        documents: Any,
        dropped: Any,
        first: Any,
        last: Any,
    ) -> int:
        assert (are_long.value, first.value) == (1, 0)
        count = last.value * mask._obj.row
        given = bytes(last) + bytes(mask._obj)
        given += ctypes.string_at(ids, 8 * count) + ctypes.string_at(documents, 8 * count)
        ctypes.memmove(dropped, machine_code.run_on_arm(self.built, given=given), count)
        self.calls += 1
        return 0


@pytest.mark.skipif(not machine_code.can_emulate(), reason=machine_code.NEED)
@pytest.mark.parametrize("kind", list(machine_code.ARM))
def test_arms_mask_is_the_same(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows that reset at documents, and that begin with them."""
    on_arm = OnArm(kind, tmp_path)
    monkeypatch.setattr(
        compiled_mask, "library", lambda: SimpleNamespace(fourfold_goldfish_drop=on_arm)
    )
    tokens, documents = texts(rows=5, row=40)
    boundaries: tuple[Literal["reset", "prefix"], ...] = ("reset", "prefix")
    for boundary in boundaries:
        mask = Goldfish(k=3, context=4, boundary=boundary)
        expected = mask._by_operations(tokens, documents)
        assert torch.equal(mask.drop(tokens, documents), expected)
        assert expected.any()
    assert on_arm.calls == len(boundaries)


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
