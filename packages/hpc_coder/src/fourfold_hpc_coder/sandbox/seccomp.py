"""Which system calls a job may not make, as a seccomp filter for x86-64 and aarch64.

Landlock guards what is opened, not what is done to a file by its name (modes, owners, times, attributes),
nor other processes' settings, nor sockets. Those calls, and whatever reaches into the kernel's rarer parts,
answer EPERM or pretend; calls that are newer than this list answer ENOSYS, as on an older kernel.
"""

import ctypes
import errno
import platform
import struct
from collections.abc import Sequence

PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column of the table, and how the kernel names it (`AUDIT_ARCH_*`)."""

DENIED: dict[str, tuple[int, int]] = {
    # Other processes.
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "kcmp": (312, 272),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "setpriority": (141, 140),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274),
    "ioprio_set": (251, 30),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # Sockets: a name in a file system leads to servers of the same user, and no rule of Landlock guards it.
    "socket": (41, 198),
    # What outlives a process, or is shared with others, without being a file.
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "semget": (64, 190),
    "semop": (65, 193),
    "semctl": (66, 191),
    "semtimedop": (220, 192),
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # Files by their name or handle.
    "chown": (92, -1),
    "lchown": (94, -1),
    "fchown": (93, 55),
    "fchownat": (260, 54),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "utime": (132, -1),
    "utimes": (235, -1),
    "futimesat": (261, -1),
    "utimensat": (280, 88),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "inotify_init": (253, -1),
    "inotify_init1": (294, 26),
    "fanotify_init": (300, 262),
    # Mounts and namespaces.
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "statmount": (457, 457),
    "listmount": (458, 458),
    # Users.
    "setuid": (105, 146),
    "setgid": (106, 144),
    "setreuid": (113, 145),
    "setregid": (114, 143),
    "setresuid": (117, 147),
    "setresgid": (119, 149),
    "setgroups": (116, 159),
    "setfsuid": (122, 151),
    "setfsgid": (123, 152),
    # The kernel's rarer parts, and the machine.
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "acct": (163, 89),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "syslog": (103, 116),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
}
"""Numbers on x86-64 and aarch64; -1 where there is no such call."""

PRETENDED: dict[str, tuple[int, int]] = {
    "chmod": (90, -1),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
}
"""Answer that all is well and do nothing: a linker gives up where it cannot make its output executable."""

_OWN_ONLY = {"prlimit64": (302, 261), "sched_setaffinity": (203, 122)}
"""Allowed for the caller itself, whose process number is then given as 0."""
_CLONE = (56, 220)
_CLONE3 = 435
"""Takes its flags in memory, where no filter sees them: glibc falls back to `clone`."""
_NEW_NAMESPACES = 0x7E020000
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET."""
FIRST_UNKNOWN = 463
"""`setxattrat`: from here on, calls are newer than the table (Linux 6.13)."""
_X32 = 0x40000000
"""Bit of x86-64's second table of calls."""

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
"""Instructions of classic BPF: load a word, three jumps against a constant, return one."""
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
"""Offsets in `struct seccomp_data`."""
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050000
"""The last with an errno, or with 0 for a success that is none."""


HOARDS = ("shmget", "msgget", "semget", "memfd_create", "memfd_secret", "add_key", "io_uring_setup")
"""Give memory that is in no process, where nobody would count it."""


def _column() -> tuple[int, int]:
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        raise ValueError(
            f"the table of system calls has no column for {machine}; it knows "
            f"{' and '.join(_ARCHITECTURES)}"
        )
    return _ARCHITECTURES[machine]


def _beginning(architecture: int) -> list[tuple[int, int, int, int]]:
    return [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
    ]


def against_hoarding() -> bytes:
    """A filter for jobs that namespaces hold: it refuses no more than `HOARDS`.

    Raises:
        ValueError: as `program`.
    """
    column, architecture = _column()
    words = _beginning(architecture)
    words += [(_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _REFUSE | errno.EPERM)]
    for name in HOARDS:
        words += [(_EQUAL, 0, 1, DENIED[name][column]), (_RETURN, 0, 0, _REFUSE | errno.EPERM)]
    words.append((_RETURN, 0, 0, _ALLOW))
    return _assembled(words)


def _assembled(words: Sequence[tuple[int, int, int, int]]) -> bytes:
    return b"".join(struct.pack("<HBBI", *word) for word in words)


def program() -> bytes:
    """The filter's instructions for this machine.

    Raises:
        ValueError: on other processors.
    """
    column, architecture = _column()
    forbid, unknown = _REFUSE | errno.EPERM, _REFUSE | errno.ENOSYS
    words = _beginning(architecture)

    def when(jump: int, value: int, answer: int) -> None:
        words.extend([(jump, 0, 1, value), (_RETURN, 0, 0, answer)])

    when(_AT_LEAST, _X32, forbid)
    when(_AT_LEAST, FIRST_UNKNOWN, unknown)
    when(_EQUAL, _CLONE3, unknown)
    for table, answer in ((DENIED, forbid), (PRETENDED, _REFUSE)):
        for numbers in table.values():
            if numbers[column] >= 0:
                when(_EQUAL, numbers[column], answer)
    # One after another: call by number, else over the four words; then by the first argument's low half.
    for number, jump, value, on_match, otherwise in (
        *((one[column], _EQUAL, 0, _ALLOW, forbid) for one in _OWN_ONLY.values()),
        (_CLONE[column], _ANY_BIT, _NEW_NAMESPACES, forbid, _ALLOW),
    ):
        words.append((_EQUAL, 0, 4, number))
        words.append((_LOAD, 0, 0, _FIRST_ARGUMENT))
        when(jump, value, on_match)
        words.append((_RETURN, 0, 0, otherwise))
    words.append((_RETURN, 0, 0, _ALLOW))
    return _assembled(words)


def enforce(libc: ctypes.CDLL) -> None:
    """Put the filter over this process and all that it will start; there is no way back.

    Raises:
        OSError: where the kernel refuses, as without `no_new_privs`.
    """
    text = program()
    instructions = ctypes.create_string_buffer(text, len(text))
    whole = struct.pack("@HP", len(text) // 8, ctypes.addressof(instructions))
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, whole, 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")
