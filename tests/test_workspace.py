"""Laws of the workspace: names, bounds, what is committed."""

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
MEMBERS = sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml"))
IDS = [member.name for member in MEMBERS]


def project(member: Path) -> dict:
    return tomllib.loads((member / "pyproject.toml").read_text())["project"]


def tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = [name for name in listed.stdout.decode().split("\0") if name]
    return [ROOT / name for name in names if (ROOT / name).is_file()]


@pytest.mark.parametrize("member", MEMBERS, ids=IDS)
def test_folder_distribution_and_module_have_one_name(member: Path) -> None:
    assert project(member)["name"] == f"fourfold-{member.name.replace('_', '-')}"
    [module] = (member / "src").iterdir()
    assert module.name == f"fourfold_{member.name}"
    assert (module / "py.typed").exists()
    assert importlib.metadata.version(project(member)["name"]) == project(member)["version"]


@pytest.mark.parametrize("member", MEMBERS, ids=IDS)
def test_every_package_has_the_same_anatomy(member: Path) -> None:
    for name in ("README.md", "CHANGELOG.md", "tests"):
        assert (member / name).exists(), name
    assert f"## {project(member)['version']}" in (member / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("member", MEMBERS, ids=IDS)
def test_bounds_on_siblings_hold_the_siblings_version(member: Path) -> None:
    """The lock does not check bounds between members."""
    versions = {project(other)["name"]: project(other)["version"] for other in MEMBERS}
    for text in project(member).get("dependencies", []):
        needed = Requirement(text)
        if needed.name in versions:
            assert str(needed.specifier), f"{member.name} must bound {needed.name}"
            assert needed.specifier.contains(versions[needed.name]), text


@pytest.mark.parametrize("member", MEMBERS, ids=IDS)
def test_a_package_declares_what_it_imports(member: Path) -> None:
    """Every import is a declared dependency or extra, the package itself or the standard library."""
    facts = project(member)
    texts = list(facts.get("dependencies", []))
    for extra in facts.get("optional-dependencies", {}).values():
        texts += extra
    declared = {Requirement(text).name.replace("-", "_").lower() for text in texts}
    imported = set()
    for path in (member / "src").rglob("*.py"):
        imported |= set(
            re.findall(r"^\s*(?:from|import)\s+([a-zA-Z_]\w*)", path.read_text(), re.MULTILINE)
        )
    known = declared | set(sys.stdlib_module_names) | {f"fourfold_{member.name}"}
    prose = {name for name in imported if not _is_module(name)}
    assert imported - prose <= known


def _is_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def test_nothing_tracked_names_an_index_or_a_machine() -> None:
    """Neither the lock nor a page: pip's own configuration says where packages come from."""
    hosts = ["pypi" + ".org", "python" + "hosted", "npm" + "js.org", "download.py" + "torch"]
    places = ["/wor" + "k/", "/ro" + "ot/"]
    for path in tracked():
        if path.suffix in {".svg", ".png"}:
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        for word in hosts + places:
            assert word not in text, f"{path.relative_to(ROOT)} holds {word}"


def test_the_repository_stays_small() -> None:
    """Under 30 MB in all, no file above 1.5 MB."""
    sizes = {path: path.stat().st_size for path in tracked()}
    assert sum(sizes.values()) < 30e6
    assert {path.name for path, size in sizes.items() if size > 1.5e6} == set()
