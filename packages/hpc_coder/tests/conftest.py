"""One bench for all tests that compile and run: a sandbox that works here, or a skip that says why."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from fourfold_hpc_coder.judge import toolchain
from fourfold_hpc_coder.judge.bench import Bench, JudgeSettings
from fourfold_hpc_coder.sandbox.backends import Landlock, Sandbox, Unprotected
from fourfold_hpc_coder.sandbox.job import Job, Limits
from fourfold_hpc_coder.sandbox.process import find_sandbox, run
from fourfold_hpc_coder.sandbox.scratch import scratch_folder


@pytest.fixture(scope="session")
def sandbox() -> Sandbox:
    if reason := toolchain.missing("serial"):
        pytest.skip(reason)
    try:
        found = find_sandbox(allow_none=False)
    except ValueError as error:
        pytest.skip(str(error))
    assert not isinstance(found, Unprotected)
    return found


@pytest.fixture(scope="session")
def bench(sandbox):
    """One timed call, and patience: a busy machine must not end what would answer."""
    settings = JudgeSettings(time_limit_s=30, repetitions=1)
    with scratch_folder() as scratch:
        yield Bench(sandbox=sandbox, scratch=scratch, settings=settings, secret=1)


@pytest.fixture(scope="session", params=["the best", "landlock"])
def walled(request, bench):
    """The bench behind each wall that a machine may be left with."""
    if request.param == "the best":
        return bench
    if isinstance(bench.sandbox, Landlock):
        pytest.skip("Landlock is the best here")
    limits = Limits(wall_s=60, cpu_s=5, memory_bytes=1 << 28, processes=64, file_bytes=1 << 20)
    if run(Landlock(), Job(command=("true",), mounts=(), limits=limits)).code:
        pytest.skip("Landlock does not work here (Linux 6.12)")
    return replace(bench, sandbox=Landlock())


def children() -> set[str]:
    """Processes that this one has started, from any of its threads, and that have not been waited for."""
    found: set[str] = set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # a thread may end while we look
            found.update((task / "children").read_text().split())
    return found


@pytest.fixture
def nothing_left_behind(bench):
    """No process, no mount and no file of a job outlives it."""
    mounts = Path("/proc/mounts").read_text()
    before = children()
    yield
    # Another scorer on this machine may have jobs of its own; ours are below this process. So are
    # the ranks that another package's tests keep for the whole run: what was there before may stay.
    assert children() <= before
    assert Path("/proc/mounts").read_text() == mounts
    assert [*bench.scratch.iterdir()] == []
