"""A judge behind HTTP, for programs of this machine only: JSON in, JSON out, standard library.

    POST /judge     {"problem": "27_reduce_average", "code": "...", "model": "omp"}, or a list of such
    GET  /problems  names, models and prompts of the built-in problems
    GET  /health    the sandbox, and how many answers wait

It listens on the loopback address alone. Other users of the machine reach that too, and so does any page in a
browser: every request must carry the token that the server wrote to a file which its user alone can read.
What waits is bounded, a request beyond it is told to come again; so are a request's size, the time in which
it must arrive, and the number of connections.
"""

import hmac
import json
import secrets
import threading
from concurrent.futures import Future
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from os import PathLike
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from fourfold_hpc_coder.doors.judging import LONGEST_CHARACTERS, BusyError, OpenJudge
from fourfold_hpc_coder.judge.judge import Judgement
from fourfold_hpc_coder.problems.library import own_problems
from fourfold_hpc_coder.score.journal import judgement_fields
from fourfold_hpc_coder.vocabulary import Model

LOOPBACK = "127.0.0.1"
LARGEST_BYTES = 8 * LONGEST_CHARACTERS
"""Of a request."""
CONNECTIONS = 64
"""At once; each is a thread that waits for its judgements."""
ARRIVING_S = 30.0
"""Longest that a client may let the server wait for its next bytes."""
FIELDS = {"problem", "code", "model", "prompt", "extracts_body"}


class _RefusalError(Exception):
    """An answer other than 200."""

    def __init__(self, status: HTTPStatus, because: str) -> None:
        super().__init__(because)
        self.status = status


class JudgeServer(ThreadingHTTPServer):
    """The server; `serve_forever` works until `shutdown`.

    Args:
        judge: that it asks.
        port: 0 for any that is free; `server_port` says which.
        token_file: receives the token, readable by its owner alone.
        connections: at once.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = CONNECTIONS

    def __init__(
        self,
        judge: OpenJudge,
        port: int,
        token_file: str | PathLike[str],
        *,
        connections: int = CONNECTIONS,
    ) -> None:
        self.judge = judge
        self.token = secrets.token_urlsafe(24)
        self._places = threading.BoundedSemaphore(connections)
        super().__init__((LOOPBACK, port), _Handler)
        path = Path(token_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.touch(mode=0o600, exist_ok=False)
        with path.open("w", encoding="utf-8") as file:
            file.write(f"{self.token}\n")

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://{LOOPBACK}:{self.server_port}"

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for the connection, or a refusal where there are too many."""
        if not self._places.acquire(blocking=False):
            with suppress(OSError):
                request.sendall(
                    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\n"
                    b"Content-Length: 0\r\nConnection: close\r\n\r\n"
                )
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection, then give its place back."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: a client that went away is no event."""


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: JudgeServer  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"
    timeout = ARRIVING_S

    def do_GET(self) -> None:
        """`/problems` and `/health`."""
        self._respond(self._asked_for)

    def do_POST(self) -> None:
        """`/judge`."""
        self._respond(self._judged)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its names
        """Nothing: answers may be many, and secret."""

    def _respond(self, work: Any) -> None:
        status, more = HTTPStatus.OK, {}
        try:
            self._admit()
            fields = work()
        except _RefusalError as refusal:
            status, fields = refusal.status, {"error": str(refusal)}
        except ValueError as error:
            status, fields = HTTPStatus.BAD_REQUEST, {"error": str(error)}
        except BusyError as error:
            status, fields = HTTPStatus.SERVICE_UNAVAILABLE, {"error": str(error)}
            more["Retry-After"] = "1"
        except RuntimeError as error:
            status, fields = HTTPStatus.INTERNAL_SERVER_ERROR, {"error": str(error)}
        content = json.dumps(fields).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in more.items():
            self.send_header(name, value)
        if status != HTTPStatus.OK:  # what was not read of the request would be taken for the next
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        self.wfile.write(content)

    def _admit(self) -> None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ").encode()
        if not hmac.compare_digest(given, self.server.token.encode()):
            raise _RefusalError(
                HTTPStatus.UNAUTHORIZED,
                "send the header `Authorization: Bearer TOKEN`, with the token of the server's file",
            )

    def _asked_for(self) -> Any:
        match self.path:
            case "/health":
                bench = self.server.judge.bench
                return {
                    "sandbox": bench.sandbox.name,
                    "gap": bench.sandbox.gap,
                    "waiting": self.server.judge.waiting,
                }
            case "/problems":
                return [
                    {"problem": problem.name, "model": model, "prompt": problem.prompt(model)}
                    for problem in own_problems().values()
                    for model in problem.models
                ]
            case _:
                raise _RefusalError(
                    HTTPStatus.NOT_FOUND, "there are POST /judge, GET /problems and GET /health"
                )

    def _judged(self) -> Any:
        if self.path != "/judge":
            raise _RefusalError(
                HTTPStatus.NOT_FOUND, "there are POST /judge, GET /problems and GET /health"
            )
        asked = self._content()
        judge = self.server.judge
        entries = asked if isinstance(asked, list) else [asked]
        if len(entries) > judge.most_waiting:
            raise ValueError(f"{len(entries)} answers at once; {judge.most_waiting} are the most")
        chosen = [_checked(entry) for entry in entries]
        # All of them or none: a list of which some were refused would be judged in part.
        futures: list[Future[Judgement]] = []
        try:
            futures += [judge.submit(**fields, waits=False) for fields in chosen]
        except BaseException:
            for future in futures:
                future.cancel()
            raise
        judged = [
            shown(judge, future.result(), fields.get("model", "omp"))
            for future, fields in zip(futures, chosen, strict=True)
        ]
        return judged if isinstance(asked, list) else judged[0]

    def _content(self) -> Any:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise _RefusalError(HTTPStatus.LENGTH_REQUIRED, "send a Content-Length")
        if int(length) > LARGEST_BYTES:
            raise _RefusalError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"{length} bytes are too many; {LARGEST_BYTES} are the most",
            )
        try:
            content = self.rfile.read(int(length))
            return json.loads(content)
        except TimeoutError:
            raise _RefusalError(
                HTTPStatus.REQUEST_TIMEOUT, f"the request did not arrive within {ARRIVING_S:g} s"
            ) from None
        except ValueError as error:
            raise ValueError(f"the request is not JSON: {error}") from None


def _checked(entry: Any) -> dict[str, Any]:
    """The arguments of `OpenJudge.submit` in one entry of a request.

    Raises:
        ValueError: where it is something else.
    """
    if not isinstance(entry, dict):
        raise ValueError(
            f"an answer is an object with problem and code, not {type(entry).__name__}"
        )
    if lacking := sorted({"problem", "code"} - {*entry}):
        raise ValueError(f"an answer lacks {', '.join(lacking)}")
    if unknown := sorted({*map(str, entry)} - FIELDS):
        raise ValueError(
            f"an answer has {', '.join(unknown)}; there are {', '.join(sorted(FIELDS))}"
        )
    for name, value in entry.items():
        kind = bool if name == "extracts_body" else str
        if not isinstance(value, kind):
            raise ValueError(f"{name} is {type(value).__name__}, not {kind.__name__}")
    return entry


def shown(judge: OpenJudge, judgement: Judgement, model: Model) -> dict[str, Any]:
    """A judgement as plain JSON, with what a client asks first: does it count, and how fast is it?"""
    fields = judgement_fields(judgement)
    return {
        **fields,
        "counts": judgement.sample.counts,
        "speedup": judge.speedup(judgement, model),
        "efficiency": judge.efficiency(judgement, model),
    }


def ask(url: str, token_file: str | PathLike[str], fields: Any, *, patience_s: float = 600) -> Any:
    """The server's judgement on an answer, or its judgements on a list of them.

    Args:
        url: of the server.
        token_file: that it wrote.
        fields: `problem`, `code` and, where wanted, `model`, `prompt`, `extracts_body`; or a list of such.
        patience_s: longest to wait.

    Raises:
        ValueError: with the server's words, where it refuses.
    """
    token = Path(token_file).read_text(encoding="utf-8").strip()
    request = Request(  # noqa: S310 - the user's address
        f"{url}/judge",
        data=json.dumps(fields).encode(),
        headers={"Content-Type": "application/json", "Authorization": f"Bearer {token}"},
    )
    try:
        with urlopen(request, timeout=patience_s) as response:  # noqa: S310
            return json.load(response)
    except HTTPError as error:
        with error:
            said = error.read().decode("utf-8", "replace")
        with suppress(ValueError, KeyError, TypeError):
            said = json.loads(said)["error"]
        raise ValueError(f"{url}: {error.code} {error.reason}: {said}") from None
