"""The system calls that a job may not make, as seccomp filters that libseccomp writes for this processor.

Landlock guards what is opened, not what is done to a file by its name (modes, owners, times, attributes),
nor other processes' settings, nor sockets. Those calls, and whatever reaches into the kernel's rarer parts,
answer EPERM or pretend; calls that are newer than this list answer ENOSYS, as on an older kernel.
"""

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

LIBRARY = "libseccomp.so.2"
"""Debian's libseccomp2, which apt itself needs."""

HOARDS = ("shmget", "msgget", "semget", "memfd_create", "memfd_secret", "add_key", "io_uring_setup")
"""Give memory that is in no process, where nobody would count it."""

_DENIED = {
    "other processes": "ptrace process_vm_readv process_vm_writev process_madvise process_mrelease kcmp "
    "pidfd_open pidfd_getfd setpriority sched_setparam sched_setscheduler sched_setattr ioprio_set "
    "migrate_pages move_pages",
    "servers of the same user, to which a name in a file system leads, past any rule of Landlock; and the "
    "kernel's buffers, which nobody counts": "socket socketpair",
    "what outlives a process, or is shared with others, without being a file": "shmat shmctl semop semctl "
    "semtimedop msgsnd msgrcv msgctl mq_open mq_unlink request_key keyctl",
    "files by their name or handle": "chown lchown fchown fchownat setxattr lsetxattr fsetxattr removexattr "
    "lremovexattr fremovexattr utime utimes futimesat utimensat name_to_handle_at open_by_handle_at "
    "inotify_init inotify_init1 fanotify_init",
    "mounts and namespaces": "mount umount2 pivot_root chroot unshare setns open_tree move_mount fsopen "
    "fsconfig fsmount fspick mount_setattr statmount listmount",
    "users": "setuid setgid setreuid setregid setresuid setresgid setgroups setfsuid setfsgid",
    "the kernel's rarer parts, and the machine": "bpf perf_event_open userfaultfd io_uring_enter "
    "io_uring_register quotactl quotactl_fd swapon swapoff reboot kexec_load kexec_file_load init_module "
    "finit_module delete_module acct settimeofday clock_settime clock_adjtime adjtimex syslog sethostname "
    "setdomainname",
}
DENIED = frozenset((*HOARDS, *" ".join(_DENIED.values()).split()))
"""Answer EPERM."""

PRETENDED = ("chmod", "fchmod", "fchmodat", "fchmodat2")
"""Answer that all is well and do nothing: a linker gives up where it cannot make its output executable."""
OWN_ONLY = ("prlimit64", "sched_setaffinity")
"""Allowed for the caller itself, whose process number is then given as 0."""
HIDDEN = ("clone3",)
"""Takes its flags in memory, where no filter sees them; without it glibc uses `clone`."""
NEW_NAMESPACES = (1 << 17, *(1 << bit for bit in range(25, 31)))
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET."""
FIRST_UNREAD = 463
"""`setxattrat`: from here on, calls are newer than this list (Linux 6.13), with one number everywhere."""

_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_REFUSE = 0x00050000
"""With an errno, or with 0 for a success that is none."""
_FORBID, _UNKNOWN = _REFUSE | errno.EPERM, _REFUSE | errno.ENOSYS
_BAD_ARCHITECTURE, _OPTIMIZE = 2, 8
_BINARY_TREE = 2
_NOT_EQUAL, _EQUAL, _MASKED_EQUAL = 1, 4, 7
PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2


class _Comparison(ctypes.Structure):
    """`struct scmp_arg_cmp`: which argument, how, and with what."""

    _fields_ = (
        ("argument", ctypes.c_uint),
        ("how", ctypes.c_int),
        ("first", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    )


@cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError:
        raise OSError(f"no {LIBRARY} (Debian: libseccomp2)") from None
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_syscall_resolve_num_arch.restype = ctypes.c_void_p
    return library


@dataclass(slots=True)
class _Filter:
    """A filter under way."""

    handle: ctypes.c_void_p

    def add(self, action: int, number: int, *comparisons: _Comparison) -> None:
        """Have a call answered by an action, where its arguments compare so."""
        array = (_Comparison * len(comparisons))(*comparisons)
        _checked(
            _library().seccomp_rule_add_array(
                self.handle, ctypes.c_uint32(action), number, len(comparisons), array
            )
        )

    def program(self) -> bytes:
        """Its instructions, for this processor's calls and no other table of them."""
        file = os.memfd_create("seccomp")
        try:
            _checked(_library().seccomp_export_bpf(self.handle, file))
            return os.pread(file, os.fstat(file).st_size, 0)
        finally:
            os.close(file)


@contextmanager
def _filter(default: int) -> Iterator[_Filter]:
    """A filter that answers by `default` what no rule names, and kills who uses another table of calls."""
    handle = ctypes.c_void_p(_library().seccomp_init(ctypes.c_uint32(default)))
    try:
        for attribute, value in ((_BAD_ARCHITECTURE, _KILL), (_OPTIMIZE, _BINARY_TREE)):
            _checked(_library().seccomp_attr_set(handle, attribute, ctypes.c_uint32(value)))
        yield _Filter(handle)
    finally:
        _library().seccomp_release(handle)


def _checked(result: int) -> None:
    if result:
        raise OSError(-result, f"libseccomp: {os.strerror(-result)}")


def _name(number: int) -> str:
    """The call of a number on this processor; empty where libseccomp knows none."""
    library = _library()
    address = library.seccomp_syscall_resolve_num_arch(library.seccomp_arch_native(), number)
    if not address:
        return ""
    try:
        return ctypes.string_at(address).decode()
    finally:
        ctypes.CDLL(None).free(ctypes.c_void_p(address))


def against_hoarding() -> bytes:
    """A filter for jobs that namespaces hold: it refuses no more than `HOARDS`.

    Raises:
        OSError: where libseccomp is not here, or too old for one of them.
    """
    with _filter(_ALLOW) as filter_:
        for name in HOARDS:
            number = _library().seccomp_syscall_resolve_name(name.encode())
            if number == -1:
                raise OSError(f"{LIBRARY} is too old: it does not know {name}")
            filter_.add(_FORBID, number)
        return filter_.program()


def against_escapes() -> bytes:
    """A filter for jobs that only Landlock holds: it allows what this list leaves.

    Raises:
        OSError: where libseccomp is not here.
    """
    with _filter(_UNKNOWN) as filter_:
        for number in range(FIRST_UNREAD):
            name = _name(number)
            if name in DENIED:
                filter_.add(_FORBID, number)
            elif name in PRETENDED:
                filter_.add(_REFUSE, number)
            elif name in OWN_ONLY:
                filter_.add(_ALLOW, number, _Comparison(0, _EQUAL, 0, 0))
                filter_.add(_FORBID, number, _Comparison(0, _NOT_EQUAL, 0, 0))
            elif name == "clone":
                flags = 1 if platform.machine() == "s390x" else 0  # elsewhere the first argument
                every = sum(NEW_NAMESPACES)
                filter_.add(_ALLOW, number, _Comparison(flags, _MASKED_EQUAL, every, 0))
                for flag in NEW_NAMESPACES:
                    filter_.add(_FORBID, number, _Comparison(flags, _MASKED_EQUAL, flag, flag))
            elif name and name not in HIDDEN:
                filter_.add(_ALLOW, number)
        return filter_.program()


def enforce(libc: ctypes.CDLL, program: bytes) -> None:
    """Put a filter over this process and all that it will start; there is no way back.

    Raises:
        OSError: where the kernel refuses, as without `no_new_privs`.
    """
    instructions = ctypes.create_string_buffer(program, len(program))
    whole = struct.pack("@HP", len(program) // 8, ctypes.addressof(instructions))
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, whole, 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")
