"""A real checkout of ParEval, where one lies in ../shared/ParEval: nothing of it is in this repository."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fourfold_hpc_coder.judge.judge import judge
from fourfold_hpc_coder.pareval.bodies import body_of
from fourfold_hpc_coder.pareval.checkout import (
    HOPELESS,
    UNSTEADY,
    CheckoutProblem,
    checkout_reference,
    open_checkout,
)
from fourfold_hpc_coder.pareval.files import Question

PAREVAL = Path(__file__).parents[4] / "shared" / "ParEval"

pytestmark = pytest.mark.skipif(
    not PAREVAL.is_dir(), reason="no checkout of ParEval is in ../shared/ParEval"
)


def questions(model: str) -> list[Question]:
    if not PAREVAL.is_dir():
        return []
    entries = json.loads((PAREVAL / "prompts" / "generation-prompts.json").read_text())
    return [
        Question(
            name=entry["name"],
            problem_type=entry["problem_type"],
            model=entry["parallelism_model"],
            prompt=entry["prompt"],
            outputs=("}",),
            fields=entry,
        )
        for entry in entries
        if entry["parallelism_model"] == model
    ]


def found(question: Question) -> CheckoutProblem:
    return open_checkout(PAREVAL).find(question)


@pytest.mark.parametrize("question", questions("omp"), ids=lambda question: question.name)
def test_every_driver_is_read(question: Question) -> None:
    """No comparison that NaN passes is left, and each can be asked for other sizes and its own answer."""
    problem = found(question)
    validate = problem.text[problem.text.index("bool validate") :]
    assert not re.search(r"abs\([^;]*-[^;]*\)\s*>", validate)
    assert problem.sizes(np.random.default_rng(0)) or question.name in UNSTEADY
    assert "correct" in problem.own_answer(question.prompt)[1]


def test_most_problems_have_a_second_look() -> None:
    assert sum(found(question).second_look is not None for question in questions("mpi")) == 36


def own_body(question: Question) -> str:
    """The checkout's answer in the question's words."""
    file = PAREVAL / "drivers" / "cpp" / "benchmarks" / question.problem_type / question.name
    text = (file / "baseline.hpp").read_text()
    [head] = re.finditer(r"\b(correct[A-Z]\w*)\s*\(([^{;]*)\)\s*\{", text)
    asked = re.search(r"(\w+)\s*\(([^()]*)\)\s*\{\s*$", question.prompt)
    assert asked is not None
    body = body_of(text[head.end() :], "int unnamed() {").replace(head.group(1), asked.group(1))
    for theirs, ours in zip(_names(head.group(2)), _names(asked.group(2)), strict=True):
        body = re.sub(rf"\b{theirs}\b", ours, body)
    return body


def _names(parameters: str) -> list[str]:
    return re.findall(r"(\w+)\s*(?:,(?![^<]*>)|$)", parameters)


@pytest.mark.slow
@pytest.mark.parametrize("question", questions("serial"), ids=lambda question: question.name)
def test_the_checkouts_own_answers_are_right(bench, question: Question) -> None:
    """At our sizes and under our second look too, except where its own check refuses them."""
    problem = replace(found(question), size="(1<<10)")
    right = checkout_reference(bench, problem, question.prompt)
    assert len(right.checks) == (1 if question.name in {*UNSTEADY, *HOPELESS} else 3)
    verdict = judge(bench, right, "serial", question.prompt, own_body(question)).verdict
    assert (verdict == "correct") == (question.name not in HOPELESS)


LU = (
    # By rows and columns, with sums.
    """std::vector<double> M(N * N); for (auto &e : A) M[e.row * N + e.column] = e.value;
for (size_t i = 0; i < N; ++i) {
    for (size_t k = i; k < N; ++k) {
        double s = 0; for (size_t j = 0; j < i; ++j) s += L[i * N + j] * U[j * N + k];
        U[i * N + k] = M[i * N + k] - s;
    }
    L[i * N + i] = 1;
    for (size_t k = i + 1; k < N; ++k) {
        double s = 0; for (size_t j = 0; j < i; ++j) s += L[k * N + j] * U[j * N + i];
        L[k * N + i] = (M[k * N + i] - s) / U[i * N + i];
    }
} }""",
    # By elimination in U.
    """for (auto &e : A) U[e.row * N + e.column] = e.value;
for (size_t k = 0; k < N; ++k) {
    L[k * N + k] = 1;
    for (size_t i = k + 1; i < N; ++i) {
        double f = L[i * N + k] = U[i * N + k] / U[k * N + k];
        for (size_t j = k; j < N; ++j) U[i * N + j] -= f * U[k * N + j];
        U[i * N + k] = 0;
    }
} }""",
)


def test_a_right_answer_may_hold_nan_where_the_checkouts_does(bench) -> None:
    """No answer to this problem could pass; one of nothing but NaN still does not."""
    question = next(q for q in questions("serial") if q.name in UNSTEADY)
    right = checkout_reference(bench, found(question), question.prompt)
    for body in LU:
        judgement = judge(bench, right, "serial", question.prompt, body)
        assert judgement.verdict == "correct", judgement.because
    nothing = "for (size_t i = 0; i < N * N; ++i) L[i] = U[i] = NAN; }"
    assert judge(bench, right, "serial", question.prompt, nothing).verdict == "wrong"


CONSTANTS = {"18": "1", "28": "1", "39": "0"}


@pytest.mark.parametrize("number", CONSTANTS)
def test_constants_that_pareval_takes_are_wrong(bench, number: str) -> None:
    question = next(q for q in questions("serial") if q.name.startswith(number))
    right = checkout_reference(bench, found(question), question.prompt)
    body = f"return {CONSTANTS[number]}; }}"
    assert judge(bench, right, "serial", question.prompt, body).verdict == "wrong"


def test_an_answer_for_the_size_that_is_checked_alone_is_wrong(bench) -> None:
    """Of a problem for which we have none of our own."""
    question = next(q for q in questions("serial") if q.name.startswith("32"))
    right = checkout_reference(bench, found(question), question.prompt)
    loop = "double s = 0, t = 0; for (double v : x) { s += v; t += s; } return t;"
    for body, verdict in (
        (f"{loop} }}", "correct"),
        (f"if (x.size() == 1024) {{ {loop} }} return 0; }}", "wrong"),
    ):
        assert judge(bench, right, "serial", question.prompt, body).verdict == verdict
