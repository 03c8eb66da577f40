"""Names who keeps the other ranks waiting: one that hangs, one that has ended, one that is slow.

A thread of each rank leaves a sign of life in the launch's store every second, with what the rank does at
that moment. Where a collective fails or takes longer than the launch's patience, the others' signs say who
is to blame; ages are counted in signs, so a wall clock that jumps changes nothing. A rank that nothing else
ends is ended here.
"""

import atexit
import json
import logging
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from fourfold_parallel.common.activity import NOW
from fourfold_parallel.launch import is_launched, patience

log = logging.getLogger(__name__)

GRACE_S = 30.0
"""After the launch's patience has ended a collective, so long for this process to end by itself."""
LAST_S = 10.0
"""After a collective has failed, so long for this process to end by itself."""
EXIT_CODE = 75
"""Of a rank that had to be ended: "try again", as sysexits.h has it."""


class RankLostError(RuntimeError):
    """A collective failed, or was not met by all ranks; the message names rank, axis, layer and direction."""


class TerminatedError(SystemExit):
    """The scheduler asked this process to end; its state is saved. As an exit code: 143, that of SIGTERM."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


class Watchdog:
    """This rank's signs of life, and its view of the others'. Does nothing in a process alone.

    Args:
        beat_s: seconds between two signs.
    """

    def __init__(self, *, beat_s: float = 1.0) -> None:
        self._patience_s = patience().total_seconds()
        self._beat_s = min(beat_s, self._patience_s / 60)
        self._ends = threading.Event()
        self._thread: threading.Thread | None = None
        self._store: Any = None
        self._rank = self._ranks = 0
        self._is_gone = False

    def __enter__(self) -> Self:
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
            # A connection of its own: the other may be blocked in a wait.
            store: Any = dist.distributed_c10d._get_default_store()  # noqa: SLF001 - no public name
            self._store = store.clone()
            self._store.set(self._key("last", self._rank), "")
            self._beat(0)
            self._thread = threading.Thread(target=self._live, daemon=True, name="watchdog")
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._thread is not None:
            if error is not None and not self._is_gone:
                with suppress(Exception):
                    words = f"{type(error).__name__}: {error}"[:500]
                    self._store.set(self._key("last", self._rank), words)
            self._ends.set()
            self._thread.join()
            self._thread = None
            if isinstance(error, RankLostError) and is_launched():
                _see_to_the_end()

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """The scope of a training: an error of a collective in it comes with who is to blame.

        Raises:
            RankLostError: In the place of torch's own error.
        """
        try:
            yield
        except RuntimeError as error:
            if not self._ranks or not _is_of_collective(error):
                raise
            told = (
                f"rank {self._rank} gave up at step {NOW.step + 1}, in {NOW.phase}: "
                f"{_first_line(error)}. {self.others()}"
            )
            log.critical("%s", told)  # now: what is under way may keep this process from ending
            raise RankLostError(told) from error

    def others(self) -> str:
        """The other ranks' state in a sentence or two; takes three beats."""
        before = self._signs()
        if self._is_gone:
            return "the launch's store does not answer: rank 0, or the launcher, has ended"
        time.sleep(3 * self._beat_s)
        after = self._signs()
        told: list[str] = []
        for rank in range(self._ranks):
            if rank == self._rank:
                continue
            was, now = before.get(rank), after.get(rank)
            words = self._last_words(rank)
            if words:
                told.append(f"rank {rank} has ended: {words}")
            elif now is None:
                told.append(f"the sign of rank {rank} cannot be read")
            elif was is not None and was["count"] == now["count"]:
                told.append(
                    f"rank {rank} gives no sign of life: it was killed or stopped, or its machine hangs; at "
                    f"its last sign it {now['doing']}"
                )
            elif not now["waits"]:
                told.append(
                    f"rank {rank} is alive, and does not wait for others: it {now['doing']}"
                )
        return "; ".join(told) or "every other rank is alive and waits too"

    def _live(self) -> None:
        count = 0
        while not self._ends.wait(self._beat_s):
            count += 1
            try:
                self._beat(count)
            except RuntimeError:  # whoever held the store has ended: the collectives say so
                self._is_gone = True
                return
            if NOW.waiting_for_s() > self._patience_s + GRACE_S:
                with suppress(Exception):
                    log.critical(
                        "rank %d waits in vain for %.0f s, and is ended: it %s. %s",
                        self._rank, NOW.waiting_for_s(), NOW, self.others(),
                    )  # fmt: skip
                os._exit(EXIT_CODE)

    def _beat(self, count: int) -> None:
        sign = {"count": count, "doing": str(NOW), "waits": NOW.awaited is not None}
        self._store.set(self._key("sign", self._rank), json.dumps(sign))

    def _signs(self) -> dict[int, dict[str, Any]]:
        signs: dict[int, dict[str, Any]] = {}
        try:
            for rank in range(self._ranks):
                if self._store.check([self._key("sign", rank)]):
                    signs[rank] = json.loads(self._store.get(self._key("sign", rank)))
        except RuntimeError:
            self._is_gone = True
        return signs

    def _last_words(self, rank: int) -> str:
        key = self._key("last", rank)
        with suppress(Exception):
            if self._store.check([key]):
                return self._store.get(key).decode()
        return ""

    @staticmethod
    def _key(kind: str, rank: int) -> str:
        return f"fourfold/{kind}/{rank}"


def _see_to_the_end() -> None:
    """See that this process ends: collectives under way keep an interpreter from it, without a limit."""

    def leave() -> None:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_CODE)

    atexit.register(leave)
    if threading.current_thread() is threading.main_thread():
        # Where the way to the end hangs itself. No thread would do: they stand still when it begins.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, LAST_S)


def _is_of_collective(error: RuntimeError) -> bool:
    words = ("gloo", "nccl", "connection closed", "connection reset", "timed out", "c10d")
    said = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in said for word in words)


def _first_line(error: BaseException) -> str:
    notes: list[str] = getattr(error, "__notes__", [])
    return " ".join([str(error).strip().split("\n")[0][:300], *notes])


class StopRequest:
    """Whether the scheduler has asked this process to end (SIGTERM), within a scope of the main thread."""

    def __init__(self) -> None:
        self.is_made = False
        self._before: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the handler's signature
        self.is_made = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Straggler:
    """A rank that the others wait for."""

    rank: int
    share: float
    """Of the time of a step, by how much it works longer than the median of the others."""
    phase: str
    """The part of a step in which it loses most of that."""
    own_s: float
    others_s: float
    """Seconds of work: its own, and the median of the others."""
    steps: int
    """In which they were spent."""


SPANS = ("data", "forward", "backward", "update")
"""Phases of a step in which ranks should take equally long."""
SLOW = 0.1
"""Of the time of a step: a rank that works longer than the others by more is named."""


def straggler(own_s: Tensor, elapsed_s: float, *, steps: int) -> Straggler | None:
    """The rank that keeps the others waiting, if one does.

    Args:
        own_s: seconds of each rank's own work in each of `SPANS`, [ranks, spans], over a number of steps.
        elapsed_s: seconds that those steps took.
        steps: their number.
    """
    totals = own_s.sum(1)
    rank = int(totals.argmax())
    others = [row for other, row in enumerate(own_s) if other != rank]
    if not others or elapsed_s <= 0:
        return None
    usual = torch.stack(others).median(0).values
    usual_s = statistics.median(float(row.sum()) for row in others)
    share = (float(totals[rank]) - usual_s) / elapsed_s
    if share < SLOW:
        return None
    phase = SPANS[int((own_s[rank] - usual).argmax())]
    return Straggler(
        rank=rank,
        share=share,
        phase=phase,
        own_s=float(totals[rank]),
        others_s=usual_s,
        steps=steps,
    )


class Meetings:
    """A short exchange between all ranks, about four times a second: who was asked to end, who is slow.

    Every rank computes from the same numbers when the next one is, so that all come.

    Args:
        ranks: of the launch. sees_waits: the session notes when it waits for others in backward (a grid
        does; what torch does inside
            DDP's backward it does not tell).
    """

    PERIOD_S = 0.25
    WINDOW_S = 5.0
    """Stragglers are looked for over so long."""

    def __init__(self, ranks: Any, *, sees_waits: bool) -> None:
        self._ranks = ranks
        self._spans = [span for span in SPANS if sees_waits or span != "backward"]
        self._next = 1
        self._done = 0
        self._began_s = time.perf_counter()
        self._window: list[Tensor] = []
        self._window_s = 0.0
        self._window_steps = 0
        self._before = self._own()
        self._slow: Straggler | None = None

    def news(self) -> Straggler | None:
        """The slow rank of a window that has ended since the last call, if there is one."""
        slow, self._slow = self._slow, None
        return slow

    def meet(self, *, asked: bool) -> bool:
        """After a step: whether some rank was asked to end; it may be told a few steps late."""
        if self._ranks.size == 1:  # nobody to meet, and nobody slower than others
            return asked
        self._done += 1
        if self._done < self._next:
            return False
        own = self._own()
        elapsed_s = time.perf_counter() - self._began_s
        mine = [own[span] - self._before[span] for span in SPANS]
        with NOW.waiting("the ranks' meeting after a step"):
            table = self._ranks.table([float(asked), elapsed_s, *mine])
        self._before, self._began_s = self._own(), time.perf_counter()
        longest_s = float(table[:, 1].max())
        self._window.append(table[:, 2:])
        self._window_s += longest_s
        self._window_steps += self._done
        steps, self._done = self._done, 0
        self._next = max(1, int(self.PERIOD_S * steps / max(longest_s, 1e-6)))
        if self._window_s >= self.WINDOW_S:
            own_s = torch.stack(self._window).sum(0)
            self._slow = straggler(own_s, self._window_s, steps=self._window_steps)
            self._window, self._window_s, self._window_steps = [], 0.0, 0
        return bool(table[:, 0].any())

    def _own(self) -> dict[str, float]:
        spent, _ = NOW.seconds()
        return {span: spent.get(span, 0.0) if span in self._spans else 0.0 for span in SPANS}
