"""The judge's side of a candidate's process: inputs in, answers out, the clock in our hands.

What is timed is the call alone, by our clock, from "go" to the reply. A program could do its work outside
those two moments: early, while it receives its inputs, or late, before it hands over the outputs, in threads
or in functions of the C library that it replaced. Both are watched from outside: the kernel's count of the
job's processor time, and the wall time, for the judge to charge.
"""

import contextlib
import os
import secrets
import selectors
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fourfold_hpc_coder.problems import Parameter
from fourfold_hpc_coder.sandbox import Job, Mount, Process, Sandbox, started

TOKEN = 16
_PIPE_BYTES = 1 << 20
_EVIDENCE = struct.Struct("<9d")
ALLOWANCE_S = 0.1
"""Wall time for a request's way there and back on a busy machine."""
ALLOWANCE_BYTES_PER_S = 100e6
"""A tenth of what a pipe moves on an idle core."""


class EndedError(Exception):
    """The candidate's process ended, or was ended, before it answered."""


class ForgedError(Exception):
    """Something other than our driver wrote on the channel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What a call did beside its answer, summed over ranks (see `drivers/server.hpp`)."""

    process_cpu_s: float
    main_cpu_s: float
    region_cpu_s: float
    regions: float
    team: float
    message_cpu_s: float
    messages: float
    talking_ranks: float
    ranks: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back from one call."""

    outputs: dict[str, np.ndarray]
    runtime_s: float
    """Of the call, from "go" to the reply."""
    around_s: float
    """Wall time of moving inputs and outputs beyond an allowance."""
    moving_cpu_s: tuple[float, float]
    """Processor time of the whole job while inputs and while outputs were moved."""
    evidence: Evidence


@dataclass(slots=True)
class Channel:
    """Two pipes to one running candidate."""

    process: Process
    folder: Path
    patience_s: float
    """Longest that one request may take."""
    requests: int = -1
    replies: int = -1
    _outgoing: memoryview = field(default_factory=lambda: memoryview(b""))
    _incoming: bytearray = field(default_factory=bytearray)

    def connect(self) -> None:
        """Open the pipes; the write end can be opened only once the candidate reads."""
        self.replies = os.open(self.folder / "replies", os.O_RDONLY | os.O_NONBLOCK)
        # Starting ranks takes its time on a busy machine, and none of it is the candidate's.
        limit_s = time.perf_counter() + 4 * self.patience_s
        while self.requests < 0:
            self._check(limit_s)
            with contextlib.suppress(OSError):  # ENXIO: nobody reads yet
                self.requests = os.open(self.folder / "requests", os.O_WRONLY | os.O_NONBLOCK)
            if self.requests < 0:
                self.process.pump(0.002)
        for name in ("requests", "replies"):  # a second program could open them by name
            (self.folder / name).unlink()
        import fcntl

        fcntl.fcntl(self.requests, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self.process.listen(self.replies, selectors.EVENT_READ, self._receive)

    def call(
        self,
        arguments: Sequence[np.ndarray],
        parameters: Sequence[Parameter],
        outputs: Sequence[Parameter],
    ) -> Answer:
        """Send inputs, have the candidate called once, take its outputs.

        Raises:
            EndedError: where it died, ran into a limit or fell silent.
            ForgedError: where a reply is not our driver's.
        """
        payload = b"".join(map(_packed, arguments, parameters))
        idle_cpu_s, started_s = self.process.processor_s(), time.perf_counter()
        self._ask(b"L", payload)
        early_s = time.perf_counter() - started_s
        early_cpu_s = self.process.processor_s() - idle_cpu_s
        go_s = time.perf_counter()
        self._ask(b"G", b"")
        done_s = time.perf_counter()
        done_cpu_s = self.process.processor_s()
        dump_s = time.perf_counter()
        reply = self._ask(b"D", b"")
        late_s = time.perf_counter() - dump_s
        late_cpu_s = self.process.processor_s() - done_cpu_s
        evidence = _EVIDENCE.unpack_from(reply)
        return Answer(
            outputs=_unpacked(memoryview(reply)[_EVIDENCE.size :], outputs),
            runtime_s=done_s - go_s,
            around_s=max(0.0, early_s - _allowed_s(len(payload)))
            + max(0.0, late_s - _allowed_s(len(reply))),
            moving_cpu_s=(early_cpu_s, late_cpu_s),
            evidence=Evidence(
                **dict(zip(Evidence.__dataclass_fields__, map(float, evidence), strict=True))
            ),
        )

    def quit(self) -> None:
        """Let the candidate end by itself: exit codes and output of a good program are also its own."""
        with contextlib.suppress(EndedError, BrokenPipeError):
            self._send(b"Q" + secrets.token_bytes(TOKEN) + struct.pack("<Q", 0))
            limit_s = time.perf_counter() + self.patience_s
            while not self.process.done and time.perf_counter() < limit_s:
                self.process.pump(0.005)

    def close(self) -> None:
        """Close both ends."""
        for descriptor in (self.requests, self.replies):
            if descriptor >= 0:
                with contextlib.suppress(KeyError, ValueError):
                    self.process.selector.unregister(descriptor)
                os.close(descriptor)

    def _ask(self, operation: bytes, payload: bytes) -> bytes:
        token = secrets.token_bytes(TOKEN)
        if self._incoming:
            raise ForgedError("it wrote on the result channel without being asked")
        self._send(operation + token + struct.pack("<Q", len(payload)) + payload)
        head = self._take(TOKEN + 8)
        if head[:TOKEN] != token:
            raise ForgedError("a reply on the result channel does not carry the request's secret")
        (length,) = struct.unpack("<Q", head[TOKEN:])
        if length > self.process.job.limits.memory_bytes:
            raise ForgedError(f"a reply on the result channel claims {length} bytes")
        return self._take(length)

    def _send(self, message: bytes) -> None:
        limit_s = time.perf_counter() + self.patience_s
        self._outgoing = memoryview(message)
        self._push()
        if not self._outgoing:
            return
        self.process.listen(self.requests, selectors.EVENT_WRITE, self._push)
        try:
            while self._outgoing:
                self._check(limit_s)
                self.process.pump(0.05)
        finally:
            self.process.selector.unregister(self.requests)

    def _push(self) -> None:
        try:
            while self._outgoing:
                self._outgoing = self._outgoing[os.write(self.requests, self._outgoing) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            raise EndedError from None

    def _take(self, length: int) -> bytes:
        limit_s = time.perf_counter() + self.patience_s
        while len(self._incoming) < length:
            self._check(limit_s)
            self.process.pump(0.05)
        taken = bytes(self._incoming[:length])
        del self._incoming[:length]
        return taken

    def _receive(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self.replies, _PIPE_BYTES):
                self._incoming += chunk
            # End of file: the candidate closed its end, which only a dying or hostile one does.
            self.process.selector.unregister(self.replies)

    def _check(self, limit_s: float) -> None:
        if self.process.done:
            self._receive_rest()
            raise EndedError
        if time.perf_counter() > limit_s:
            self.process.kill("wall")
            raise EndedError

    def _receive_rest(self) -> None:
        if self.replies >= 0 and self.replies in self.process.selector.get_map():
            self._receive()


def _allowed_s(length: int) -> float:
    return ALLOWANCE_S + length / ALLOWANCE_BYTES_PER_S


def _packed(values: np.ndarray, parameter: Parameter) -> bytes:
    count = struct.pack("<Q", values.size) if parameter.holds == "many" else b""
    return count + values.tobytes()


def _unpacked(reply: memoryview, outputs: Sequence[Parameter]) -> dict[str, np.ndarray]:
    found, at = {}, 0
    for parameter in outputs:
        count = 1
        if parameter.holds == "many":
            if at + 8 > len(reply):
                raise ForgedError("a reply on the result channel is too short")
            (count,) = struct.unpack_from("<Q", reply, at)
            at += 8
        size = count * parameter.dtype.itemsize
        if at + size > len(reply):
            raise ForgedError("a reply on the result channel is too short")
        found[parameter.name] = np.frombuffer(reply[at : at + size], parameter.dtype)
        at += size
    return found


@contextlib.contextmanager
def opened(sandbox: Sandbox, job: Job, folder: Path, *, patience_s: float) -> Iterator[Channel]:
    """Start a candidate and connect to it; on leaving the block it is gone, with its pipes.

    Args:
        sandbox: where it runs.
        job: its command; the channel's folder is mounted for it at /channel.
        folder: private folder of this launch.
        patience_s: longest that one request may take.
    """
    pipes = folder / "channel"
    pipes.mkdir()
    for name in ("requests", "replies"):
        os.mkfifo(pipes / name)
        # The folder above is ours alone; inside, the stranger must open them.
        (pipes / name).chmod(0o666)
    mounted = Job(
        command=job.command,
        mounts=(*job.mounts, Mount(source=pipes, target="/channel")),
        limits=job.limits,
        environment=job.environment,
    )
    with started(sandbox, mounted) as process:
        channel = Channel(process=process, folder=pipes, patience_s=patience_s)
        try:
            yield channel
        finally:
            channel.close()
