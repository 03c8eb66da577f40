"""An answer in, a judgement out, without a file: the scorer's own schedule behind a queue.

Answers that wait together are built and checked on all processors and then timed one by one, as the answers
of a file are, by the same code and with the same cache. So the verdicts are the same.
"""

import math
import secrets
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import cast

from fourfold_hpc_coder.evaluation import speedup_at_k
from fourfold_hpc_coder.judge import toolchain
from fourfold_hpc_coder.judge.bench import Bench, JudgeSettings
from fourfold_hpc_coder.judge.judge import Judgement
from fourfold_hpc_coder.judge.reference import Reference
from fourfold_hpc_coder.pareval.bodies import body_of
from fourfold_hpc_coder.pareval.files import Question
from fourfold_hpc_coder.problems.library import find_problem, own_problems
from fourfold_hpc_coder.sandbox.backends import Sandbox
from fourfold_hpc_coder.sandbox.process import find_sandbox
from fourfold_hpc_coder.sandbox.scratch import scratch_folder
from fourfold_hpc_coder.score.cache import answer_key, cached, keep
from fourfold_hpc_coder.score.schedule import TOGETHER, AnswerTask, judge_all
from fourfold_hpc_coder.vocabulary import MODELS, Model, Processors, Prompt

GATHERING_S = 0.02
"""After an answer came, others may join it for so long: they are built side by side."""
REDRAWN = 256
"""Answers that are judged on one set of inputs. Sentences name sizes and values, from which a reader who asks
again and again would learn the inputs; they are drawn anew then."""
WAITING = 1024
"""Answers that may wait, unless told otherwise."""
LONGEST_CHARACTERS = 1 << 20
"""Of an answer."""


class BusyError(Exception):
    """As many answers wait as may; ask again later."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """An answer that waits, and whoever waits for its judgement."""

    task: AnswerTask
    future: Future[Judgement]


@dataclass(slots=True, kw_only=True)
class OpenJudge:
    """A judge at work: any thread may hand over answers. `open_judge` makes one and ends it."""

    bench: Bench
    jobs: int
    most_waiting: int
    is_cached: bool
    _line: deque[_Asked] = field(default_factory=deque)
    _rights: dict[str, Reference] = field(default_factory=dict)
    _drawn_for: int = 0
    _is_closed: bool = False
    _changed: threading.Condition = field(default_factory=threading.Condition)

    @property
    def waiting(self) -> int:
        """Answers that wait."""
        return len(self._line)

    def submit(
        self,
        problem: str,
        code: str,
        *,
        model: Model = "omp",
        prompt: str = "",
        extracts_body: bool = False,
        waits: bool = True,
    ) -> "Future[Judgement]":
        """Hand over an answer; its judgement comes by the future.

        Args:
            problem: name of a built-in problem, such as `27_reduce_average`.
            code: the function's body, up to its closing brace.
            model: parallel model that was asked for.
            prompt: the text that was shown, which ends by opening the function; empty for the built-in one.
            extracts_body: whether the code is a chat's reply, of which the function's body is judged.
            waits: whether to wait for a place in the queue where it is full.

        Raises:
            ValueError: for a problem, prompt or model that cannot be judged here, or code too long.
            BusyError: where the queue is full and `waits` is False.
            RuntimeError: once the judge is closed.
        """
        question = asked(problem, code, model, prompt, extracts_body=extracts_body)
        if reason := toolchain.barred(question.model, self.bench.sandbox):
            raise ValueError(reason)
        [body] = question.outputs
        known = find_problem(question.name, question.prompt, question.model)
        key = answer_key(known, question.model, question.prompt, body, self.bench.settings)
        future: Future[Judgement] = Future()
        if self.is_cached and (judgement := cached(key)):
            future.set_result(judgement)
            return future
        task = AnswerTask(question, known, body, key, ())
        with self._changed:
            if not waits and len(self._line) >= self.most_waiting:
                raise BusyError(
                    f"{self.most_waiting} answers wait already; ask again when some have been judged"
                )
            self._changed.wait_for(lambda: self._is_closed or len(self._line) < self.most_waiting)
            if self._is_closed:
                raise RuntimeError("this judge is closed; open another with open_judge()")
            self._line.append(_Asked(task, future))
            self._changed.notify_all()
        return future

    def judge(
        self,
        problem: str,
        code: str,
        *,
        model: Model = "omp",
        prompt: str = "",
        extracts_body: bool = False,
    ) -> Judgement:
        """The judgement on an answer; arguments and errors as of `submit`."""
        return self.submit(
            problem, code, model=model, prompt=prompt, extracts_body=extracts_body
        ).result()

    def speedup(self, judgement: Judgement, model: Model) -> float:
        """Best sequential time over the answer's, on the model's largest launch; 0 unless it counts."""
        prompt = Prompt(name="", problem_type="", model=model, samples=(judgement.sample,))
        value = speedup_at_k([prompt], 1, processors=self._largest(model))
        return 0.0 if math.isnan(value) else value

    def efficiency(self, judgement: Judgement, model: Model) -> float:
        """The speed-up per processor."""
        return self.speedup(judgement, model) / self._largest(model).count

    def _largest(self, model: Model) -> Processors:
        return max(self.bench.settings.of(model), key=lambda processors: processors.count)

    def close(self) -> None:
        """Take no more answers; those that wait are judged."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def work(self) -> None:
        """Judge what comes, until it is closed and nothing waits; one thread does this."""
        while batch := self._next():
            self._judge(batch)

    def _next(self) -> list[_Asked]:
        """The answers to judge together; none once it is closed and nothing waits."""
        with self._changed:
            self._changed.wait_for(lambda: self._line or self._is_closed)
            full = min(TOGETHER, self.most_waiting)
            self._changed.wait_for(
                lambda: self._is_closed or len(self._line) >= full, timeout=GATHERING_S
            )
            batch = [self._line.popleft() for _ in range(min(TOGETHER, len(self._line)))]
            self._changed.notify_all()
            return batch

    def _judge(self, batch: list[_Asked]) -> None:
        """Settle every future of a batch."""
        futures: dict[str, list[Future[Judgement]]] = {}
        tasks: dict[str, AnswerTask] = {}
        for waiting in batch:
            if not waiting.future.set_running_or_notify_cancel():
                continue  # nobody wants it any more
            futures.setdefault(waiting.task.key, []).append(waiting.future)
            tasks[waiting.task.key] = waiting.task
        ordered = sorted(tasks.values(), key=lambda task: task.problem.name)

        def settle(task: AnswerTask, judgement: Judgement) -> None:
            if self.is_cached:
                keep(task.key, judgement)
            for future in futures.pop(task.key):
                future.set_result(judgement)

        if self._drawn_for >= REDRAWN:
            self.bench, self._drawn_for = replace(self.bench, secret=secrets.randbits(63)), 0
            self._rights.clear()
        self._drawn_for += len(ordered)
        failed: Mapping[str, str] = {}
        why: BaseException | None = None
        try:
            failed = judge_all(self.bench, ordered, MODELS, self.jobs, settle, self._rights)
        except BaseException as error:  # noqa: BLE001 - whoever waits must hear of it
            why = error
        for key, left in futures.items():
            task = tasks[key]
            place = f"{task.problem.name} ({task.question.model})"
            said = failed.get(task.source) or failed.get(place) or f"{why or 'not judged'}"
            for future in left:
                future.set_exception(RuntimeError(f"{place} cannot be judged: {said}"))


def asked(
    problem: str, code: str, model: str, prompt: str = "", *, extracts_body: bool = False
) -> Question:
    """The question that an answer belongs to, with the answer as its one output.

    Raises:
        ValueError: for another problem, model or kind of code than there are.
    """
    if model not in MODELS:
        raise ValueError(f"model {model!r} is none of {', '.join(MODELS)}")
    if not isinstance(code, str) or len(code) > LONGEST_CHARACTERS:
        raise ValueError(
            f"code is {len(code)} characters long; {LONGEST_CHARACTERS} are the most"
            if isinstance(code, str)
            else f"code is {type(code).__name__}, not the text of a function's body"
        )
    chosen = cast("Model", model)
    if not prompt:
        known = own_problems().get(problem)
        if known is not None and chosen not in known.models:
            raise ValueError(
                f"{problem} has no prompt in {model}; it has {', '.join(known.models)}"
            )
        prompt = known.prompt(chosen) if known else ""
    body = body_of(code, prompt) if extracts_body else code
    # Half of a character, which UTF-16 allows and no file of ours can hold, is a question mark.
    whole = body.encode("utf-8", "replace").decode()
    kind = find_problem(problem, prompt, chosen).problem_type
    return Question(
        name=problem,
        problem_type=kind,
        model=chosen,
        prompt=prompt,
        outputs=(whole,),
        fields={},
    )


@contextmanager
def open_judge(
    *,
    settings: JudgeSettings | None = None,
    sandbox: Sandbox | None = None,
    jobs: int = 2,
    waiting: int = WAITING,
    is_cached: bool = True,
) -> Iterator[OpenJudge]:
    """A judge for many answers; on leaving the block it has judged what waited.

    Args:
        settings: limits and launches; the command line's for none.
        sandbox: the best that works here for none.
        jobs: answers built and checked at once; timing is always done alone.
        waiting: answers that may wait.
        is_cached: whether verdicts of equal answers are taken from the cache, and put there.

    Raises:
        ValueError: where no sandbox works, or a number is below 1.
    """
    if min(jobs, waiting) < 1:
        raise ValueError(f"jobs={jobs}, waiting={waiting}: use numbers of 1 or more")
    with scratch_folder() as scratch:
        bench = Bench(
            sandbox=sandbox or find_sandbox(allow_none=False),
            scratch=scratch,
            settings=settings or JudgeSettings(),
            secret=secrets.randbits(63),
        )
        opened = OpenJudge(bench=bench, jobs=jobs, most_waiting=waiting, is_cached=is_cached)
        worker = threading.Thread(target=opened.work, name="judge", daemon=True)
        worker.start()
        try:
            yield opened
        finally:
            opened.close()
            worker.join()


def judge_code(
    problem: str,
    code: str,
    *,
    model: Model = "omp",
    prompt: str = "",
    extracts_body: bool = False,
    settings: JudgeSettings | None = None,
) -> Judgement:
    """Compile, run and judge one answer in the sandbox.

    For many answers `open_judge` is faster: it builds them side by side and draws inputs once.

    Args:
        problem: name of a built-in problem, such as `27_reduce_average`.
        code: the function's body, up to its closing brace.
        model: parallel model that was asked for.
        prompt: the text that was shown, which ends by opening the function; empty for the built-in one.
        extracts_body: whether the code is a chat's reply, of which the function's body is judged.
        settings: limits and launches; the command line's for none.

    Raises:
        ValueError: for a problem, prompt or model that cannot be judged here, or where no sandbox works.
        RuntimeError: where our own reference fails.
    """
    with open_judge(settings=settings) as opened:
        return opened.judge(problem, code, model=model, prompt=prompt, extracts_body=extracts_body)
