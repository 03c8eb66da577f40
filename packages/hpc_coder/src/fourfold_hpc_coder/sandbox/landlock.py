"""Keep a job behind Landlock and seccomp, where no namespace may be made: `python -I -m ...landlock JSON`.

This process stays as the job's keeper, the parent of whatever the job leaves behind. Below it the job sees
the files it was given and opens no other; it has no socket, no privilege and, of processes, can signal only
its own. When its first process ends, or the keeper is told to end (SIGTERM), the keeper kills all of it at
once: within its own Landlock domain "every process" means the job's.

What a namespace would do and this does not: the job sees the process numbers of the machine and whether a
file exists, whatever its place; it may write to the folder that stands for /tmp until the supervisor's next
look at its size. Started by root, it becomes a user that owns nothing, of whose tasks the kernel allows so
many, and keeps one capability: to walk through our folders to the files that Landlock lets it open.
"""

import base64
import ctypes
import json
import os
import signal
import struct
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from fourfold_hpc_coder.sandbox import seccomp

OLDEST = 6
"""ABI of Landlock that guards signals and abstract sockets (Linux 6.12); without it a job could signal us."""
_CREATE, _ADD_RULE, _RESTRICT = 444, 445, 446
"""System calls, of the same number on every processor."""
_ASK_VERSION = 1
_PATH_BENEATH = 1
_ALL_FILES, _ALL_NETWORK, _ALL_SCOPES = 0xFFFF, 0x3, 0x3
"""Every right that ABI 6 knows: none is allowed unless a rule says so."""
_EXECUTE, _WRITE, _READ, _LIST, _TRUNCATE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14
_NODES = 1 << 6 | 1 << 9 | 1 << 11 | 1 << 15
"""Making devices and sockets, and commands to devices: nowhere."""
_SEE = _EXECUTE | _READ | _LIST
_OF_A_FILE = _EXECUTE | _WRITE | _READ | _TRUNCATE
"""Rights that something other than a folder can have."""

PR_SET_PDEATHSIG, PR_CAPBSET_READ, PR_CAPBSET_DROP, PR_SET_SECUREBITS = 1, 23, 24, 28
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 36, 38, 47
_AMBIENT_RAISE, _AMBIENT_CLEAR_ALL = 2, 4
_CAPABILITIES_V3 = 0x20080522
_LAST_CAPABILITY = 63
_NO_SETUID_FIXUP = 1 << 2
"""Capabilities outlast a change of user, and access(2) answers with regard to them."""
CAP_DAC_OVERRIDE = 1
"""To pass by the modes of folders and files, where Landlock has a rule for what is opened."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The files that a job may use, by what it may do with them; the paths are real ones."""

    see: tuple[str, ...]
    """Folders and files to read and execute; those that are not there are left out."""
    use: tuple[str, ...]
    """Devices and pipes to read and write."""
    own: tuple[str, ...]
    """Folders in which files are made, changed and removed."""


class Kernel:
    """The system calls that Python lacks."""

    def __init__(self) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)

    def call(self, number: int, *arguments: Any) -> int:
        """A system call's result.

        Raises:
            OSError: where it fails.
        """
        return self._checked(self.libc.syscall(number, *arguments), f"system call {number}")

    def control(self, operation: int, *arguments: int) -> None:
        """prctl(2).

        Raises:
            OSError: where it fails.
        """
        padded = (*arguments, *[0] * (4 - len(arguments)))
        words = [ctypes.c_ulong(word) for word in padded]
        self._checked(self.libc.prctl(operation, *words), f"prctl {operation}")

    @staticmethod
    def _checked(result: int, what: str) -> int:
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"{what}: {os.strerror(number)}")
        return result

    def abi(self) -> int:
        """Landlock's version; 0 where the kernel has none or does not use it."""
        try:
            return self.call(_CREATE, None, ctypes.c_size_t(0), _ASK_VERSION)
        except OSError:
            return 0

    def confine(self, files: int, network: int, scopes: int, rules: Rules) -> None:
        """Enter a new domain in which of the given rights only those of the rules are left."""
        wanted = struct.pack("=QQQ", files, network, scopes)
        ruleset = self.call(_CREATE, wanted, ctypes.c_size_t(len(wanted)), 0)
        try:
            for paths, rights in (
                (rules.see, _SEE),
                (rules.use, _READ | _WRITE),
                (rules.own, _ALL_FILES & ~_NODES),
            ):
                for path in paths:
                    self._allow(ruleset, path, rights)
            self.call(_RESTRICT, ruleset, 0)
        finally:
            os.close(ruleset)

    def _allow(self, ruleset: int, path: str, rights: int) -> None:
        try:
            beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            allowed = rights if Path(path).is_dir() else rights & _OF_A_FILE
            rule = struct.pack("=Qi", allowed, beneath)
            self.call(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0)
        finally:
            os.close(beneath)

    def powerless(self, user: int) -> None:
        """Become a user with no rights but its own; as root, another one that owns nothing."""
        self.control(PR_CAP_AMBIENT, _AMBIENT_CLEAR_ALL)
        kept = 0
        if os.geteuid() == 0:
            kept = 1 << CAP_DAC_OVERRIDE
            for capability in {*range(_LAST_CAPABILITY + 1)} - {CAP_DAC_OVERRIDE}:
                if self.libc.prctl(PR_CAPBSET_READ, capability, 0, 0, 0) > 0:
                    self.control(PR_CAPBSET_DROP, capability)
            self.control(PR_SET_SECUREBITS, _NO_SETUID_FIXUP)
            os.setgroups(())
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        header = struct.pack("=Ii", _CAPABILITIES_V3, 0)
        sets = struct.pack("=6I", kept, kept, kept, 0, 0, 0)
        self._checked(self.libc.capset(header, sets), "capset")
        if kept:
            self.control(PR_CAP_AMBIENT, _AMBIENT_RAISE, CAP_DAC_OVERRIDE)


def keep(
    command: Sequence[str],
    environment: Mapping[str, str],
    rules: Rules,
    *,
    program: bytes,
    home: str,
    user: int,
) -> int:
    """Run a command behind the rules; when it ends, so does everything that it started.

    Args:
        command: found on the environment's PATH.
        environment: the whole of it.
        rules: which files it may open.
        program: of the filter over its system calls.
        home: folder to start in.
        user: whom to become where this runs as root.

    Returns:
        Its exit code, as shells report it: 128 more than a signal's number.

    Raises:
        OSError: where the kernel lacks something or does not allow it; nothing was started then.
    """
    kernel = Kernel()
    if kernel.abi() < OLDEST:
        raise OSError(f"this kernel's Landlock has ABI {kernel.abi()}; {OLDEST} is needed")
    told = {signal.SIGTERM, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, told)
    kernel.control(PR_SET_PDEATHSIG, signal.SIGTERM)
    kernel.control(PR_SET_CHILD_SUBREAPER, 1)
    kernel.control(PR_SET_NO_NEW_PRIVS, 1)
    nothing = Rules(see=(), use=(), own=())
    kernel.confine(0, 0, _ALL_SCOPES, nothing)
    _prove_scope()
    child = os.fork()
    if child == 0:
        _begin(kernel, command, environment, rules, program, home, user)
    status, killed = None, False
    while status is None and not killed:
        killed = signal.sigwait(told) == signal.SIGTERM
        status = _reaped(child)
    _end_all()
    if killed:
        os.kill(os.getpid(), signal.SIGKILL)
    code = os.waitstatus_to_exitcode(status or 0)
    return code if code >= 0 else 128 - code


def _prove_scope() -> None:
    """Refuse to go on where signals still leave our domain: `_end_all` would reach everyone's processes."""
    try:
        os.kill(os.getppid(), 0)
    except PermissionError:
        return
    raise OSError("signals leave Landlock's domain")


def _reaped(child: int) -> int | None:
    """Collect what has ended; the status of the job's first process, if it is among them."""
    first_status = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return first_status
        if pid == 0:
            return first_status
        if pid == child:
            first_status = status


def _end_all() -> None:
    """Kill every process of the domain but this one, in one call, until none is left to be waited for."""
    while True:
        _prove_scope()
        with suppress(ProcessLookupError, PermissionError):
            os.kill(-1, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return


def _begin(
    kernel: Kernel,
    command: Sequence[str],
    environment: Mapping[str, str],
    rules: Rules,
    program: bytes,
    home: str,
    user: int,
) -> NoReturn:
    """In the child: give everything up, in the order in which it is still possible, and become the job."""
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # by Python, and exec(2) would keep it so
            signal.signal(ignored, signal.SIG_DFL)
        os.setsid()
        os.chdir(home)
        kernel.powerless(user)
        kernel.confine(_ALL_FILES, _ALL_NETWORK, _ALL_SCOPES, rules)
        seccomp.enforce(kernel.libc, program)
        os.execvpe(command[0], [*command], {**environment})  # noqa: S606 - a shell would be one more to trust
    except OSError as error:
        os.write(2, f"landlock: {error.strerror or error}\n".encode())
    finally:
        os._exit(126)


def main() -> NoReturn:
    """Keep the job that the one argument describes."""
    asked = json.loads(sys.argv[1])
    rules = Rules(**{name: tuple(paths) for name, paths in asked["rules"].items()})
    try:
        code = keep(
            asked["command"],
            asked["environment"],
            rules,
            program=base64.b64decode(asked["filter"]),
            home=asked["home"],
            user=asked["user"],
        )
    except (OSError, ValueError) as error:
        sys.exit(f"landlock: {error}")
    os._exit(code)


if __name__ == "__main__":
    main()
