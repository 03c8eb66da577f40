"""What is compiled once and kept, and which answers the short prelude serves."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from fourfold_hpc_coder.judge import artifacts, build, prelude, toolchain
from fourfold_hpc_coder.judge.bench import built
from fourfold_hpc_coder.problems.library import own_problems
from fourfold_hpc_coder.sandbox.backends import Unprotected
from fourfold_hpc_coder.sandbox.job import Job, JobResult
from fourfold_hpc_coder.vocabulary import Model

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

AVERAGE = own_problems()["27_reduce_average"]


@pytest.mark.skipif(
    bool(toolchain.missing("mpi")),
    reason="it counts what MPI's compiler is asked for (Debian: libopenmpi-dev, openmpi-bin)",
)
def test_what_answers_share_is_compiled_once(tmp_path: Path, monkeypatch) -> None:
    """One prelude and one driver for all CPU models, races included."""
    made: list[str] = []

    def remember(_, job: Job) -> JobResult:
        made.append(" ".join(job.command))
        return JobResult(code=0, stdout="", stderr="", elapsed_s=0, cpu_s=0, limit="nothing")

    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path))
    monkeypatch.setattr(artifacts, "run", remember)
    driver = AVERAGE.driver("serial")
    models: tuple[Model, ...] = ("serial", "omp", "mpi", "mpi+omp")
    for flavour in (*map(toolchain.flavour_of, models), toolchain.racing()):
        build.prepare(flavour, driver, "", Unprotected())
    assert sum("prelude.hpp.gch" in one for one in made) == 1
    assert sum("driver.cc" in one for one in made) == 1
    names = ("alone.cc", "ranks.cc", "threads.cc", "race.cc")
    assert all(sum(name in one for one in made) == 1 for name in names)


@pytest.mark.parametrize("header", ["", "#include <iostream>\n"], ids=["short", "whole"])
@pytest.mark.parametrize("model", ["serial", "omp", "mpi", "race"])
def test_what_is_precompiled_is_used_and_changes_no_instruction(
    bench, tmp_path, model, header
) -> None:
    """Compiled without it, an answer is the same program, but for the lines that a race is found by."""
    if model == "mpi" and (reason := toolchain.missing("mpi")):
        pytest.skip(reason)
    flavour = toolchain.racing() if model == "race" else toolchain.flavour_of(model)
    flavour = replace(flavour, flags=("-Winvalid-pch", *flavour.flags))
    asked: Model = "omp" if model == "race" else model
    body = AVERAGE.answer("omp" if model == "serial" else asked)  # its pragma says nothing
    text = AVERAGE.unit(header + AVERAGE.prompt(asked), body)
    assert prelude.needs_whole(flavour, text, bench.sandbox) == bool(header)
    inputs = build.prepare(flavour, AVERAGE.driver(asked), text, bench.sandbox)
    bare = tmp_path / "bare"
    shutil.copytree(inputs.prelude, bare, ignore=shutil.ignore_patterns("*.gch"))
    programs = []
    for number, folder in enumerate((inputs.prelude, bare)):
        source, program = tmp_path / f"in{number}", tmp_path / f"out{number}"
        source.mkdir()
        program.mkdir()
        (source / "answer.cpp").write_text(text)
        built = replace(inputs, prelude=folder)
        outcome = build.compile_candidate(bench.sandbox, built, source, program)
        assert (outcome.code, outcome.stderr) == (0, "")
        programs.append((program / "answer").read_bytes())
    assert model == "race" or programs[0] == programs[1]


@pytest.fixture
def named(tmp_path: Path, monkeypatch):
    """The Kokkos that stands under a prefix which the environment names."""
    toolchain.kokkos.cache_clear()
    monkeypatch.setenv("FOURFOLD_KOKKOS", str(tmp_path))
    yield toolchain.kokkos
    toolchain.kokkos.cache_clear()


@pytest.mark.parametrize(
    ("headers", "library"),
    [
        ("include", "lib64/libkokkoscore.a"),
        ("include/kokkos", "lib/x86_64-linux-gnu/libkokkoscore.so"),
        ("include/trilinos", "lib/libtrilinos_kokkoscore.so"),
    ],
)
def test_a_named_kokkos_is_used_as_it_was_built(named, tmp_path: Path, headers, library) -> None:
    """Its standard of C++, its threads, and its folder, which no sandbox shows by itself."""
    for place in (tmp_path / headers / "KokkosCore_config.h", tmp_path / library):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("#define KOKKOS_VERSION 50202\n#define KOKKOS_ENABLE_CXX20\n")
    assert not toolchain.missing("kokkos")
    flavour = toolchain.flavour_of("kokkos")
    assert f"-isystem{tmp_path / headers}" in flavour.prelude
    assert "-std=c++20" in flavour.prelude
    assert "-fopenmp" not in flavour.prelude
    assert str(tmp_path / library) in flavour.libraries
    assert flavour.given == (tmp_path,)
    assert toolchain.identity("kokkos").endswith("Kokkos 5.2.2")


def test_a_prefix_without_kokkos_is_named(named, tmp_path: Path) -> None:
    assert named() is None
    assert str(tmp_path) in toolchain.missing("kokkos")


def test_the_compiler_of_a_wheel_is_found(tmp_path: Path, monkeypatch) -> None:
    """Where PATH has none; the sandbox shows its folder."""
    wheel = tmp_path / "nvidia" / "cu13" / "bin" / "nvcc"
    wheel.parent.mkdir(parents=True)
    wheel.write_text("#!/bin/sh\necho Build of a wheel\n")
    wheel.chmod(0o755)
    monkeypatch.setattr(toolchain.shutil, "which", lambda _: None)
    monkeypatch.setattr(toolchain.sys, "path", [str(tmp_path)])
    assert not toolchain.missing("cuda")
    assert toolchain.flavour_of("cuda").given == (wheel.parents[1],)
    assert toolchain.identity("cuda") == "Build of a wheel"
    monkeypatch.setattr(toolchain.sys, "path", [])
    assert "nvidia-cuda-nvcc" in toolchain.missing("cuda")


WHOLE = (
    "std::cout << 1;",
    "std::complex<double> z;",
    "std::mt19937 g;",
    "std::thread t;",
    "std::string s = std::to_string(1);",
    "auto p = std::make_unique<int>(1);",
    "double b = std::cyl_bessel_j(0, 1.0);",
    "double b = beta;",
    "errno = ERANGE;",
    "clock_gettime(CLOCK_MONOTONIC, &now);",
    "long c = time(nullptr);",
    "std::lock_guard held(m);",
    "#include <bits/stdc++.h>",
    "#include <regex>",
)
SHORT = (
    "#include <omp.h>\n#include <vector>\nstd::vector<double> v(3); std::sort(v.begin(), v.end());",
    "double m = std::max(std::fabs(-1.0), M_PI); assert(m < INFINITY && m < DBL_MAX);",
    'auto f = std::function<int(int)>([](int i) { return abs(i); }); printf("%d", f(INT_MIN + 1));',
    "std::unordered_map<int, std::set<long>> h; std::atomic<int> n{0}; n += h.size();",
    "int s = std::accumulate(std::begin(a), std::end(a), 0); memcpy(b, a, sizeof a);",
    "std::priority_queue<std::pair<int, int>> q; std::optional<int> o; std::swap(s, o); // cout",
)


@pytest.mark.parametrize("text", WHOLE)
def test_a_name_that_only_the_whole_prelude_holds_asks_for_it(bench, text: str) -> None:
    flavour = toolchain.flavour_of("serial")
    assert prelude.needs_whole(flavour, text, bench.sandbox)
    assert prelude.needs_whole(flavour, "#define a std::cout\n", bench.sandbox)
    assert "include" in text or not prelude.needs_whole(flavour, f"// {text}", bench.sandbox)


@pytest.mark.parametrize("text", SHORT)
def test_what_most_answers_use_is_in_the_short_prelude(bench, text: str) -> None:
    assert not prelude.needs_whole(toolchain.flavour_of("serial"), text, bench.sandbox)


@pytest.mark.parametrize("model", ["serial", "omp"])
def test_right_answers_build_under_the_short_prelude(bench, tmp_path: Path, model: Model) -> None:
    """Most have it, and what they name is there; the slow tests judge every one of them."""
    flavour = toolchain.flavour_of(model)
    answers = [
        (one, one.unit(one.prompt(model), one.answer(model)))
        for one in own_problems().values()
        if model in one.models
    ]
    short = [
        (one, text)
        for one, text in answers
        if not prelude.needs_whole(flavour, text, bench.sandbox)
    ]
    assert len(short) >= len(answers) // 2
    for one, text in (short[0], short[-1]):
        folder = tmp_path / one.name
        folder.mkdir()
        outcome = built(bench, one, model, text, folder)
        assert outcome.code == 0, outcome.stderr
