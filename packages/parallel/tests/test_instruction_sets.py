"""The shared vectors on every instruction set that can be run or emulated here."""

import ctypes
from pathlib import Path

import pytest

from fourfold_parallel.common import native
from fourfold_parallel.testing import machine_code

PROGRAM = """
#include "fourfold/vectors.h"
#include <cstdio>

// Lane j of the fold is the sum of the lanes of parts[j]; a transposed square; the ends of both exponentials.
extern "C" int wrong(void) {
    int faults = 0;
    Lanes parts[LANES], square[LANES];
    float sums[LANES] = {}, found[LANES];
    for (int64_t i = 0; i < LANES; ++i)
        for (int64_t j = 0; j < LANES; ++j) {
            parts[i][j] = float(i * i + 3 * j);
            square[i][j] = float(i * LANES + j);
            sums[i] += parts[i][j];
        }
    store(found, folded(parts));
    transpose(square);
    for (int64_t i = 0; i < LANES; ++i) {
        faults += found[i] != sums[i];
        for (int64_t j = 0; j < LANES; ++j) faults += square[i][j] != float(j * LANES + i);
    }
    float ramp[LANES];
    for (int64_t i = 0; i < LANES; ++i) ramp[i] = float((i * 7) % LANES);
    faults += across<larger>(load(ramp))[0] != float(LANES - 1);
    faults += across<added>(load(ramp))[LANES - 1] != float(LANES * (LANES - 1) / 2);
    for (float x = -86.5f; x < 87; x += 0.37f) {
        const float expected = float(std::exp(double(x)));
        faults += !(std::fabs(exponential(Lanes{} + x)[1] - expected) <= 4e-7f * expected);
    }
    faults += exponential(Lanes{} - 100.0f)[0] != 0;
    for (double x = -690; x <= 0; x += 1.7) {
        const double expected = std::exp(x);
        faults += !(std::fabs(wide_exponential(Doubles{} + x)[0] - expected) <= 1e-10 * expected);
    }
    faults += wide_exponential(Doubles{} - std::numeric_limits<double>::infinity())[0] != 0;
    alignas(64) BFloat16 halves[LANES];
    for (int64_t i = 0; i < LANES; ++i) halves[i].bits = uint16_t(0x3f80 + i);
    store(found, load(halves));
    for (int64_t i = 0; i < LANES; ++i) faults += as<uint32_t>(found[i]) >> 16 != halves[i].bits;
    return faults;
}

extern "C" int lanes(void) { return LANES; }

#ifdef ALONE
int main() {
    std::printf("%d %d\\n", lanes(), wrong());
    return 0;
}
#endif
"""

needs_compiler = pytest.mark.skipif(
    native.compiler() is None, reason="needs a C++ compiler, as Debian's g++"
)
X86 = {"x86-64": 4, "x86-64-v3": 8, "x86-64-v4": 16}
"""Lanes by instruction set."""
NEEDED = {"x86-64": "sse2", "x86-64-v3": "avx2", "x86-64-v4": "avx512bw"}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = tmp_path / "sources" / "fourfold_vectors_example"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "vectors.cpp").write_text(PROGRAM)
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path / "cache"))
    return folder.name


@needs_compiler
@pytest.mark.parametrize("instructions", X86)
def test_vectors_of_each_width(
    package: str, instructions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if NEEDED[instructions] not in native.processor():
        pytest.skip(f"this processor has no {NEEDED[instructions]}")
    monkeypatch.setenv("FOURFOLD_INSTRUCTIONS", instructions)
    native.load.cache_clear()
    library = native.load(package, "vectors.cpp")
    native.load.cache_clear()
    assert library is not None
    assert (library.lanes(), library.wrong()) == (X86[instructions], 0)


@pytest.mark.skipif(not machine_code.can_emulate(), reason=machine_code.NEED)
@pytest.mark.parametrize(("kind", "lanes"), [("NEON", 4), ("SVE", 8)])
def test_vectors_of_arm_under_an_emulator(
    package: str, kind: str, lanes: int, tmp_path: Path
) -> None:
    text = "#define ALONE\n" + native.whole_source(package, "vectors.cpp")
    written = machine_code.run_on_arm(machine_code.built_for_arm(text, kind, tmp_path))
    assert written.split() == [str(lanes).encode(), b"0"]


@needs_compiler
def test_the_wheels_compiler_builds_the_same(
    package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where nothing is on PATH and ziglang is installed."""
    pytest.importorskip(native.WHEEL, reason="needs ziglang, the extra [compiler]")
    monkeypatch.setattr(native, "COMPILERS", ())
    command = native.compiler()
    assert command is not None
    assert native.WHEEL in command
    library = ctypes.CDLL(str(native.build(package, "vectors.cpp", command)))
    assert library.wrong() == 0


def test_the_way_to_the_faster_form_is_said(
    package: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "COMPILERS", ())
    monkeypatch.setattr(native, "WHEEL", "no_such_wheel")
    native.load.cache_clear()
    assert native.load(package, "vectors.cpp") is None
    native.load.cache_clear()
    assert "pip install no_such_wheel" in caplog.text
