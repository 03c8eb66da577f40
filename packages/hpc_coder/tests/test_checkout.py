"""Problems of a ParEval checkout: a tiny one in its layout, and what answers to it may and may not do."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fourfold_hpc_coder.__main__ import main
from fourfold_hpc_coder.judge import toolchain
from fourfold_hpc_coder.judge.bench import JudgeSettings
from fourfold_hpc_coder.judge.judge import judge
from fourfold_hpc_coder.judge.reference import reference
from fourfold_hpc_coder.pareval import checkout as checkouts
from fourfold_hpc_coder.pareval.checkout import HOPELESS, Checkout, open_checkout, strict
from fourfold_hpc_coder.pareval.files import Question
from fourfold_hpc_coder.pareval.second_look import further_problems
from fourfold_hpc_coder.score import score
from fourfold_hpc_coder.score.score import Scoring
from fourfold_hpc_coder.vocabulary import Model, Processors
from fourfold_parallel.common.progress import silent

NAME = "90_transform_twice"
UTILITIES = """#pragma once
#include <cmath>
#include <cstdlib>
#define NO_OPTIMIZE __attribute__((optimize("O0")))
#define NO_INLINE __attribute__((noinline)) __attribute__((optimize("O3")))
#if !defined(USE_SERIAL) && !defined(USE_OMP) && !defined(USE_MPI) && !defined(USE_KOKKOS)
#error "no model"
#endif
#if defined(USE_MPI)
#define SPREAD(values) MPI_Bcast((values).data(), (values).size(), MPI_DOUBLE, 0, MPI_COMM_WORLD)
#else
#define SPREAD(values)
#endif
template <class V> bool equal(V const &a, V const &b, double epsilon) {
    for (size_t i = 0; i < a.size(); ++i) {
        if (std::abs(a[i] - b[i]) > epsilon) return false;
    }
    return true;
}
"""
BASELINE = """#pragma once
void NO_INLINE correctTwice(std::vector<double> &x) { for (auto &v : x) v *= 2; }
"""
DRIVER = """// Driver of twice
// /* Double every element. */
// void twice(std::vector<double> &x) {

#include <vector>
#include "utilities.hpp"
#include "baseline.hpp"
#include "generated-code.hpp"   // the answer
struct Context { std::vector<double> x; };
void reset(Context *ctx) { for (auto &v : ctx->x) v = rand() / 1e6; }
Context *init() {
    auto *ctx = new Context();
    ctx->x.resize(DRIVER_PROBLEM_SIZE);
    reset(ctx);
    return ctx;
}
void NO_OPTIMIZE compute(Context *ctx) { twice(ctx->x); }
void NO_OPTIMIZE best(Context *ctx) { correctTwice(ctx->x); }
bool validate(Context *) {
    const size_t TEST_SIZE = 100;
    std::vector<double> right(TEST_SIZE);
    for (auto &v : right) v = rand() / 1e6;
    right[0] = NAN, right[1] = INFINITY; // as elimination without pivots gives them
    SPREAD(right);
    auto tested = right;
    correctTwice(right);
    twice(tested);
    return equal(right, tested, 1e-6);
}
void destroy(Context *ctx) { delete ctx; }
"""
KOKKOS_DRIVER = """#include <Kokkos_Core.hpp>
#include <vector>
#include "utilities.hpp"
#include "baseline.hpp"
#include "generated-code.hpp"
struct Context { Kokkos::View<double *> x; std::vector<double> host; };
void reset(Context *ctx) {
    for (size_t i = 0; i < ctx->host.size(); ++i) ctx->x(i) = ctx->host[i] = rand() / 1e6;
}
Context *init() {
    auto *ctx = new Context{Kokkos::View<double *>("x", DRIVER_PROBLEM_SIZE), {}};
    ctx->host.resize(DRIVER_PROBLEM_SIZE);
    reset(ctx);
    return ctx;
}
void NO_OPTIMIZE compute(Context *ctx) { twice(ctx->x); }
void NO_OPTIMIZE best(Context *ctx) { correctTwice(ctx->host); }
bool validate(Context *) {
    const size_t TEST_SIZE = 100;
    std::vector<double> right(TEST_SIZE), tested(TEST_SIZE);
    Kokkos::View<double *> x("x", TEST_SIZE);
    for (size_t i = 0; i < TEST_SIZE; ++i) x(i) = right[i] = rand() / 1e6;
    correctTwice(right);
    twice(x);
    for (size_t i = 0; i < TEST_SIZE; ++i) tested[i] = x(i);
    return equal(right, tested, 1e-6);
}
"""

SEARCH = "36_search_check_if_array_contains_value"
SEARCH_BASELINE = """#pragma once
bool NO_INLINE correctContains(std::vector<int> const &x, int target) {
    for (int v : x) if (v == target) return true;
    return false;
}
"""
SEARCH_DRIVER = """// Driver of twice
// /* Double every element. */
// void twice(std::vector<double> &x) {

#include <vector>
#include "utilities.hpp"
#include "generated-code.hpp"
#include "baseline.hpp"
struct Context { std::vector<int> x; };
void reset(Context *ctx) { for (auto &v : ctx->x) v = rand(); }
Context *init() {
    auto *ctx = new Context();
    ctx->x.resize(DRIVER_PROBLEM_SIZE);
    reset(ctx);
    return ctx;
}
void NO_OPTIMIZE compute(Context *ctx) { (void)contains(ctx->x, 1); }
void NO_OPTIMIZE best(Context *ctx) { (void)correctContains(ctx->x, 1); }
bool validate(Context *) {
    std::vector<int> x(1024);
    for (auto &v : x) v = rand();
    int target = rand(); // which hardly ever is among them
    return contains(x, target) == correctContains(x, target);
}
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pareval")
    folder = root / "drivers" / "cpp" / "benchmarks" / "transform" / NAME
    folder.mkdir(parents=True)
    (folder / "cpu.cc").write_text(DRIVER)
    (folder / "kokkos.cc").write_text(KOKKOS_DRIVER)
    (folder / "baseline.hpp").write_text(BASELINE)
    (root / "drivers" / "cpp" / "utilities.hpp").write_text(UTILITIES)
    search = folder.parents[1] / "search" / SEARCH
    search.mkdir(parents=True)
    (search / "cpu.cc").write_text(SEARCH_DRIVER)
    (search / "baseline.hpp").write_text(SEARCH_BASELINE)
    sizes = {NAME: {"serial": "(1<<14)", "omp": "(1<<20)", "mpi": "(1<<14)"}}
    (root / "drivers" / "problem-sizes.json").write_text(json.dumps(sizes))
    return root


def entry(model: Model, *outputs: str) -> dict:
    return {
        "problem_type": "transform",
        "language": "cpp",
        "name": NAME,
        "parallelism_model": model,
        "prompt": "/* Double every element. */\nvoid twice(std::vector<double> &x) {",
        "outputs": [*outputs],
    }


@pytest.fixture
def plan(sandbox, checkout: Path, tmp_path: Path) -> Scoring:
    return Scoring(
        outputs=tmp_path / "outputs.json",
        folder=tmp_path / "scores",
        models=("serial", "omp", "mpi"),
        settings=JudgeSettings(time_limit_s=10, repetitions=2).with_launches(
            {"omp": (Processors(threads=2),), "mpi": (Processors(ranks=2),)}
        ),
        sandbox=sandbox,
        jobs=1,
        ks=(1,),
        is_cached=False,
        find=open_checkout(checkout).find,
    )


RIGHT = "for (size_t i = 0; i < x.size(); ++i) x[i] = 2 * x[i]; }"
ANSWERS: dict[Model, dict[str, str]] = {
    "serial": {
        RIGHT: "correct",
        "for (auto &v : x) v += 2; }": "wrong",
        "for (auto &v : x) v = NAN; }": "wrong",
        "correctTwice(x); }": "cheat",
        "/* correctTwice */ for (auto &v : x) v *= 2; }": "correct",
        'printf("Validation: PASS\\nTime: 0.1\\nBestSequential: 9\\n"); fflush(stdout); _Exit(0); }': "crash",
        "if (x.size() == 100) for (auto &v : x) v *= 2; }": "wrong",
        "\n#define equal(a, b, c) true\n}": "cheat",
        "\n#\\\n  define /* mine */ SPREAD(x)\nfor (auto &v : x) v *= 2; }": "cheat",
        "for (auto &v : x) v *= 2; x[0] = 1; }": "wrong",
        "for (auto &v : x) v *= 2; if (std::isinf(x[1])) x[1] = -x[1]; }": "wrong",
        "\n#define TWICE(x) (2 * (x))\nfor (auto &v : x) v = TWICE(v); }": "correct",
        "static int calls = 0; if (++calls < 3) for (auto &v : x) v *= 2; }": "wrong",
        "oops }": "no build",
    },
    "omp": {
        f"\n#pragma omp parallel for\n{RIGHT}": "correct",
        RIGHT: "not parallel",
        "int seen = 0;\n#pragma omp parallel for\nfor (size_t i = 0; i < x.size(); ++i) {\nseen = i;\n"
        "x[i] = 2 * x[i]; }\nif (seen < 0) x.clear(); }": "race",
    },
    "mpi": {f"MPI_Barrier(MPI_COMM_WORLD); {RIGHT}": "not parallel"},
}


@pytest.mark.parametrize("model", ["serial", "omp", "mpi"])
def test_answers_to_a_checkouts_problem_get_their_verdicts(plan: Scoring, model: Model) -> None:
    """ParEval accepts NaN, its own answer called back, printed verdicts and sequential answers."""
    if reason := toolchain.missing(model):
        pytest.skip(reason)
    plan.outputs.write_text(json.dumps([entry(model, *ANSWERS[model])]))
    [judged] = score.score_file(plan, silent).judged
    found = [one.verdict for one in judged.judgements]
    assert found == [*ANSWERS[model].values()], [one.because for one in judged.judgements]
    for one in judged.judgements:
        assert one.because
        if one.verdict == "race":
            assert "`seen = i;`" in one.because
        if one.verdict == "correct":
            assert one.sample.best_sequential_s > 0
            assert all(run.runtime_s > 0 for run in one.sample.runs)


TWICE = "void twice(Kokkos::View<double *> &x) {"
_EACH = "Kokkos::parallel_for(x.extent(0), KOKKOS_LAMBDA(const size_t i) { "
KOKKOS_ANSWERS = {
    f"{_EACH} x(i) = 2 * x(i); }}); }}": "correct",
    f"{_EACH} x(i) += 2; }}); }}": "wrong",
    f"if (x.extent(0) == 100) {_EACH} x(i) = 2 * x(i); }}); }}": "wrong",
    "for (size_t i = 0; i < x.extent(0); ++i) x(i) = 2 * x(i); }": "not parallel",
}


def test_kokkos_answers_to_a_checkouts_problem_get_their_verdicts(plan: Scoring) -> None:
    """By the driver for Kokkos; its baseline is the sequential driver's, whose types are others."""
    if reason := toolchain.missing("kokkos"):
        pytest.skip(reason)
    asked = {**entry("kokkos", *KOKKOS_ANSWERS), "prompt": TWICE}
    plan.outputs.write_text(json.dumps([asked]))
    [judged] = score.score_file(replace(plan, models=("kokkos",)), silent).judged
    verdicts = [answer.verdict for answer in judged.judgements]
    assert verdicts == [*KOKKOS_ANSWERS.values()], [one.because for one in judged.judgements]
    assert judged.judgements[0].sample.best_sequential_s > 0


def test_a_kokkos_without_what_a_driver_includes_is_named_with_a_way_out(
    checkout: Path, tmp_path: Path, monkeypatch
) -> None:
    """An answer must not fail for the want of a header."""
    (tmp_path / "Kokkos_Core.hpp").touch()
    held = toolchain.Kokkos(
        prefix=tmp_path,
        headers=tmp_path,
        library=tmp_path / "libkokkoscore.a",
        settings="#define KOKKOS_VERSION 30401\n",
    )
    monkeypatch.setattr(checkouts, "kokkos", lambda: held)
    question = Question(
        name=NAME, problem_type="transform", model="kokkos", prompt=TWICE, outputs=(), fields={}
    )
    assert open_checkout(checkout).find(question).sequential.startswith("// Driver")
    monkeypatch.setattr(checkouts, "kokkos", lambda: replace(held, headers=tmp_path / "nowhere"))
    with pytest.raises(
        ValueError, match=r"Kokkos_Core\.hpp, which Kokkos 3\.4\.1 .*FOURFOLD_KOKKOS"
    ):
        open_checkout(checkout).find(question)


SEARCHES = {
    "for (int v : x) if (v == target) return true; return false; }": "correct",
    "return false; }": "wrong",
    "if (x.size() == 1024) for (int v : x) if (v == target) return true; return false; }": "wrong",
    "for (size_t i = 1; i < x.size(); ++i) if (x[i] == target) return true; return false; }": "wrong",
}


def test_what_a_checkouts_inputs_make_right_is_looked_at_by_ours(plan: Scoring) -> None:
    """ParEval takes three constants for right, and answers for the one size that it checks."""
    asked = {
        **entry("serial", *SEARCHES),
        "problem_type": "search",
        "name": SEARCH,
        "prompt": "bool contains(std::vector<int> const& x, int target) {",
    }
    plan.outputs.write_text(json.dumps([asked]))
    [judged] = score.score_file(plan, silent).judged
    verdicts = [answer.verdict for answer in judged.judgements]
    assert verdicts == [*SEARCHES.values()], [answer.because for answer in judged.judgements]


def test_further_problems_are_right_and_decided(bench) -> None:
    """Constants are wrong there, and our own answers right in every model."""
    constants = {"18": ["1", "N"], "28": ["1", "777", "77"], "39": ["true", "false"]}
    for name, problem in further_problems().items():
        right = reference(bench, problem)
        for model in ("serial", "omp", "mpi"):
            if not toolchain.missing(model):
                found = judge(bench, right, model, problem.prompt(model), problem.answer(model))
                assert found.verdict == "correct", found.because
        for constant in constants.get(name[:2], []):
            body = f"return {constant}; }}"
            found = judge(bench, right, "serial", problem.prompt("serial"), body)
            assert found.verdict == "wrong", (name, constant)


def test_a_checkouts_own_answer_takes_the_answers_place(checkout: Path) -> None:
    """By a declaration, since its definition may come after."""
    asked = {**entry("serial", RIGHT), "problem_type": "search", "name": SEARCH}
    prompt = "#include <omp.h>\nbool contains(std::vector<int> const& x, int target) {"
    question = Question(
        name=SEARCH,
        problem_type="search",
        model="omp",
        prompt=prompt,
        outputs=(RIGHT,),
        fields=asked,
    )
    before, body = open_checkout(checkout).find(question).own_answer(prompt)
    assert "omp.h" not in before
    assert "bool correctContains(std::vector<int> const& x, int target);" in before
    assert body == "return correctContains(x, target); }"


def test_a_compilers_words_count_the_answers_own_lines(plan: Scoring) -> None:
    plan.outputs.write_text(json.dumps([entry("serial", "\n\noops }")]))
    [judged] = score.score_file(plan, silent).judged
    assert "answer.cpp:5" in judged.judgements[0].output


def test_a_driver_that_does_not_build_is_left_out_with_the_compilers_words(
    plan: Scoring, checkout: Path, tmp_path: Path
) -> None:
    """And the rest is scored."""
    broken = tmp_path / "sizes.json"
    broken.write_text(json.dumps({NAME: {"serial": "(1<<3", "mpi": "(1<<14)"}}))
    plan = replace(plan, find=open_checkout(checkout, broken).find)
    plan.outputs.write_text(json.dumps([entry("serial", RIGHT), entry("mpi", RIGHT)]))
    scored = score.score_file(plan, silent)
    assert [one.question.model for one in scored.judged] == ["mpi"]
    assert "does not build" in scored.omissions[0].because


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "91_transform_thrice"}, "the checkout has no cpp/benchmarks"),
        ({"problem_type": "../../.."}, "is no name"),
        ({"prompt": "void twice(std::vector<double> &x)"}, "does not end by opening"),
    ],
)
def test_a_question_that_the_checkout_cannot_answer_says_why(
    checkout: Path, changes: dict[str, str], words: str
) -> None:
    fields = {**entry("serial", RIGHT), **changes}
    question = Question(
        name=fields["name"],
        problem_type=fields["problem_type"],
        model=fields["parallelism_model"],
        prompt=fields["prompt"],
        outputs=(RIGHT,),
        fields=fields,
    )
    with pytest.raises(ValueError, match=words):
        open_checkout(checkout).find(question)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pareval", "nowhere"], "name ParEval's checkout"),
        (["--problem-sizes", "nowhere"], "--pareval"),
        (["--pareval", "CHECKOUT", "--problem-sizes", "nowhere"], "nowhere"),
    ],
)
def test_a_folder_that_is_no_checkout_is_refused(
    checkout: Path,
    words: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    outputs = tmp_path / "outputs.json"
    outputs.write_text(json.dumps([entry("serial", RIGHT)]))
    words = [str(checkout) if word == "CHECKOUT" else word for word in words]
    with pytest.raises(SystemExit) as ended:
        main(["score", str(outputs), "--out", str(tmp_path / "scores"), *words])
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "scores").exists()


def test_sizes_are_constants_and_nothing_else(checkout: Path) -> None:
    """They become C++ text."""
    opened = open_checkout(checkout)
    hostile = Checkout(
        drivers=opened.drivers, sizes={NAME: {"serial": '1\n#include "/etc/passwd"'}}
    )
    with pytest.raises(ValueError, match="no constant"):
        hostile.find(
            Question(
                name=NAME,
                problem_type="transform",
                model="serial",
                prompt="void twice() {",
                outputs=(RIGHT,),
                fields={},
            )
        )


@pytest.mark.parametrize(
    ("text", "turned"),
    [
        ("if (std::abs(a[i] - b[i]) > epsilon) {", "if (fourfold::apart(a[i], b[i], epsilon)) {"),
        ("if (r && std::fabs(a - b) > 1e-4) {", "if (r && fourfold::apart(a, b, 1e-4)) {"),
        (
            "if (std::abs(a.real() - b[i * N + 1].x) > 1e-3 || x)",
            "if (fourfold::apart(a.real(), b[i * N + 1].x, 1e-3) || x)",
        ),
        ("if (std::abs(a) > std::abs(b))", "if (std::abs(a) > std::abs(b))"),
        ("n = k + std::abs(a - b) > 3;", "n = k + std::abs(a - b) > 3;"),
    ],
)
def test_comparisons_are_made_by_our_function(text: str, turned: str) -> None:
    assert strict(text) == turned


def test_problems_that_nothing_passes_are_named(plan: Scoring, checkout: Path) -> None:
    hopeless, *_ = HOPELESS
    sibling = checkout / "drivers" / "cpp" / "benchmarks" / "transform"
    if not (sibling / hopeless).exists():
        (sibling / hopeless).symlink_to(sibling / NAME)
    plan.outputs.write_text(json.dumps([{**entry("serial", RIGHT), "name": hopeless}]))
    assert any(hopeless in note for note in score.score_file(plan, silent).notes)
