"""What keeps a job apart: the command lines of two kinds of sandbox, and of none.

Both kinds need Linux namespaces: `Bubblewrap`, and `Namespaces` (util-linux alone, where bubblewrap is not
installed). Inside, a program sees /usr and what the job mounts, has its own processes, and no network; it
runs as a user that owns nothing. When the first process in its namespace ends, the kernel ends all others:
nothing survives. `Unprotected` is for machines where neither works and the user says that it is no matter.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fourfold_hpc_coder.jobs import Job


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
