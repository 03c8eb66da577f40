"""Laws of every sandbox: what a program inside cannot do. A backend is held to them by being registered."""

import os
import socket
from pathlib import Path

import pytest

from fourfold_hpc_coder.sandbox import backends, seccomp
from fourfold_hpc_coder.sandbox.backends import BACKENDS, Bubblewrap, Landlock, Sandbox, Unprotected
from fourfold_hpc_coder.sandbox.job import Job, JobResult, Limits, Mount
from fourfold_hpc_coder.sandbox.process import find_sandbox, run, started
from fourfold_hpc_coder.sandbox.scratch import scratch_folder

LIMITS = Limits(wall_s=120, cpu_s=2, memory_bytes=1 << 28, processes=32, file_bytes=1 << 20)

NAP = f"sleep {1000 + os.getpid() / 1e8:.8f}"
"""Of this run of the tests, and of no other on this machine."""


def why_not(sandbox: Sandbox) -> str:
    """Why a sandbox does not work on this machine; empty where it does."""
    try:
        result = run(sandbox, Job(command=("true",), mounts=(), limits=LIMITS))
    except OSError as error:
        return str(error)
    return result.stderr or f"exit code {result.code}" if result.code else ""


def working(sandbox: Sandbox) -> Sandbox:
    if reason := why_not(sandbox):
        pytest.skip(f"{sandbox.name} does not work here: {reason}")
    return sandbox


@pytest.fixture(scope="module", params=BACKENDS, ids=lambda sandbox: sandbox.name)
def sandbox(request) -> Sandbox:
    return working(request.param)


@pytest.fixture(scope="module")
def landlock() -> Sandbox:
    return working(Landlock())


def inside(sandbox, script: str, *words: str | Mount, limits: Limits = LIMITS) -> JobResult:
    """Run a shell script; its arguments are paths inside, which not every wall can keep."""
    mounts = tuple(one for one in words if isinstance(one, Mount))
    arguments = tuple(one for one in words if isinstance(one, str))
    command = ("sh", "-c", script, "sh", *arguments)
    return run(sandbox, Job(command=command, mounts=mounts, limits=limits))


def test_it_sees_usr_and_its_own_processes_and_nothing_of_ours(sandbox) -> None:
    """No /etc/passwd, no home, no environment of ours, no process but its own."""
    found = inside(
        sandbox,
        "ls / /etc /proc | sort; env; cat /etc/passwd /etc/hostname; ls /home /root; "
        "echo x > /usr/x && echo writable; cat /proc/$PPID/environ | tr '\\0' '\\n'",
    )
    for secret in ("passwd", "hostname", "shadow", "home", "root", "writable"):
        assert secret not in found.stdout.splitlines()
    assert str(os.getpid()) not in found.stdout.splitlines()
    assert "PYTEST" not in found.stdout
    assert "root:" not in found.stdout


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
        'cat "$1/given"; echo > "$1/x"; echo > /usr/x; echo > /x; echo kept > "$2/x"; echo > "$HOME/x";'
        ' ln -s / "$2/top"; echo > "$2/top/x"; chmod 777 "$1/given"; rm "$1/given"',
        "/given",
        "/made",
        Mount(source=readable, target="/given"),
        Mount(source=writable, target="/made", writable=True),
    )
    assert found.stdout == "here"
    assert [one.name for one in readable.iterdir()] == ["given"]
    assert (writable / "x").read_text() == "kept\n"
    assert not Path("/usr/x").exists()
    assert not Path("/x").exists()


def test_what_is_given_at_a_depth_is_reached(sandbox, tmp_path: Path) -> None:
    """Bubblewrap made the folders above it for itself alone."""
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "file").write_text("here")
    mount = Mount(source=tmp_path / "given", target="/at/some/depth")
    assert inside(sandbox, 'cat "$1/file"', "/at/some/depth", mount).stdout == "here"


def test_files_are_bounded(sandbox) -> None:
    """One file by the limit on files; many by the size of the private folder, or by who looks at it."""
    found = inside(
        sandbox, 'head -c 9000000 /dev/zero > "$HOME/a"; wc -c < "$HOME/a"; rm "$HOME/a"'
    )
    assert found.limit == "files" or int(found.stdout) <= LIMITS.file_bytes
    found = inside(
        sandbox,
        'i=0; while head -c 400000 /dev/zero > "$HOME/$i"; do i=$((i+1)); sleep 0.1; done; echo full',
    )
    assert found.stdout == "full\n" or found.limit == "files"


def test_behind_landlock_a_file_too_large_ends_at_the_limit_on_files(landlock) -> None:
    """Whoever sees it first: the kernel, which ends the process, or the supervisor, which ends the job."""
    found = inside(landlock, 'exec head -c 9000000 /dev/zero > "$HOME/a"')
    assert (found.limit, found.code) == ("files", -9)


def test_empty_files_are_bounded(sandbox) -> None:
    """They take no block, and each a place and memory of the kernel's."""
    script = 'perl -e \'for (1..20000) { open(my $f, ">", "$ENV{HOME}/$_") or die }; sleep 5; print "all"\''
    found = inside(sandbox, script)
    assert found.limit == "files" or "all" not in found.stdout


def test_buffers_of_sockets_are_memory(sandbox) -> None:
    """A socket's buffer is in no process's count; so many sockets as could hold too much are too many."""
    script = (
        "perl -MSocket -e 'for (1..10) { if (!fork) { my @all; for (1..100) {"
        " socketpair(my $a, my $b, AF_UNIX, SOCK_STREAM, PF_UNSPEC) or exit 1; push @all, $a, $b }"
        ' sleep 5; print "held" } } sleep 6\''
    )
    found = inside(sandbox, script)
    assert found.limit == "memory" or "held" not in found.stdout


def test_files_without_a_name_are_bounded_too(sandbox) -> None:
    """Removed while it is open, a file still takes its space."""
    script = 'eval "exec $i> $HOME/$i"; rm "$HOME/$i"; head -c 400000 /dev/zero >&$i || echo full'
    found = inside(sandbox, f"for i in 3 4 5 6; do {script}; done; sleep 1")
    assert "full" in found.stdout or found.limit == "files"


@pytest.mark.parametrize("call", ["shmget", "memfd_create"])
def test_memory_that_no_process_holds_is_refused(sandbox, call: str) -> None:
    """Shared segments and files without a place are in no process's count: 800 MB went under 256."""
    if sandbox.gap:
        pytest.skip(f"{sandbox.name} says so itself: {sandbox.gap}")
    number = seccomp._library().seccomp_syscall_resolve_name(call.encode())
    arguments = "0, 1 << 20, 0600" if call == "shmget" else "$name, 0"
    script = f"my $name = 'x'; print syscall({number}, {arguments}) < 0 ? 'refused' : 'given'"
    assert inside(sandbox, f'perl -e "{script}"'.replace("$", "\\$")).stdout == "refused"


def test_everything_ends_with_the_job(sandbox) -> None:
    """Children that were sent to the background in a session of their own die as well, before its limit."""
    found = inside(sandbox, f"setsid {NAP} & setsid {NAP} & exit 3")
    assert (found.code, found.limit) == (3, "nothing")
    assert NAP not in _commands()


def test_it_signals_no_process_of_ours(sandbox) -> None:
    """Neither its keeper, nor this process, nor everybody at once."""
    found = inside(sandbox, f"kill -9 $PPID {os.getpid()}; kill -9 -1; exit 3")
    assert found.limit == "nothing"
    assert found.code in (3, 137)


@pytest.mark.parametrize(
    "call",
    [
        "socket.socket(socket.AF_INET, socket.SOCK_STREAM)",
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
        "socket.socket(socket.AF_UNIX)",
        "os.setuid(0)",
        "os.utime('/usr')",
        "os.memfd_create('x')",
        "checked(libc.unshare(0x10000000))",
        "checked(libc.syscall(56 if os.uname().machine == 'x86_64' else 220, 0x10000011, 0, 0, 0, 0))",
        "checked(libc.ptrace(16, os.getppid(), 0, 0))",
        "checked(libc.syscall(425, 8, bytes(120)))",
        "checked(libc.shmget(0, 4096, 0o1600))",
        "checked(libc.prlimit(os.getppid(), 7, 0, bytes(16)))",
    ],
)
def test_behind_landlock_calls_of_no_use_to_a_program_are_refused(landlock, call: str) -> None:
    """With EPERM or, by files' rules, EACCES: the interpreter lives to tell."""
    if not Path("/usr/bin/python3").exists():
        pytest.skip("no python3 in /usr")
    script = f"""import ctypes, os, socket
libc = ctypes.CDLL(None, use_errno=True)
def checked(found):
    if found == -1: raise OSError(ctypes.get_errno(), "refused")
try: {call}
except PermissionError: print("refused")"""
    job = Job(command=("/usr/bin/python3", "-I", "-c", script), mounts=(), limits=LIMITS)
    found = run(landlock, job)
    assert found.stdout == "refused\n", found.stderr


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
    job = Job(command=("sh", "-c", f"{NAP} & {NAP}"), mounts=(), limits=LIMITS)
    with started(sandbox, job) as process:
        while NAP not in _commands() and not process.done:
            process.pump(0.05)
    assert process.done
    assert NAP not in _commands()


def _commands() -> str:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
    return "\n".join(found)


def test_where_no_namespace_can_be_made_landlock_is_found(
    landlock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert find_sandbox(allow_none=False) == landlock


def test_without_a_sandbox_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """And says what would help; `allow_none` is the user's word."""
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with pytest.raises(ValueError, match="bubblewrap"):
        find_sandbox(allow_none=False)
    assert isinstance(find_sandbox(allow_none=True), Unprotected)


def test_the_filters_refuse_by_name_on_whatever_processor() -> None:
    """Every name is a call here, or one that libseccomp has yet to learn and so answers ENOSYS."""
    library = seccomp._library()
    for name in (*seccomp.DENIED, *seccomp.PRETENDED, *seccomp.OWN_ONLY, *seccomp.HIDDEN, "clone"):
        number = library.seccomp_syscall_resolve_name(name.encode())
        assert number >= 0 or number == -1, name
        assert number < seccomp.FIRST_UNREAD
    assert all(len(make()) % 8 == 0 for make in (seccomp.against_hoarding, seccomp.against_escapes))


def test_without_libseccomp_landlock_is_out_and_bubblewrap_says_what_it_leaves_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caches = (seccomp._library, backends._hoarding_filter, backends._escape_filter)
    monkeypatch.setattr(seccomp, "LIBRARY", "libnothing.so.0")
    for made in caches:
        made.cache_clear()
    try:
        assert "Debian: libseccomp2" in why_not(Landlock())
        assert "libnothing.so.0" in Bubblewrap().gap
        assert "not counted" in Bubblewrap().gap
        assert "--seccomp" not in Bubblewrap().arguments(
            Job(command=("true",), mounts=(), limits=LIMITS), 0
        )
    finally:
        for made in caches:
            made.cache_clear()


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
