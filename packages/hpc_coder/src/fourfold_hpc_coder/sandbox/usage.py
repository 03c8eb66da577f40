"""The use of the processes below a process, by the kernel's count: tasks, memory, processor time, files."""

import contextlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path


def descendants(pid: int) -> list[int]:
    """Processes below a process, across namespaces, nearest first."""
    below_all: list[int] = []
    waiting = [pid]
    while waiting:
        below: list[int] = []
        for parent in waiting:
            for thread in _children_files(parent):
                with contextlib.suppress(OSError):
                    below += [int(word) for word in thread.read_text().split()]
        below_all += below
        waiting = below
    return below_all


def _children_files(pid: int) -> Sequence[Path]:
    try:
        return [Path(entry.path, "children") for entry in os.scandir(f"/proc/{pid}/task")]
    except OSError:
        return ()


_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def usage(pid: int) -> tuple[int, int, float]:
    """Tasks below a process (as the kernel's limit counts), resident bytes, processor seconds."""
    resident, cpu_s, count = 0, 0.0, 0
    for process in descendants(pid):
        try:
            words = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        count += int(words[17])
        cpu_s += (int(words[11]) + int(words[12])) * _TICK_S
        resident += int(words[21]) * _PAGE
    return count, resident, cpu_s


def folder_bytes(folder: Path, pid: int) -> int:
    """Space of a folder's files and of files without a name that processes below a process still hold."""
    taken: dict[tuple[int, int], int] = {}
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                _add(taken, Path(place, name).lstat())
    for process in descendants(pid):
        with contextlib.suppress(OSError):
            for descriptor in os.scandir(f"/proc/{process}/fd"):
                with contextlib.suppress(OSError):
                    status = descriptor.stat()
                    if stat.S_ISREG(status.st_mode) and not status.st_nlink:
                        _add(taken, status)
    return sum(taken.values())


ENTRY_BYTES = 4096
"""Counted for a file beside its blocks: an empty one takes a place, and memory of the kernel's."""


def _add(taken: dict[tuple[int, int], int], status: os.stat_result) -> None:
    taken[status.st_dev, status.st_ino] = 512 * status.st_blocks + ENTRY_BYTES


def namespace_bytes(pid: int, places: Sequence[str], size: int) -> tuple[int, int]:
    """The use of what a job's own namespaces hold and none of its processes: its files, and its sockets.

    Args:
        pid: the process above it.
        places: file systems of the job's own, by their paths inside.
        size: of each of them, by which it is known.

    Returns:
        `ENTRY_BYTES` for each file in the fullest of the places, and as much memory as the buffers of its
        sockets may take; 0 for what cannot be seen.
    """
    files, sockets = 0, 0
    own = _link(f"/proc/{os.getpid()}/ns/net")
    for process in reversed(descendants(pid)):  # the innermost are within
        with contextlib.suppress(OSError, ValueError):
            if not sockets and _link(f"/proc/{process}/ns/net") not in ("", own):
                used = Path(f"/proc/{process}/net/sockstat").read_text().split()[2]
                sockets = int(used) * SOCKET_BYTES
            for place in places:
                held = os.statvfs(f"/proc/{process}/root{place}")
                # Of another size it is not the job's: the process has yet to enter its own.
                if not 0 <= held.f_blocks * held.f_frsize - size < _PAGE:
                    continue
                files = max(files, (held.f_files - held.f_ffree) * ENTRY_BYTES)
        if files and sockets:
            break
    return files, sockets


SOCKET_BYTES = 2 * 212992
"""Linux's default bound on a socket's buffers: what was sent, and what arrived."""


def _link(path: str) -> str:
    try:
        return str(Path(path).readlink())
    except OSError:
        return ""
