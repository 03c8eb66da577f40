"""One judge for a whole process, for libraries that call a function and know of no beginning and no end."""

import atexit
import threading
from contextlib import ExitStack

from fourfold_hpc_coder.doors.judging import OpenJudge, open_judge
from fourfold_hpc_coder.judge.bench import JudgeSettings

_STACK = ExitStack()
_OPEN: dict[tuple[JudgeSettings, int], OpenJudge] = {}
_LOCK = threading.Lock()


def shared_judge(settings: JudgeSettings | None = None, *, jobs: int = 2) -> OpenJudge:
    """The judge of these settings in this process: opened on first use, closed when the process ends.

    Args:
        settings: limits and launches; the command line's for none.
        jobs: answers built and checked at once.

    Raises:
        ValueError: where no sandbox works.
    """
    key = (settings or JudgeSettings(), jobs)
    with _LOCK:
        if not _OPEN:
            atexit.register(close_shared)
        if key not in _OPEN:
            _OPEN[key] = _STACK.enter_context(open_judge(settings=key[0], jobs=jobs))
        return _OPEN[key]


def close_shared() -> None:
    """Close every judge of this process; the next call opens another."""
    with _LOCK:
        _OPEN.clear()
        _STACK.close()
