"""The work of this rank at the moment, and where its time went: for messages, records and clocks.

One `Activity` stands for the process (`NOW`). The loop says which phase begins; what waits for other ranks
says so while it waits. Both cost a microsecond.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Listener = Callable[[str], None]
"""Told of each phase, collective and stage of a save as it begins."""


class Activity:
    """The present phase, what is waited for, and the seconds of each phase so far.

    Time is the monotonic clock's: a wall clock that jumps changes nothing here.
    """

    def __init__(self) -> None:
        self.step = 0
        """Optimizer steps done."""
        self.phase = "start"
        """data, forward, backward, update, ..."""
        self.awaited: object = None
        """The collective that is waited for; its text says axis, layer and direction. None if none is."""
        self.listeners: list[Listener] = []
        self.spent_s: defaultdict[str, float] = defaultdict(float)
        """Seconds by phase, without those spent in waiting for other ranks."""
        self.waited_s: defaultdict[str, float] = defaultdict(float)
        """Seconds of waiting for other ranks, by phase."""
        self.counts: dict[str, float] = {}
        """Further numbers of the step, for its record: an engine adds them."""
        self.news: list[tuple[str, dict[str, object]]] = []
        """Events that the record has not yet, with their values."""
        self._since = time.perf_counter()
        self._waits_since = 0.0
        self._depth = 0

    def enter(self, phase: str) -> None:
        """A phase begins, and the one before it ends."""
        now = time.perf_counter()
        self.spent_s[self.phase] += now - self._since
        self._since = now
        self.phase = phase
        if self.listeners:
            self.mark(phase)

    def begin_waiting(self, awaited: object) -> None:
        """A collective is waited for from now on."""
        self._depth += 1
        if self._depth == 1:
            self.awaited = awaited
            self._waits_since = time.perf_counter()
            if self.listeners:
                self.mark("collective")

    def end_waiting(self) -> None:
        """It has ended, whether or not it failed."""
        self._depth -= 1
        if self._depth == 0:
            waited = time.perf_counter() - self._waits_since
            self.waited_s[self.phase] += waited
            self._since += waited  # not of the phase's own time
            self.awaited = None

    @contextmanager
    def waiting(self, awaited: object) -> Iterator[None]:
        """The scope of a wait for other ranks."""
        self.begin_waiting(awaited)
        try:
            yield
        finally:
            self.end_waiting()

    def mark(self, what: str) -> None:
        """Tell listeners of something that is no phase of the loop, such as a stage of a save."""
        for listener in tuple(self.listeners):
            listener(what)

    def take(self) -> tuple[dict[str, float], list[tuple[str, dict[str, object]]]]:
        """Counts and news since the last call."""
        taken = self.counts, self.news
        self.counts, self.news = {}, []
        return taken

    def seconds(self) -> tuple[dict[str, float], dict[str, float]]:
        """Seconds by phase so far, the present one's included: own, and spent in waiting."""
        now = time.perf_counter()
        self.spent_s[self.phase] += now - self._since
        self._since = now
        return dict(self.spent_s), dict(self.waited_s)

    def waits_s(self) -> float:
        """Seconds of waiting for other ranks so far."""
        return sum(self.waited_s.values())

    def waiting_for_s(self) -> float:
        """Seconds since the present wait began; 0 where there is none."""
        return time.perf_counter() - self._waits_since if self.awaited is not None else 0.0

    def __str__(self) -> str:
        awaited = self.awaited
        doing = f"waits for {awaited}" if awaited is not None else f"is in {self.phase}"
        return f"{doing} of step {self.step + 1}"


NOW = Activity()
"""Of this process."""
