"""Build the wheels of all packages, check them, and try each alone in a fresh environment.

    scripts/env python scripts/release.py             # wheels in dist/, and a table of what was checked
    scripts/env python scripts/release.py --tag       # the commands that tag what passed, too
    scripts/env python scripts/release.py --python python3.13 --without-torch

Where torch has no small build for an interpreter, `--without-torch` puts an empty distribution in its place:
pip still resolves everything else, all code is compiled and every help is asked for, but names that need
torch are not imported. Any fault ends the script with status 1.
"""

import email
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro
from packaging.metadata import Metadata
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
MEMBERS = sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml"))
UV = next(ROOT.glob(".env-work/uv-*/bin/uv"), None)
OFFLINE = ("--offline", "--no-index", "--find-links", str(ROOT / "wheelhouse"))
NO_TORCH = "2.13.0+none"
"""The version of the empty distribution in torch's place: no index has it."""
IMPORT = """
import importlib, sys
module = importlib.import_module(sys.argv[1])
names = [name for name in module.__all__ if getattr(module, name) is not None]
print(module.__version__, module.__file__, len(names))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """How to release."""

    out: Path = ROOT / "dist"
    """Folder of the wheels; those of an earlier build are removed."""
    python: str = sys.executable
    """Interpreter of the fresh environments. This one installs from wheelhouse/, another with its pip."""
    without_torch: bool = False
    """Put an empty distribution in torch's place, and import nothing that needs it."""
    tag: bool = False
    """Print the commands that tag this commit."""


def main() -> None:
    """Build, check, try, and say what came of it."""
    chosen = tyro.cli(Chosen, description=__doc__)
    for old in chosen.out.glob("fourfold_*.whl"):
        old.unlink()
    table = Table("package", "version", "KiB", "files", "tried on", "faults")
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        wheels = {member: build(member, chosen.out) for member in MEMBERS}
        for member, wheel in wheels.items():
            mine = [*faults_of_pages(member), *faults_of_wheel(member, wheel)]
            try:
                trial = Trial.of(chosen.python, Path(folder, member.name), chosen.without_torch)
                tried = trial.install(wheel)
                mine += trial.faults(member)
            except subprocess.CalledProcessError as error:
                tried, mine = chosen.python, [*mine, *error.stderr.splitlines()[-15:]]
            with zipfile.ZipFile(wheel) as archive:
                files = len(archive.namelist())
            size = f"{wheel.stat().st_size / 1024:.0f}"
            table.add_row(member.name, version_of(member), size, str(files), tried, str(len(mine)))
            faults += [f"{member.name}: {fault}" for fault in mine]
    Console(highlight=False).print(table)
    if faults:
        raise SystemExit("\n".join(faults))
    if chosen.tag:
        print("\n".join(f"git tag {member.name}-{version_of(member)}" for member in MEMBERS))


def call(*words: str | Path, folder: Path = ROOT) -> str:
    """What a command prints on standard output; it must end well."""
    listed = [str(word) for word in words]
    return subprocess.run(listed, cwd=folder, capture_output=True, text=True, check=True).stdout


def build(member: Path, folder: Path) -> Path:
    """The wheel of a package, by uv and from the wheelhouse alone."""
    if UV is None:
        raise SystemExit("no uv in .env-work/; make the environment with scripts/env first")
    call(UV, "build", "--wheel", *OFFLINE, "--out-dir", folder, member)
    return folder / f"fourfold_{member.name}-{version_of(member)}-py3-none-any.whl"


def version_of(member: Path) -> str:
    """The version that a package declares."""
    return tomllib.loads((member / "pyproject.toml").read_text())["project"]["version"]


def faults_of_pages(member: Path) -> Iterator[str]:
    """The CHANGELOG must begin with the version that is released."""
    headings = re.findall(r"^## (.*)$", (member / "CHANGELOG.md").read_text(), re.MULTILINE)
    if headings[:1] != [version_of(member)]:
        first = headings[0] if headings else "nothing"
        yield f"CHANGELOG.md begins with {first}, and the version is {version_of(member)}"


def faults_of_wheel(member: Path, wheel: Path) -> Iterator[str]:
    """One line for each thing that a wheel lacks, gets wrong, or gives away."""
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist() if name[-1] != "/"}
    source = member / "src"
    paths = {path for path in source.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    ours = {path.relative_to(source).as_posix() for path in paths}
    yield from (f"lacks {name}" for name in sorted(ours - files.keys()))
    own = {name for name in files if ".dist-info/" not in name}
    yield from (f"holds {name}, which is not in src/" for name in sorted(own - ours))
    information = wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info"
    if files.get(f"{information}/licenses/LICENSE") != (ROOT / "LICENSE").read_bytes():
        yield "its licence is not that of the project"
    places = (ROOT, Path.home(), Path(sys.prefix), Path(tempfile.gettempdir()))
    for name, data in files.items():  # the first: a checkout may lie in one of the others
        named = [place for place in places if str(place).encode() + b"/" in data]
        yield from (f"{name} names {place}" for place in named[:1])
    yield from faults_of_metadata(member, files[f"{information}/METADATA"])


def faults_of_metadata(member: Path, data: bytes) -> Iterator[str]:
    """What an index would refuse, and bounds on siblings that do not hold their versions."""
    try:
        facts = Metadata.from_email(data, validate=True)
    except ExceptionGroup as errors:
        yield from (f"metadata: {error}" for error in errors.exceptions)
        return
    if str(facts.version) != version_of(member):
        yield f"metadata has version {facts.version}"
    if facts.license_expression != "Apache-2.0" or not email.message_from_bytes(data)["Author"]:
        yield "metadata lacks the licence or the authors"
    if "Typing :: Typed" not in (facts.classifiers or []):
        yield "metadata does not say that it is typed"
    if facts.description_content_type != "text/markdown" or not facts.description:
        yield "metadata lacks the README"
    versions = {f"fourfold-{one.name.replace('_', '-')}": version_of(one) for one in MEMBERS}
    for needed in facts.requires_dist or []:
        version = versions.get(needed.name)
        if version and not (is_bounded(needed) and needed.specifier.contains(version)):
            yield f"{needed} does not bound and hold {version}"


def is_bounded(needed: Requirement) -> bool:
    """A requirement of an extra repeats a bound that the package has anyway."""
    return bool(needed.specifier) or needed.marker is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A fresh environment for one package."""

    folder: Path
    interpreter: Path
    """Of the environment."""
    with_uv: bool
    """Install from the wheelhouse, which is for the interpreter of this script."""
    without_torch: bool

    @classmethod
    def of(cls, python: str, folder: Path, without_torch: bool = False) -> "Trial":
        """Make the environment in `folder`, which must not exist."""
        with_uv = python == sys.executable
        words = [UV, "venv", "-q", "--offline", "--python"] if with_uv else []
        call(*words, python, *([] if with_uv else ["-m", "venv"]), folder)
        return cls(
            folder=folder,
            interpreter=folder / "bin" / "python",
            with_uv=with_uv,
            without_torch=without_torch,
        )

    def install(self, *wheels: Path) -> str:
        """Install wheels and what they need, siblings from beside them; gives the interpreter's version."""
        words = ["--find-links", wheels[0].parent, *wheels]
        if self.without_torch:
            words = ["--find-links", self._empty_torch(), f"torch=={NO_TORCH}", *words]
        if self.with_uv:
            cache = self.folder.parent / "uv-cache"
            uv = [UV, "pip", "install", "-q", "--cache-dir", cache, "--python", self.interpreter]
            call(*uv, *OFFLINE, *words)
        else:
            call(self.interpreter, "-m", "pip", "install", "-q", "--no-input", *words)
        return call(self.interpreter, "--version").split()[1]

    def faults(self, member: Path) -> Iterator[str]:
        """What does not compile, import or answer, with nothing of the checkout on the path."""
        module = f"fourfold_{member.name}"
        checks = [("-W", "error", "-m", "compileall", "-q", "-f", self._packages() / module)]
        checks += [("-m", module, "--help"), ("-m", module, "--version")]
        checks += [] if self.without_torch else [("-c", IMPORT, module)]
        answer = ""
        for words in checks:
            try:
                answer = call(self.interpreter, "-I", *words, folder=self.folder)
            except subprocess.CalledProcessError as error:
                yield f"{' '.join(map(str, words))}: {error.stdout}{error.stderr}".strip()
        if version_of(member) not in answer:
            yield f"the last answer names another version: {answer}"
        if not self.without_torch and str(self.folder) not in answer:
            yield f"was not imported from its wheel: {answer}"

    def _packages(self) -> Path:
        return Path(
            call(
                self.interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"
            ).strip()
        )

    def _empty_torch(self) -> Path:
        """A folder with a wheel that holds nothing but torch's name."""
        folder, name = self.folder / "empty", f"torch-{NO_TORCH}"
        folder.mkdir()
        files = {
            "METADATA": f"Metadata-Version: 2.1\nName: torch\nVersion: {NO_TORCH}\n",
            "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            "RECORD": "",
        }
        with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as archive:
            for file, text in files.items():
                archive.writestr(f"{name}.dist-info/{file}", text)
        return folder


if __name__ == "__main__":
    main()
