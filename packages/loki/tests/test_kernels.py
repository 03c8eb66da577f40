"""The fast twins against the reference, at shapes that are no powers of two."""

import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fourfold_loki.attention import approximate_scores, attend
from fourfold_loki.budget import Budget, Count
from fourfold_loki.cache import TILE, tiled
from fourfold_loki.kernels import cpu, native
from fourfold_loki.kernels.dispatch import twin
from fourfold_loki.kernels.page_read import PageRead
from fourfold_parallel.common import native as runtime
from fourfold_parallel.common.native import COMPILERS
from fourfold_parallel.testing import machine_code

FLOAT32 = 2e-5
BFLOAT16 = 1e-2
"""Inputs are rounded alike for both sides; what is left is the output's own rounding."""
SHAPES = [
    # batch, heads, kv_heads, head width, width, tokens, keys, page
    (1, 1, 1, 64, 8, 17, 7, 1),
    (2, 6, 2, 64, 16, 255, 64, 16),
    (1, 9, 3, 64, 16, 1000, 256, 16),
    (1, 8, 2, 128, 32, 250, 128, 32),
    (2, 4, 4, 32, 12, 100, 30, 1),
    (1, 3, 1, 80, 20, 97, 64, 16),
]
LARGEST_PAGE = 64


def scene(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, kv_heads, head_width, width, tokens, _, _ = shape
    generator = torch.Generator().manual_seed(tokens)
    room = tokens + -tokens % LARGEST_PAGE + LARGEST_PAGE

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    queries = normal(batch, heads, 1, head_width)
    keys = normal(batch, kv_heads, room, head_width)
    values = normal(batch, kv_heads, room, head_width - 16)
    return queries, keys, values, tiled(keys[..., :width])


def read_of(shape: tuple[int, ...], *, sinks: int, window: int) -> PageRead:
    return PageRead(
        length=shape[5],
        pages=shape[6] // shape[7],
        page=shape[7],
        sinks=sinks,
        window=window,
        scaling=shape[3] ** -0.5,
    )


def reference(shape: tuple[int, ...], *, sinks: int = 0, window: int = 0) -> Tensor:
    _, _, kv_heads, head_width, width, tokens, count, page = shape
    queries, keys, values, _ = scene(shape)
    keys, values = keys[:, :, :tokens], values[:, :, :tokens]
    scaling = head_width**-0.5
    budget = Budget(amount=Count(keys=count), page=page, sinks=sinks, window=window)
    visible = torch.ones(queries.shape[0], 1, 1, tokens, dtype=torch.bool)
    scores = approximate_scores(queries, keys, width=width, scaling=scaling)
    keep = budget.keep(scores, visible, kv_heads=kv_heads, layer=0)
    return attend(queries, keys, values, keep, scaling=scaling)


needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, COMPILERS)), reason="needs a C++ compiler, as Debian's g++"
)
TWINS = [
    pytest.param(cpu.decode, id="torch"),
    pytest.param(native.decode, id="compiled", marks=needs_compiler),
]


@pytest.mark.parametrize("decode", TWINS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("sinks", "window"), [(0, 0), (2, 4)])
def test_a_cpu_twin_is_the_reference(
    decode: Callable[..., Tensor], shape: tuple[int, ...], sinks: int, window: int
) -> None:
    queries, keys, values, leading = scene(shape)
    output = decode(
        queries,
        keys,
        values,
        leading,
        read_of(shape, sinks=sinks, window=window),
    )
    torch.testing.assert_close(
        output, reference(shape, sinks=sinks, window=window), atol=FLOAT32, rtol=FLOAT32
    )


@needs_compiler
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="x86-64-v3 needs a processor with AVX2",
)
@pytest.mark.parametrize("instructions", ["x86-64", "x86-64-v3"])
def test_narrower_vectors_are_the_reference(
    instructions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOURFOLD_INSTRUCTIONS", instructions)
    runtime.load.cache_clear()
    for shape in SHAPES:
        output = native.decode(*scene(shape), read_of(shape, sinks=2, window=4))
        expected = reference(shape, sinks=2, window=4)
        torch.testing.assert_close(output, expected, atol=FLOAT32, rtol=FLOAT32)
    runtime.load.cache_clear()


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_pages_of_a_head_are_shared_among_threads(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of a softmax put together are the whole, also where threads are more than heads and pages."""
    monkeypatch.setattr(native, "WORTH_SHARING", 0)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for shape in SHAPES:
            output = native.decode(*scene(shape), read_of(shape, sinks=0, window=0))
            torch.testing.assert_close(output, reference(shape), atol=FLOAT32, rtol=FLOAT32)
    finally:
        torch.set_num_threads(before)


READ = PageRead(length=255, pages=4, page=16, sinks=0, window=0, scaling=0.125)


@pytest.mark.parametrize("decode", TWINS)
def test_a_batch_of_no_rows_has_no_output(decode: Callable[..., Tensor]) -> None:
    """In a server that batches, the rows may all have ended."""
    queries, keys, values, leading = (part[:0] for part in scene(SHAPES[1]))
    assert decode(queries, keys, values, leading, READ).shape == (0, 6, 1, 48)
    assert cpu.dense(queries, keys, values, length=255, scaling=0.1).shape == (0, 6, 1, 48)


@needs_compiler
def test_the_compiled_twin_reads_bfloat16() -> None:
    parts = [part.bfloat16() for part in scene(SHAPES[1])]
    assert twin(*parts) is native.decode
    expected = cpu.decode(*(part.float() for part in parts), READ)
    output = native.decode(*parts, READ)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, atol=BFLOAT16, rtol=BFLOAT16)


@needs_compiler
def test_threads_share_the_heads_and_change_nothing() -> None:
    before = torch.get_num_threads()
    outputs = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            outputs.append(native.decode(*scene(SHAPES[1]), READ))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*outputs)


@needs_compiler
def test_scores_far_apart_leave_no_weight_undefined() -> None:
    queries, keys, values, leading = scene(SHAPES[1])
    scaled = (1000 * queries, keys, values, leading)
    expected = cpu.decode(*scaled, READ)
    torch.testing.assert_close(native.decode(*scaled, READ), expected, atol=1e-3, rtol=1e-3)


@needs_compiler
def test_the_compiled_twin_refuses_what_it_cannot_read() -> None:
    queries, keys, values, leading = scene(SHAPES[1])
    with pytest.raises(ValueError, match=r"float64 .* contiguous float32 or bfloat16"):
        native.decode(queries.double(), keys, values, leading, READ)
    narrow = keys[..., :40].contiguous()
    assert twin(queries[..., :40], narrow, values, leading) is cpu.decode
    with pytest.raises(ValueError, match=r"pages=17 of length=255 with pages of 16.*1 to 16"):
        native.decode(queries, keys, values, leading, replace(READ, pages=17))


@needs_compiler
def test_the_compiled_twin_reads_within_its_tensors() -> None:
    """It reads the sizes of the keys, so a tensor of another cache would be read beyond its end."""
    queries, keys, values, leading = scene(SHAPES[1])
    assert native.takes(queries, keys, values, leading)
    half = keys.shape[2] // 2 // TILE * TILE
    for others in (
        (queries[:0], keys, values, leading),
        (queries[:, :-1], keys, values, leading),
        (queries, keys, values[:, :, :half].contiguous(), leading),
        (queries, keys, values[:, :1].contiguous(), leading),
        (queries, keys, values, leading[:, :, : half // TILE].contiguous()),
        (queries, keys, values, leading[:0]),
    ):
        assert not native.takes(*others)


def test_without_a_compiler_torch_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    assert twin(*scene(SHAPES[1])) is cpu.decode


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_dense_twin_is_full_attention(shape: tuple[int, ...]) -> None:
    queries, keys, values, _ = scene(shape)
    output = cpu.dense(queries, keys, values, length=shape[5], scaling=0.1)
    everything = torch.ones(queries.shape[0], 1, 1, shape[5], dtype=torch.bool)
    expected = attend(
        queries, keys[:, :, : shape[5]], values[:, :, : shape[5]], everything, scaling=0.1
    )
    torch.testing.assert_close(output, expected, atol=FLOAT32, rtol=FLOAT32)


ON_ARM = """
int main() {
    const int64_t stacks = read<int64_t>(1)[0];
    Sizes s;
    std::memcpy(&s, read<int64_t>(11).data(), sizeof s);
    const auto queries = read<float>(stacks * s.group * s.head_width);
    const auto keys = read<float>(stacks * s.room * s.head_width);
    const auto values = read<float>(stacks * s.room * s.value_width);
    const auto leading = read<float>(stacks * s.room * s.width);
    std::vector<float> parted(stacks * s.parts * s.group * s.value_width), logs(stacks * s.parts * s.group);
    std::vector<float> output(stacks * s.group * s.value_width);
    const Call call{queries.data(), keys.data(),   values.data(), leading.data(),
                    parted.data(),  logs.data(), s,             0};
    fourfold_loki_decode(&call, 0, stacks * s.parts);
    fourfold_loki_merge(&call, output.data(), stacks);
    std::fwrite(output.data(), sizeof(float), output.size(), stdout);
}
"""


@pytest.mark.skipif(not machine_code.can_emulate(), reason=machine_code.NEED)
@pytest.mark.parametrize("kind", list(machine_code.ARM))
def test_arms_vectors_are_the_reference(kind: str, tmp_path: Path) -> None:
    """The kernel cross-compiled, under an emulator; a head's pages in two parts."""
    text = runtime.whole_source("fourfold_loki.kernels", "decode.cpp") + machine_code.READ + ON_ARM
    built = machine_code.built_for_arm(text, kind, tmp_path)
    for shape in (SHAPES[1], SHAPES[2], SHAPES[5]):
        queries, keys, values, leading = scene(shape)
        read = read_of(shape, sinks=2, window=4)
        batch, kv_heads, room, head_width = keys.shape
        stacks = batch * kv_heads
        sizes = (
            stacks, queries.shape[1] // kv_heads, head_width, values.shape[-1], leading.shape[3], room,
            read.length, read.pages, read.page, read.sinks, read.window, 2,
        )  # fmt: skip
        given = torch.tensor(sizes).numpy().tobytes()
        given += b"".join(
            part.numpy().tobytes() for part in (queries * read.scaling, keys, values, leading)
        )
        written = machine_code.run_on_arm(built, given=given)
        output = torch.frombuffer(bytearray(written), dtype=torch.float32)
        expected = reference(shape, sinks=2, window=4)
        torch.testing.assert_close(output.view_as(expected), expected, atol=FLOAT32, rtol=FLOAT32)


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="counts x86's instructions")
@pytest.mark.parametrize("instructions", ["x86-64-v3", "x86-64-v4"])
def test_registers_hold_what_is_computed_with(instructions: str) -> None:
    """Two vector instructions in three touched the stack when 16 lanes were two registers; 4 to 5 % do."""
    command = runtime.compiler()
    assert command is not None
    share = machine_code.stack_share("fourfold_loki.kernels", "decode.cpp", instructions, command)
    assert share < 0.1


VECTORS = {
    "sm_80": r"fma\.rn\.f32",
    "sm_90": r"fma\.rn\.f32",
    "sm_100": r"(fma\.rn|add)\.f32x2",
    "gfx942": r"v_pk_fma_f32",
}


@pytest.mark.parametrize("target", VECTORS)
def test_machine_code_for_gpus(target: str) -> None:
    """No register goes to memory, shared memory fits, caches are read 16 bytes at a time, vectors add."""
    pytest.importorskip("triton", reason="needs triton, the extra [triton] of this package")
    from fourfold_loki.kernels import triton
    from fourfold_parallel.testing import gpu_code

    for heads, kv_heads, width in ((9, 3, 64), (32, 8, 128)):
        queries = torch.zeros(1, heads, 1, width, dtype=torch.bfloat16)
        keys, values = torch.zeros(2, 1, kv_heads, 1024, width, dtype=torch.bfloat16)
        read = replace(READ, length=1024, pages=16)
        with gpu_code.launches() as caught:
            triton.decode(queries, keys, values, tiled(keys[..., : width // 4]), read)
        assert [one.name for one in caught] == ["score_kernel", "gather_kernel", "merge_kernel"]
        for one in caught:
            code = gpu_code.compiled(one, target)
            assert code.spilled_bytes == 0
            assert 0 < code.registers < 256
            assert code.shared_bytes <= gpu_code.SHARED_LIMITS[target]
            wide = r"global_load_dwordx[24]" if target == "gfx942" else r"ld\.global\S*\.v4\.b32"
            assert code.has(wide)
            # Two float32 at a time where a processor can.
            assert code.has(VECTORS[target])


def test_triton_through_its_interpreter() -> None:
    """In a process of its own, since the interpreter is chosen when triton is imported."""
    pytest.importorskip("triton", reason="needs triton, the extra [triton] of this package")
    done = subprocess.run(
        [sys.executable, __file__],
        env={"TRITON_INTERPRET": "1", "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["equal"] * 7


def interpret() -> None:
    """Run the kernels on CPU tensors and compare; in float16 once."""
    from fourfold_loki.kernels import triton

    for shape in SHAPES:
        queries, keys, values, leading = scene(shape)
        output = triton.decode(
            queries,
            keys,
            values,
            leading,
            read_of(shape, sinks=2, window=4),
        )
        expected = reference(shape, sinks=2, window=4)
        torch.testing.assert_close(output, expected, atol=FLOAT32, rtol=FLOAT32)
        sys.stdout.write("equal\n")
    queries, keys, values, leading = (part.half() for part in scene(SHAPES[1]))
    ours = triton.decode(queries, keys, values, leading, READ)
    theirs = cpu.decode(queries.float(), keys.float(), values.float(), leading.float(), READ)
    torch.testing.assert_close(ours.float(), theirs, atol=2e-3, rtol=2e-3)
    sys.stdout.write("equal\n")


if __name__ == "__main__":
    interpret()
