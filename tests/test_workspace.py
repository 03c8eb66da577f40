"""Laws of the workspace: names, bounds, anatomy, what is committed."""

import ast
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
PAPERS = [member for member in MEMBERS if member.name != "parallel"]


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


IDEAS = {
    "goldfish": "loss.py",
    "recurrent_depth": "model.py",
    "loki": "attention.py",
    "gemstones": "laws.py",
    "hpc_coder": "evaluation.py",
    "outliers": "geometry.py",
    "mlperf_hpc": "decomposition.py",
    "continual": "forgetting.py",
}
"""The file of each paper that a newcomer opens first."""
ROOMS = 16
"""Files and folders that a package may show at its top."""
REPRODUCTION = {"claims", "experiment", "figures", "measures", "recipes"}
"""What every paper's `reproduce/` holds, each as a file or a folder."""


def source_of(member: Path) -> Path:
    return member / "src" / f"fourfold_{member.name}"


def siblings_of(path: Path, package: str) -> set[str]:
    """Modules of its own package that a file imports anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if name.startswith(f"{package}.")}


@pytest.mark.parametrize("member", MEMBERS, ids=IDS)
def test_every_package_has_the_same_front(member: Path) -> None:
    """Pages, licence, public names with a stub, a command line, and few enough rooms to know them."""
    for name in ("README.md", "CHANGELOG.md", "LICENSE", "tests"):
        assert (member / name).exists(), name
    assert f"## {project(member)['version']}" in (member / "CHANGELOG.md").read_text()
    source = source_of(member)
    for name in ("__init__.py", "__init__.pyi", "__main__.py", "commands.py", "py.typed"):
        assert (source / name).exists(), name
    rooms = {
        path.name
        for path in source.iterdir()
        if path.name not in {"__init__.py", "__init__.pyi", "__main__.py", "py.typed"}
        and (path.suffix or any(path.rglob("*.py")))
        and path.name != "__pycache__"
    }
    assert len(rooms) <= ROOMS, sorted(rooms)
    scripts = project(member)["scripts"]
    command = "fourfold" if member.name == "parallel" else project(member)["name"]
    assert scripts == {command: f"fourfold_{member.name}.__main__:main"}


@pytest.mark.parametrize("member", PAPERS, ids=lambda path: path.name)
def test_every_paper_has_the_same_anatomy(member: Path) -> None:
    """What reproduces the paper lies in `reproduce/`, and nothing of it beside what a user imports."""
    source = source_of(member)
    there = {path.stem for path in (source / "reproduce").iterdir()}
    assert there >= REPRODUCTION
    assert not {path.stem for path in source.iterdir()} & REPRODUCTION
    for path in source.rglob("*.py"):
        if "reproduce" not in path.parts and path.name not in {"__main__.py", "commands.py"}:
            used = {
                name
                for name in siblings_of(path, f"fourfold_{member.name}")
                if ".reproduce" in name
            }
            assert not used, f"{path.name} needs {used}, which only reproduces the paper"


@pytest.mark.parametrize("member", PAPERS, ids=lambda path: path.name)
def test_the_idea_stands_on_value_types_alone(member: Path) -> None:
    """Whatever the idea file imports of its own package imports nothing of it in turn.

    The runtime's is left out: the neighbours of linear.py (schedule, collectives, mesh) are its idea too.
    """
    package = f"fourfold_{member.name}"
    source = source_of(member)
    for name in siblings_of(source / IDEAS[member.name], package):
        path = source.joinpath(*name.split(".")[1:]).with_suffix(".py")
        if path.exists():
            assert not siblings_of(path, package), f"{path.name} is more than values"


@pytest.mark.parametrize("member", MEMBERS, ids=IDS)
def test_asking_for_help_costs_no_heavy_import(member: Path) -> None:
    """`--help` lists every command, and neither it nor the package's name loads torch."""
    module = f"fourfold_{member.name}"
    script = (
        f"import sys, {module}, {module}.commands, {module}.__main__ as entry\n"
        "sys.argv[1:] = ['--help']\n"
        "try:\n    entry.main()\nexcept SystemExit as ended:\n    assert not ended.code\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'scipy', 'jinja2'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    called = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert called.returncode == 0, called.stderr
    assert "reproduce" in called.stdout


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


@pytest.mark.parametrize("member", MEMBERS, ids=IDS)
def test_variables_are_named_after_what_they_hold(member: Path) -> None:
    """A pronoun is no name: `found` was a dict, a match, a tuple and a list."""
    pronouns = [
        f"{path.name}:{node.lineno} {node.id}"
        for path in source_of(member).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Name)
        and isinstance(node.ctx, ast.Store)
        and node.id in {"one", "found"}
    ]
    assert pronouns == []


@pytest.mark.parametrize("member", MEMBERS, ids=IDS)
def test_docstrings_name_things_and_not_questions(member: Path) -> None:
    """The first line says what it is or gives; a question leaves that to the reader."""
    questions = [
        f"{path.name}: {text.splitlines()[0]}"
        for path in source_of(member).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module)
        and (text := ast.get_docstring(node))
        and text.split()[0] in {"What", "Which", "How", "Where", "Why"}
    ]
    assert questions == []
