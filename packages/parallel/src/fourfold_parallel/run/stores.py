"""Stores: slower memories that hold activations between forward and backward.

A store is a frozen value of a recipe; `open` gives its `Shelf`, which moves bytes and nothing else. `Ways`
are the two lanes to a shelf, a thread each, first come, first served: a write and a read may be under way
at once. Whatever fails is raised where the bytes are waited for, and names the block and the place.
"""

from __future__ import annotations

import errno
import os
import tempfile
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fourfold_parallel.plan.machine import Channel

ALIGNMENT = 4096
"""Places in a file begin at multiples of this, as disks read."""


class StoreError(OSError):
    """Activations that could not be written, or read back as they were."""


class Shelf(Protocol):
    """A place for bytes. Both lanes use it, each from a thread of its own."""

    def write(self, pieces: Sequence[Tensor]) -> Any:
        """Keep the bytes of these tensors (uint8, one-dimensional), and give what names them.

        Raises:
            StoreError: They could not be kept.
        """
        ...

    def read(self, kept: Any, pieces: Sequence[Tensor]) -> None:
        """Fill tensors of the same sizes.

        Raises:
            StoreError: Less is there than was written, or something else.
        """
        ...

    def drop(self, kept: Any) -> None:
        """Forget them, written whole or not."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


class Store(Protocol):
    """Something that opens a shelf."""

    def open(self, device: torch.device) -> Shelf:
        """A shelf for tensors of a device."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The host's memory: pinned, and copied on streams of its own, where the device is a GPU."""

    def open(self, device: torch.device) -> Shelf:
        """An empty shelf."""
        return _HostShelf(device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A file without a name, so that nothing is left behind by whatever ends the process."""

    folder: str = ""
    """Holds it; empty is the system's for temporary files."""
    checks: bool = True
    """Compare a checksum of every piece that is read (CRC-32)."""

    def open(self, device: torch.device) -> Shelf:
        """An empty file.

        Raises:
            StoreError: The folder cannot be written to.
        """
        return _DiskShelf(device, Path(self.folder or tempfile.gettempdir()), checks=self.checks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Throttled:
    """Another store, slowed down: for tests, and to see what a slower one would cost."""

    store: Host | Disk
    bytes_per_s: float
    """Of each direction, at most."""
    latency_s: float = 0.0
    """Of a transfer, at least."""

    def open(self, device: torch.device) -> Shelf:
        """A shelf whose calls take as long as they would there."""
        return _Slowed(self.store.open(device), self.bytes_per_s, self.latency_s)


class _HostShelf:
    """Copies in buffers that are used again."""

    def __init__(self, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._free: defaultdict[int, list[Tensor]] = defaultdict(list)
        self._lanes: dict[str, Any] = {}

    def write(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        buffers = [self._buffer(piece.numel()) for piece in pieces]
        self._copy("out", buffers, pieces)
        return buffers

    def read(self, kept: list[Tensor], pieces: Sequence[Tensor]) -> None:
        self._copy("in", pieces, kept)

    def drop(self, kept: list[Tensor]) -> None:
        for buffer in kept:
            self._free[buffer.numel()].append(buffer)

    def close(self) -> None:
        self._free.clear()

    def _buffer(self, nbytes: int) -> Tensor:
        free = self._free[nbytes]
        if free:
            return free.pop()
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._pinned)

    def _copy(self, lane: str, to: Sequence[Tensor], source: Sequence[Tensor]) -> None:
        if not self._pinned:
            for target, piece in zip(to, source, strict=True):
                # numpy copies without the interpreter's lock, and on this thread alone.
                target.numpy()[:] = piece.numpy()
            return
        stream = self._lanes.get(lane) or self._lanes.setdefault(lane, torch.cuda.Stream())
        stream.wait_stream(
            torch.cuda.current_stream()
        )  # memory that was freed may be in use there still
        with torch.cuda.stream(stream):
            for target, piece in zip(to, source, strict=True):
                target.copy_(piece, non_blocking=True)
        stream.synchronize()


@dataclass(slots=True)
class _Extents:
    """Pieces in a file: where each begins, its size and its checksum."""

    at: list[int]
    sizes: list[int]
    sums: list[int]


class _DiskShelf:
    """Extents of one file, used again when they are free."""

    def __init__(self, device: torch.device, folder: Path, *, checks: bool) -> None:
        self._on_gpu = device.type == "cuda"
        self._checks = checks
        self._end = 0
        self._free: defaultdict[int, list[int]] = defaultdict(list)
        try:
            self._file, path = tempfile.mkstemp(
                prefix="fourfold-", suffix=".activations", dir=folder
            )
        except OSError as error:
            raise StoreError(
                f"folder={str(folder)!r} takes no file ({error.strerror}); name another"
            ) from error
        self.path = path
        Path(path).unlink()

    def write(self, pieces: Sequence[Tensor]) -> _Extents:
        kept = _Extents([], [], [])
        try:
            for piece in pieces:
                view = self._host(piece).numpy().data
                at = self._place(view.nbytes)
                kept.at.append(at)
                kept.sizes.append(view.nbytes)
                kept.sums.append(zlib.crc32(view) if self._checks else 0)
                done = 0
                while done < view.nbytes:
                    done += os.pwrite(self._file, view[done:], at + done)
        except OSError as error:
            self.drop(kept)
            raise StoreError(f"{self.path}: {os.strerror(error.errno or errno.EIO)}") from error
        return kept

    def read(self, kept: _Extents, pieces: Sequence[Tensor]) -> None:
        for piece, at, size, checksum in zip(pieces, kept.at, kept.sizes, kept.sums, strict=True):
            buffer = torch.empty(size, dtype=torch.uint8) if self._on_gpu else piece
            view = buffer.numpy().data
            done = 0
            while done < size:
                got = os.preadv(self._file, [view[done:]], at + done)
                if not got:
                    raise StoreError(
                        f"{self.path} gave {done:,} of {size:,} bytes at {at:,}: it was cut short"
                    )
                done += got
            if self._checks and zlib.crc32(view) != checksum:
                raise StoreError(
                    f"{self.path} holds other bytes than were written at {at:,} ({size:,} bytes): the disk "
                    "or "
                    "the memory is faulty"
                )
            if self._on_gpu:
                piece.copy_(buffer)

    def drop(self, kept: _Extents) -> None:
        for at, size in zip(kept.at, kept.sizes, strict=True):
            self._free[size].append(at)

    def close(self) -> None:
        os.close(self._file)

    def _host(self, piece: Tensor) -> Tensor:
        return piece.cpu() if self._on_gpu else piece

    def _place(self, size: int) -> int:
        free = self._free[size]
        if free:
            return free.pop()
        at = self._end
        length = -(-size // ALIGNMENT) * ALIGNMENT
        os.posix_fallocate(
            self._file, at, max(length, ALIGNMENT)
        )  # a full disk is met before a write
        self._end += length
        return at


class _Slowed:
    """Sleeps until a call has taken what it would on a slower road."""

    def __init__(self, inner: Shelf, bytes_per_s: float, latency_s: float) -> None:
        self._inner, self._bytes_per_s, self._latency_s = inner, bytes_per_s, latency_s

    def write(self, pieces: Sequence[Tensor]) -> Any:
        started_s = time.perf_counter()
        kept = self._inner.write(pieces)
        self._sleep(started_s, pieces)
        return kept

    def read(self, kept: Any, pieces: Sequence[Tensor]) -> None:
        started_s = time.perf_counter()
        self._inner.read(kept, pieces)
        self._sleep(started_s, pieces)

    def drop(self, kept: Any) -> None:
        self._inner.drop(kept)

    def close(self) -> None:
        self._inner.close()

    def _sleep(self, started_s: float, pieces: Sequence[Tensor]) -> None:
        nbytes = sum(piece.numel() for piece in pieces)
        end_s = started_s + self._latency_s + nbytes / self._bytes_per_s
        time.sleep(max(0.0, end_s - time.perf_counter()))


class Ways:
    """The lanes out to a shelf and in from it."""

    def __init__(self, shelf: Shelf, device: torch.device) -> None:
        self.shelf = shelf

        def here() -> None:
            if device.type == "cuda":
                torch.cuda.set_device(device)

        self._out = ThreadPoolExecutor(1, "fourfold-out", here)
        self._in = ThreadPoolExecutor(1, "fourfold-in", here)

    def out(self, job: Callable[[], None]) -> Future[None]:
        """Do something after all writes before it."""
        return self._out.submit(job)

    def inward(self, job: Callable[[], None]) -> Future[None]:
        """Do something after all reads before it."""
        return self._in.submit(job)

    def close(self) -> None:
        """Wait for both lanes, and close the shelf."""
        self._out.shutdown()
        self._in.shutdown()
        self.shelf.close()


PROBED_ROUNDS = 2


def probe(ways: Ways, nbytes: int, device: torch.device) -> Channel:
    """The speeds of a store, one way after the other, from transfers of so many bytes and of a quarter."""
    timed: dict[tuple[str, int], float] = {}
    sizes = (max(4, nbytes), max(1, nbytes // 4))
    for size in sizes:
        piece = torch.zeros(size, dtype=torch.uint8, device=device)
        for _ in range(PROBED_ROUNDS):
            started_s = time.perf_counter()
            kept = ways.shelf.write([piece])
            written_s = time.perf_counter()
            ways.shelf.read(kept, [piece])
            read_s = time.perf_counter()
            ways.shelf.drop(kept)
            for way, seconds in (("out", written_s - started_s), ("in", read_s - written_s)):
                timed[way, size] = min(seconds, timed.get((way, size), seconds))
    (out_rate, out_latency), (in_rate, in_latency) = (
        _line(sizes[1], timed[way, sizes[1]], sizes[0], timed[way, sizes[0]])
        for way in ("out", "in")
    )
    return Channel(
        out_bytes_per_s=out_rate, in_bytes_per_s=in_rate,
        out_latency_s=out_latency, in_latency_s=in_latency,
    )  # fmt: skip


def _line(small: int, small_s: float, large: int, large_s: float) -> tuple[float, float]:
    """(bytes per second, latency) of the line through two points, or through the larger alone."""
    slope = (large_s - small_s) / (large - small)
    if slope <= 0 or small_s - small * slope < 0:
        return large / max(large_s, 1e-9), 0.0
    return 1 / slope, small_s - small * slope
