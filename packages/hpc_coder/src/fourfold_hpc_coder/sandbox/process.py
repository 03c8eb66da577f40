"""Run a stranger's program so that it can do nothing but compute: no network, no files, bounded everything.

A `Job` says what a program may see and use, a `Sandbox` (`backends.py`) is a way to hold it to that, and the
supervisor here, outside, measures it, caps its output, and kills what exceeds its time, memory or processes.
"""

import contextlib
import itertools
import os
import select
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

from fourfold_hpc_coder.sandbox.backends import BACKENDS, Landlock, Sandbox, Unprotected
from fourfold_hpc_coder.sandbox.job import Cause, Job, JobResult, Limits, Mount
from fourfold_hpc_coder.sandbox.scratch import private_folder
from fourfold_hpc_coder.sandbox.usage import (
    descendants,
    folder_bytes,
    namespace_bytes,
    usage,
)

STRANGERS = itertools.count(os.getpid() * 7 % 4000)
"""Users that own nothing, one per job, so that no job's process count adds to another's (root only)."""
FIRST_STRANGER = 61184
"""systemd's range of users made on the fly: no system gives them to anyone."""
LEAVE_S = 5.0
"""Longest that the kernel gets to take a dead job's processes away; without a namespace some may stay."""
OWN_FILE_SYSTEMS = ("/tmp", "/dev/shm")  # noqa: S108 - inside
"""Of a job with namespaces."""
LIMIT_OF: dict[int, Cause] = {signal.SIGXCPU: "cpu", signal.SIGXFSZ: "files"}
"""Limits that the kernel holds as well as we: whichever comes first, the job ended at that limit."""
WATCH_S = 0.05
"""Period at which the supervisor looks at a job's memory and processes."""


def find_sandbox(*, allow_none: bool) -> Sandbox:
    """The best sandbox that works on this machine, found by trying.

    Raises:
        ValueError: where none does and `allow_none` is False.
    """
    tried = []
    for sandbox in BACKENDS:
        reason = _why_not(sandbox)
        if not reason:
            return sandbox
        tried.append(f"{sandbox.name}: {reason}")
    if allow_none:
        return Unprotected()
    raise ValueError(
        f"no sandbox works here ({'; '.join(tried)}); install Debian's bubblewrap, allow user "
        "namespaces, use Linux 6.12 or newer with Landlock, or say --unsafe-no-sandbox if you trust "
        "every program in the file"
    )


def _why_not(sandbox: Sandbox) -> str:
    limits = Limits(wall_s=20, cpu_s=5, memory_bytes=1 << 28, processes=64, file_bytes=1 << 20)
    job = Job(command=("sh", "-c", "! head -c 1 /etc/passwd >&2"), mounts=(), limits=limits)
    try:
        outcome = run(sandbox, job)
    except OSError as error:
        return error.strerror or str(error)
    return "" if outcome.code == 0 else (outcome.stderr.strip().splitlines() or ["fails"])[-1]


@dataclass(slots=True)
class Process:
    """A job under way and its supervisor: call `pump` until `done`, then `finish`."""

    job: Job
    handle: subprocess.Popen[bytes]
    started_s: float
    has_keeper: bool
    """Whether the handle is of a keeper, which ends the whole job when told to (`landlock.py`)."""
    has_namespaces: bool
    """Whether the job has file systems and a network of its own."""
    private: Path | None
    """Folder that stands for the job's /tmp, where nothing but us bounds it."""
    limit: Cause = "nothing"
    cpu_s: float = 0.0
    streams: dict[str, bytearray] = field(default_factory=dict)
    selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    watched_s: float = 0.0

    @property
    def elapsed_s(self) -> float:
        """Since the start."""
        return time.perf_counter() - self.started_s

    @property
    def done(self) -> bool:
        """Whether the job has ended."""
        return self.handle.poll() is not None

    def processor_s(self) -> float:
        """Processor seconds of its processes so far, ended threads included, by the kernel's count."""
        spent_s = 0.0
        for pid in descendants(self.handle.pid):
            # The clock that clock_getcpuclockid(3) gives for another process.
            with contextlib.suppress(OSError):
                spent_s += time.clock_gettime((~pid << 3) | 2)
        return spent_s

    def listen(self, descriptor: int, events: int, handler: Callable[[], None]) -> None:
        """Call a handler from `pump` when a descriptor is ready."""
        self.selector.register(descriptor, events, handler)

    def pump(self, wait_s: float) -> None:
        """Read what the job wrote, run ready handlers, hold the job to its limits."""
        for key, _ in self.selector.select(min(wait_s, WATCH_S)):
            key.data()
        now_s = time.perf_counter()
        if now_s - self.watched_s >= WATCH_S and not self.done:
            self.watched_s = now_s
            self._watch()

    def _watch(self) -> None:
        limits = self.job.limits
        if self.elapsed_s > limits.wall_s:
            self.kill("wall")
            return
        count, resident, cpu_s = usage(self.handle.pid)
        self.cpu_s = max(self.cpu_s, cpu_s)
        files = 0
        if self.has_namespaces:
            files, buffers = namespace_bytes(self.handle.pid, OWN_FILE_SYSTEMS, limits.file_bytes)
            resident += buffers
        if resident > limits.memory_bytes:
            self.kill("memory")
        elif count > limits.processes + 16:  # the sandbox's own, and mpirun's
            self.kill("processes")
        elif files > limits.file_bytes or (
            self.private and folder_bytes(self.private, self.handle.pid) > limits.file_bytes
        ):
            self.kill("files")

    def kill(self, limit: Cause) -> None:
        """End the whole job; the first limit given is the one that is reported."""
        if self.limit == "nothing":
            self.limit = limit
        if self.has_keeper:
            self.handle.terminate()
            return
        for pid in descendants(self.handle.pid):
            _signal(pid)
        _signal(self.handle.pid)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.handle.pid, signal.SIGKILL)

    def finish(self) -> JobResult:
        """Kill what still runs, read the rest, and say how it went."""
        if not self.done:
            self.kill("nothing")
        self.handle.wait()
        for stream in (self.handle.stdout, self.handle.stderr):
            assert stream is not None
            self._read(stream)
            stream.close()
        self.selector.close()
        code = self.handle.returncode
        if self.limit == "nothing":
            self.limit = LIMIT_OF.get(-code if code < 0 else code - 128, "nothing")
        if self.limit != "nothing":
            # Whichever of the job's processes died first, and whatever its parent made of that.
            code = -signal.SIGKILL
        return JobResult(
            code=code,
            stdout=self.streams["stdout"].decode(errors="replace"),
            stderr=self.streams["stderr"].decode(errors="replace"),
            elapsed_s=self.elapsed_s,
            cpu_s=self.cpu_s,
            limit=self.limit,
        )

    def _read(self, stream: IO[bytes]) -> None:
        kept = self.streams["stdout" if stream is self.handle.stdout else "stderr"]
        for _ in range(64):  # at most 4 MiB before the limits are looked at again
            try:
                chunk = os.read(stream.fileno(), 1 << 16)
            except BlockingIOError:
                return
            if not chunk:
                with contextlib.suppress(KeyError):
                    self.selector.unregister(stream.fileno())
                return
            kept += chunk[: self.job.limits.output_bytes - len(kept)]


@contextlib.contextmanager
def started(sandbox: Sandbox, job: Job) -> Iterator[Process]:
    """Start a job; on leaving the block it is dead and reaped, whatever happened."""
    if sandbox.has_namespaces:
        with _started(sandbox, job, None) as process:
            yield process
        return
    with private_folder() as private:
        stands_for_tmp = Mount(source=private, target="/tmp", writable=True)  # noqa: S108
        mounted = replace(job, mounts=(*job.mounts, stands_for_tmp))
        with _started(sandbox, mounted, private) as process:
            yield process


@contextlib.contextmanager
def _started(sandbox: Sandbox, job: Job, private: Path | None) -> Iterator[Process]:
    stranger = FIRST_STRANGER + next(STRANGERS) % 4000
    if os.geteuid() == 0 and sandbox.has_namespaces:
        for mount in job.mounts:
            if mount.writable:
                os.chown(mount.source, stranger, stranger)
    # The job's processes hold the writing end of a pipe: its end of file says that the last of them is
    # gone, which the starter's own exit does not (the kernel may still be killing what it left).
    lifeline, writing_end = os.pipe()
    try:
        handle = subprocess.Popen(  # noqa: S603 - the sandbox is what makes this safe
            sandbox.arguments(job, stranger),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            pass_fds=(writing_end,),
            cwd="/",
        )
    except OSError:
        os.close(lifeline)
        raise
    finally:
        os.close(writing_end)
    process = Process(
        job=job,
        handle=handle,
        started_s=time.perf_counter(),
        has_keeper=isinstance(sandbox, Landlock),
        has_namespaces=sandbox.has_namespaces,
        private=private,
        streams={"stdout": bytearray(), "stderr": bytearray()},
    )
    try:
        for stream in (handle.stdout, handle.stderr):
            assert stream is not None
            os.set_blocking(stream.fileno(), False)
            process.listen(stream.fileno(), selectors.EVENT_READ, lambda s=stream: process._read(s))  # noqa: SLF001
        with _told_of_end(process):
            yield process
    finally:
        if not process.done:
            process.kill("nothing")
        handle.wait()
        for stream in (handle.stdout, handle.stderr):
            if stream is not None:
                stream.close()
        process.selector.close()
        _await_end(lifeline)


@contextlib.contextmanager
def _told_of_end(process: Process) -> Iterator[None]:
    """Have `pump` wake when the job ends; before Linux 5.3 it finds out at its next look."""
    try:
        ended = os.pidfd_open(process.handle.pid)
    except OSError:
        yield
        return
    process.listen(ended, selectors.EVENT_READ, lambda: None)
    try:
        yield
    finally:
        os.close(ended)


def _await_end(lifeline: int) -> None:
    """Return when nobody holds the other end of the pipe any more, or after `LEAVE_S`."""
    latest_s = time.perf_counter() + LEAVE_S
    try:
        while (left_s := latest_s - time.perf_counter()) > 0:
            ready, _, _ = select.select([lifeline], [], [], left_s)
            if ready and not os.read(lifeline, 1 << 16):
                return
    finally:
        os.close(lifeline)


def run(sandbox: Sandbox, job: Job) -> JobResult:
    """Run a job to its end or to a limit."""
    with started(sandbox, job) as process:
        while not process.done:
            process.pump(WATCH_S)
        return process.finish()


def _signal(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)
