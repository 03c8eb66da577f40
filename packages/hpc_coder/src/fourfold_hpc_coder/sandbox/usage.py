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


def _add(taken: dict[tuple[int, int], int], status: os.stat_result) -> None:
    taken[status.st_dev, status.st_ino] = 512 * status.st_blocks
