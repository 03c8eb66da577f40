"""A job: a command, the files that it may see, its limits, and its result."""

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Cause = Literal["wall", "cpu", "memory", "processes", "files", "nothing"]
"""The limit that ended a job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The most that a job may use."""

    wall_s: float
    cpu_s: int
    """Per process, enforced by the kernel."""
    memory_bytes: int
    """Resident, over all processes; each process may map four times this."""
    processes: int
    file_bytes: int
    """Largest file; the private /tmp holds as much in all."""
    output_bytes: int = 1 << 18
    """Kept of each of the two output streams; the rest is read and thrown away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """A folder of ours as the job sees it."""

    source: Path
    target: str
    """Absolute path inside."""
    writable: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A command and everything that it may see and use."""

    command: tuple[str, ...]
    mounts: tuple[Mount, ...]
    limits: Limits
    environment: tuple[tuple[str, str], ...] = ()
    """Added to a minimal environment; nothing is inherited."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """The end of a job: its exit code, its output, its time."""

    code: int
    """Exit code; -N where signal N ended it."""
    stdout: str
    stderr: str
    elapsed_s: float
    cpu_s: float
    """Processor time of all its processes, as last seen."""
    limit: Cause

    @property
    def signal(self) -> int:
        """Signal that ended the job or (as shells and mpirun report) one of its processes; 0 for none."""
        if self.code < 0:
            return -self.code
        return self.code - 128 if 128 < self.code < 128 + signal.NSIG else 0
