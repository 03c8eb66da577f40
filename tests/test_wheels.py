"""A wheel brings all that its package needs, and needs nothing that it does not declare."""

import email
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MEMBERS = sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml"))
UV = next(ROOT.glob(".env-work/uv-*/bin/uv"), None)
OFFLINE = ("--offline", "--no-index", "--find-links", str(ROOT / "wheelhouse"))

pytestmark = pytest.mark.skipif(
    UV is None or not list((ROOT / "wheelhouse").glob("uv_build-*.whl")),
    reason="no uv and no wheelhouse: this environment was not made by scripts/env",
)


def uv(*words: str) -> None:
    called = subprocess.run(
        [str(UV), *words], capture_output=True, text=True, timeout=250, check=False
    )
    assert called.returncode == 0, called.stderr


def build(member: Path, folder: Path) -> Path:
    uv("build", "--wheel", *OFFLINE, "--out-dir", str(folder), str(member))
    [wheel] = folder.glob(f"fourfold_{member.name}-*.whl")
    return wheel


@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.name)
def test_a_wheel_holds_all_that_its_package_holds(member: Path, tmp_path: Path) -> None:
    """Templates, stubs and sources of kernels too; the licence, the authors and what it is for."""
    with zipfile.ZipFile(build(member, tmp_path)) as wheel:
        names = set(wheel.namelist())
        [metadata] = [name for name in names if name.endswith(".dist-info/METADATA")]
        facts = email.message_from_bytes(wheel.read(metadata))
    source = member / "src"
    files = [path for path in source.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert {path.relative_to(source).as_posix() for path in files} <= names
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert facts["License-Expression"] == "Apache-2.0"
    assert facts["Author"]
    assert "Typing :: Typed" in facts.get_all("Classifier", [])


@pytest.mark.slow  # half a minute, most of it for torch's wheel
@pytest.mark.timeout(600)
def test_the_runtime_works_without_extras(tmp_path: Path) -> None:
    """In an empty environment: the help, the version and the public names."""
    wheel = build(ROOT / "packages" / "parallel", tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    uv("venv", "--offline", "--python", sys.executable, str(tmp_path / "venv"))
    uv("pip", "install", "--python", str(python), *OFFLINE, str(wheel))
    program = (
        "import fourfold_parallel as f; f.train; f.Fourfold; f.DeepSpeed; print(f.__version__)"
    )
    for words in (("-m", "fourfold_parallel", "--help"), ("-c", program)):
        called = subprocess.run(
            [str(python), *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert called.returncode == 0, called.stderr
    assert called.stdout.strip() == wheel.name.split("-")[1]
