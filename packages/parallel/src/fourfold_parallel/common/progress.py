"""Progress as a value: libraries call it, the command line draws it."""

import logging
import time
from typing import Protocol

log = logging.getLogger(__name__)


class Progress(Protocol):
    """Told how far a piece of work has come."""

    def __call__(self, done: int, total: int, note: str) -> None:
        """`done` of `total` steps; `note` is a few words, such as the current loss."""
        ...


DONE = "done"
"""The note of work that is finished."""


def silent(done: int, total: int, note: str) -> None:
    """Say nothing."""


class Logged:
    """Log lines at level INFO: the first step, the last, and one in `every_s` seconds between them."""

    def __init__(self, *, every_s: float = 5.0) -> None:
        self._every_s = every_s
        self._last_step = 0
        self._first_step, self._first_s, self._due_s = 0, 0.0, 0.0

    def __call__(self, done: int, total: int, note: str) -> None:
        """Write `step 20 of 50: loss 3.121 nats, 12 s left`; a step before the last one begins anew."""
        now_s = time.monotonic()
        if not self._last_step or done <= self._last_step:
            self._first_step, self._first_s, self._due_s = done, now_s, now_s
        self._last_step = done
        if now_s < self._due_s and done < total:
            return
        self._due_s = now_s + self._every_s
        left = ""
        if self._first_step < done < total:
            step_s = (now_s - self._first_s) / (done - self._first_step)
            left = f", {step_s * (total - done):.0f} s left"
        log.info("step %d of %d: %s%s", done, total, note, left)


logged = Logged()
"""Tells of a training unless something else is asked for."""
