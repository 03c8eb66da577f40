"""The judge's side of a candidate's process: inputs in, answers out, the clock in our hands.

What is timed is the call alone, by our clock, from "go" to the reply. A program could do its work outside
those two moments: early, while it receives its inputs, or late, before it hands over the outputs, in threads
or in functions of the C library that it replaced. Both are watched from outside, by the kernel's count of the
job's processor time, for the judge to charge. The server's ranks sleep where they wait for one another.
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

from fourfold_hpc_coder.problems.signature import Parameter
from fourfold_hpc_coder.sandbox.backends import Sandbox
from fourfold_hpc_coder.sandbox.job import Job, Mount
from fourfold_hpc_coder.sandbox.process import Process, started

TOKEN = 16
_PIPE_BYTES = 1 << 20
_EVIDENCE = struct.Struct("<12d")


class EndedError(Exception):
    """The candidate's process ended, or was ended, before it answered."""


class ForgedError(Exception):
    """Something other than our driver wrote on the channel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Measurements of a call beside its answer, summed over ranks (see `drivers/server.hpp`)."""

    process_cpu_s: float
    main_cpu_s: float
    region_cpu_s: float
    regions: float
    team: float
    message_cpu_s: float
    team_cpu_s: float
    busiest_cpu_s: float
    messages: float
    talking_ranks: float
    ranks: float
    working_ranks: float

    @property
    def computed_s(self) -> float:
        """Processor time of the calling threads outside MPI, which waits by spinning."""
        return self.main_cpu_s - self.message_cpu_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The outputs of one call, its time, and the evidence of its work."""

    outputs: dict[str, np.ndarray]
    runtime_s: float
    """Of the call, from "go" to the reply."""
    moving_cpu_s: tuple[float, float]
    """Processor time of the whole job while inputs and while outputs were moved."""
    evidence: Evidence
    elsewhere: np.ndarray
    """What the ranks after the first returned, in their order; empty where nothing is returned."""


@dataclass(slots=True)
class Channel:
    """Two pipes to one running candidate."""

    process: Process
    folder: Path
    patience_s: float
    """Longest that one request may take."""
    requests: int = -1
    replies: int = -1
    _outgoing: list[memoryview] = field(default_factory=list)
    _incoming: memoryview = field(default_factory=lambda: memoryview(b""))
    """The rest of the reply under way, to be filled."""

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

        for pipe in (self.requests, self.replies):
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)

    def call(
        self,
        arguments: Sequence[np.ndarray],
        parameters: Sequence[Parameter],
        outputs: Sequence[Parameter],
    ) -> Reply:
        """Send inputs, have the candidate called once, take its outputs.

        Raises:
            EndedError: where it died, ran into a limit or fell silent.
            ForgedError: where a reply is not our driver's.
        """
        payload = [
            part for pair in zip(arguments, parameters, strict=True) for part in _packed(*pair)
        ]
        idle_cpu_s = self.process.processor_s()
        self._ask(b"L", payload)
        early_cpu_s = self.process.processor_s() - idle_cpu_s
        go_s = time.perf_counter()
        self._ask(b"G")
        done_s = time.perf_counter()
        done_cpu_s = self.process.processor_s()
        reply = self._ask(b"D")
        late_cpu_s = self.process.processor_s() - done_cpu_s
        if len(reply) < _EVIDENCE.size:
            raise ForgedError("a reply on the result channel is too short")
        evidence = _EVIDENCE.unpack_from(reply)
        taken, rest = _unpacked(reply[_EVIDENCE.size :], outputs)
        return Reply(
            outputs=taken,
            elsewhere=_returned(rest, outputs),
            runtime_s=done_s - go_s,
            moving_cpu_s=(early_cpu_s, late_cpu_s),
            evidence=Evidence(
                **dict(zip(Evidence.__dataclass_fields__, map(float, evidence), strict=True))
            ),
        )

    def quit(self) -> None:
        """Let the candidate end by itself: exit codes and output of a good program are also its own."""
        with contextlib.suppress(EndedError, BrokenPipeError):
            self._send([memoryview(b"Q" + secrets.token_bytes(TOKEN) + struct.pack("<Q", 0))])
            limit_s = time.perf_counter() + self.patience_s
            while not self.process.done and time.perf_counter() < limit_s:
                self.process.pump(0.05)

    def close(self) -> None:
        """Close both ends."""
        for descriptor in (self.requests, self.replies):
            if descriptor >= 0:
                with contextlib.suppress(KeyError, ValueError):
                    self.process.selector.unregister(descriptor)
                os.close(descriptor)

    def _ask(self, operation: bytes, payload: Sequence[memoryview] = ()) -> memoryview:
        token = secrets.token_bytes(TOKEN)
        with contextlib.suppress(BlockingIOError):  # nothing is there
            if os.read(self.replies, 1):
                raise ForgedError("it wrote on the result channel without being asked")
        head = operation + token + struct.pack("<Q", sum(map(len, payload)))
        self._send([memoryview(head), *payload])
        head = self._take(TOKEN + 8)
        if head[:TOKEN] != token:
            raise ForgedError("a reply on the result channel does not carry the request's secret")
        (length,) = struct.unpack("<Q", head[TOKEN:])
        if length > self.process.job.limits.memory_bytes:
            raise ForgedError(f"a reply on the result channel claims {length} bytes")
        return self._take(length)

    def _send(self, parts: Sequence[memoryview]) -> None:
        limit_s = time.perf_counter() + self.patience_s
        self._outgoing = [part for part in parts if len(part)]
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
                written = os.writev(self.requests, self._outgoing)
                while self._outgoing and written >= len(self._outgoing[0]):
                    written -= len(self._outgoing.pop(0))
                if written:
                    self._outgoing[0] = self._outgoing[0][written:]
        except BlockingIOError:
            return
        except BrokenPipeError:
            raise EndedError from None

    def _take(self, length: int) -> memoryview:
        """The next bytes of the reply; only what was asked for is read, so that none are left over."""
        limit_s = time.perf_counter() + self.patience_s
        whole = memoryview(bytearray(length))
        self._incoming = whole
        self._receive()
        if not self._incoming:
            return whole
        self.process.listen(self.replies, selectors.EVENT_READ, self._receive)
        try:
            while self._incoming:
                try:
                    self._check(limit_s)
                except EndedError:
                    self._receive()  # its last words
                    if self._incoming:
                        raise
                else:
                    self.process.pump(0.05)
        finally:
            self._deaf()
        return whole

    def _receive(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._incoming:
                count = os.readv(self.replies, [self._incoming])
                if not count:
                    # Only a dying or hostile program closes its end; the former ends soon.
                    self._deaf()
                    return
                self._incoming = self._incoming[count:]

    def _deaf(self) -> None:
        with contextlib.suppress(KeyError):
            self.process.selector.unregister(self.replies)

    def _check(self, limit_s: float) -> None:
        if self.process.done:
            raise EndedError
        if time.perf_counter() > limit_s:
            self.process.kill("wall")
            raise EndedError


def _packed(values: np.ndarray, parameter: Parameter) -> tuple[memoryview, memoryview]:
    """Their number where there may be several, and their bytes."""
    count = struct.pack("<Q", values.size) if parameter.holds == "many" else b""
    flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return memoryview(count), flat.data


def _unpacked(
    reply: memoryview, outputs: Sequence[Parameter]
) -> tuple[dict[str, np.ndarray], memoryview]:
    """The outputs of the first rank, and what is left of the reply."""
    arrays, at = {}, 0
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
        arrays[parameter.name] = np.frombuffer(reply[at : at + size], parameter.dtype)
        at += size
    return arrays, reply[at:]


def _returned(rest: memoryview, outputs: Sequence[Parameter]) -> np.ndarray:
    result = next((output.dtype for output in outputs if output.name == "result"), np.dtype("u1"))
    if len(rest) % result.itemsize:
        raise ForgedError("a reply on the result channel ends within a value")
    return np.frombuffer(rest, result)


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
