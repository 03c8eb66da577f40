"""Build the pages of the project: READMEs, docs/, guides, and the reference with shapes in its signatures.

    scripts/env python scripts/pages.py                  # into out/pages; open out/pages/index.html
    scripts/env python scripts/pages.py --out FOLDER

The pages need neither a server nor a network, search included. A warning of the builder, a link or an
anchor that leads nowhere, and anything that would be fetched from elsewhere end the build with status 1.
"""

import contextlib
import importlib
import io
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from unittest import mock
from urllib.parse import unquote, urlsplit

import tyro
from sphinx.cmd.build import build_main

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (
    "*.md",
    "docs/**/*.md",
    "packages/*/*.md",
    "packages/*/docs/*.md",
    "packages/*/results/*.md",
    "packages/*/src/**/*.md",
)
"""The Markdown of the checkout that becomes pages."""
LANGUAGES = {".py": "python", ".hpp": "cpp", ".cpp": "cpp"}
"""Sources that documents link to become pages too."""
ORPHAN = "---\norphan: true\n---\n\n"
"""What opens a page that links lead to and no list names."""
LINK = re.compile(r"\]\(([^)#:\s]+)")
PUBLIC = re.compile(r"^from \.(\S+) import \w+ as (\w+)$", re.MULTILINE)
"""A line of a package's `__init__.pyi`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Where the pages go."""

    out: Path = ROOT / "out" / "pages"


def main() -> None:
    """Build, check, and say where the pages are."""
    chosen = tyro.cli(Chosen, description=__doc__)
    with tempfile.TemporaryDirectory() as folder:
        staged, built = Path(folder, "staged"), Path(folder, "built")
        stage(staged)
        build(staged, built)
        if faults := list(faults_of(built)):
            raise SystemExit("\n".join(faults))
        shutil.rmtree(chosen.out, ignore_errors=True)
        shutil.copytree(built, chosen.out)
    print(f"{sum(1 for _ in chosen.out.rglob('*.html'))} pages: {chosen.out / 'index.html'}")


def build(staged: Path, built: Path) -> None:
    """Make pages of what was staged; any warning ends it."""
    words = ["-b", "html", "-q", "-W", "--keep-going", "-c", str(ROOT / "docs")]
    if build_main([*words, "-d", str(built.with_name("cache")), str(staged), str(built)]):
        raise SystemExit("the pages have warnings; see above")
    shutil.copyfile(built / "README.html", built / "index.html")


def stage(folder: Path) -> None:
    """Lay out below `folder` what Sphinx reads: the documents, what they link to, and the reference."""
    for document in sorted({path for pattern in DOCUMENTS for path in ROOT.glob(pattern)}):
        text = document.read_text(encoding="utf-8")
        for target in LINK.findall(text):
            take(folder, (document.parent / target).resolve())
        place = document.relative_to(ROOT)
        text = LINK.sub(partial(led, document), text)
        write(folder / place, ORPHAN + text if "src" in place.parts else text)
    packages = sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml"))
    for package in packages:
        place = folder / package.relative_to(ROOT)
        write(place / "reference.md", reference(package))
        pages = ["reference", *(["results/README"] if (package / "results").exists() else [])]
        pages += sorted(f"docs/{path.stem}" for path in package.glob("docs/*.md"))
        append(place / "README.md", contents("About", [*pages, "Changes <CHANGELOG>"]))
    guides = [f"docs/guides/{path.stem}" for path in sorted(ROOT.glob("docs/guides/*.md"))]
    papers = [f"{package.relative_to(ROOT)}/README" for package in packages]
    project = ["docs/architecture", "docs/numerics", "docs/log", "CONTRIBUTING"]
    for caption, pages in (("Guides", guides), ("Packages", papers), ("The project", project)):
        append(folder / "README.md", contents(caption, pages))


def write(path: Path, text: str) -> None:
    """Write a text, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def append(path: Path, text: str) -> None:
    """Add to a staged page."""
    write(path, path.read_text(encoding="utf-8") + text)


def contents(caption: str, pages: list[str]) -> str:
    """A hidden table of contents: pages in the sidebar."""
    return "\n".join(["\n```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```\n"])


def take(folder: Path, target: Path) -> None:
    """Stage a file that a document links to; a source gets a page that shows it."""
    if not target.is_file() or target.suffix == ".md":
        return
    place = folder / target.relative_to(ROOT)
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(target, place)
    if target.suffix in LANGUAGES:
        name = re.sub(r"^.*/src/", "", target.as_posix())
        shown = f"```{{literalinclude}} {target.name}\n:language: {LANGUAGES[target.suffix]}\n:linenos:\n```"
        write(place.with_name(f"{place.name}.md"), f"{ORPHAN}# {name}\n\n{shown}\n")


def led(document: Path, link: re.Match[str]) -> str:
    """A link as it is among the pages: a folder's leads to its README, a source's to its page."""
    target = document.parent / link[1]
    if target.is_dir():
        return f"]({link[1].rstrip('/')}/README.md"
    return f"]({link[1]}.md" if target.suffix in LANGUAGES else link[0]


def reference(package: Path) -> str:
    """The page of a package's public names, by module, and of its commands."""
    module = f"fourfold_{package.name}"
    public: dict[str, list[str]] = {}
    for part, name in PUBLIC.findall((package / "src" / module / "__init__.pyi").read_text()):
        public.setdefault(part, []).append(name)
    parts = [f"# Reference of {module}", f"All names are imported from `{module}`."]
    for part, names in public.items():
        links = ", ".join(f"{{py:obj}}`{name} <{module}.{part}.{name}>`" for name in names)
        parts.append(f"- `{part}`: {links}")
    for part, names in public.items():
        listed = f".. automodule:: {module}.{part}\n   :members: {', '.join(names)}"
        parts += [f"## {part}", f"```{{eval-rst}}\n{listed}\n```"]
    parts.append("## Commands")
    [listed] = re.findall(r"\{([\w,-]+)\}", help_of(module).partition("\n")[0])
    for command in listed.split(","):
        parts += [f"### {command}", f"```text\n{help_of(module, command)}```"]
    return "\n\n".join(parts) + "\n"


def help_of(module: str, *words: str) -> str:
    """The help of a package's command line, 96 columns wide."""
    entry = importlib.import_module(f"{module}.__main__")
    said = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [module, *words, "--help"]),
        mock.patch.dict(os.environ, COLUMNS="96"),
        contextlib.redirect_stdout(said),
        contextlib.suppress(SystemExit),
    ):
        entry.main()
    return said.getvalue()


class Links(HTMLParser):
    """The addresses and anchors of a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.fetched: set[str] = set()
        """What a browser loads without being asked."""
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note where a tag leads to, and where it can be led to."""
        for name, value in attrs:
            if name in {"id", "name"} and value:
                self.anchors.add(value)
            elif name in {"href", "src"} and value:
                (self.links if tag == "a" else self.fetched).add(value)


def faults_of(site: Path) -> Iterator[str]:
    """One line for each link or anchor that leads nowhere, and each thing fetched from elsewhere."""
    pages = {path.resolve(): Links(path) for path in sorted(site.rglob("*.html"))}
    for page, links in pages.items():
        name = page.relative_to(site.resolve())
        for address in sorted(links.links | links.fetched):
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                if address in links.fetched and parts.scheme != "data":
                    yield f"{name}: fetches {address}"
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            anchor = unquote(parts.fragment)
            if not target.is_file():
                yield f"{name}: {address} leads nowhere"
            elif anchor and target in pages and anchor not in pages[target].anchors:
                yield f"{name}: {address} has no such anchor"
    for style in sorted(site.rglob("*.css")):
        for address in re.findall(r"(?:url\(|@import)\s*['\"]?([^'\")]+)", style.read_text()):
            if urlsplit(address).netloc:
                yield f"{style.relative_to(site)}: fetches {address}"


if __name__ == "__main__":
    main()
