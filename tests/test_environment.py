"""`scripts/env` on a workspace with a tiny lock, so that a set-up takes seconds and no network."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(
    not list((ROOT / "wheelhouse").glob("uv-*.whl")),
    reason="wheelhouse/ holds no uv: this environment was not made by scripts/env",
)

PROJECT = """
[project]
name = "tiny"
version = "0"
requires-python = ">=3.11"
dependencies = ["einops"]
[tool.uv]
package = false
[dependency-groups]
dev = []
material = []
papers = []
"""


DEV = 'dev = [{ include-group = "papers" }, { include-group = "docs" }]'
MEMBER = """
[project]
name = "fourfold-none"
version = "0"
[build-system]
requires = ["uv_build>=0.9"]
build-backend = "uv_build"
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """An empty workspace that needs one small wheel, beside a wheelhouse that holds it."""
    place = tmp_path / "clone with a blank"
    (place / "scripts").mkdir(parents=True)
    (place / "packages" / "none").mkdir(parents=True)
    (place / "packages" / "none" / "pyproject.toml").write_text("# counted in the checksum only\n")
    for name in ("env", "environment.py"):
        shutil.copy(ROOT / "scripts" / name, place / "scripts" / name)
    (place / "pyproject.toml").write_text(PROJECT)
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for pattern in ("einops-*", "uv-0*", "uv_build-*", "setuptools-*", "wheel-*"):
        [wheel] = (ROOT / "wheelhouse").glob(pattern)
        os.link(wheel, wheels / wheel.name)
    version = next(wheels.glob("einops-*")).name.split("-")[1]
    (place / "uv.lock").write_text(
        'version = 1\nrevision = 3\nrequires-python = ">=3.11"\n'
        '[[package]]\nname = "einops"\n'
        f'version = "{version}"\nsource = {{ registry = "wheelhouse" }}\n'
        f'wheels = [{{ path = "einops-{version}-py3-none-any.whl" }}]\n'
        '[[package]]\nname = "tiny"\nversion = "0"\nsource = { virtual = "." }\n'
        'dependencies = [{ name = "einops" }]\n'
        '[package.metadata]\nrequires-dist = [{ name = "einops" }]\n'
    )
    return place


def env(checkout: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    base = {"PATH": f"{Path(sys.executable).resolve().parent}:/usr/bin:/bin", "HOME": str(checkout)}
    return subprocess.run(
        [str(checkout / "scripts" / "env"), *words],
        cwd="/",
        env={**base, "FOURFOLD_PYTHON": str(Path(sys.executable).resolve()), **variables},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def offline(checkout: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    wheels = str(checkout.parent / "wheels")
    return env(checkout, "--offline", "--wheelhouse", wheels, *words, **variables)


SHOW = ("python", "-c", "import einops, sys; print(sys.prefix)")


def test_it_makes_the_environment_once_and_is_silent_afterwards(checkout: Path) -> None:
    """From any directory, offline, into a path with a blank."""
    first = offline(checkout, *SHOW)
    assert first.returncode == 0, first.stderr
    assert first.stdout.strip() == str(checkout / ".venv")
    again = env(checkout, "true")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")


def test_a_half_finished_attempt_is_started_over(checkout: Path) -> None:
    assert offline(checkout, "true").returncode == 0
    [package] = (checkout / ".venv").glob("lib/python*/site-packages/einops")
    shutil.rmtree(package)
    (checkout / ".venv" / "fourfold-stamp").unlink()
    (checkout / ".env-work" / "unfinished").touch()
    assert offline(checkout, *SHOW).returncode == 0


def test_two_calls_at_once_make_one_environment(checkout: Path) -> None:
    wheels = str(checkout.parent / "wheels")
    words = [str(checkout / "scripts" / "env"), "--offline", "--wheelhouse", wheels, *SHOW]
    variables = {**os.environ, "FOURFOLD_PYTHON": str(Path(sys.executable).resolve())}
    both = [
        subprocess.Popen(
            words, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    outputs = [one.communicate(timeout=200) for one in both]
    assert [one.returncode for one in both] == [0, 0], outputs
    assert sum("installing" in errors for _, errors in outputs) == 1


def test_a_changed_lock_is_noticed(checkout: Path) -> None:
    assert offline(checkout, "true").returncode == 0
    with (checkout / "pyproject.toml").open("a") as file:
        file.write("\n# changed\n")
    assert "making the environment" in offline(checkout, "true").stderr


def interpreters() -> list[str]:
    """The CPythons of this machine that `scripts/env` takes, this one first."""
    places = [Path("/usr/bin"), Path("/usr/local/bin"), *Path("/opt/python").glob("*/bin")]
    places += Path.home().glob(".pyenv/versions/*/bin")
    paths = [place / f"python3.{minor}" for place in places for minor in (11, 12, 13)]
    versions = {path.name: str(path) for path in paths if path.exists()}
    mine = f"python3.{sys.version_info.minor}"
    return list({mine: str(Path(sys.executable).resolve()), **versions}.values())


@pytest.mark.parametrize("python", interpreters(), ids=lambda path: Path(path).name)
def test_another_python_resolves_what_every_group_asks_for(checkout: Path, python: str) -> None:
    """Groups that include groups, members with what they need, constraints from the lock."""
    member = checkout / "packages" / "none"
    (member / "src" / "fourfold_none").mkdir(parents=True)
    (member / "src" / "fourfold_none" / "__init__.py").touch()
    (member / "pyproject.toml").write_text(MEMBER)
    project = PROJECT.replace("papers = []", 'papers = ["fourfold-none"]\ndocs = ["einops"]')
    project = project.replace("dev = []", DEV)
    (checkout / "pyproject.toml").write_text(project)
    made = offline(checkout, "--resolve", *SHOW, FOURFOLD_PYTHON=python)
    assert made.returncode == 0, made.stderr
    assert made.stdout.strip() == str(checkout / ".venv")
    assert "resolving for this machine" in made.stderr
    shown = env(checkout, "python", "-c", "import fourfold_none, sys; print(sys.version_info[:2])")
    assert shown.stdout.strip() == str((3, int(Path(python).name.partition("3.")[2] or 11)))


def test_it_resolves_around_the_torch_that_is_there(checkout: Path) -> None:
    """With what it needs, and nothing else of its interpreter. Its module may name a build."""
    base = checkout.parent / "base"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(base)], check=True)
    [site] = base.glob("lib/python*/site-packages")
    (site / "torch").mkdir()
    (site / "torch" / "__init__.py").write_text('__version__ = "2.12.9+gpu"\n')
    (site / "torch-2.12.9.dist-info").mkdir()
    (site / "torch-2.12.9.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torch\nVersion: 2.12.9\n"
    )
    (site / "torch-2.12.9.dist-info" / "RECORD").write_text(
        "torch/__init__.py,,\ntorch-2.12.9.dist-info/METADATA,,\n"
    )
    (site / "einops.py").write_text("there = True")
    lock = checkout / "uv.lock"
    for name, version in (("torch", "2.13.0+cpu"), ("triton", "3.9.0")):
        with lock.open("a") as file:
            file.write(
                f'[[package]]\nname = "{name}"\nversion = "{version}"\n'
                f'source = {{ registry = "wheelhouse" }}\nwheels = [{{ path = "{name}.whl" }}]\n'
            )
    shutil.rmtree(checkout / "packages" / "none")
    needs = {"early": "fourfold-parallel>=0", "parallel": "torch>=2"}
    for name, need in needs.items():
        source = checkout / "packages" / name / "src" / f"fourfold_{name}"
        source.mkdir(parents=True)
        (source / "__init__.py").touch()
        member = MEMBER.replace("none", name).replace(
            "[build", f'dependencies = ["{need}"]\n[build', 1
        )
        member += "[project.optional-dependencies]\nmore = []\n"
        (checkout / "packages" / name / "pyproject.toml").write_text(member)
    papers = ", ".join(f'"fourfold-{name}[more]"' for name in needs)
    project = PROJECT.replace("papers = []", f"papers = [{papers}]").replace("dev = []", DEV)
    (checkout / "pyproject.toml").write_text(project.replace("material = []", 'docs = ["einops"]'))
    show = (
        "python",
        "-c",
        "import fourfold_early, torch, einops; print(torch.__version__, hasattr(einops, 'there'))",
    )
    made = offline(checkout, "--resolve", *show, FOURFOLD_PYTHON=str(base / "bin" / "python"))
    assert made.returncode == 0, made.stderr
    assert made.stdout.strip() == "2.12.9+gpu False"
    assert "around its own torch 2.12.9" in made.stderr


def test_a_read_only_home_is_no_hindrance(checkout: Path) -> None:
    """Caches go below the checkout where the home cannot be written to."""
    home = checkout.parent / "home"
    home.mkdir(mode=0o555)
    made = offline(
        checkout, "python", "-c", "import os; print(os.environ.get('HF_HOME'))", HOME=str(home)
    )
    assert made.returncode == 0, made.stderr
    assert list(home.iterdir()) == []
    if os.geteuid() != 0:  # the superuser may write anywhere
        assert made.stdout.strip().startswith(str(checkout))


def test_what_is_missing_offline_is_named_with_the_way_out(checkout: Path) -> None:
    made = env(checkout, "--offline", "true")
    assert made.returncode == 1
    assert "step 'fetch' has no network" in made.stderr
    assert "--wheelhouse DIR" in made.stderr
    assert "einops" in made.stderr


def test_without_a_command_it_says_what_it_would_do(checkout: Path) -> None:
    said = env(checkout)
    assert said.returncode == 0
    assert "Would fetch 1 packages" in said.stdout
    assert not (checkout / ".venv").exists()


def test_an_unsuitable_python_is_refused_by_name(checkout: Path) -> None:
    refused = env(checkout, "true", FOURFOLD_PYTHON="/bin/false", PATH="/nonexistent:/usr/sbin")
    assert refused.returncode != 0
