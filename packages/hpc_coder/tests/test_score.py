"""Files of outputs: golden verdicts, results in ParEval's layout, journal, cache, kills, bad input."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fourfold_hpc_coder.__main__ import main
from fourfold_hpc_coder.evaluation import pass_at_k
from fourfold_hpc_coder.judge import toolchain
from fourfold_hpc_coder.judge.bench import JudgeSettings
from fourfold_hpc_coder.pareval import files as pareval
from fourfold_hpc_coder.problems.library import own_problems
from fourfold_hpc_coder.score import cache, report, schedule, score
from fourfold_hpc_coder.score.journal import Journal
from fourfold_hpc_coder.score.score import Scoring
from fourfold_hpc_coder.vocabulary import Model, Processors
from fourfold_parallel.common.progress import silent

GOLDEN = Path(__file__).parents[4] / "shared" / "golden" / "hpc_coder"

VERDICT = {
    "correct": "correct",
    "correct_slow": "correct",
    "correct_but_sequential": "not parallel",
    "correct_but_mpi_only": "not parallel",
    "sequential_with_pragma_in_comment": "not parallel",
    "wrong": "wrong",
    "wrong_exclusive": "wrong",
    "wrong_only_local_part": "wrong",
    "race": "race",
    "nobuild": "no build",
    "segv": "crash",
    "segv_rank1": "crash",
    "hang": "timeout",
    "deadlock": "timeout",
    "nan_everywhere": "not finite",
}
"""What each label of the hand-written outputs means in our words."""

QUICK = JudgeSettings(
    time_limit_s=8,
    repetitions=1,
    sizes=(
        ("55_transform_relu", 50_000),
        ("27_reduce_average", 50_000),
        ("30_scan_prefix_sum", 50_000),
        ("21_histogram_bin_0-100", 50_000),
    ),
).with_launches(
    {
        "omp": (Processors(), Processors(threads=2)),
        "mpi": (Processors(ranks=2),),
        "mpi+omp": (Processors(ranks=2, threads=2),),
    }
)


@pytest.fixture
def plan(sandbox, tmp_path: Path) -> Scoring:
    return Scoring(
        outputs=tmp_path / "outputs.json",
        folder=tmp_path / "scores",
        models=("serial", "omp"),
        settings=QUICK,
        sandbox=sandbox,
        jobs=2,
        ks=(1,),
        is_cached=False,
    )


def entry(name: str, model: Model, *outputs: str) -> dict:
    problem = own_problems()[name]
    return {
        "problem_type": problem.problem_type,
        "language": "cpp",
        "name": name,
        "parallelism_model": model,
        "prompt": problem.prompt(model),
        "temperature": 0.2,
        "top_p": 0.95,
        "do_sample": True,
        "max_new_tokens": 1024,
        "prompted": True,
        "outputs": [*outputs],
    }


AVERAGE = "27_reduce_average"
RIGHT = "double s = 0; for (double v : x) s += v; return s / x.size(); }"


@pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="../shared/golden/hpc_coder is not beside this checkout"
)
@pytest.mark.parametrize("model", ["serial", "omp", "mpi", "mpi+omp", "kokkos", "cuda"])
def test_golden_outputs_get_the_verdicts_of_their_labels(plan: Scoring, model: Model) -> None:
    """All 41, each with a sentence; ParEval's own runner accepts NaN, a race and sequential answers."""
    if reason := toolchain.missing(model):
        pytest.skip(reason)
    scored = score.score_file(
        replace(plan, outputs=GOLDEN / "outputs.json", models=(model,), is_cached=True), silent
    )
    labels = {
        (one["name"], one["parallelism_model"]): one["labels"]
        for one in json.loads((GOLDEN / "labels.json").read_text())
    }
    for judged in scored.judged:
        expected = labels[judged.question.name, model]
        for judgement, label in zip(judged.judgements, expected, strict=True):
            wanted = (
                "compiled, not run" if (model, label) == ("cuda", "correct") else VERDICT[label]
            )
            assert judgement.verdict == wanted, (judged.question.name, label, judgement.because)
            assert judgement.because
    assert len(scored.judged) == sum(key[1] == model for key in labels)
    assert not scored.omissions


def test_what_was_never_run_is_neither_right_nor_wrong(plan: Scoring) -> None:
    """A GPU kernel's build rate is known; its pass@1 is empty, not 0."""
    if reason := toolchain.missing("cuda"):
        pytest.skip(reason)
    name = "55_transform_relu"
    right = own_problems()[name].answer("cuda")
    plan.outputs.write_text(json.dumps([entry(name, "cuda", right, "oops }")]))
    [judged] = score.score_file(replace(plan, models=("cuda",), is_cached=True), silent).judged
    assert [one.verdict for one in judged.judgements] == ["compiled, not run", "no build"]
    assert "needs a GPU" in judged.judgements[0].because
    [row] = csv.DictReader((plan.folder / "metrics.csv").read_text().splitlines())
    assert (row["build@1"], row["pass@1"], row["speedup_n@1"]) == ("0.5", "", "")


def test_results_are_in_parevals_layout_and_read_back(plan: Scoring) -> None:
    plan.outputs.write_text(json.dumps([entry(AVERAGE, "serial", RIGHT, "return 0; }", "oops }")]))
    score.score_file(plan, silent)
    [result] = json.loads((plan.folder / "results.json").read_text())
    right, wrong, broken = result["outputs"]
    assert [*right] == [
        "generated_output",
        "source_write_success",
        "did_build",
        "is_source_valid",
        "did_any_run",
        "did_all_run",
        "are_any_valid",
        "are_all_valid",
        "best_sequential_runtime",
        "runs",
    ]
    assert right["are_all_valid"]
    assert right["runs"][0]["runtime"] > 0
    assert wrong["did_all_run"]
    assert not wrong["are_any_valid"]
    assert (broken["did_build"], broken["runs"]) == (False, None)
    [prompt] = pareval.read_results(plan.folder / "results.json")
    assert [sample.counts for sample in prompt.samples] == [True, False, False]
    rows = [*csv.DictReader((plan.folder / "runs.csv").read_text().splitlines())]
    assert len(rows) == 3
    [metrics] = csv.DictReader((plan.folder / "metrics.csv").read_text().splitlines())
    assert float(metrics["pass@1"]) == pytest.approx(1 / 3)
    assert float(metrics["build@1"]) == pytest.approx(2 / 3)


def test_equal_answers_are_judged_once_and_the_cache_spares_the_rest(
    plan: Scoring, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path / "cache"))
    plan.outputs.write_text(json.dumps([entry(AVERAGE, "serial", RIGHT, "return 2; }", RIGHT)]))
    cached = replace(plan, is_cached=True)
    first = score.score_file(cached, silent)
    assert first.reused == 1
    monkeypatch.delattr(schedule, "check")
    second = score.score_file(replace(cached, folder=tmp_path / "again"), silent)
    assert second.reused == 3
    verdicts = [one.verdict for one in second.judged[0].judgements]
    assert verdicts == ["correct", "wrong", "correct"]


def test_a_null_among_outputs_is_an_answer_that_failed(plan: Scoring) -> None:
    """Left out, it raised every rate of its prompt, and took the right answers with it."""
    plan.outputs.write_text(
        json.dumps([{**entry(AVERAGE, "serial", RIGHT), "outputs": [RIGHT, None]}])
    )
    scored = score.score_file(plan, silent)
    assert not scored.omissions
    [judged] = scored.judged
    assert [answer.verdict for answer in judged.judgements] == ["correct", "no answer"]
    assert pass_at_k([judged.prompt], 1) == 0.5


def test_a_chats_reply_is_named_and_its_body_judged_where_asked_for(plan: Scoring) -> None:
    """With its fence it is no C++; a fence in a comment or a string of a body is none."""
    prompt = own_problems()[AVERAGE].prompt("serial")
    replies = (
        f"Here it is:\n```cpp\n{RIGHT}\n```\nIt adds them up.",
        f"```cpp\n{prompt}\n{RIGHT}\n```",
        f"{RIGHT}\n```",
    )
    plan.outputs.write_text(json.dumps([entry(AVERAGE, "serial", *replies, f"// ```\n{RIGHT}")]))
    [judged] = score.score_file(plan, silent).judged
    assert [one.verdict for one in judged.judgements] == ["no build"] * 3 + ["correct"]
    assert all("--extract-bodies" in one.because for one in judged.judgements[:3])
    extracting = replace(plan, extracts_bodies=True)
    [judged] = score.score_file(extracting, silent).judged
    assert [one.verdict for one in judged.judgements] == ["correct"] * 4
    [result] = json.loads((plan.folder / "results.json").read_text())
    assert result["raw_outputs"][:3] == [*replies]
    assert result["outputs"][1]["generated_output"].strip() == RIGHT


def test_any_change_of_what_decides_a_verdict_changes_its_key(tmp_path: Path) -> None:
    """A file that is new, renamed or changed; a report's does not."""
    package = tmp_path / "package"
    shutil.copytree(Path(cache.__file__).parents[1], package)

    def key() -> str:
        cache.sources_sha256.cache_clear()
        return cache.sources_sha256(cache.DECISIVE, package)

    seen = {key()}
    for room in ("judge", "judge/drivers", "sandbox", "problems", "pareval"):
        new = package / room / "new.txt"
        new.write_text("")
        seen.add(key())
        new.write_text("x")
        seen.add(key())
        new.rename(new.with_name("newer.txt"))
        seen.add(key())
    (package / "evaluation.py").write_text("")
    seen.add(key())
    assert len(seen) == 1 + 5 * 3 + 1
    (package / "score" / "report.py").write_text("")
    assert key() in seen


KILLED = """
import sys
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, {tests!r})
from fourfold_hpc_coder.score import score
from fourfold_hpc_coder.judge.bench import JudgeSettings
from fourfold_hpc_coder.sandbox.process import find_sandbox
from fourfold_parallel.common.progress import silent
score.score_file(score.Scoring(outputs=Path({outputs!r}), folder=Path({folder!r}), models=("serial",),
    settings=JudgeSettings(time_limit_s=8, repetitions=1, sizes=(({name!r}, 50_000),)),
    sandbox=find_sandbox(allow_none=False), jobs=1, ks=(1,), is_cached=False), silent)
"""


def test_a_killed_scoring_goes_on_and_gives_the_same_results(plan: Scoring, tmp_path: Path) -> None:
    """SIGKILL after the first verdict: nothing it had is judged again, no process of its jobs remains."""
    bodies = [RIGHT, "return 1; }", "return x[0]; }", "oops }", "return -1; }", RIGHT + "//"]
    plan.outputs.write_text(json.dumps([entry(AVERAGE, "serial", *bodies)]))
    settings = JudgeSettings(time_limit_s=8, repetitions=1, sizes=((AVERAGE, 50_000),))
    plan = replace(plan, models=("serial",), settings=settings, jobs=1)
    script = KILLED.format(
        tests=str(Path(__file__).parent),
        outputs=str(plan.outputs),
        folder=str(plan.folder),
        name=AVERAGE,
    )
    victim = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
    journal = plan.folder / "verdicts.jsonl"
    while victim.poll() is None and (
        not journal.exists() or len(journal.read_text().splitlines()) < 3
    ):
        time.sleep(0.02)
    jobs = _below(victim.pid)
    victim.kill()
    victim.wait()
    held = journal.read_text()
    with journal.open("a") as file:
        file.write('{"key": "torn')
    scored = score.score_file(plan, silent)
    assert journal.read_text().startswith(held)
    assert scored.reused >= len(held.splitlines()) - 1
    assert [one.verdict for one in scored.judged[0].judgements] == [
        "correct",
        "wrong",
        "wrong",
        "no build",
        "wrong",
        "correct",
    ]
    assert not any(Path(f"/proc/{pid}/exe").exists() for pid in jobs)
    again = score.score_file(plan, silent)
    assert again.reused == len(bodies)
    assert pareval.read_results(plan.folder / "results.json")[0] == again.judged[0].prompt


def _untimed(folder: Path) -> list[dict]:
    """The results without what a clock gave."""
    entries = json.loads((folder / "results.json").read_text())
    for entry in entries:
        for output in entry["outputs"]:
            output["best_sequential_runtime"] = output["best_sequential_runtime"] is not None
            for run in output["runs"] or ():
                run["runtime"] = run["runtime"] is not None
    return entries


@pytest.mark.parametrize(
    "moment", [0.3, *(pytest.param(one, marks=pytest.mark.slow) for one in (0.1, 0.5, 0.7, 0.9))]
)
def test_killed_at_any_moment_the_result_file_is_the_same(
    plan: Scoring, tmp_path: Path, moment: float
) -> None:
    """Killed after a share of the time that it takes, twice, then left to end: as if nothing had been."""
    bodies = [RIGHT, "return 1; }", "oops }", RIGHT + "//", "return x[0]; }"]
    plan.outputs.write_text(json.dumps([entry(AVERAGE, "serial", *bodies)]))
    settings = JudgeSettings(time_limit_s=8, repetitions=1, sizes=((AVERAGE, 50_000),))
    plan = replace(plan, models=("serial",), settings=settings, jobs=1)
    began_s = time.perf_counter()
    score.score_file(replace(plan, folder=tmp_path / "whole"), silent)
    whole_s = time.perf_counter() - began_s
    script = KILLED.format(
        tests=str(Path(__file__).parent),
        outputs=str(plan.outputs),
        folder=str(plan.folder),
        name=AVERAGE,
    )
    for share in (moment, 1 - moment):
        victim = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
        while victim.poll() is None and not plan.folder.exists():
            time.sleep(0.02)
        time.sleep(share * whole_s)
        victim.kill()
        victim.wait()
    score.score_file(plan, silent)
    assert _untimed(plan.folder) == _untimed(tmp_path / "whole")
    # The sentences speak of inputs that are drawn for each scoring.
    found, wanted = (
        [
            row["verdict"]
            for row in csv.DictReader((folder / "verdicts.csv").read_text().splitlines())
        ]
        for folder in (plan.folder, tmp_path / "whole")
    )
    assert found == wanted


def _below(pid: int) -> list[int]:
    from fourfold_hpc_coder.sandbox.usage import descendants

    return descendants(pid)


def test_an_interrupted_scoring_leaves_no_process(plan: Scoring) -> None:
    plan.outputs.write_text(json.dumps([entry(AVERAGE, "serial", "for (;;) {} }")]))
    script = KILLED.format(
        tests=str(Path(__file__).parent),
        outputs=str(plan.outputs),
        folder=str(plan.folder),
        name=AVERAGE,
    )
    victim = subprocess.Popen(
        [sys.executable, "-c", script], start_new_session=True, stderr=subprocess.DEVNULL
    )
    limit_s = time.perf_counter() + 600
    while not (jobs := _below(victim.pid)) and time.perf_counter() < limit_s:
        time.sleep(0.02)
    os.kill(victim.pid, signal.SIGINT)
    victim.wait(600)
    assert jobs
    assert not any(Path(f"/proc/{pid}/exe").exists() for pid in jobs)


def test_the_page_holds_every_answer_and_escapes_it(plan: Scoring) -> None:
    body = 'return "<script>alert(1)</script>"[0] + 0 * x[0]; }'
    plan.outputs.write_text(json.dumps([entry(AVERAGE, "serial", RIGHT, body)]))
    scored = score.score_file(plan, silent)
    page = report.write(
        scored,
        plan.folder / "report.html",
        title="t",
        ks=(1,),
        settings=QUICK,
        facts=["sandbox: here"],
    ).read_text()
    assert page.count("<script") == 1  # of every page of ours
    assert "&lt;script&gt;alert(1)" in page
    for one in scored.judged[0].judgements:
        assert one.verdict in page
    assert "http" not in page


BAD_FILES = {
    "not json": ("outputs", "not JSON"),
    "not a list": ("{}", "not a list of prompts"),
    "empty": ("[]", "nothing in"),
    "other models": (json.dumps([entry(AVERAGE, "hip", "}")]), "prompts for hip only"),
    "no such problem": (json.dumps([{**entry(AVERAGE, "serial", "}"), "name": "99_x"}]), "99_x"),
    "no outputs": (json.dumps([entry(AVERAGE, "serial")]), "no outputs"),
    "another function": (
        json.dumps([{**entry(AVERAGE, "serial", "}"), "prompt": "int f() {"}]),
        "average",
    ),
    "unknown model": (
        json.dumps([{**entry(AVERAGE, "serial", "}"), "parallelism_model": "pthreads"}]),
        "pthreads",
    ),
    "missing field": (json.dumps([{"name": AVERAGE}]), "lacks parallelism_model, prompt, outputs"),
    "outputs of another kind": (
        json.dumps([{**entry(AVERAGE, "serial"), "outputs": [1, 2]}]),
        "not a list of texts",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_cannot_be_scored_says_why(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture, sandbox
) -> None:
    """Exit code 2 and a sentence; nothing is written."""
    text, words = BAD_FILES[case]
    (tmp_path / "outputs.json").write_text(text)
    with pytest.raises(SystemExit) as ended:
        main(["score", str(tmp_path / "outputs.json"), "--out", str(tmp_path / "scores")])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "scores").exists()


def test_what_cannot_be_scored_is_named_and_the_rest_is_scored(
    plan: Scoring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad entry, an unknown problem, an absent MPI, a k above n."""
    entries = [
        entry(AVERAGE, "serial", RIGHT),
        {"name": "half"},
        {**entry(AVERAGE, "serial", RIGHT), "name": "00_dense_la_lu_decomp"},
        entry(AVERAGE, "mpi", RIGHT),
    ]
    plan.outputs.write_text(json.dumps(entries))
    monkeypatch.setattr(
        toolchain,
        "missing",
        lambda model: "mpicxx is not installed (Debian: libopenmpi-dev)" if model == "mpi" else "",
    )
    scored = score.score_file(replace(plan, models=("serial", "mpi"), ks=(1, 5)), silent)
    assert [one.verdict for one in scored.judged[0].judgements] == ["correct"]
    reasons = " ".join(one.because for one in scored.omissions)
    for words in ("lacks", "built-in problems", "libopenmpi-dev"):
        assert words in reasons
    assert "k=5 is above the number of samples" in scored.notes[0]
    [row] = csv.DictReader((plan.folder / "metrics.csv").read_text().splitlines())
    assert (row["pass@1"], row["pass@5"]) == ("1.0", "")


def test_absent_gpu_compilers_are_named_per_prompt_and_the_rest_is_scored(
    plan: Scoring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt for CUDA, one for HIP, one that can be scored."""
    found = shutil.which
    monkeypatch.setattr(
        "shutil.which", lambda name: None if name in ("nvcc", "hipcc") else found(name)
    )
    models: tuple[Model, ...] = ("serial", "cuda", "hip")
    entries = [entry(AVERAGE, "serial", RIGHT), *(entry(AVERAGE, m, "}") for m in models[1:])]
    plan.outputs.write_text(json.dumps(entries))
    scored = score.score_file(replace(plan, models=models), silent)
    assert [one.verdict for one in scored.judged[0].judgements] == ["correct"]
    assert {one.place: one.because for one in scored.omissions} == {
        f"{AVERAGE} (cuda)": toolchain.missing("cuda"),
        f"{AVERAGE} (hip)": "hipcc is not installed (Debian: hipcc)",
    }


def test_an_absent_compiler_is_named_with_its_package(
    plan: Scoring, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    plan.outputs.write_text(json.dumps([entry(AVERAGE, "serial", RIGHT)]))
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(SystemExit) as ended:
        main(["score", str(plan.outputs), "--out", str(plan.folder)])
    assert ended.value.code == 2
    assert "g++ is not installed (Debian: g++)" in capsys.readouterr().err
    assert not plan.folder.exists()
    models: tuple[Model, ...] = ("serial", "omp", "mpi", "mpi+omp", "kokkos", "cuda", "hip")
    assert all("is not installed (" in toolchain.missing(model) for model in models)


@pytest.mark.parametrize(
    ("wrapper", "words"),
    [("exit 1", "mpicxx is not Open MPI's"), ("echo -I/nowhere", "mpi.h")],
    ids=["no --showme", "no header"],
)
def test_an_mpi_that_does_not_work_leaves_the_rest_to_be_scored(
    plan: Scoring, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrapper: str, words: str
) -> None:
    """MPICH's wrapper knows no --showme; half an installation compiles nothing."""
    other = tmp_path / "bin" / "mpicxx"
    other.parent.mkdir()
    other.write_text(f"#!/bin/sh\n{wrapper}\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", f"{other.parent}{os.pathsep}{os.environ['PATH']}")
    toolchain._said.cache_clear()
    toolchain.mpi_flags.cache_clear()
    plan.outputs.write_text(json.dumps([entry(AVERAGE, m, RIGHT) for m in ("serial", "mpi")]))
    try:
        scored = score.score_file(replace(plan, models=("serial", "mpi")), silent)
    finally:
        toolchain._said.cache_clear()
        toolchain.mpi_flags.cache_clear()
    assert [one.judgements[0].verdict for one in scored.judged] == ["correct"]
    assert words in scored.omissions[0].because


def test_a_row_is_an_answer_whatever_stands_in_it(plan: Scoring) -> None:
    """Texts of Windows, and half a character, which JSON can hold and a file cannot."""
    bodies = (RIGHT.replace("; ", ";\r\n"), f"// \ud83d\n{RIGHT}", f'// \U0001f600, ""\n{RIGHT}')
    plan.outputs.write_text(json.dumps([entry(AVERAGE, "serial", *bodies)]))
    scored = score.score_file(plan, silent)
    assert {one.verdict for one in scored.judged[0].judgements} == {"correct"}
    with (plan.folder / "runs.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    assert [row["output_idx"] for row in rows] == ["0", "1", "2"]
    assert rows[0]["generated_output"] == bodies[0].replace("\r", "\\r").replace("\n", "\\n")
    assert "\U0001f600" in rows[2]["generated_output"]


def test_a_prompt_that_our_driver_cannot_call_is_left_out(plan: Scoring) -> None:
    """ParEval's Kokkos prompts have matrices of two dimensions; an answer to one would not link."""
    asked = entry("02_dense_la_gemm", "kokkos", "}")
    views = "Kokkos::View<const double**> &A, Kokkos::View<const double**> &B, Kokkos::View<double**> &C"
    declared = f"void gemm({views}, size_t M, size_t K, size_t N) {{"
    theirs = {**asked, "prompt": f"#include <Kokkos_Core.hpp>\n{declared}"}
    same = entry(AVERAGE, "serial", RIGHT)
    same["prompt"] = "double average(const std::vector<double>&values) {"
    same["outputs"] = [RIGHT.replace("x", "values")]
    copied = {**same, "prompt": "double average(std::vector<double> x) {"}
    plan.outputs.write_text(json.dumps([theirs, same, copied]))
    scored = score.score_file(replace(plan, models=("serial", "kokkos")), silent)
    assert [one.judgements[0].verdict for one in scored.judged] == ["correct"]
    assert [one.place.split()[0] for one in scored.omissions] == ["02_dense_la_gemm", AVERAGE]
    assert declared in scored.omissions[0].because


@pytest.mark.parametrize("name", ["[b]", "[/red]"])
def test_a_message_is_shown_as_it_is(name: str, tmp_path: Path, capsys, sandbox) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["score", str(tmp_path / name)])
    assert ended.value.code == 2
    assert f"{tmp_path / name} cannot be read" in capsys.readouterr().err


def test_scores_of_another_file_are_not_overwritten(plan: Scoring) -> None:
    plan.outputs.write_text(json.dumps([entry(AVERAGE, "serial", RIGHT)]))
    score.score_file(plan, silent)
    before = (plan.folder / "results.json").read_bytes()
    plan.outputs.write_text(json.dumps([entry(AVERAGE, "serial", "return 0; }")]))
    with pytest.raises(ValueError, match="another file"):
        score.score_file(plan, silent)
    assert (plan.folder / "results.json").read_bytes() == before


def test_two_scorings_do_not_write_into_one_folder(plan: Scoring) -> None:
    """Of another process, or of this one: the first is left as it is."""
    plan.outputs.write_text(json.dumps([entry(AVERAGE, "serial", RIGHT)]))
    with (
        Journal(plan.outputs, plan.folder),
        pytest.raises(ValueError, match="another scoring is writing"),
    ):
        score.score_file(plan, silent)
    assert len((plan.folder / "verdicts.jsonl").read_text().splitlines()) == 1


def test_a_damaged_journal_is_named_by_its_line(plan: Scoring) -> None:
    """Without that line its answer is judged again."""
    plan.outputs.write_text(json.dumps([entry(AVERAGE, "serial", RIGHT)]))
    score.score_file(plan, silent)
    path = plan.folder / "verdicts.jsonl"
    header, verdict = path.read_text().splitlines()
    for line in (verdict[:-9], header, "[]"):
        path.write_text(f"{header}\n{line}\n")
        with pytest.raises(ValueError, match=r"verdicts.jsonl, line 2 is damaged; remove"):
            score.score_file(plan, silent)
        assert path.read_text() == f"{header}\n{line}\n"
    path.write_text(f"{header}\n")
    assert score.score_file(plan, silent).judged[0].judgements[0].verdict == "correct"


def test_results_can_be_scored_again(plan: Scoring, tmp_path: Path) -> None:
    """A driver's results hold the outputs: a file that was scored is a file to score."""
    plan.outputs.write_text(json.dumps([entry(AVERAGE, "serial", RIGHT)]))
    score.score_file(plan, silent)
    again = replace(plan, outputs=plan.folder / "results.json", folder=tmp_path / "again")
    assert score.score_file(again, silent).judged[0].judgements[0].verdict == "correct"


def test_results_that_are_partly_there_are_read_as_outputs(tmp_path: Path) -> None:
    """Entries that a driver finished, entries that it did not reach, and one that it left torn."""
    done = [{"generated_output": RIGHT, "did_build": True, "runs": None}]
    entries = [
        {**entry(AVERAGE, "serial"), "outputs": done},
        entry(AVERAGE, "omp", RIGHT),
        {**entry(AVERAGE, "mpi"), "outputs": [*done, RIGHT]},
        {**entry(AVERAGE, "kokkos"), "outputs": [{"did_build": False}]},
    ]
    (tmp_path / "half.json").write_text(json.dumps(entries))
    questions, problems = pareval.read_outputs(tmp_path / "half.json")
    assert [(one.model, one.outputs) for one in questions] == [
        ("serial", (RIGHT,)),
        ("omp", (RIGHT,)),
        ("mpi", (RIGHT, RIGHT)),
    ]
    assert "not a list of texts" in problems[0].because


@pytest.mark.parametrize(
    "words",
    [
        ["--models", "cobol"],
        ["--jobs", "0"],
        ["--k", "0"],
        ["--threads", "0"],
        ["--ranks", "-1"],
        ["--time-limit-s", "0"],
        ["--time-limit-s", "inf"],
        ["--time-limit-s", "nan"],
    ],
    ids=" ".join,
)
def test_impossible_options_are_refused(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "outputs.json").write_text(json.dumps([entry(AVERAGE, "serial", RIGHT)]))
    with pytest.raises(SystemExit) as ended:
        main(["score", str(tmp_path / "outputs.json"), "--out", str(tmp_path / "s"), *words])
    assert ended.value.code == 2
    assert words[1] in capsys.readouterr().err
