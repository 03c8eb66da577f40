"""The judge's other doors: a function, a queue, a server, and what other libraries call. One law for all:
the verdicts are those of a file that the command line scores."""

import asyncio
import gc
import json
import socket
import stat
import threading
from concurrent.futures import CancelledError
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fourfold_hpc_coder.doors import judging, server, shared
from fourfold_hpc_coder.doors.judging import BusyError, asked, judge_code, open_judge
from fourfold_hpc_coder.doors.prompting import asks
from fourfold_hpc_coder.doors.rewards import Reward
from fourfold_hpc_coder.judge.bench import JudgeSettings
from fourfold_hpc_coder.judge.judge import Judgement
from fourfold_hpc_coder.problems.library import own_problems
from fourfold_hpc_coder.score.score import Scoring, score_file
from fourfold_hpc_coder.vocabulary import Execution, Processors, Sample

AVERAGE = "27_reduce_average"
SERIAL = "double s = 0; for (double v : x) s += v; return s / x.size(); }"
SETTINGS = JudgeSettings(
    time_limit_s=20, repetitions=1, sizes=((AVERAGE, 50_000),), races=False
).with_launches({"omp": (Processors(threads=2),)})
ANSWERS = (
    own_problems()[AVERAGE].answer("omp"),
    SERIAL,
    "return 0; }",
    'return std::nan(""); }',
    "undeclared; }",
    "",
    "fourfold::evidence.regions = 9; return 0; }",
    "std::exit(0); }",
)
"""Right, right and serial, wrong, not a number, no build, nothing, a cheat, a crash."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory, sandbox):
    """A cache of this module's own: its verdicts are fresh, its compilers' work is shared."""
    patch = pytest.MonkeyPatch()
    patch.setattr(judging, "cached", lambda key: None)
    patch.setattr(judging, "keep", lambda key, judgement: None)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def by_command_line(cache, sandbox, tmp_path_factory) -> list[str]:
    """The verdicts of a file with the same answers."""
    folder = tmp_path_factory.mktemp("scored")
    problem = own_problems()[AVERAGE]
    entry = {
        "name": AVERAGE,
        "problem_type": "reduce",
        "parallelism_model": "omp",
        "prompt": problem.prompt("omp"),
        "outputs": [*ANSWERS],
    }
    (folder / "outputs.json").write_text(json.dumps([entry]))
    result = score_file(
        Scoring(
            outputs=folder / "outputs.json",
            folder=folder / "scores",
            models=("omp",),
            settings=SETTINGS,
            sandbox=sandbox,
            is_cached=False,
        )
    )
    return [judgement.verdict for judgement in result.judged[0].judgements]


@pytest.fixture(scope="module")
def opened(cache, sandbox):
    with open_judge(settings=SETTINGS, sandbox=sandbox) as judge:
        yield judge


def test_the_queue_gives_the_command_lines_verdicts(opened, by_command_line) -> None:
    futures = [opened.submit(AVERAGE, body) for body in ANSWERS]
    assert [future.result().verdict for future in futures] == by_command_line
    expected = ["correct", "not parallel", "wrong", "not finite", "no build", "no answer", "cheat"]
    assert by_command_line == [*expected, "crash"]


def test_many_threads_get_each_its_own_judgement(opened, by_command_line) -> None:
    said: dict[int, str] = {}

    def ask(place: int) -> None:
        body = f"/* {place} */ {ANSWERS[place % 3]}"
        said[place] = opened.judge(AVERAGE, body).verdict

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert said == {place: by_command_line[place % 3] for place in range(9)}


def test_the_function_judges_one_answer(cache, by_command_line) -> None:
    judgement = judge_code(AVERAGE, ANSWERS[0], settings=SETTINGS)
    assert judgement.verdict == by_command_line[0]
    assert judgement.sample.counts


def test_a_reply_of_a_chat_is_judged_by_its_function(opened) -> None:
    prompt = own_problems()[AVERAGE].prompt("omp").rpartition("\n")[2]
    reply = f"Here it is:\n```cpp\n{prompt}\n{ANSWERS[0]}\n```\nIt is fast."
    assert opened.judge(AVERAGE, reply, extracts_body=True).verdict == "correct"


@pytest.mark.parametrize(
    ("problem", "model", "prompt", "words"),
    [
        ("27", "omp", "", "not among the 34"),
        (AVERAGE, "fortran", "", "none of serial"),
        ("08_fft_split_fft", "cuda", "", "has no prompt in cuda"),
        (AVERAGE, "omp", "int other(int x) {", "does not end by opening average"),
    ],
)
def test_what_cannot_be_judged_is_refused_in_words(
    problem: str, model: str, prompt: str, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        asked(problem, SERIAL, model, prompt)


def test_code_that_is_no_text_or_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="NoneType"):
        asked(AVERAGE, None, "omp")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="characters long"):
        asked(AVERAGE, "x" * (judging.LONGEST_CHARACTERS + 1), "omp")


@contextmanager
def stopped(monkeypatch: pytest.MonkeyPatch, waiting: int):
    """A judge whose schedule waits for a signal before it settles anything."""
    go, begun = threading.Event(), threading.Event()

    def late(bench, tasks, models, jobs, settle, rights) -> dict[str, str]:
        begun.set()
        assert go.wait(60)
        for task in tasks:
            if task.body != "unsettled }":
                settle(task, JUDGEMENT)
        return {AVERAGE: "its reference is broken"}

    monkeypatch.setattr(judging, "judge_all", late)
    with open_judge(settings=SETTINGS, waiting=waiting, is_cached=False) as judge:
        yield judge, go, begun


JUDGEMENT = Judgement(
    verdict="correct",
    because="its answers are right",
    sample=Sample(
        built=True,
        parallel=True,
        runs=(Execution(processors=Processors(threads=2), ran=True, valid=True, runtime_s=0.5),),
        best_sequential_s=0.8,
    ),
    output="",
    proof="",
)


def test_a_full_queue_says_so_and_loses_nothing(sandbox, monkeypatch) -> None:
    with stopped(monkeypatch, 2) as (judge, go, begun):
        first = judge.submit(AVERAGE, "first }")
        assert begun.wait(60)
        rest = [judge.submit(AVERAGE, f"{n} }}") for n in range(2)]
        with pytest.raises(BusyError, match="2 answers wait already"):
            judge.submit(AVERAGE, "late }", waits=False)
        rest[0].cancel()
        go.set()
        assert first.result(60) is JUDGEMENT
        assert rest[1].result(60) is JUDGEMENT
        with pytest.raises(CancelledError):
            rest[0].result(1)


def test_a_closed_judge_settles_what_waited_and_takes_no_more(sandbox, monkeypatch) -> None:
    with stopped(monkeypatch, 4) as (judge, go, _begun):
        waiting = [judge.submit(AVERAGE, f"{n} }}") for n in range(3)]
        judge.close()
        go.set()
        assert [future.result(60) for future in waiting] == [JUDGEMENT] * 3
        with pytest.raises(RuntimeError, match="closed"):
            judge.submit(AVERAGE, "late }")


def test_whoever_waits_hears_why_nothing_could_be_judged(sandbox, monkeypatch) -> None:
    with stopped(monkeypatch, 4) as (judge, go, _):
        waiting = judge.submit(AVERAGE, "unsettled }")
        go.set()
        with pytest.raises(RuntimeError, match="its reference is broken"):
            waiting.result(60)


def test_inputs_are_drawn_anew_after_some_answers(sandbox, monkeypatch) -> None:
    """Sentences name values: who asks again and again must not learn the inputs."""
    monkeypatch.setattr(judging, "REDRAWN", 2)
    secrets: list[int] = []

    def quick(bench, tasks, models, jobs, settle, rights) -> dict[str, str]:
        secrets.append(bench.secret)
        for task in tasks:
            settle(task, JUDGEMENT)
        return {}

    monkeypatch.setattr(judging, "judge_all", quick)
    with open_judge(settings=SETTINGS, is_cached=False) as judge:
        for number in range(5):
            judge.judge(AVERAGE, f"{number} }}")
    assert secrets[0] == secrets[1]
    assert len({*secrets}) == 3


@settings(suppress_health_check=[HealthCheck.too_slow])  # it is the machine that is
@given(runtime_s=st.floats(1e-6, 1e3), best_s=st.floats(1e-6, 1e3), speed=st.floats(0, 4))
def test_a_reward_is_bounded_and_pays_for_nothing_less_than_asked(
    runtime_s: float, best_s: float, speed: float
) -> None:
    judge = SimpleNamespace(efficiency=lambda judgement, model: best_s / runtime_s / 2)
    reward = Reward(speed=speed)
    value = reward.of(judge, JUDGEMENT, "omp")  # pyright: ignore[reportArgumentType]
    assert 1 <= value <= 1 + speed
    worse = Sample(built=True, parallel=False, runs=JUDGEMENT.sample.runs, best_sequential_s=1.0)
    for verdict in ("not parallel", "wrong", "race", "cheat"):
        judged = Judgement(verdict=verdict, because="", sample=worse, output="", proof="")
        assert reward.of(judge, judged, "omp") == 0  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def served(opened, tmp_path_factory):
    token = tmp_path_factory.mktemp("server") / "token"
    with server.JudgeServer(opened, 0, token) as listening:
        thread = threading.Thread(target=listening.serve_forever, daemon=True)
        thread.start()
        yield SimpleNamespace(url=listening.url, token=token, server=listening)
        listening.shutdown()
        thread.join(60)


def raw(served, path: str, data: bytes | None = None, token: str = "", **headers: str) -> dict:
    token = token or served.token.read_text().strip()
    headers = {"Authorization": f"Bearer {token}", **headers}
    request = Request(f"{served.url}{path}", data=data, headers=headers)
    with urlopen(request, timeout=60) as response:
        return json.load(response)


def test_the_server_gives_the_command_lines_verdicts(served, by_command_line) -> None:
    entries = [{"problem": AVERAGE, "code": body} for body in ANSWERS]
    judged = server.ask(served.url, served.token, entries)
    assert [fields["verdict"] for fields in judged] == by_command_line
    assert [fields["counts"] for fields in judged] == [True] + [False] * 7
    assert judged[0]["speedup"] > 0
    alone = server.ask(served.url, served.token, entries[2])
    assert alone["verdict"] == by_command_line[2]


def test_the_server_shows_its_problems_and_its_state(served) -> None:
    listed = raw(served, "/problems")
    assert {entry["problem"] for entry in listed} == {*own_problems()}
    assert raw(served, "/health")["sandbox"] == served.server.judge.bench.sandbox.name


def test_the_token_is_its_owners_alone_and_nothing_goes_without(served) -> None:
    assert stat.S_IMODE(served.token.stat().st_mode) == 0o600
    assert served.server.server_address[0] == "127.0.0.1"
    for path, data in (("/health", None), ("/judge", b"{}")):
        with pytest.raises(HTTPError) as refused:
            raw(served, path, data, token="another")
        with refused.value as error:
            assert error.code == 401


@pytest.mark.parametrize(
    ("path", "content", "status", "words"),
    [
        ("/judge", b"{", 400, "not JSON"),
        ("/judge", b'"text"', 400, "not str"),
        ("/judge", b'{"code": "x"}', 400, "lacks problem"),
        ("/judge", b'{"problem": "x", "code": 1}', 400, "code is int"),
        ("/judge", b'{"problem": "27", "code": "}"}', 400, "not among"),
        ("/judge", b'{"problem": "27", "code": "}", "sandbox": "none"}', 400, "has sandbox"),
        ("/elsewhere", b"{}", 404, "POST /judge"),
        ("/judge", b"[" + b"0," * 2000 + b"0]", 400, "are the most"),
    ],
)
def test_a_bad_request_gets_its_status_and_a_sentence(
    served, path: str, content: bytes, status: int, words: str
) -> None:
    with pytest.raises(HTTPError) as refused:
        raw(served, path, content)
    with refused.value as error:
        assert error.code == status
        assert words in json.load(error)["error"]


def test_a_request_without_end_and_one_too_large_are_refused(served) -> None:
    token = served.token.read_text().strip()
    for length, status in (("999999999999", b"413"), ("-1", b"411")):
        with socket.create_connection(served.server.server_address, timeout=60) as line:
            head = f"POST /judge HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
            line.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode())
            assert line.recv(4096).split()[1] == status


def test_connections_beyond_the_bound_are_told_to_come_again(opened, tmp_path: Path) -> None:
    with server.JudgeServer(opened, 0, tmp_path / "token", connections=1) as listening:
        thread = threading.Thread(target=listening.serve_forever, daemon=True)
        thread.start()
        with socket.create_connection(listening.server_address, timeout=60) as held:
            held.sendall(b"GET /hea")
            # Connections are taken in their order: the second comes while the first is held.
            with socket.create_connection(listening.server_address, timeout=60) as second:
                assert second.recv(4096).split()[1] == b"503"
        listening.shutdown()
        thread.join(60)


def test_a_server_that_is_full_says_so(sandbox, monkeypatch, tmp_path: Path) -> None:
    with stopped(monkeypatch, 1) as (judge, go, begun):
        judge.submit(AVERAGE, "first }")
        assert begun.wait(60)
        judge.submit(AVERAGE, "second }")
        with server.JudgeServer(judge, 0, tmp_path / "token") as listening:
            thread = threading.Thread(target=listening.serve_forever, daemon=True)
            thread.start()
            with pytest.raises(ValueError, match=r"503 .*1 answers wait already"):
                server.ask(
                    listening.url, tmp_path / "token", {"problem": AVERAGE, "code": "late }"}
                )
            go.set()
            listening.shutdown()
            thread.join(60)


@pytest.fixture
def process_wide(opened, monkeypatch):
    """The judge that every library's door finds."""
    monkeypatch.setattr(shared, "_OPEN", {(SETTINGS, 2): opened, (JudgeSettings(), 2): opened})


def test_one_judge_serves_a_process(process_wide, opened) -> None:
    assert shared.shared_judge(SETTINGS) is opened


def test_prompts_are_asked_for_by_model_and_name() -> None:
    chosen = [*asks(["omp", "mpi"], "27_")]
    assert [(ask.problem, ask.model) for ask in chosen] == [(AVERAGE, "omp"), (AVERAGE, "mpi")]
    assert chosen[0].prompt in chosen[0].request
    with pytest.raises(ValueError, match="named like"):
        [*asks(["omp"], "no such")]


def test_trls_reward_is_the_judges(process_wide, opened, by_command_line) -> None:
    pytest.importorskip("datasets", reason="needs datasets, of the extra [trl]")
    from fourfold_hpc_coder.doors.grpo import JudgeReward, rows

    assert {*rows(["omp"], "27_", chat=True)[0]} == {"prompt", "problem", "model"}
    reward = JudgeReward(Reward(speed=0), SETTINGS)
    texts = [[{"role": "assistant", "content": body}] for body in ANSWERS]
    values = reward(texts, problem=[AVERAGE] * 8, model=["omp"] * 8, completion_ids=[])
    assert values == [float(verdict == "correct") for verdict in by_command_line]
    assert reward([ANSWERS[0]], problem=[AVERAGE], model=["omp"]) == [1.0]


def test_lm_evals_task_is_the_judges(process_wide, by_command_line) -> None:
    """Its own evaluator, on a model that answers the same to every prompt."""
    pytest.importorskip("lm_eval", reason="needs lm-eval, the extra [evaluation]")
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    from fourfold_hpc_coder.doors.harness import parallel_code

    class Says(LM):
        def __init__(self, answer: str) -> None:
            super().__init__()
            self.answer = answer

        def generate_until(self, requests, **_: object) -> list[str]:
            return [self.answer for _ in requests]

        def loglikelihood(self, requests, **_: object) -> list:
            raise NotImplementedError  # the base class wants it; the task asks for text alone

        def loglikelihood_rolling(self, requests, **_: object) -> list:
            raise NotImplementedError  # as above

    for body, verdict in zip(ANSWERS[:3], by_command_line[:3], strict=True):
        results = simple_evaluate(
            Says(body),
            tasks=[parallel_code(["omp"], "27_", settings=SETTINGS)],
            task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=0,
        )
        assert results is not None
        metrics = results["results"]["parallel_code"]
        assert metrics["counts,judged"] == float(verdict == "correct")
        assert metrics["builds,judged"] == 1.0


@pytest.mark.filterwarnings("ignore")  # its own libraries' are no affair of ours
def test_inspects_task_is_the_judges(process_wide, by_command_line, tmp_path: Path) -> None:
    """Inspect's own evaluation, on its model that says what it is told."""
    pytest.importorskip("inspect_ai", reason="needs inspect-ai, the extra [inspect]")
    from inspect_ai import eval as evaluate
    from inspect_ai.model import ModelOutput, ModelUsage, get_model

    from fourfold_hpc_coder.doors.inspect_task import parallel_code

    for body, verdict in zip(ANSWERS[:3], by_command_line[:3], strict=True):
        told = ModelOutput.from_content("mockllm/model", body)
        told.usage = ModelUsage()  # it would fetch a tokenizer to count
        [log] = evaluate(
            parallel_code("omp", "27_", settings=SETTINGS),
            model=get_model("mockllm/model", custom_outputs=[told]),
            log_dir=str(tmp_path),
            display="none",
        )
        assert log.status == "success", log.error
        assert log.samples
        [score] = (log.samples[0].scores or {}).values()
        assert score.metadata is not None
        assert score.metadata["verdict"] == verdict
        assert score.value == ("C" if verdict == "correct" else "I")
    gc.collect()  # streams that it left open, while their warnings are ignored


def test_openenvs_environment_is_the_judges(process_wide, by_command_line) -> None:
    pytest.importorskip("openenv", reason="needs openenv, the extra [openenv]")
    from fourfold_hpc_coder.doors.openenv_environment import (
        AnswerAction,
        ParallelCodeEnvironment,
    )

    environment = ParallelCodeEnvironment(
        ("omp",), "27_", rounds=2, reward=Reward(speed=0), settings=SETTINGS
    )
    with pytest.raises(ValueError, match="over"):
        environment.step(AnswerAction(code=""))
    assert environment.reset(seed=1).prompt == own_problems()[AVERAGE].prompt("omp")
    wrong = environment.step(AnswerAction(code=ANSWERS[2]))
    assert (wrong.verdict, wrong.reward, wrong.done) == (by_command_line[2], 0.0, False)
    right = environment.step(AnswerAction(code=ANSWERS[0]))
    assert (right.verdict, right.reward, right.done) == ("correct", 1.0, True)
    assert environment.state.step_count == 2


def test_verifiers_tasks_are_the_judges(process_wide, by_command_line) -> None:
    pytest.importorskip("verifiers", reason="needs verifiers, the extra [verifiers]")
    from fourfold_hpc_coder.doors.verifiers_tasks import ParallelCodeConfig, ParallelCodeTaskset

    [task] = ParallelCodeTaskset(ParallelCodeConfig(models="omp", only="27_"))
    for place, body in enumerate(ANSWERS[:3]):
        recorded: dict[str, float] = {}
        trace = SimpleNamespace(
            id=str(place),
            last_reply=body,
            rewards={},
            metrics={},
            record_metrics=recorded.update,
            record_metric=recorded.__setitem__,
            record_reward=lambda name, value, weight, into=recorded: into.update({name: value}),
        )
        asyncio.run(task.score(trace))  # pyright: ignore[reportArgumentType]
        assert recorded["counts"] == float(by_command_line[place] == "correct")
        assert (recorded["parallel_code"] >= 1) == (by_command_line[place] == "correct")
