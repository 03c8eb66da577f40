"""One bench for all tests that compile and run: a sandbox that works here, or a skip that says why."""

from contextlib import suppress
from pathlib import Path

import pytest

from fourfold_hpc_coder import toolchain
from fourfold_hpc_coder.sandbox import FIRST_STRANGER, find_sandbox, scratch_folder
from fourfold_hpc_coder.walls import Bubblewrap, Namespaces
from fourfold_hpc_coder.workbench import Bench, Settings


@pytest.fixture(scope="session")
def sandbox() -> Bubblewrap | Namespaces:
    if reason := toolchain.missing("serial"):
        pytest.skip(reason)
    try:
        found = find_sandbox(allow_none=False)
    except ValueError as error:
        pytest.skip(str(error))
    assert isinstance(found, Bubblewrap | Namespaces)
    return found


@pytest.fixture(scope="session")
def bench(sandbox):
    """One timed call, and patience: a busy machine must not end what would answer."""
    settings = Settings(time_limit_s=30, repetitions=1)
    with scratch_folder() as scratch:
        yield Bench(sandbox=sandbox, scratch=scratch, settings=settings, secret=1)


def strangers() -> list[str]:
    """Commands of processes that belong to a job's user: none is left after a job (when run as root)."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            status = (entry / "status").read_text()
            is_zombie = "State:\tZ" in status
            uid = int(status.split("Uid:")[1].split()[0])
        except OSError:
            continue
        if FIRST_STRANGER <= uid < FIRST_STRANGER + 4000 and not is_zombie:
            found.append(status.split()[1])
    return found


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
