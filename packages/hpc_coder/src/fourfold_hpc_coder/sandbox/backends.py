"""Three sandboxes that keep a job apart, and one that does not: each gives the command line that starts it.

Two need Linux namespaces: `Bubblewrap`, and `Namespaces` (util-linux alone, where bubblewrap is not
installed). Inside, a program sees /usr and what the job mounts, has its own processes, and no network; it
runs as a user that owns nothing. When the first process in its namespace ends, the kernel ends all others:
nothing survives. `Landlock` is for machines that allow no namespaces, as within most containers: the program
stays among the machine's processes and files and is denied them (`landlock.py` says what that leaves open).
`Unprotected` is for machines where none works and the user says that it is no matter.
"""

import base64
import hashlib
import json
import os
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Protocol

from fourfold_hpc_coder.sandbox import seccomp
from fourfold_hpc_coder.sandbox.job import Job
from fourfold_parallel.common.files import cache_folder, whole_file


class Sandbox(Protocol):
    """A way to run a job apart from everything else."""

    @property
    def name(self) -> str:
        """For records and messages."""
        ...

    @property
    def has_namespaces(self) -> bool:
        """Whether a job has mounts, processes and a bounded /tmp of its own."""
        ...

    @property
    def gap(self) -> str:
        """The one thing that a job may do here and another sandbox forbids, and why; empty for nothing."""
        ...

    def arguments(self, job: Job, stranger: int) -> list[str]:
        """The command line that runs the job's command inside.

        Args:
            job: what to run.
            stranger: numeric user to become, where the sandbox is set up by root.
        """
        ...


def _limited(job: Job, *, others: int = 0) -> list[str]:
    """The command under the kernel's limits; `others` are tasks of its user that are not the job's."""
    limits = job.limits
    return [
        "prlimit",
        f"--as={4 * limits.memory_bytes}",
        f"--cpu={limits.cpu_s}:{limits.cpu_s + 1}",
        f"--fsize={limits.file_bytes}",
        f"--nproc={limits.processes + others}",
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
    plain = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LC_ALL": "C.UTF-8"}
    private = dict.fromkeys(("HOME", "TMPDIR"), "/tmp")  # noqa: S108
    return {**plain, **private, **dict(job.environment)}


def in_place(job: Job) -> Job:
    """The job where nothing can be mounted: each path inside is replaced by the real one."""

    def real(word: str) -> str:
        for mount in job.mounts:
            if word == mount.target or word.startswith(f"{mount.target}/"):
                return f"{mount.source}{word.removeprefix(mount.target)}"
        return word

    environment = _environment(job).items()
    return replace(
        job,
        command=tuple(map(real, job.command)),
        environment=tuple((key, real(value)) for key, value in environment),
    )


_SEEN = ("/etc/alternatives", "/etc/ld.so.cache", "/etc/openmpi", "/sys/devices/system")
"""Beside /usr: what compilers, the loader and Open MPI read."""
_LINKS = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
"""Links from the root into /usr on every Debian since 12."""


_UNCOUNTED = "memory that is in no process, such as shared segments, is not counted"


@cache
def _hoarding_filter() -> tuple[Path | None, str]:
    """The file with the filter against memory that nobody counts, or None and why there is none."""
    try:
        program = seccomp.against_hoarding()
    except OSError as error:
        return None, f"{error}: {_UNCOUNTED}"
    file = cache_folder() / "hpc_coder" / "filters" / hashlib.sha256(program).hexdigest()[:24]
    if not file.exists():
        with whole_file(file) as partial:
            partial.write_bytes(program)
    return file, ""


@cache
def _escape_filter() -> str:
    """The filter for jobs without namespaces, as text."""
    return base64.b64encode(seccomp.against_escapes()).decode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Bubblewrap:
    """`bwrap`: as root it drops to a stranger inside, as a user it makes a user namespace."""

    name: str = "bubblewrap"
    has_namespaces: bool = True

    @property
    def gap(self) -> str:
        """Nothing where libseccomp is installed."""
        return _hoarding_filter()[1]

    def arguments(self, job: Job, stranger: int) -> list[str]:
        """Mounts, namespaces, limits, then the command."""
        words = ["bwrap", "--die-with-parent", "--new-session", "--clearenv"]
        filter_, _ = _hoarding_filter()
        if filter_:
            # bwrap reads it from a descriptor.
            words = ["sh", "-c", 'exec "$@" 9<"$0"', str(filter_), *words, "--seccomp", "9"]
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
            for above in [*Path(mount.target).parents][-2::-1]:  # which it would close to others
                words += ["--perms", "0755", "--dir", str(above)]
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
    has_namespaces: bool = True

    @property
    def gap(self) -> str:
        """Nothing where libseccomp is installed."""
        return _hoarding_filter()[1]

    def arguments(self, job: Job, stranger: int) -> list[str]:
        """As `Bubblewrap`; the environment is set by `env -i` outside."""
        is_root = os.geteuid() == 0
        words = ["env", "-i", *(f"{key}={value}" for key, value in _environment(job).items())]
        filter_, _ = _hoarding_filter()
        if filter_:  # unshare and setpriv of Debian 12 set none
            words += [
                sys.executable,
                "-I",
                "-m",
                "fourfold_hpc_coder.sandbox.filtered",
                str(filter_),
            ]
        words += ["unshare", *([] if is_root else ["--user", "--map-root-user"])]
        words += ["--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child=KILL"]
        # Any folder serves as the place of the new root; it is covered in this namespace only.
        words += ["/bin/sh", "-c", _SET_UP, "sh", "/mnt", str(job.limits.file_bytes)]
        for mount in job.mounts:
            words += [str(mount.source), mount.target, "rw" if mount.writable else "ro"]
        return [*words, "--", *(_as_stranger(stranger) if is_root else []), *_limited(job)]


_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


@dataclass(frozen=True, slots=True, kw_only=True)
class Landlock:
    """Landlock, seccomp and a keeper, for whoever may make no namespace; programs have no socket."""

    name: str = "landlock"
    has_namespaces: bool = False
    gap: str = ""

    def arguments(self, job: Job, stranger: int) -> list[str]:
        """The keeper's command line, which holds the rules, the real paths and the limits."""
        placed = in_place(job)
        given = [str(mount.source) for mount in job.mounts if not mount.writable]
        pipes = [entry for folder in given for entry in Path(folder).iterdir() if entry.is_fifo()]
        asked = {
            "command": _limited(placed, others=_tasks_of_user() if os.geteuid() else 0),
            "user": stranger,
            "environment": dict(placed.environment),
            "filter": _escape_filter(),
            "home": dict(placed.environment)["HOME"],
            "rules": {
                "see": ["/usr", *(f"/{link}" for link in _LINKS), *_SEEN, *given],
                "use": [*_DEVICES, *map(str, pipes)],
                "own": [str(mount.source) for mount in job.mounts if mount.writable],
            },
        }
        return [
            sys.executable,
            "-I",
            "-m",
            "fourfold_hpc_coder.sandbox.landlock",
            json.dumps(asked),
        ]


def _tasks_of_user() -> int:
    """Tasks of the user who runs this: without a namespace the kernel counts a job's together with them."""
    tasks = 0
    for entry in os.scandir("/proc"):
        with suppress(OSError):
            if entry.name.isdigit() and entry.stat().st_uid == os.geteuid():
                tasks += sum(1 for _ in os.scandir(f"{entry.path}/task"))
    return tasks


@dataclass(frozen=True, slots=True, kw_only=True)
class Unprotected:
    """No protection but limits: for programs that the user trusts. Mounts are replaced by real paths."""

    name: str = "none"
    has_namespaces: bool = False
    gap: str = "a job has the rights of the user who scores"

    def arguments(self, job: Job, stranger: int) -> list[str]:  # noqa: ARG002 - the protocol's
        """The command with the targets of mounts replaced by their sources."""
        placed = in_place(job)
        pairs = (f"{key}={value}" for key, value in placed.environment)
        return ["env", "-i", *pairs, *_limited(placed, others=_tasks_of_user())]


BACKENDS: tuple[Sandbox, ...] = (Bubblewrap(), Namespaces(), Landlock())
"""Every sandbox that protects, the best first; `tests/test_sandbox.py` holds each to the same laws."""
