"""What counts as parallel in a program's text and in what it did."""

import time
from dataclasses import replace

import pytest

from fourfold_hpc_coder.judge.parallelism import (
    clearest,
    in_action,
    in_text,
    is_by_turns,
    second_look,
    without_comments,
)
from fourfold_hpc_coder.judge.protocol import Evidence
from fourfold_hpc_coder.vocabulary import MODELS, Model, Processors

LINEAR_S = 10
"""Ten times what a scan that is linear takes here, on a busy machine; a quadratic one takes minutes."""
LOOP = "for (int i = 0; i < n; ++i) s += i;"


@pytest.mark.parametrize(
    ("model", "text", "parallel"),
    [
        ("omp", f"#pragma omp parallel for\n{LOOP}", True),
        ("omp", f"  #  pragma  omp   parallel\n{{ {LOOP} }}", True),
        ("omp", f"#pragma omp \\\n   parallel for\n{LOOP}", True),
        ("omp", f'_Pragma("omp parallel for") {LOOP}', True),
        ("omp", f"#pragma omp taskloop\n{LOOP}", True),
        ("omp", f"[[omp::directive(parallel for)]] {LOOP}", True),
        ("omp", f"// #pragma omp parallel for\n{LOOP}", False),
        ("omp", f"/*\n#pragma omp parallel for\n*/ {LOOP}", False),
        ("omp", 'auto s = "\\n#pragma omp parallel for\\n";', False),
        ("omp", 'auto s = R"(\n#pragma omp parallel for\n)";', False),
        ("omp", f"#if 0\n#pragma omp parallel for\n#endif\n{LOOP}", False),
        ("omp", f"#if 0\n#if 1\n#endif\n#pragma omp parallel for\n#endif\n{LOOP}", False),
        ("omp", f"#if 0\n#else\n#pragma omp parallel for\n#endif\n{LOOP}", True),
        ("omp", f"#if 0\n#endif\n#pragma omp parallel for\n{LOOP}", True),
        ("omp", f"#pragma omp simd\n{LOOP}", False),
        ("omp", "#pragma omp barrier\n", False),
        ("mpi", "MPI_Allreduce(a, b, 1, c, d, e);", True),
        ("mpi", "MPI_Isend (a);", True),
        ("mpi", "MPI_Sendrecv(a);", True),
        ("mpi", "MPI_Fetch_and_op(a);", True),
        ("mpi", "MPI_Rget(a);", True),
        ("mpi", "MPI_Barrier(MPI_COMM_WORLD);", False),
        ("mpi", "MPI_Comm_rank(MPI_COMM_WORLD, &rank);", False),
        ("mpi", "// MPI_Send(x);", False),
        ("mpi+omp", f"#pragma omp parallel for\n{LOOP} MPI_Reduce(x);", True),
        ("mpi+omp", "MPI_Reduce(x);", False),
        ("mpi+omp", f"#pragma omp parallel for\n{LOOP}", False),
        ("kokkos", "Kokkos::parallel_reduce(n, f, s);", True),
        ("kokkos", "for (int i = 0; i < x.extent(0); ++i) x(i) = 0;", False),
        ("cuda", "int i = blockIdx.x * blockDim.x + threadIdx.x;", True),
        ("cuda", "for (int i = 0; i < N; ++i) x[i] = 0;", False),
        ("serial", "return 1;", True),
    ],
)
def test_the_text_must_use_the_model_outside_of_comments(
    model: Model, text: str, parallel: bool
) -> None:
    assert in_text(text, model).parallel == parallel


@pytest.mark.parametrize(
    ("text", "parallel"),
    [
        ("std::sort(std::execution::par, x.begin(), x.end());", True),
        ("using namespace std::execution; std::reduce(par_unseq, x.begin(), x.end());", True),
        ("std::sort(std::execution::seq, x.begin(), x.end());", False),
        ("std::sort(x.begin(), x.end()); // std::execution::par, ", False),
    ],
)
def test_a_parallel_policy_is_read_outside_of_comments(text: str, parallel: bool) -> None:
    assert in_text(text, "stdpar").parallel == parallel


@pytest.mark.parametrize(
    "piece",
    [
        "\n",
        "#if 0\n",
        " \t\n",
        "/*",
        'R"a(',
        "omp::directive(",
        "#pragma omp\n",
        '_Pragma("',
        "\\\n",
    ],
)
def test_a_text_that_repeats_itself_is_read_in_no_time(piece: str) -> None:
    """Hundreds of blank lines, or conditions that are not closed, once took minutes."""
    began_s = time.process_time()
    for model in MODELS:
        in_text(piece * 50_000, model)
    assert time.process_time() - began_s < LINEAR_S


def test_comments_go_and_code_stays() -> None:
    text = 'a /* b */ c // d\ne "/* f */" g \'"\' h'
    assert without_comments(text).split() == ["a", "c", "e", '""', "g", '""', "h"]


IDLE = Evidence(
    process_cpu_s=1.0,
    main_cpu_s=1.0,
    region_cpu_s=0.0,
    regions=1,
    team=4,
    message_cpu_s=0.0,
    team_cpu_s=0.0,
    busiest_cpu_s=0.0,
    messages=0,
    talking_ranks=0,
    ranks=2,
    working_ranks=2,
)
TWO = Processors(threads=2)
RANKS = Processors(ranks=2)


@pytest.mark.parametrize(
    ("model", "processors", "evidence", "parallel"),
    [
        ("omp", TWO, IDLE, False),
        ("omp", TWO, replace(IDLE, region_cpu_s=0.9), True),
        ("omp", TWO, replace(IDLE, region_cpu_s=0.9, team=2), False),
        ("omp", TWO, replace(IDLE, process_cpu_s=2.0), True),
        ("omp", TWO, replace(IDLE, process_cpu_s=2.0, regions=0), False),
        ("omp", TWO, replace(IDLE, region_cpu_s=0.04, message_cpu_s=0.9), True),
        ("omp", TWO, replace(IDLE, region_cpu_s=0.9, team_cpu_s=1, busiest_cpu_s=0.99), False),
        ("omp", TWO, replace(IDLE, process_cpu_s=2, team_cpu_s=1, busiest_cpu_s=1), False),
        ("omp", TWO, replace(IDLE, region_cpu_s=0.9, team_cpu_s=1, busiest_cpu_s=0.6), True),
        ("omp", Processors(), IDLE, True),
        ("mpi", RANKS, IDLE, False),
        ("mpi", RANKS, replace(IDLE, messages=1, talking_ranks=1), False),
        ("mpi", RANKS, replace(IDLE, messages=2, talking_ranks=2), True),
        ("mpi", RANKS, replace(IDLE, messages=2, talking_ranks=2, working_ranks=1), False),
        ("mpi", Processors(), IDLE, True),
        ("stdpar", TWO, replace(IDLE, process_cpu_s=2.0), False),
        ("stdpar", TWO, replace(IDLE, region_cpu_s=0.5), True),
        ("stdpar", TWO, replace(IDLE, region_cpu_s=0.5, team=1), False),
        ("kokkos", Processors(), IDLE, False),
        ("kokkos", Processors(), replace(IDLE, region_cpu_s=0.5), True),
    ],
)
def test_what_it_did_counts_where_there_were_several_processors(
    model: Model, processors: Processors, evidence: Evidence, parallel: bool
) -> None:
    """An empty parallel region is no work; one rank that talks to itself is no exchange."""
    assert in_action({processors: evidence}, model).parallel == parallel


@pytest.mark.parametrize(
    ("text", "by_turns"),
    [
        (f"#pragma omp parallel for schedule(dynamic, 8)\n{LOOP}", True),
        (f"#pragma omp parallel for schedule(monotonic: guided)\n{LOOP}", True),
        (f"#pragma omp taskloop\n{LOOP}", True),
        (f"#pragma omp parallel for schedule(static)\n{LOOP}", False),
        (f"#pragma omp parallel for // schedule(dynamic)\n{LOOP}", False),
    ],
)
def test_threads_that_take_turns_may_leave_all_to_one(text: str, by_turns: bool) -> None:
    assert is_by_turns(text) == by_turns
    idle = replace(IDLE, region_cpu_s=0.9, team_cpu_s=1, busiest_cpu_s=1)
    assert in_action({TWO: idle}, "omp", by_turns=by_turns).parallel == by_turns


@pytest.mark.parametrize(
    ("alone_s", "together_s", "parallel"),
    [
        (1.0, 1.0, True),  # shared
        (1.0, 1.5, True),  # much is done twice
        (1.0, 2.0, False),  # all of it
        (0.0002, 0.0004, True),  # too short to tell
    ],
)
def test_ranks_that_each_do_the_whole_work_are_not_parallel(
    alone_s: float, together_s: float, parallel: bool
) -> None:
    """Whatever token they exchange: on two ranks the work is done twice."""
    told = replace(IDLE, messages=2, talking_ranks=2)
    seen = {
        Processors(): replace(IDLE, main_cpu_s=alone_s, ranks=1),
        RANKS: replace(told, main_cpu_s=together_s),
    }
    assert in_action(seen, "mpi").parallel == parallel


@pytest.mark.parametrize(
    ("crowded_s", "parallel"), [(2.1, True), (4.1, False)], ids=["slow moment", "repeated work"]
)
def test_more_ranks_than_cores_settle_whether_ranks_repeat_the_work(
    crowded_s: float, parallel: bool
) -> None:
    """A slow moment makes half of the work look like all of it, and a quarter not."""
    told = replace(IDLE, messages=2, talking_ranks=2)
    seen = {
        Processors(): replace(IDLE, main_cpu_s=1.0, ranks=1),
        RANKS: replace(told, main_cpu_s=1.96),
    }
    crowd = second_look(seen, cores=2)
    assert crowd == Processors(ranks=4)
    seen[crowd] = replace(told, main_cpu_s=crowded_s)
    assert in_action(seen, "mpi").parallel == parallel
    assert second_look(seen, cores=2) is None
    assert second_look({**seen, RANKS: replace(told, main_cpu_s=1.2)}, cores=9) is None


@pytest.mark.parametrize(("threads", "chosen"), [(1, 1), (2, 2)])
def test_of_several_calls_the_least_disturbed_tells_what_a_rank_computes(
    threads: int, chosen: int
) -> None:
    """On several threads, the one in which regions show most."""
    spent = ((3.0, 0.5), (1.0, 0.0), (2.0, 1.0))
    calls = [replace(IDLE, main_cpu_s=main, region_cpu_s=inside) for main, inside in spent]
    assert clearest(calls, Processors(threads=threads)) is calls[chosen]
