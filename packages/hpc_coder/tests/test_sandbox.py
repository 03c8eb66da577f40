"""What a program inside cannot do, in each way of keeping it there."""

import os
import shutil
import socket
from pathlib import Path

import pytest

from fourfold_hpc_coder.jobs import Job, Limits, Mount, Outcome
from fourfold_hpc_coder.sandbox import find_sandbox, run, scratch_folder, started
from fourfold_hpc_coder.walls import Bubblewrap, Namespaces, Unprotected

LIMITS = Limits(wall_s=120, cpu_s=2, memory_bytes=1 << 28, processes=32, file_bytes=1 << 20)


def _works(sandbox) -> bool:
    if shutil.which("bwrap") is None and isinstance(sandbox, Bubblewrap):
        return False
    try:
        return run(sandbox, Job(command=("true",), mounts=(), limits=LIMITS)).code == 0
    except OSError:
        return False


@pytest.fixture(scope="module", params=[Bubblewrap(), Namespaces()], ids=lambda one: one.name)
def sandbox(request):
    if not _works(request.param):
        pytest.skip(f"{request.param.name} does not work here (Debian: bubblewrap, util-linux)")
    return request.param


def inside(sandbox, script: str, *mounts: Mount, limits: Limits = LIMITS) -> Outcome:
    return run(sandbox, Job(command=("sh", "-c", script), mounts=mounts, limits=limits))


def test_it_sees_usr_and_its_own_processes_and_nothing_of_ours(sandbox) -> None:
    """No /etc/passwd, no home, no environment of ours, no process but its own."""
    found = inside(
        sandbox, "ls / /etc /proc | sort; env; id -u; test -w /usr && echo writable; ls /home /root"
    )
    for secret in ("passwd", "hostname", "shadow", "home", "root", "writable"):
        assert secret not in found.stdout.splitlines()
    assert str(os.getpid()) not in found.stdout.splitlines()
    assert "PYTEST" not in found.stdout


def test_it_has_no_network(sandbox) -> None:
    """Not even this machine's: a server that listens here is out of reach."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        script = f"python3 -c 'import socket; socket.create_connection((\"127.0.0.1\", {port}), 2)'"
        found = inside(sandbox, f"command -v python3 || exit 9; {script}")
        if found.code == 9:
            pytest.skip("no python3 in /usr")
        assert found.code != 0
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_it_writes_only_where_it_may(sandbox, tmp_path: Path) -> None:
    readable, writable = tmp_path / "readable", tmp_path / "writable"
    readable.mkdir()
    writable.mkdir()
    (readable / "given").write_text("here")
    found = inside(
        sandbox,
        "cat /given/given; echo > /given/x; echo > /usr/x; echo > /x; echo kept > /made/x; echo > /tmp/x",
        Mount(source=readable, target="/given"),
        Mount(source=writable, target="/made", writable=True),
    )
    assert found.stdout == "here"
    assert [one.name for one in readable.iterdir()] == ["given"]
    assert (writable / "x").read_text() == "kept\n"
    assert not Path("/usr/x").exists()
    assert not Path("/x").exists()


def test_files_are_bounded(sandbox) -> None:
    """One file by the limit on files, many by the size of the private folder."""
    found = inside(
        sandbox,
        "head -c 9000000 /dev/zero > /tmp/a; for i in 1 2 3 4 5; do head -c 600000 /dev/zero > /tmp/$i; done;"
        " du -sb /tmp | cut -f1",
    )
    assert int(found.stdout) <= 1.2 * LIMITS.file_bytes


def test_everything_ends_with_the_job(sandbox) -> None:
    """Children that were sent to the background in a session of their own die as well, before its limit."""
    found = inside(sandbox, "setsid sleep 1000 & setsid sleep 1000 & exit 3")
    assert (found.code, found.limit) == (3, "nothing")
    assert "sleep 1000" not in _commands()


def test_an_endless_loop_ends_at_the_processor_limit(sandbox) -> None:
    limits = Limits(wall_s=600, cpu_s=1, memory_bytes=1 << 28, processes=32, file_bytes=1 << 20)
    assert inside(sandbox, "while :; do :; done", limits=limits).limit == "cpu"


def test_a_wait_ends_at_the_wall_limit(sandbox) -> None:
    limits = Limits(wall_s=1, cpu_s=9, memory_bytes=1 << 28, processes=32, file_bytes=1 << 20)
    found = inside(sandbox, "sleep 100", limits=limits)
    assert (found.limit, found.code) == ("wall", -9)
    assert found.elapsed_s < 100


def test_output_is_read_to_the_cap_and_no_further(sandbox) -> None:
    limits = Limits(
        wall_s=30,
        cpu_s=1,
        memory_bytes=1 << 28,
        processes=32,
        file_bytes=1 << 20,
        output_bytes=1000,
    )
    found = inside(sandbox, "yes", limits=limits)
    assert len(found.stdout) == 1000


def test_processes_are_bounded(sandbox) -> None:
    found = inside(sandbox, "i=0; while [ $i -lt 200 ]; do sleep 5 & i=$((i+1)); done; echo all")
    assert "all" not in found.stdout or found.limit == "processes"


def test_a_killed_job_leaves_nothing(sandbox) -> None:
    """Leaving the block of a job under way, as on an error of ours, kills all of it."""
    job = Job(command=("sh", "-c", "sleep 1001 & sleep 1001"), mounts=(), limits=LIMITS)
    with started(sandbox, job) as process:
        while "sleep 1001" not in _commands() and not process.done:
            process.pump(0.05)
    assert process.done
    assert "sleep 1001" not in _commands()


def _commands() -> str:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
    return "\n".join(found)


def test_without_a_sandbox_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """And says what would help; `allow_none` is the user's word."""
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match="bubblewrap"):
        find_sandbox(allow_none=False)
    assert isinstance(find_sandbox(allow_none=True), Unprotected)


def test_without_protection_paths_are_the_real_ones(tmp_path: Path) -> None:
    (tmp_path / "given").write_text("here")
    job = Job(
        command=("cat", "/job/given"),
        mounts=(Mount(source=tmp_path, target="/job"),),
        limits=LIMITS,
    )
    assert run(Unprotected(), job).stdout == "here"


def test_what_a_killed_scorer_left_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    parent = tmp_path / f"fourfold-hpc-coder-{os.geteuid()}"
    left = parent / "999999999-old"
    left.mkdir(parents=True)
    with scratch_folder() as folder:
        assert folder.is_dir()
        assert not left.exists()
    assert not parent.exists()
