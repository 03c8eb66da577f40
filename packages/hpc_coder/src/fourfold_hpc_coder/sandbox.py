"""Run a stranger's program so that it can do nothing but compute: no network, no files, bounded everything.

A `Job` says what a program may see and use; a `Sandbox` is a way to hold it to that. Two ways need Linux
namespaces: `Bubblewrap`, and `Namespaces` (util-linux alone, where bubblewrap is not installed). Inside,
a program sees /usr and what the job mounts, has its own processes, and no network; it runs as a user that
owns nothing. When the first process in its namespace ends, the kernel ends all others: nothing survives.
A supervisor outside measures, caps the output, and kills what exceeds its time, memory or processes.

`Unprotected` is for machines where neither works and the user says that it is no matter.
"""

import contextlib
import itertools
import os
import select
import selectors
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal, Protocol

STRANGERS = itertools.count(os.getpid() * 7 % 4000)
"""Users that own nothing, one per job, so that no job's process count adds to another's (root only)."""
FIRST_STRANGER = 61184
"""systemd's range of users made on the fly: no system gives them to anyone."""
LEAVE_S = 5.0
"""How long the kernel gets to take a dead job's processes away; without a namespace some may stay."""
WATCH_S = 0.05
"""Period at which the supervisor looks at a job's memory and processes."""

Cause = Literal["wall", "cpu", "memory", "processes", "nothing"]
"""Which limit ended a job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a job may use."""

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
class Outcome:
    """How a job ended."""

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


class Sandbox(Protocol):
    """A way to run a job apart from everything else."""

    @property
    def name(self) -> str:
        """For records and messages."""
        ...

    def arguments(self, job: Job, stranger: int) -> list[str]:
        """The command line that runs the job's command inside.

        Args:
            job: what to run.
            stranger: numeric user to become, where the sandbox is set up by root.
        """
        ...


def _limited(job: Job) -> list[str]:
    limits = job.limits
    return [
        "prlimit",
        f"--as={4 * limits.memory_bytes}",
        f"--cpu={limits.cpu_s}:{limits.cpu_s + 1}",
        f"--fsize={limits.file_bytes}",
        f"--nproc={limits.processes}",
        "--nofile=256",
        "--core=0",
        "--",
        *job.command,
    ]


def _as_stranger(stranger: int) -> list[str]:
    return [
        "setpriv",
        f"--reuid={stranger}",
        f"--regid={stranger}",
        "--clear-groups",
        "--no-new-privs",
        "--bounding-set=-all",
        "--inh-caps=-all",
        "--",
    ]


def _environment(job: Job) -> dict[str, str]:
    plain = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/tmp", "LC_ALL": "C.UTF-8"}  # noqa: S108
    return {**plain, **dict(job.environment)}


_SEEN = ("/etc/alternatives", "/etc/ld.so.cache", "/etc/openmpi", "/sys/devices/system")
"""Beside /usr: what compilers, the loader and Open MPI read."""
_LINKS = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
"""Links from the root into /usr on every Debian since 12."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bubblewrap:
    """`bwrap`: as root it drops to a stranger inside, as a user it makes a user namespace."""

    name: str = "bubblewrap"

    def arguments(self, job: Job, stranger: int) -> list[str]:
        """Mounts, namespaces, limits, then the command."""
        words = ["bwrap", "--die-with-parent", "--new-session", "--clearenv"]
        for key, value in _environment(job).items():
            words += ["--setenv", key, value]
        if os.geteuid() == 0:
            words += ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
            words += ["--unshare-cgroup-try", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
            words += ["--cap-add", "CAP_SETPCAP"]
        else:
            words += ["--unshare-all"]
        words += ["--ro-bind", "/usr", "/usr"]
        for link in _LINKS:
            if Path("/", link).exists():
                words += ["--symlink", f"usr/{link}", f"/{link}"]
        for folder in ("/etc", "/sys", "/sys/devices"):
            words += ["--perms", "0755", "--dir", folder]
        for seen in _SEEN:
            words += ["--ro-bind-try", seen, seen]
        private = str(job.limits.file_bytes)
        words += ["--proc", "/proc", "--dev", "/dev"]
        for folder in ("/tmp", "/dev/shm"):  # noqa: S108
            words += ["--perms", "1777", "--size", private, "--tmpfs", folder]
        for mount in job.mounts:
            words += ["--bind" if mount.writable else "--ro-bind", str(mount.source), mount.target]
        words += ["--chdir", "/tmp", "--"]  # noqa: S108
        return words + (_as_stranger(stranger) if os.geteuid() == 0 else []) + _limited(job)


# The shell stays, as the first process of its namespace: that one does not die of its own signals.
_SET_UP = """set -e
root=$1; size=$2; shift 2
mount --make-rprivate /
mount -t tmpfs -o mode=755,size=$size fourfold "$root"
cd "$root"
mkdir usr proc dev tmp etc sys old
for link in bin sbin lib lib32 lib64 libx32; do [ -e /$link ] && ln -s usr/$link $link; done
bind() { if [ -d "$1" ]; then mkdir -p ".$2"; else mkdir -p ".${2%/*}"; : > ".$2"; fi
  mount --bind "$1" ".$2"; mount -o "remount,bind,nosuid,nodev,$3" ".$2"; }
bind /usr /usr ro
for seen in /etc/alternatives /etc/ld.so.cache /etc/openmpi; do
  [ -e $seen ] && bind $seen $seen ro; done
while [ "$1" != -- ]; do bind "$1" "$2" "$3"; shift 3; done; shift
mount -t proc -o nosuid,nodev,noexec proc proc
for node in null zero random urandom full; do : > dev/$node; mount --bind /dev/$node dev/$node; done
mkdir dev/shm; ln -s /proc/self/fd dev/fd
mount -t tmpfs -o mode=1777,nosuid,nodev,size=$size shm dev/shm
mount -t tmpfs -o mode=1777,nosuid,nodev,size=$size tmp tmp
/usr/sbin/pivot_root . old
umount -l /old; rmdir /old
mount -o remount,bind,ro / 2>/dev/null || true
cd /tmp
"$@"
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Namespaces:
    """util-linux alone: `unshare`, a small root of mounts, `pivot_root`, `setpriv`."""

    name: str = "namespaces"

    def arguments(self, job: Job, stranger: int) -> list[str]:
        """As `Bubblewrap`; the environment is set by `env -i` outside."""
        is_root = os.geteuid() == 0
        words = ["env", "-i", *(f"{key}={value}" for key, value in _environment(job).items())]
        words += ["unshare", *([] if is_root else ["--user", "--map-root-user"])]
        words += ["--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child=KILL"]
        # Any folder serves as the place of the new root; it is covered in this namespace only.
        words += ["/bin/sh", "-c", _SET_UP, "sh", "/mnt", str(job.limits.file_bytes)]
        for mount in job.mounts:
            words += [str(mount.source), mount.target, "rw" if mount.writable else "ro"]
        return [*words, "--", *(_as_stranger(stranger) if is_root else []), *_limited(job)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unprotected:
    """No protection but limits: for programs that the user trusts. Mounts are replaced by real paths."""

    name: str = "none"

    def arguments(self, job: Job, stranger: int) -> list[str]:  # noqa: ARG002 - the protocol's
        """The command with the targets of mounts replaced by their sources."""
        mounts = sorted(job.mounts, key=lambda mount: -len(mount.target))

        def real(word: str) -> str:
            for mount in mounts:
                word = word.replace(f"{mount.target}/", f"{mount.source}/")
            return word

        pairs = (f"{key}={real(value)}" for key, value in _environment(job).items())
        return ["env", "-i", *pairs, *map(real, _limited(job))]


def find_sandbox(*, allow_none: bool) -> Sandbox:
    """The best sandbox that works on this machine, found by trying.

    Raises:
        ValueError: where none does and `allow_none` is False.
    """
    tried = []
    for sandbox in (Bubblewrap(), Namespaces()):
        reason = _why_not(sandbox)
        if not reason:
            return sandbox
        tried.append(f"{sandbox.name}: {reason}")
    if allow_none:
        return Unprotected()
    raise ValueError(
        f"no sandbox works here ({'; '.join(tried)}); install Debian's bubblewrap, or allow user "
        "namespaces, or say --unsafe-no-sandbox if you trust every program in the file"
    )


def _why_not(sandbox: Sandbox) -> str:
    limits = Limits(wall_s=20, cpu_s=5, memory_bytes=1 << 28, processes=64, file_bytes=1 << 20)
    job = Job(command=("test", "!", "-e", "/etc/passwd"), mounts=(), limits=limits)
    try:
        outcome = run(sandbox, job)
    except OSError as error:
        return str(error.strerror)
    return "" if outcome.code == 0 else (outcome.stderr.strip().splitlines() or ["fails"])[-1]


@dataclass(slots=True)
class Process:
    """A job under way and its supervisor: call `pump` until `done`, then `finish`."""

    job: Job
    handle: subprocess.Popen[bytes]
    started_s: float
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
        if resident > limits.memory_bytes:
            self.kill("memory")
        elif count > limits.processes + 16:  # the sandbox's own, and mpirun's
            self.kill("processes")

    def kill(self, limit: Cause) -> None:
        """End the whole job; the first limit given is the one that is reported."""
        if self.limit == "nothing":
            self.limit = limit
        for pid in descendants(self.handle.pid):
            _signal(pid)
        _signal(self.handle.pid)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.handle.pid, signal.SIGKILL)

    def finish(self) -> Outcome:
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
        if self.limit == "nothing" and signal.SIGXCPU in (-code, code - 128):
            self.limit = "cpu"
        return Outcome(
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
    stranger = FIRST_STRANGER + next(STRANGERS) % 4000
    if os.geteuid() == 0 and not isinstance(sandbox, Unprotected):
        for mount in job.mounts:
            if mount.writable:
                os.chown(mount.source, stranger, stranger)
    # The job's processes hold the writing end of a pipe: its end of file says that the last of them is
    # gone, which the starter's own exit does not (the kernel may still be killing what it left).
    lifeline, held = os.pipe()
    try:
        handle = subprocess.Popen(  # noqa: S603 - the sandbox is what makes this safe
            sandbox.arguments(job, stranger),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            pass_fds=(held,),
            cwd="/",
        )
    except OSError:
        os.close(lifeline)
        raise
    finally:
        os.close(held)
    process = Process(
        job=job,
        handle=handle,
        started_s=time.perf_counter(),
        streams={"stdout": bytearray(), "stderr": bytearray()},
    )
    try:
        for stream in (handle.stdout, handle.stderr):
            assert stream is not None
            os.set_blocking(stream.fileno(), False)
            process.listen(stream.fileno(), selectors.EVENT_READ, lambda s=stream: process._read(s))  # noqa: SLF001
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


def run(sandbox: Sandbox, job: Job) -> Outcome:
    """Run a job to its end or to a limit."""
    with started(sandbox, job) as process:
        while not process.done:
            process.pump(WATCH_S)
        return process.finish()


def descendants(pid: int) -> list[int]:
    """Processes below a process, across namespaces, nearest first."""
    found: list[int] = []
    waiting = [pid]
    while waiting:
        below: list[int] = []
        for one in waiting:
            for thread in _children_files(one):
                with contextlib.suppress(OSError):
                    below += [int(word) for word in thread.read_text().split()]
        found += below
        waiting = below
    return found


def _children_files(pid: int) -> Sequence[Path]:
    try:
        return [Path(entry.path, "children") for entry in os.scandir(f"/proc/{pid}/task")]
    except OSError:
        return ()


_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def usage(pid: int) -> tuple[int, int, float]:
    """Processes below a process, their resident bytes, their processor seconds."""
    resident, cpu_s, count = 0, 0.0, 0
    for one in descendants(pid):
        try:
            words = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        count += 1
        cpu_s += (int(words[11]) + int(words[12])) * _TICK_S
        resident += int(words[21]) * _PAGE
    return count, resident, cpu_s


def _signal(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A private folder for jobs' files; those that killed scorers left behind are removed first."""
    parent = Path(tempfile.gettempdir()) / f"fourfold-hpc-coder-{os.geteuid()}"
    parent.mkdir(mode=0o700, exist_ok=True)
    for left in parent.iterdir():
        owner = left.name.partition("-")[0]
        if not (owner.isdigit() and Path("/proc", owner).exists()):
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=parent))
    folder.chmod(0o711)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            parent.rmdir()
