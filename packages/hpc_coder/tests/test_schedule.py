"""The order of a scoring: everything is built and checked before anything is timed, and kills cost little."""

import json
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourfold_hpc_coder.judge import artifacts, launch, races, reference
from fourfold_hpc_coder.judge import bench as workbench
from fourfold_hpc_coder.judge.bench import JudgeSettings, Quiet
from fourfold_hpc_coder.pareval.files import Question
from fourfold_hpc_coder.problems.library import own_problems
from fourfold_hpc_coder.score import schedule, score
from fourfold_hpc_coder.score.score import Scoring
from fourfold_hpc_coder.vocabulary import Model, Processors
from fourfold_parallel.common.progress import silent

AVERAGE, RELU = "27_reduce_average", "55_transform_relu"
RIGHT = "double s = 0; for (double v : x) s += v; return s / x.size(); }"
SETTINGS = JudgeSettings(
    time_limit_s=8, repetitions=1, sizes=((AVERAGE, 50_000), (RELU, 50_000))
).with_launches({"omp": (Processors(), Processors(threads=2))})


def entry(name: str, model: Model, *outputs: str) -> dict:
    problem = own_problems()[name]
    return {
        "problem_type": problem.problem_type,
        "language": "cpp",
        "name": name,
        "parallelism_model": model,
        "prompt": problem.prompt(model),
        "outputs": [*outputs],
    }


def plan(sandbox, folder: Path, *entries: dict) -> Scoring:
    (folder / "outputs.json").write_text(json.dumps(entries))
    return Scoring(
        outputs=folder / "outputs.json",
        folder=folder / "scores",
        models=("serial", "omp"),
        settings=SETTINGS,
        sandbox=sandbox,
        jobs=2,
        ks=(1,),
        is_cached=False,
    )


def untimed(folder: Path) -> tuple[list[dict], list[str]]:
    """The results without what a clock gave, and the verdicts."""
    entries = json.loads((folder / "results.json").read_text())
    for one in entries:
        for output in one["outputs"]:
            output["best_sequential_runtime"] = output["best_sequential_runtime"] is not None
            for run in output["runs"] or ():
                run["runtime"] = run["runtime"] is not None
    rows = (folder / "verdicts.csv").read_text().splitlines()
    return entries, [row.split(",")[3] for row in rows]


class Watch:
    """When each compiler, program and timing began and ended, and in which thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[str, int, float, float]] = []
        self._patience = threading.local()
        self._wrap(monkeypatch, artifacts, "run", "compiler")
        self._wrap(monkeypatch, reference, "trusted_answers", "reference")
        self._wrap(monkeypatch, schedule, "check", "check")
        for holder, name, kind in (
            *((module, "launched", "program") for module in (launch, races, reference)),
            (Quiet, "timing", "timing"),
        ):
            self._wrap_block(monkeypatch, holder, name, kind)

    def _wrap(self, monkeypatch, holder, name: str, kind: str) -> None:
        real = getattr(holder, name)

        def watched(*words, **more):
            began_s = time.perf_counter()
            try:
                return real(*words, **more)
            finally:
                self._saw(kind, began_s)

        monkeypatch.setattr(holder, name, watched)

    def _wrap_block(self, monkeypatch, holder, name: str, kind: str) -> None:
        real = getattr(holder, name)

        @contextmanager
        def watched(*words, **more):
            with real(*words, **more) as held:
                began_s = time.perf_counter()
                try:
                    yield held
                finally:
                    self._saw(kind, began_s)

        monkeypatch.setattr(holder, name, watched)

    def _saw(self, kind: str, began_s: float) -> None:
        self.seen.append((kind, threading.get_ident(), began_s, time.perf_counter()))

    def of(self, kind: str) -> list[tuple[int, float, float]]:
        return [event[1:] for event in self.seen if event[0] == kind]


def overlap(one: tuple[int, float, float], other: tuple[int, float, float]) -> bool:
    return one[1] < other[2] and other[1] < one[2]


@pytest.mark.parametrize("large_bytes", [schedule.LARGE_BYTES, 0], ids=["kept", "at once"])
def test_no_timing_overlaps_a_build_a_check_or_another_timing(
    sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large_bytes: int
) -> None:
    """Two jobs, two problems; programs that are kept are timed when nothing else exists at all."""
    monkeypatch.setattr(schedule, "LARGE_BYTES", large_bytes)
    problems = own_problems()
    bodies = [problems[RELU].answer("omp") + "//" * n for n in range(3)]
    asked = plan(
        sandbox,
        tmp_path,
        entry(RELU, "omp", *bodies, "oops }"),
        entry(AVERAGE, "serial", RIGHT, "return 0; }", RIGHT + "//"),
    )
    watch = Watch(monkeypatch)
    scored = score.score_file(asked, silent)
    verdicts = [[one.verdict for one in judged.judgements] for judged in scored.judged]
    assert verdicts == [["correct"] * 3 + ["no build"], ["correct", "wrong", "correct"]]
    timings = watch.of("timing")
    assert len(timings) == 2 + 3 * 2 + 2  # references, three answers on two launches, two on one
    for at, timing in enumerate(timings):
        assert not any(overlap(timing, other) for other in timings[at + 1 :])
        assert not any(overlap(timing, build) for build in watch.of("compiler"))
    references = watch.of("reference")
    candidates = [
        one for one in timings if not any(overlap(one, r) and one[0] == r[0] for r in references)
    ]
    assert len(candidates) == 8
    if large_bytes:
        for timing in candidates:
            assert not any(overlap(timing, check) for check in watch.of("check"))
            assert sum(overlap(timing, program) for program in watch.of("program")) == 1


KILLED_BETWEEN = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_schedule import SETTINGS
from fourfold_hpc_coder.score import schedule
from fourfold_hpc_coder.score import score
from fourfold_hpc_coder.sandbox.process import find_sandbox
from fourfold_parallel.common.progress import silent
left = {left}
real = schedule.time_candidate
def killed(*words):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*words)
schedule.time_candidate = killed
score.score_file(score.Scoring(outputs=Path({outputs!r}), folder=Path({folder!r}), models=("serial", "omp"),
    settings=SETTINGS, sandbox=find_sandbox(allow_none=False), jobs=2, ks=(1,), is_cached=False), silent)
"""


def test_killed_between_checks_and_timings_it_goes_on_to_the_same_file(
    sandbox, tmp_path: Path
) -> None:
    """Before the first timing only what needs none is settled; before the second, what was timed too."""
    bodies = [RIGHT, "return 1; }", "oops }", RIGHT + "//", "return x[0]; }"]
    asked = plan(sandbox, tmp_path, entry(AVERAGE, "serial", *bodies))
    score.score_file(replace(asked, folder=tmp_path / "whole"), silent)
    for left, settled in ((0, 3), (1, 4)):
        script = KILLED_BETWEEN.format(
            tests=str(Path(__file__).parent),
            outputs=str(asked.outputs),
            folder=str(asked.folder),
            left=left,
        )
        ended = subprocess.run([sys.executable, "-c", script], check=False)
        assert ended.returncode == -9
        lines = (asked.folder / "verdicts.jsonl").read_text().splitlines()
        assert len(lines) == 1 + settled
    scored = score.score_file(asked, silent)
    assert scored.reused == 4
    assert untimed(asked.folder) == untimed(tmp_path / "whole")


@given(st.lists(st.sampled_from([*own_problems()][:9]), max_size=200).map(sorted))
def test_windows_keep_the_order_and_their_bounds(names: list[str]) -> None:
    problems = own_problems()
    question = Question(name="", problem_type="", model="serial", prompt="", outputs=(), fields={})
    tasks = [
        schedule.AnswerTask(question, problems[name], "", str(at), ())
        for at, name in enumerate(names)
    ]
    cut = [*schedule.windows(tasks)]
    assert [task for window in cut for task in window] == tasks
    for window in cut:
        assert 0 < len(window) <= schedule.TOGETHER
        assert len({task.source for task in window}) <= schedule.PROBLEMS


def test_the_bench_of_a_window_is_empty_after_it(bench, sandbox, tmp_path: Path) -> None:
    """Programs that waited are gone with their folders."""
    question = Question(
        name=AVERAGE,
        problem_type="reduce",
        model="serial",
        prompt=own_problems()[AVERAGE].prompt("serial"),
        outputs=(RIGHT,),
        fields={},
    )
    own = workbench.Bench(sandbox=sandbox, scratch=tmp_path, settings=SETTINGS, secret=1)
    found = []
    task = schedule.AnswerTask(question, own_problems()[AVERAGE], RIGHT, "key", ((0, 0),))
    failed = schedule.judge_all(own, [task], ("serial",), 2, lambda *one: found.append(one))
    assert not failed
    assert [judgement.verdict for _, judgement in found] == ["correct"]
    assert [*tmp_path.iterdir()] == []
