"""The benchmark of judges, and ours held to it; the families of forged times, one by one."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fourfold_hpc_coder.judge.bench import JudgeSettings
from fourfold_hpc_coder.judge.judge import judge
from fourfold_hpc_coder.judge.reference import reference
from fourfold_hpc_coder.judges.suite import (
    JudgeFinding,
    cases,
    judged_here,
    read_findings,
    table,
    write_suite,
)
from fourfold_hpc_coder.judges.times import FORGED_TIMES, SPENT_S, ForgedTime
from fourfold_hpc_coder.pareval.files import read_outputs
from fourfold_hpc_coder.problems.library import own_problems
from fourfold_hpc_coder.vocabulary import Processors

SETTINGS = JudgeSettings(time_limit_s=5, repetitions=1).with_launches(
    {"omp": (Processors(), Processors(threads=2))}
)


def test_this_judge_errs_on_no_case(sandbox) -> None:
    wrong = [
        (finding.case.name, finding.verdict)
        for finding in judged_here(SETTINGS)
        if not finding.is_right
    ]
    assert wrong == []


def test_the_suite_is_a_file_of_outputs_in_the_order_of_its_cases(tmp_path: Path) -> None:
    questions, omissions = read_outputs(write_suite(tmp_path))
    bodies = [body for question in questions for body in question.outputs]
    assert bodies == [case.body for case in cases()]
    assert omissions == ()
    listed = json.loads((tmp_path / "cases.json").read_text())
    assert [case["counts"] for case in listed] == [case.counts for case in cases()]
    assert len({case.name for case in cases()}) == len(cases())
    assert {case.counts for case in cases()} == {True, False}


def test_findings_are_read_from_results_and_from_a_list(tmp_path: Path) -> None:
    entries = json.loads(write_suite(tmp_path).read_text())
    path = tmp_path / "results.json"
    for entry in entries:
        entry["outputs"] = [
            {"did_build": True, "did_all_run": True, "are_all_valid": True}
            for _ in entry["outputs"]
        ]
    path.write_text(json.dumps(entries))
    credulous = read_findings(path)
    assert all(finding.counted for finding in credulous)
    path.write_text(json.dumps([case.counts for case in cases()]))
    right = read_findings(path)
    assert all(finding.is_right for finding in right)
    let_through = sum(not case.counts for case in cases())
    last = table({"right": right, "credulous": credulous}).splitlines()[-1]
    assert last.endswith(f"| 0 let through, 0 refused | {let_through} let through, 0 refused |")
    for content, words in (
        ("{}", "holds dict"),
        ("[true]", "says something of 1"),
        ('[{"outputs": ["x"]}]', "without results"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=words):
            read_findings(path)


def test_a_wrong_word_is_marked() -> None:
    case = cases()[0]
    row = [JudgeFinding(case=each, counted=each.counts, verdict="") for each in cases()]
    row[0] = JudgeFinding(case=case, counted=not case.counts, verdict="ran")
    assert table({"one": row}).count("**") == 4  # the word, and the name of the last row


@pytest.fixture(scope="module")
def timed(bench):
    sizes = (("27_reduce_average", 100_000),)
    return replace(bench, settings=replace(bench.settings, repetitions=2, sizes=sizes, races=False))


@pytest.mark.parametrize("forged", FORGED_TIMES, ids=lambda forged: forged.name)
def test_a_forged_time_is_charged_or_its_program_refused(timed, forged: ForgedTime) -> None:
    right = reference(timed, own_problems()["27_reduce_average"])
    prompt = forged.above + right.exercise.prompt("serial")  # pyright: ignore[reportAttributeAccessIssue]
    judged = judge(timed, right, "serial", prompt, forged.body)
    if forged.outcome == "refused":
        assert judged.verdict == "wrong", (judged.verdict, judged.because)
        return
    assert judged.verdict == "correct", (judged.verdict, judged.because)
    [run] = judged.sample.runs
    assert (run.runtime_s > SPENT_S / 2) == (forged.outcome == "charged"), run.runtime_s


def test_the_page_names_every_family() -> None:
    page = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    for forged in FORGED_TIMES:
        assert f"| {forged.words} | {forged.outcome} | {forged.charge} |" in page
