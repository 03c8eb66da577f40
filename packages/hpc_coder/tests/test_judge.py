"""Verdicts on programs that are right, wrong, broken and hostile; nothing is left behind by any."""

import math
import re
import threading
from dataclasses import replace

import pytest

from fourfold_hpc_coder.judge import toolchain
from fourfold_hpc_coder.judge.bench import JudgeSettings, Quiet
from fourfold_hpc_coder.judge.judge import judge
from fourfold_hpc_coder.judge.reference import reference
from fourfold_hpc_coder.problems.library import own_problems
from fourfold_hpc_coder.sandbox.backends import Bubblewrap, Landlock, Unprotected
from fourfold_hpc_coder.vocabulary import Model, Processors

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

RIGHT = "double s = 0; for (double v : x) s += v; return s / x.size(); }"
ONE_EACH: dict[Model, tuple[Processors, ...]] = {
    "omp": (Processors(threads=2),),
    "mpi": (Processors(ranks=2),),
    "mpi+omp": (Processors(ranks=2, threads=2),),
    "stdpar": (Processors(threads=2),),
}


@pytest.fixture(scope="module")
def quick(bench):
    """One launch per model and small inputs."""
    sizes = tuple(
        (name, min(one.timing_size, 64 * one.check_size)) for name, one in own_problems().items()
    )
    settings = replace(bench.settings, sizes=sizes, races=False).with_launches(ONE_EACH)
    return replace(bench, settings=settings)


@pytest.fixture(scope="module")
def average(bench):
    return reference(bench, own_problems()["27_reduce_average"])


def verdict(bench, right, body: str, model: Model = "serial"):
    if reason := toolchain.missing(model):
        pytest.skip(reason)
    return judge(bench, right, model, right.exercise.prompt(model), body)


HASTE_S = 3
"""Patience with what never answers."""
HELD = f"if (reached) std::abort(); {RIGHT}"
"""An attack that succeeds aborts; one that fails answers right."""


@pytest.mark.parametrize(
    "attack",
    [
        'bool reached = std::ifstream("/etc/passwd").good() || std::ifstream("/etc/hostname").good();',
        'bool reached = std::ofstream("/job/answer").good() || std::ofstream("/usr/x").good() ||'
        ' std::ofstream("/x").good() || std::ofstream("/channel/x").good() ||'
        ' std::ofstream("/tmp/../x").good() || std::ofstream("../x").good();',
        "sockaddr_in to{}; to.sin_family = AF_INET; to.sin_port = htons(22);"
        " to.sin_addr.s_addr = htonl(INADDR_LOOPBACK); int way = socket(AF_INET, SOCK_STREAM, 0);"
        " bool reached = connect(way, (sockaddr *)&to, sizeof to) == 0;",
        "bool reached = kill(getppid(), SIGSTOP) == 0 && getppid() != 1;",
        "bool reached = setuid(0) == 0 || mount(0, 0, 0, 0, 0) == 0;",
    ],
    ids=["reads the host", "writes outside", "connects", "signals its parent", "becomes root"],
)
def test_an_attack_fails_and_the_program_is_judged_by_its_answer(walled, average, attack) -> None:
    headers = (
        "#include <fstream>\n#include <csignal>\n#include <unistd.h>\n#include <sys/mount.h>\n"
    )
    headers += "#include <sys/socket.h>\n#include <netinet/in.h>\n"
    prompt = headers + average.exercise.prompt("serial")
    found = judge(walled, average, "serial", prompt, attack + HELD)
    assert found.verdict == "correct", found.because


Case = tuple[str, set[str], str]

HOSTILE: list[Case] = [
    ("for (;;) fork(); }", {"crash", "timeout"}, ""),
    (
        "if (!fork()) { setsid(); sleep(600); } return 0; }",
        {"wrong"},
        "the returned value is 0.0",
    ),
    (
        "std::vector<std::vector<char>> all; for (;;) all.emplace_back(1 << 24, 'x'); }",
        {"crash"},
        "memory|bad_alloc",
    ),
    ('for (;;) std::puts("again and again and again"); }', {"timeout"}, "s"),
    ("raise(SIGKILL); return 0; }", {"crash"}, "SIGKILL"),
    (
        "for (int f = 3; f < 64; ++f) { char b[99] = {}; (void)!write(f, b, sizeof b); } " + RIGHT,
        {"cheat"},
        "result channel",
    ),
    ("kill(-1, SIGKILL); pause(); return 0; }", {"timeout"}, "waits"),
    (
        'FILE *f = std::fopen((std::getenv("HOME") + std::string("/x")).c_str(), "w");'
        ' for (;;) std::fputs("more and more", f); }',
        {"crash"},
        "more in its files than allowed",
    ),
    ('\n#include "/etc/passwd"\nreturn 0; }', {"no build"}, "passwd"),
    ('\n#include "/dev/zero"\nreturn 0; }', {"no build"}, ""),
    (
        "return 0; } template <int N> struct T { T<N - 1> a; T<N + 1> b; }; T<9> t;",
        {"no build"},
        "",
    ),
]
"""Body, verdicts of which it gets one, and what the sentence holds: tried behind every wall."""

BAD: list[Case] = [
    ("std::exit(0); }", {"crash"}, "exit code 0 before it answered"),
    ("_exit(0); }", {"crash"}, "exit code 0"),
    (
        "const_cast<double *>(x.data())[1ul << 40] = 1; return 0; }",
        {"crash"},
        "SIGSEGV.*outside its memory",
    ),
    ('throw std::runtime_error("no luck today"); }', {"crash"}, "no luck today"),
    ("volatile bool on = true; while (on) {} return 0; }", {"timeout"}, "no answer"),
    ("pause(); return 0; }", {"timeout"}, "waits for something"),
    (f"if (x.size() == 1024) {{ {RIGHT[:-2]} }} return 0; }}", {"wrong"}, "reference has"),
    (
        "static double first = std::accumulate(x.begin(), x.end(), 0.0) / x.size(); return first; }",
        {"wrong"},
        "reference has",
    ),
    ('return std::nan(""); }', {"not finite"}, "nan"),
    ("return 1e308 * 10; }", {"not finite"}, "inf"),
    ("return 0; } struct Early { Early() { _exit(7); } } early;", {"crash"}, "exit code 7"),
    (
        "std::function<double(int)> deep = [&](int n) { volatile char b[4096] = {};"
        " return deep(n + 1) + b[n % 9]; }; return deep(0); }",
        {"crash"},
        "SIGSEGV",
    ),
    ("", {"no answer"}, "empty"),
    ("return undeclared; }", {"no build"}, "undeclared"),
    ("double other(double); return other(1); }", {"no build"}, "does not link.*other"),
]


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_program_gets_its_verdict_and_a_sentence(walled, average, case: Case) -> None:
    _gets_its_verdict(walled, average, *case)


@pytest.mark.parametrize("case", BAD)
def test_a_bad_program_gets_its_verdict_and_a_sentence(bench, average, case: Case) -> None:
    _gets_its_verdict(bench, average, *case)


def _gets_its_verdict(bench, average, body: str, allowed: set[str], words: str) -> None:
    headers = "#include <unistd.h>\n#include <csignal>\n"
    # Little memory is filled sooner, on a busy machine too; only what must time out has little time.
    limit_s = HASTE_S if "timeout" in allowed else bench.settings.time_limit_s
    settings = replace(bench.settings, memory_bytes=1 << 28, time_limit_s=limit_s)
    small = replace(bench, settings=settings)
    found = judge(small, average, "serial", headers + average.exercise.prompt("serial"), body)
    assert found.verdict in allowed, (found.verdict, found.because)
    assert re.search(words, found.because), found.because
    assert "root:" not in found.output
    assert len(found.because) < 500
    assert not found.sample.counts


@pytest.mark.parametrize("model", ["serial", "omp"])
def test_the_next_program_is_judged_as_if_nothing_had_been(walled, average, model: Model) -> None:
    races = replace(
        walled.settings, races=True, launches=(*ONE_EACH.items(), ("serial", (Processors(),)))
    )
    body = average.exercise.answer(model)
    found = verdict(replace(walled, settings=races), average, body, model)
    assert found.verdict == "correct", found.because


def test_without_a_wall_a_right_answer_is_right(quick, average) -> None:
    """Nothing is mounted then: every path of compilers and pipes is a real one."""
    unsafe = replace(quick, sandbox=Unprotected())
    assert verdict(unsafe, average, RIGHT).verdict == "correct"


_FEW = (
    "std::vector<int> few({}); "
    "std::for_each(std::execution::par, few.begin(), few.end(), [&](int &i) {{ {} }});"
)
_SERIAL = "double s = 0; for (double v : x) s += v;"
POLICIES = {
    "return std::reduce(std::execution::par, x.begin(), x.end()) / x.size(); }": "correct",
    f"/* std::execution::par, */ {RIGHT}": "not parallel",
    f"{_FEW.format(2, 'i = 1;')} {_SERIAL} return s / x.size(); }}": "not parallel",
    f"double r = 0; {_FEW.format(1, f'{_SERIAL} r = s;')} return r / x.size(); }}": "not parallel",
    "return std::reduce(std::execution::par, x.begin(), x.end()); }": "wrong",
    f"{_FEW.format(9, 'if (&i == &few[8]) throw 1;')} return 0; }}": "crash",
}


@pytest.mark.parametrize("body", POLICIES)
def test_algorithms_with_a_policy_must_divide_the_work(bench, average, body: str) -> None:
    """A policy over nothing, or over one element, divides nothing."""
    settings = bench.settings.with_launches({"stdpar": (Processors(threads=2),)})
    found = verdict(replace(bench, settings=settings), average, body, "stdpar")
    assert found.verdict == POLICIES[body], (found.because, found.output, found.proof)


RANKED = """int r, p; MPI_Comm_rank(MPI_COMM_WORLD, &r); MPI_Comm_size(MPI_COMM_WORLD, &p);
double s = 0, t = 0; for (size_t i = r; i < x.size(); i += p) s += x[i];
"""
RANKS = {
    "MPI_Allreduce(&s, &t, 1, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD); return t / x.size(); }": "correct",
    "return s / x.size(); }": "wrong",
    "if (r) MPI_Abort(MPI_COMM_WORLD, 3); return MPI_Barrier(MPI_COMM_WORLD); }": "crash",
    "if (r) raise(SIGSEGV); return MPI_Barrier(MPI_COMM_WORLD); }": "crash",
    "if (r) _Exit(0); return MPI_Barrier(MPI_COMM_WORLD); }": "crash",
    "if (!r) MPI_Barrier(MPI_COMM_WORLD); return 0; }": "timeout",
}


@pytest.mark.parametrize("body", RANKS)
def test_ranks_get_one_verdict_behind_every_wall(walled, average, body: str) -> None:
    """Behind Landlock they have no socket; the first rank that ends badly ends all, without one as with."""
    if reason := toolchain.barred("mpi", walled.sandbox):
        pytest.skip(reason)
    limit_s = 1 if RANKS[body] == "timeout" else walled.settings.time_limit_s
    settings = replace(walled.settings, time_limit_s=limit_s).with_launches(
        {"mpi": (Processors(ranks=3),)}
    )
    prompt = f"#include <csignal>\n{average.exercise.prompt('mpi')}"
    found = judge(replace(walled, settings=settings), average, "mpi", prompt, RANKED + body)
    assert found.verdict == RANKS[body], (found.because, found.output)


def test_an_mpi_that_needs_sockets_is_left_out_by_name(monkeypatch) -> None:
    """Open MPI 5 has none of the component by which ranks find each other without."""
    assert toolchain.barred("serial", Landlock()) == toolchain.missing("serial")
    if reason := toolchain.missing("mpi"):
        pytest.skip(reason)
    monkeypatch.setattr(toolchain, "_starts_without_sockets", lambda: False)
    assert "bubblewrap" in toolchain.barred("mpi", Landlock())
    assert not toolchain.barred("mpi", Bubblewrap())


HIDING = """#include <ctime>
#include <sys/syscall.h>
#include <unistd.h>
static int until = -1;
static double spent() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}
extern "C" ssize_t write(int where, const void *from, size_t n) {
    if (until >= 0 && --until == 0) { double began = spent(); while (spent() - began < 0.3) {} }
    return syscall(SYS_write, where, from, n);
}
"""
"""Takes over the C library's `write` to compute for 300 ms at another reply than the call's own."""


@pytest.mark.parametrize("replies", [4, 7], ids=["late", "early"])
@pytest.mark.parametrize("model", ["serial", "mpi"])
def test_work_hidden_around_the_call_is_charged_to_it(
    quick, average, model: Model, replies: int
) -> None:
    """Late: before the outputs are handed over. Early: while the next inputs are taken."""
    if reason := toolchain.missing(model):
        pytest.skip(reason)
    prompt = HIDING + average.exercise.prompt(model)
    body = f"until = {replies}; {average.exercise.answer(model)}"
    found = judge(quick, average, model, prompt, body)
    assert found.verdict == "correct", found.because
    [run] = found.sample.runs
    # What the reference itself spends on moving data is not charged.
    assert run.runtime_s > 0.3 - 0.15


SHORT = """#include <sys/syscall.h>
#include <unistd.h>
static int until = -1;
extern "C" ssize_t write(int where, const void *from, size_t n) {
    unsigned long nothing = 0;
    if (until >= 0) --until;
    if (until == 1) from = &nothing;
    if (until == 0) return n;
    return syscall(SYS_write, where, from, n);
}
"""
"""Takes over the C library's `write` to say of the outputs, with the right secret, that there are none."""


def test_a_reply_without_the_outputs_is_a_cheat_and_the_scorer_lives(bench, average) -> None:
    """The reply to the call is two writes, that with its outputs three: the secret, the length, the rest."""
    prompt = SHORT + average.exercise.prompt("serial")
    found = judge(bench, average, "serial", prompt, f"until = 5; {RIGHT}")
    assert found.verdict == "cheat", found.because
    assert "too short" in found.because


def test_an_answer_that_names_the_judge_is_a_cheat(bench, average) -> None:
    found = verdict(bench, average, f"fourfold::evidence.regions = 9; {RIGHT}")
    assert found.verdict == "cheat"
    assert "fourfold" in found.because
    assert verdict(bench, average, f"// fourfold\n{RIGHT}").verdict == "correct"


@pytest.mark.parametrize("place", ["-1", "x.size()"])
@pytest.mark.parametrize("model", ["serial", "mpi"])
def test_beyond_the_ends_of_an_array_nothing_goes_unseen(quick, model: Model, place: str) -> None:
    """What is read there is no 0, and who writes there is ended."""
    squares = reference(quick, own_problems()["58_transform_squaring"])
    right = squares.exercise.answer(model)
    found = verdict(quick, squares, f"x[{place}] = 0; {right}", model)
    assert found.verdict == "crash"
    assert "beyond an end of an array" in found.because or "double free" in found.because
    found = verdict(quick, squares, f"if (!x[{place}]) return; {right}", model)
    assert found.verdict == "correct", found.because
    found = verdict(quick, squares, f"if (x[{place}]) return; {right}", model)
    assert found.verdict == "wrong"


def test_ranks_that_wait_for_one_another_run_into_the_limit(quick, average) -> None:
    body = """int rank; MPI_Comm_rank(MPI_COMM_WORLD, &rank); double d;
MPI_Recv(&d, 1, MPI_DOUBLE, 1 - rank, 9, MPI_COMM_WORLD, MPI_STATUS_IGNORE); return d; }"""
    hasty = replace(quick, settings=replace(quick.settings, time_limit_s=HASTE_S))
    assert verdict(hasty, average, body, "mpi").verdict == "timeout"


def test_a_rank_that_dies_is_a_crash(quick, average) -> None:
    body = "int rank; MPI_Comm_rank(MPI_COMM_WORLD, &rank); if (rank) std::abort();" + RIGHT
    found = verdict(quick, average, body, "mpi")
    assert found.verdict == "crash", found.because
    assert "2 ranks" in found.because


def test_ranks_that_all_do_everything_are_not_parallel(quick, average) -> None:
    """Even where a barrier makes it look like MPI."""
    found = verdict(quick, average, "MPI_Barrier(MPI_COMM_WORLD);" + RIGHT, "mpi")
    assert found.verdict == "not parallel"


def test_a_single_around_serial_work_is_not_parallel(quick, average) -> None:
    """Several threads enter the region, and all but one wait."""
    body = """double s = 0;
#pragma omp parallel
{
#pragma omp single
    for (double v : x) s += v;
}
return s / x.size(); }"""
    settings = replace(quick.settings, sizes=())
    found = verdict(replace(quick, settings=settings), average, body, "omp")
    assert found.verdict == "not parallel", (found.verdict, found.because, found.proof)


def test_ranks_that_repeat_the_work_and_exchange_a_token_are_not_parallel(quick) -> None:
    launches: dict[Model, tuple[Processors, ...]] = {"mpi": (Processors(), Processors(ranks=2))}
    bench = replace(quick, settings=replace(quick.settings, sizes=()).with_launches(launches))
    right = reference(bench, own_problems()["27_reduce_average"])
    token = "int token = 1; MPI_Bcast(&token, 1, MPI_INT, 0, MPI_COMM_WORLD);"
    found = verdict(bench, right, token + RIGHT, "mpi")
    assert found.verdict == "not parallel", (found.verdict, found.because, found.proof)
    assert "of what one rank does alone" in found.because


def test_a_constant_that_two_threads_write_is_a_race(quick) -> None:
    """One element decides each compared input; here one in each half does."""
    racing = replace(quick, settings=replace(quick.settings, races=True))
    right = reference(racing, own_problems()["36_search_check_if_array_contains_value"])
    body = """bool seen = false;
#pragma omp parallel for
for (size_t i = 0; i < x.size(); ++i) if (x[i] == target) seen = true;
return seen; }"""
    found = verdict(racing, right, body, "omp")
    assert found.verdict == "race", (found.verdict, found.because)
    assert "seen = true" in found.because
    right_answer = right.exercise.answer("omp")
    assert verdict(racing, right, right_answer, "omp").verdict == "correct"


SHAPES = (
    "03_dense_la_axpy",
    "27_reduce_average",
    "21_histogram_bin_0-100",
    "30_scan_prefix_sum",
)
"""One problem of each kernel shape: in every model by default."""
RUNNABLE: tuple[Model, ...] = ("serial", "omp", "mpi", "mpi+omp", "kokkos", "stdpar", "cuda")
FIRST = {problem.problem_type: name for name, problem in reversed(own_problems().items())}
"""A problem of each type: by default in one model, all models in turn."""
QUICK = [(name, model) for name in SHAPES for model in RUNNABLE]
QUICK += [
    (name, RUNNABLE[number % len(RUNNABLE)])
    for number, (_, name) in enumerate(sorted(FIRST.items()))
    if name not in SHAPES
]


@pytest.mark.parametrize(("name", "model"), QUICK)
def test_the_reference_is_right_in_every_model(quick, name: str, model: Model) -> None:
    _reference_passes(quick, name, model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "model"),
    sorted({(name, model) for name in own_problems() for model in RUNNABLE} - {*QUICK}),
)
def test_the_reference_of_every_problem_is_right(quick, name: str, model: Model) -> None:
    _reference_passes(quick, name, model)


def _reference_passes(bench, name: str, model: Model) -> None:
    problem = own_problems()[name]
    if model not in problem.models:
        with pytest.raises(ValueError, match="form"):
            problem.answer(model)
        return
    right = reference(bench, problem)
    found = verdict(bench, right, problem.answer(model), model)
    assert found.verdict == ("compiled, not run" if model == "cuda" else "correct"), found.because
    if model != "cuda":
        assert found.sample.counts
        assert all(run.runtime_s > 0 for run in found.sample.runs)
        assert not math.isnan(found.sample.best_sequential_s)


@pytest.mark.parametrize("name", SHAPES)
def test_nothing_nan_and_constants_are_rejected(quick, name: str) -> None:
    _wrong_fails(quick, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*own_problems()} - {*SHAPES}))
def test_nothing_nan_and_constants_are_rejected_everywhere(quick, name: str) -> None:
    _wrong_fails(quick, name)


def _wrong_fails(bench, name: str) -> None:
    problem = own_problems()[name]
    right = reference(bench, problem)
    returns = bool(problem.signature.result)
    bodies = ["return 0; }", "return 1; }"] if returns else ["}"]
    kinds = {one.declared for one in problem.signature.outputs}
    if kinds & {"double", "float"}:
        bodies.append("return NAN; }")
    if not returns:
        outputs = [one.name for one in problem.signature.outputs]
        filled = "".join(f"for (auto &v : {one}) v = 1;" for one in outputs)
        bodies.append(filled + "}")
        if any("double" in kind or "float" in kind for kind in kinds):
            bodies.append("".join(f"for (auto &v : {one}) v = NAN;" for one in outputs) + "}")
    for body in bodies:
        found = verdict(bench, right, body)
        assert found.verdict in ("wrong", "not finite"), (body, found.because)


def test_a_timing_waits_for_work_and_work_for_those_who_wait_to_be_timed() -> None:
    quiet, begun, order = Quiet(), threading.Event(), []

    def timed() -> None:
        with quiet.working():
            begun.set()
            with quiet.timing():
                order.append("timed")

    def worked() -> None:
        with quiet.working():
            order.append("worked")

    threads = [threading.Thread(target=one) for one in (timed, worked)]
    with quiet.working():
        threads[0].start()
        assert begun.wait(60)
        while not quiet._wanted:
            threading.Event().wait(0.001)
        threads[1].start()
        order.append("first")
    for thread in threads:
        thread.join(60)
    assert order == ["first", "timed", "worked"]


def test_settings_name_their_launches() -> None:
    changed = JudgeSettings().with_launches({"omp": (Processors(threads=8),)})
    assert changed.of("omp") == (Processors(threads=8),)
    assert changed.of("mpi") == JudgeSettings().of("mpi")
