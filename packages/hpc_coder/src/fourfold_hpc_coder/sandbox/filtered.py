"""Put a filter of system calls over a command: `python -I -m ...filtered FILE COMMAND...`."""

import ctypes
import os
import sys
from pathlib import Path
from typing import NoReturn

from fourfold_hpc_coder.sandbox import seccomp

PR_SET_NO_NEW_PRIVS = 38


def main() -> NoReturn:
    """Become the command, behind the filter in the file; nothing is started where that fails."""
    _, file, *command = sys.argv
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "no_new_privs")
        seccomp.enforce(libc, Path(file).read_bytes())
        os.execvp(command[0], command)  # noqa: S606 - a shell would be one more to trust
    except OSError as error:
        sys.exit(f"filter: {error}")


if __name__ == "__main__":
    main()
