"""C++ beside Python: compiled once, kept under a name of its own, and never a reason to fail."""

import ctypes
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fourfold_parallel.common import native

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, native.COMPILERS)), reason="needs a C++ compiler, as Debian's g++"
)


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    native.load.cache_clear()
    yield
    native.load.cache_clear()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package of one C++ file, `twice.cpp`; and a cache of its own."""
    folder = tmp_path / "sources" / "fourfold_native_example"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "twice.cpp").write_text('extern "C" int twice(int x) { return 2 * x; }')
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.delitem(sys.modules, folder.name, raising=False)
    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path / "cache"))
    return folder.name


@needs_compiler
def test_a_source_is_compiled_once_and_anew_when_it_changes(package: str, tmp_path: Path) -> None:
    library = native.load(package, "twice.cpp")
    assert library is not None
    assert library.twice(ctypes.c_int(21)) == 42
    command = native.compiler()
    assert command is not None
    built = native.build(package, "twice.cpp", command)
    made = built.stat()
    assert native.build(package, "twice.cpp", command).stat().st_mtime_ns == made.st_mtime_ns
    assert [path for path in built.parent.iterdir() if path != built] == []
    source = tmp_path / "sources" / package / "twice.cpp"
    source.write_text(source.read_text().replace("2 * x", "3 * x"))
    assert native.build(package, "twice.cpp", command) != built


@needs_compiler
def test_a_header_is_part_of_the_source(package: str, tmp_path: Path) -> None:
    """A change of it is compiled."""
    folder = tmp_path / "sources" / package
    source, header = folder / "thrice.cpp", folder / "factor.h"
    source.write_text('#include "factor.h"\nextern "C" int thrice(int x) { return FACTOR * x; }')
    command = native.compiler()
    assert command is not None
    built = []
    for factor in (3, 4):
        header.write_text(f"#define FACTOR {factor}\n")
        built.append(native.build(package, source.name, command))
        assert ctypes.CDLL(str(built[-1])).thrice(ctypes.c_int(7)) == 7 * factor
    assert built[0] != built[1]


def test_without_a_compiler_there_is_no_library(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level("INFO"):
        assert native.load(package, "twice.cpp") is None
        assert native.load(package, "twice.cpp") is None
    assert caplog.text.count("torch's operations stand for twice.cpp") == 1


def test_a_compiler_that_fails_is_named(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'no space left' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert native.load(package, "twice.cpp") is None
    assert "no space left" in caplog.text
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("units", [0, 1, 2, 7])
def test_threads_share_every_unit_once(threads: int, units: int) -> None:
    before = torch.get_num_threads()
    done: list[int] = []
    try:
        torch.set_num_threads(threads)
        native.share(units, lambda first, last: done.extend(range(first, last)))
    finally:
        torch.set_num_threads(before)
    assert sorted(done) == list(range(units))


@pytest.mark.parametrize("ends", ["an error in the first part", "an interrupted wait"])
def test_no_part_outlives_the_call(ends: str) -> None:
    """A part computes with memory of the caller, who frees it when the call raises."""
    has_ended = threading.Event()

    def work(first: int, last: int) -> None:
        if first:
            time.sleep(0.1)
            if ends == "an interrupted wait":
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            time.sleep(0.2)
            has_ended.set()
        elif ends == "an error in the first part":
            raise KeyboardInterrupt

    before = torch.get_num_threads()
    # A shell starts what runs in the background with interrupts ignored.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        torch.set_num_threads(2)
        with pytest.raises(KeyboardInterrupt):
            native.share(2, work)
    finally:
        torch.set_num_threads(before)
        signal.signal(signal.SIGINT, handler)
    assert has_ended.is_set()


def test_a_forked_process_has_threads_of_its_own() -> None:
    """In a process of its own, since this one's other threads may hold locks where it forks."""
    program = """
import os, signal, torch
from fourfold_parallel.common.native import share
torch.set_num_threads(2)
share(2, lambda first, last: None)
if child := os.fork():
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
signal.alarm(60)
share(2, lambda first, last: None)
os._exit(7)
"""
    command = [sys.executable, "-W", "ignore", "-c", program]
    assert subprocess.run(command, timeout=100, check=False).returncode == 7


@needs_compiler
def test_further_flags_make_another_library(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command = native.compiler()
    assert command is not None
    plain = native.build(package, "twice.cpp", command)
    monkeypatch.setenv("FOURFOLD_CXXFLAGS", "-O1 -Dtwice=thrice")
    other = native.build(package, "twice.cpp", command)
    assert other != plain
    assert hasattr(ctypes.CDLL(str(other)), "thrice")
