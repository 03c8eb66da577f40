"""Parallel answers: what is a race, what counts as parallel when it ran, and how a program ends."""

import re
from dataclasses import replace

import numpy as np
import pytest

from fourfold_hpc_coder.judge import toolchain
from fourfold_hpc_coder.judge.bench import built, launched
from fourfold_hpc_coder.judge.judge import judge, wants_every_rank
from fourfold_hpc_coder.judge.reference import reference
from fourfold_hpc_coder.problems.library import own_problems
from fourfold_hpc_coder.vocabulary import Model, Processors

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

RIGHT = "double s = 0; for (double v : x) s += v; return s / x.size(); }"


@pytest.fixture(scope="module")
def quick(bench):
    """One launch per model, and no look for races."""
    settings = replace(bench.settings, races=False)
    return replace(bench, settings=settings.with_launches({"mpi": (Processors(ranks=2),)}))


@pytest.fixture(scope="module")
def average(bench):
    return reference(bench, own_problems()["27_reduce_average"])


def verdict(bench, right, body: str, model: Model):
    if reason := toolchain.missing(model):
        pytest.skip(reason)
    return judge(bench, right, model, right.exercise.prompt(model), body)


def on_the_first_rank(bench, right, body: str):
    """The verdict where the prompt wants the value on rank 0 alone."""
    if reason := toolchain.missing("mpi"):
        pytest.skip(reason)
    prompt = right.exercise.prompt("mpi").replace(", on every rank", "")
    return judge(bench, right, "mpi", prompt, body)


@pytest.mark.parametrize(
    ("body", "expected", "words"),
    [
        ("#pragma omp parallel for reduction(+:s)\n", "correct", ""),
        ("#pragma omp parallel for\n", "race", "s \\+= x\\[i\\]"),
        ("", "not parallel", "no OpenMP directive"),
        ("// #pragma omp parallel for\n", "not parallel", "no OpenMP directive"),
        ("#pragma omp parallel\n{}\n", "not parallel", "no work"),
        ("#pragma omp parallel for num_threads(1)\n", "not parallel", "no work"),
        ("[[omp::directive(parallel for reduction(+:s))]]\n", "correct", ""),
        ("#pragma omp parallel for schedule(dynamic, 64)\n#pragma omp critical\n", "no build", ""),
    ],
)
def test_an_openmp_answer_must_be_parallel_and_free_of_races(
    bench, average, body: str, expected: str, words: str
) -> None:
    loop = "for (size_t i = 0; i < x.size(); ++i) s += x[i];\nreturn s / x.size(); }"
    found = verdict(bench, average, f"double s = 0;\n{body}{loop}", "omp")
    assert found.verdict == expected, found.because
    assert re.search(words, found.because)


@pytest.mark.parametrize("clause", ["critical", "atomic"])
def test_accesses_that_are_ordered_are_no_race(quick, average, clause: str) -> None:
    body = f"""double s = 0;
#pragma omp parallel for
for (size_t i = 0; i < x.size(); ++i)
#pragma omp {clause}
s += x[i];
return s / x.size(); }}"""
    watched = replace(quick, settings=replace(quick.settings, races=True))
    assert verdict(watched, average, body, "omp").verdict == "correct"


_OWN_SUM = "double own = 0;\n#pragma omp for\nfor (size_t i = 0; i < x.size(); ++i) own += x[i];\n"
ORDERED = {
    "std::mutex": f"std::mutex m; double s = 0;\n#pragma omp parallel\n{{ {_OWN_SUM}"
    "std::lock_guard<std::mutex> g(m); s += own; }",
    "two locks": "omp_lock_t k[2]; omp_init_lock(k); omp_init_lock(k + 1); double s = 0, u = 0;\n"
    f"#pragma omp parallel\n{{ {_OWN_SUM} omp_set_lock(k); omp_set_lock(k + 1); u += 1;"
    " omp_unset_lock(k + 1); s += own; omp_unset_lock(k); }",
    "a lock within itself": "omp_nest_lock_t k; omp_init_nest_lock(&k); double s = 0;\n"
    f"#pragma omp parallel\n{{ {_OWN_SUM} omp_set_nest_lock(&k); omp_set_nest_lock(&k);"
    " omp_unset_nest_lock(&k); s += own; omp_unset_nest_lock(&k); }",
    "a lock that is tried": "omp_lock_t k; omp_init_lock(&k); double s = 0;\n"
    f"#pragma omp parallel\n{{ {_OWN_SUM} while (!omp_test_lock(&k)) {{}} s += own; omp_unset_lock(&k); }}",
    "copyprivate": "double s = 0;\n#pragma omp parallel reduction(+ : s)\n{ size_t n;\n"
    "#pragma omp single copyprivate(n)\nn = x.size();\n"
    "#pragma omp for\nfor (size_t i = 0; i < n; ++i) s += x[i];\n}",
    "a static": "auto one = [] { static const std::vector<double> ones(3, 1.0); return ones[1]; };"
    " double s = 0;\n#pragma omp parallel for reduction(+ : s)\n"
    "for (size_t i = 0; i < x.size(); ++i) s += one() * x[i];",
    "iterations that wait": "size_t n = x.size(); std::vector<double> upto(65);\n"
    "#pragma omp parallel for ordered(1) schedule(static, 1)\nfor (int b = 0; b < 64; ++b) {\n"
    "double own = 0; for (size_t i = n * b / 64; i < n * (b + 1) / 64; ++i) own += x[i];\n"
    "#pragma omp ordered depend(sink : b - 1)\nupto[b + 1] = upto[b] + own;\n"
    "#pragma omp ordered depend(source)\n} double s = upto[64];",
}


@pytest.mark.parametrize("way", ORDERED)
def test_threads_that_are_kept_apart_do_not_race(bench, average, way: str) -> None:
    """Each was once called a race."""
    found = verdict(bench, average, f"{ORDERED[way]}\nreturn s / x.size(); }}", "omp")
    assert found.verdict == "correct", found.because


def test_one_race_is_seen_beside_what_is_in_order(bench, average) -> None:
    """The second was once not looked at: the checker lacked the call that `single` makes."""
    locked = f"std::mutex m; double s = 0; int n = 0;\n#pragma omp parallel\n{{ n += 1; {_OWN_SUM}"
    locked += "std::lock_guard<std::mutex> g(m); s += own; }"
    single = (
        f"double s = 0; int n = 0;\n#pragma omp parallel reduction(+ : s)\n{{ n += 1; {_OWN_SUM}"
    )
    single += "s += own;\n#pragma omp single\nn = 0;\n}"
    for body in (locked, single):
        found = verdict(bench, average, f"{body}\nreturn s / x.size() + 0 * n; }}", "omp")
        assert found.verdict == "race", found.proof


def test_a_race_is_seen_where_an_answer_frees_what_it_was_given(bench) -> None:
    """The checker once freed fenced memory as if it had no fence, which ended the program and the look."""
    right = reference(bench, own_problems()["55_transform_relu"])
    body = """std::vector<double> y(x.size()); int n = 0;
#pragma omp parallel for
for (size_t i = 0; i < x.size(); ++i) { n += 1; y[i] = std::max(0.0, x[i]); }
x.swap(y); x.resize(x.size() + 0 * n); }"""
    found = verdict(bench, right, body, "omp")
    assert found.verdict == "race", found.proof


def test_the_checker_keeps_no_memory_of_regions_before(bench) -> None:
    """What it kept took the place of freed memory: a hundred requests of 1000 numbers took 240 MB."""
    problem = own_problems()["03_dense_la_axpy"]
    settings = replace(bench.settings, memory_bytes=100 << 20)
    given = (*problem.arguments(1000, np.random.default_rng(1)).values(),)
    text = problem.unit(problem.prompt("omp"), problem.answer("omp"))
    with bench.folder() as folder:
        assert not built(bench, problem, "omp", text, folder, watched=True).code
        with launched(bench, folder, "omp", Processors(threads=2), settings=settings) as channel:
            channel.connect()
            for _ in range(100):
                channel.call(given, problem.signature.parameters, problem.signature.outputs)
            channel.quit()
            assert channel.process.finish().code == 0


@pytest.mark.parametrize(
    ("kind", "task"), [("size_t", "taskloop"), ("int", "taskloop"), ("int", "task")]
)
def test_what_the_checker_cannot_follow_is_said(bench, average, kind: str, task: str) -> None:
    each = "{ size_t n = x.size(); for (size_t i = n * b / 8; i < n * (b + 1) / 8; ++i) part[b] += x[i]; }"
    loop, pragma = f"for ({kind} b = 0; b < 8; ++b)\n", f"#pragma omp {task} shared(part)\n"
    tasks = f"{loop}{pragma}{each}" if task == "task" else f"{pragma}{loop}{each}"
    body = f"""std::vector<double> part;
#pragma omp parallel
#pragma omp single
{{ part.resize(8);
{tasks} }}
double s = std::accumulate(part.begin(), part.end(), 0.0);
return s / x.size(); }}"""
    found = verdict(bench, average, body, "omp")
    assert found.verdict == "correct", found.because
    assert "not checked for races: it has tasks" in found.proof


_SHARE = """int r, p; MPI_Comm_rank(MPI_COMM_WORLD, &r); MPI_Comm_size(MPI_COMM_WORLD, &p);
size_t n = x.size(); double s = 0, t = 0; for (size_t i = n * r / p; i < n * (r + 1) / p; ++i) s += x[i];
MPI_Comm all = MPI_COMM_WORLD; MPI_Request q; double *b, o; MPI_Win w; MPI_Aint z; int unit;
"""
_WAIT = "MPI_Wait(&q, MPI_STATUS_IGNORE);"
_AROUND = (
    "MPI_Sendrecv_replace(&s, 1, MPI_DOUBLE, (r + 1) % p, 0, (r + p - 1) % p, 0, all, nullptr)"
)
MOVING = {
    "Ireduce": f"MPI_Ireduce(&s, &t, 1, MPI_DOUBLE, MPI_SUM, 0, all, &q); {_WAIT}",
    "Igather": "std::vector<double> a(p);"
    f" MPI_Igather(&s, 1, MPI_DOUBLE, a.data(), 1, MPI_DOUBLE, 0, all, &q); {_WAIT}"
    " for (double v : a) t += v;",
    "Sendrecv_replace": f"t = s; for (int k = 1; k < p; ++k) {{ {_AROUND}; t += s; }}",
    "Start": "t = s; for (int k = 1; k < (r ? 2 : p); ++k) {"
    " if (r) MPI_Send_init(&s, 1, MPI_DOUBLE, 0, 0, all, &q);"
    " else MPI_Recv_init(&o, 1, MPI_DOUBLE, k, 0, all, &q);"
    f" MPI_Start(&q); {_WAIT} if (!r) t += o; MPI_Request_free(&q); }}",
    "Fetch_and_op": "MPI_Win_allocate(8, 8, MPI_INFO_NULL, all, &b, &w); *b = 0; MPI_Barrier(all);"
    " MPI_Win_fence(0, w); MPI_Fetch_and_op(&s, &o, MPI_DOUBLE, 0, 0, MPI_SUM, w); MPI_Win_fence(0, w);"
    " t = *b; MPI_Win_free(&w);",
    "Win_shared_query": "MPI_Win_allocate_shared(8, 8, MPI_INFO_NULL, all, &b, &w); MPI_Win_fence(0, w);"
    " *b = s; MPI_Win_fence(0, w); for (int k = 0; k < p; ++k) { MPI_Win_shared_query(w, k, &z, &unit, &b);"
    " t += *b; } MPI_Win_fence(0, w); MPI_Win_free(&w);",
}


@pytest.mark.parametrize("call", MOVING)
def test_every_way_to_move_data_between_ranks_is_one(quick, average, call: str) -> None:
    """Each was once overlooked, and the answer called not parallel."""
    found = on_the_first_rank(quick, average, f"{_SHARE}{MOVING[call]} return t / n; }}")
    assert found.verdict == "correct", found.because


def test_one_rank_that_does_it_all_is_not_parallel(quick, average) -> None:
    body = """int rank; MPI_Comm_rank(MPI_COMM_WORLD, &rank); double s = 0;
if (!rank) for (double v : x) s += v;
MPI_Bcast(&s, 1, MPI_DOUBLE, 0, MPI_COMM_WORLD); return s / x.size(); }"""
    found = verdict(quick, average, body, "mpi")
    assert found.verdict == "not parallel"
    assert "one rank did all the work" in found.because


@pytest.mark.parametrize("model", ["serial", "mpi"])
def test_a_bad_end_after_right_answers_is_a_crash(quick, average, model: Model) -> None:
    """ParEval wants exit code 0; a program that corrupts its memory may show it only at the end."""
    last = "static struct X { ~X() { std::abort(); } } last;"
    if model == "serial":
        found = verdict(quick, average, f"{last} {RIGHT}", model)
    else:
        body = f"{last} {_SHARE} {MOVING['Ireduce']} return t / n; }}"
        found = on_the_first_rank(quick, average, body)
    assert found.verdict == "crash"
    assert "its answers were right, but it then ended with SIGABRT" in found.because
    assert not found.sample.counts


REDUCE = f"{_SHARE} MPI_Reduce(&s, &t, 1, MPI_DOUBLE, MPI_SUM, 0, all);"


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ("MPI_Bcast(&t, 1, MPI_DOUBLE, 0, all); return t / n;", "correct"),
        ("return r ? -1 : t / n;", "wrong"),
        ("return r ? NAN : t / n;", "not finite"),
    ],
)
def test_a_value_wanted_on_every_rank_is_looked_at_on_every_rank(
    quick, average, returned: str, expected: str
) -> None:
    """Of the other ranks nothing was asked once."""
    body = f"{REDUCE} {returned} }}"
    found = verdict(quick, average, body, "mpi")
    assert found.verdict == expected, found.because
    if expected != "correct":
        assert "on rank 1 is" in found.because
    assert on_the_first_rank(quick, average, body).verdict == "correct"


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("Every rank has a complete copy of x. Return the sum on all ranks.", True),
        ("Return the average, on every rank.", True),
        ("Return the result on all\n   processes.", True),
        ("Every rank has a complete copy of x. Return the result on rank 0.", False),
    ],
)
def test_a_prompt_says_where_it_wants_the_value(prompt: str, wanted: bool) -> None:
    assert wants_every_rank(prompt) == wanted


SUMMED = f"{_SHARE} MPI_Allreduce(&s, &t, 1, MPI_DOUBLE, MPI_SUM, all);"


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("MPI_Init(nullptr, nullptr);", "", "crash"),
        ("int g; MPI_Init_thread(nullptr, nullptr, 0, &g);", "", "crash"),
        ("", "MPI_Finalize();", "crash"),
        ("int is; MPI_Initialized(&is); if (!is) MPI_Init(nullptr, nullptr);", "", "correct"),
    ],
)
def test_mpi_is_started_and_ended_once(
    quick, average, before: str, after: str, expected: str
) -> None:
    """By the caller; ParEval's ends MPI after the answer too, which is an error the second time."""
    found = verdict(quick, average, f"{before} {SUMMED} {after} return t / n; }}", "mpi")
    assert found.verdict == expected, found.because
    if expected == "crash":
        assert "MPI allows it once" in found.because
