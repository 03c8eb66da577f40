"""A second look at answers to a checkout's problems, by inputs and right answers of ours.

A checkout checks answers on inputs that chance draws at one size. Constants pass some of its checks, since
what decides hardly ever comes up. Where a problem of ours asks for the same function, the answer's file is
linked with our driver as well, which calls the function itself: at sizes of ours, the smallest included, with
what decides planted at the ends and between blocks. The right answer comes from our reference, in another
process. What a checkout's own answer is wrong on, no answer to it is asked.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from fourfold_hpc_coder.judge.bench import Bench, Exercise
from fourfold_hpc_coder.judge.reference import Reference, answered, generator_of
from fourfold_hpc_coder.pareval.files import Question
from fourfold_hpc_coder.problems.library import fits, own_problems, read_problem
from fourfold_hpc_coder.problems.problem import SINGLE, Problem
from fourfold_hpc_coder.problems.signature import Parameter, Signature
from fourfold_hpc_coder.vocabulary import Model, Tolerance

DECLARED = """#include <complex>
namespace fourfold {
std::size_t sized(std::size_t own);
bool apart(double a, double b, double most);
bool apart(std::complex<double> a, std::complex<double> b, double most);
}
"""
"""Functions of ours in a checkout's driver: the size to check on, and the comparison of two numbers. They are
in a file of their own, so that no pragma of an answer about its arithmetic is about theirs."""
HELPERS = f"""{DECLARED}
namespace fourfold {{
static std::size_t size = 0; // 0 for the driver's own
std::size_t sized(std::size_t own) {{ return size ? size : own; }}
static bool same(double a, double b) {{ return a == b || (a != a && b != b); }}
bool apart(double a, double b, double most) {{ return !(same(a, b) || std::abs(a - b) <= most); }}
bool apart(std::complex<double> a, std::complex<double> b, double most) {{
    bool is_same = same(a.real(), b.real()) && same(a.imag(), b.imag());
    return !(is_same || std::abs(a - b) <= most);
}}
}}
"""
"""Their definitions. Numbers that are not finite agree where they are so in the same way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SecondLook:
    """An exercise that makes an answer's file as the checkout does, and calls it as we do."""

    asked: Exercise
    problem: Problem

    @property
    def name(self) -> str:
        """The problem's."""
        return self.problem.name

    @property
    def signature(self) -> Signature:
        """The problem's."""
        return self.problem.signature

    def unit(self, prompt: str, body: str) -> str:
        """The checkout's, so that what builds there builds here."""
        return self.asked.unit(prompt, body)

    def driver(self, model: Model) -> str:
        """The problem's, and what the checkout's text calls."""
        return HELPERS + self.problem.driver(model)

    def tolerance(self, parameter: Parameter) -> Tolerance:  # noqa: ARG002 - the protocol's
        """As wide as the widest of ParEval's own but one, so that nothing fails here by rounding."""
        return SINGLE

    def forbidden(self) -> frozenset[str]:
        """The checkout's."""
        return self.asked.forbidden()

    def fixed(self) -> frozenset[str]:
        """The checkout's."""
        return self.asked.fixed()


@lru_cache(maxsize=1)
def further_problems() -> Mapping[str, Problem]:
    """Problems for second looks alone: new ones, and ours without what a checkout's answer is wrong on."""
    files = sorted((Path(__file__).parent / "further").glob("*.toml"))
    return {file.stem: read_problem(file.stem, file.read_text("utf-8")) for file in files}


def problem_of(question: Question) -> Problem | None:
    """The problem of ours that asks for a question's function; None where there is none."""
    problem = {**own_problems(), **further_problems()}.get(question.name)
    if problem is None or not fits(problem, question.prompt, question.model):
        return None
    # A checkout hands over outputs of zeros; an answer may add to them.
    inputs = {
        name: {**rule, "kind": "zeros"} if rule["kind"] == "garbage" else rule
        for name, rule in problem.inputs.items()
    }
    return replace(problem, inputs=inputs)


def second_look(bench: Bench, asked: Exercise, problem: Problem | None) -> tuple[Reference, ...]:
    """The rounds of a second look; none where no problem of ours asks for the same.

    Raises:
        RuntimeError: where our own reference fails, which is a bug of the problem.
    """
    if problem is None:
        return ()
    rounds, _ = answered(bench, problem, [*problem.checks(generator_of(bench, problem))])
    exercise = SecondLook(asked=asked, problem=problem)
    return (Reference(exercise=exercise, checks=rounds, timed=(), best_s=float("nan")),)
