"""Pages say what the code and the records say."""

import importlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from textwrap import dedent

import pytest

import pages
import tables
from fourfold_parallel.common.records import read_record
from fourfold_parallel.reproduce.claims import read_ledger
from fourfold_parallel.reproduce.costs import cost_of
from fourfold_parallel.reproduce.experiment import experiment_of

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("packages/*/*.md")])
GUIDES = sorted(ROOT.glob("docs/guides/*.md"))
READMES = sorted(ROOT.glob("packages/*/README.md"))
PAGES = sorted(
    page
    for page in ROOT.glob("packages/*/docs/*.md")
    if "```python" in page.read_text() and "init_process_group" not in page.read_text()
)
"""Pages whose code needs no launcher."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("readme", READMES, ids=lambda page: page.parent.name)
def test_tables_are_the_committed_records(readme: Path) -> None:
    """Each table of a package's documents is what `scripts/tables.py` renders from its records."""
    documents = dict(tables.rendered(readme.parent))
    assert not documents or readme.parent / "results" / "README.md" in documents
    for document, text in documents.items():
        assert document.read_text() == text, document


@pytest.mark.parametrize("results", sorted(ROOT.glob("packages/*/results/ledger.jsonl")), ids=str)
def test_the_root_readme_counts_the_committed_verdicts_and_minutes(results: Path) -> None:
    rows = read_ledger(results)
    verdicts = Counter(row.verdict for row in rows)
    order = ("reproduced", "contradicted", "inconclusive", "not tested")
    counted = ", ".join(f"{verdicts[one]} {one}" for one in order if verdicts[one])
    package = results.parts[-3]
    [line] = re.findall(rf"^\| \[{package}\].*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert f" {len(rows)}, at {rows[0].scale} scale: {counted} | " in line
    cost = cost_of(results.parent, rows[0].scale)
    assert cost
    assert cost.stages == len(experiment_of(package).stages(rows[0].scale))
    assert f" | {cost.seconds / 60:.0f} | " in line


def test_the_root_readme_says_how_long_everything_took() -> None:
    seconds = [
        stage["seconds"]
        for path in ROOT.glob("packages/*/results/times.json")
        for stage in json.loads(path.read_text()).values()
    ]
    assert f"{sum(seconds) / 3600:.1f} hours in all" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("results", sorted(ROOT.glob("packages/*/results/ledger.jsonl")), ids=str)
def test_every_verdict_has_its_record_line(results: Path) -> None:
    """`file:line` of each row is a line of a finished, committed record."""
    for row in read_ledger(results):
        if row.verdict == "not tested":
            assert not row.record
            continue
        name, _, line = row.record.partition(":")
        record = read_record(results.parent / name)
        assert record.is_finished
        assert any(event.line == int(line) for event in record.events)


SECTIONS = ("Use it", "The idea", "What we found", "Where to read next", "Deviations", "Citation")
"""Headings that every package's README has, in this order; others may stand between."""


@pytest.mark.parametrize("readme", READMES, ids=lambda page: page.parent.name)
def test_every_readme_has_the_same_parts_in_the_same_order(readme: Path) -> None:
    """The second package that one reads costs a tenth of the first. Each says how it is installed."""
    text = readme.read_text()
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert [heading for heading in headings if heading in SECTIONS] == list(SECTIONS)
    if readme.parent.name != "parallel":
        assert f"pip install ./packages/parallel ./packages/{readme.parent.name}" in text
        assert "](results/README.md)" in text


@pytest.mark.parametrize(
    "page", [*READMES, *PAGES], ids=lambda page: str(page.relative_to(ROOT / "packages"))
)
def test_code_of_a_package_runs_or_is_quoted(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block that imports is executed; one that does not is found, line by line, in the package's source."""
    monkeypatch.chdir(tmp_path)
    package = ROOT / "packages" / page.relative_to(ROOT / "packages").parts[0]
    sources = "\n".join(path.read_text() for path in package.glob("src/**/*.py"))
    held = {line.strip() for line in sources.splitlines()}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        if re.search(r"^(import|from) ", block, re.MULTILINE):
            exec(compile(block, str(page), "exec"), {"__name__": "readme"})
        else:
            missing = [
                line for line in block.splitlines() if line.strip() and line.strip() not in held
            ]
            assert not missing


@pytest.mark.parametrize("guide", GUIDES, ids=lambda page: page.stem)
def test_a_guide_does_what_it_says(guide: Path, tmp_path: Path) -> None:
    """Its blocks run in one folder, in order; each line of a `text` block is printed by the block before."""
    printed: list[str] = []
    blocks = re.findall(
        r"^ *```(python|bash|text)\n(.*?)^ *```", guide.read_text(), re.DOTALL | re.MULTILINE
    )
    assert {"python", "text"} <= {language for language, _ in blocks}
    for language, block in blocks:
        text = dedent(block)
        named = re.match(r"# (\w+\.py)\n", text)
        if language == "text":
            assert [line for line in text.splitlines() if line not in printed] == []
        elif named:
            (tmp_path / named[1]).write_text(text)
        else:
            words = [sys.executable, "-c", text] if language == "python" else ["sh", "-ec", text]
            printed = output_of(words, tmp_path)


def output_of(words: list[str], folder: Path) -> list[str]:
    """The lines that a command prints. It must succeed, and has one thread: tests share the cores."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    called = subprocess.run(
        words,
        cwd=folder,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert called.returncode == 0, called.stdout
    return called.stdout.splitlines()


def test_the_readme_names_the_two_commands_and_ci_calls_the_test_command() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "scripts/env python scripts/reproduce.py" in readme
    assert "scripts/env pytest" in readme
    assert "scripts/env pytest\n" in (ROOT / ".ci" / "run").read_text()


def test_the_checker_of_pages_names_every_fault(tmp_path: Path) -> None:
    """Of pages that are right it says nothing."""
    (tmp_path / "style.css").write_text("a { background: url(data:image/svg+xml;b) }")
    right = '<p id="here"></p><a href="#here"></a><a href="b%20c.html#there"></a><link href="style.css">'
    (tmp_path / "a.html").write_text(right + '<a href="https://example.org">elsewhere</a>')
    (tmp_path / "b c.html").write_text('<h1 id="there"></h1>')
    assert list(pages.faults_of(tmp_path)) == []
    (tmp_path / "style.css").write_text("@import 'https://example.org/font.css';")
    wrong = '<a href="gone.html"></a><a href="a.html#gone"></a><script src="//example.org/x.js"></script>'
    (tmp_path / "b c.html").write_text(wrong)
    assert sorted(pages.faults_of(tmp_path)) == [
        "a.html: b%20c.html#there has no such anchor",
        "b c.html: a.html#gone has no such anchor",
        "b c.html: fetches //example.org/x.js",
        "b c.html: gone.html leads nowhere",
        "style.css: fetches https://example.org/font.css",
    ]


@pytest.mark.parametrize("readme", READMES, ids=lambda page: page.parent.name)
def test_the_reference_names_all_that_is_public_and_every_command(readme: Path) -> None:
    module = importlib.import_module(f"fourfold_{readme.parent.name}")
    text = pages.reference(readme.parent)
    listed = set(re.findall(r"\{py:obj\}`(\w+) <", text))
    assert listed == {name for name in module.__all__ if name != "__version__"}
    assert text.count("usage: python -m") == len(re.findall(r"^### ", text, re.MULTILINE)) > 1


def test_signatures_show_shapes_and_the_search_knows_the_names(tmp_path: Path) -> None:
    """The reference of one package, built alone."""
    program = (
        "import sys, pages; from pathlib import Path; staged, built, package = map(Path, sys.argv[1:])\n"
        "pages.write(staged / 'README.md', pages.reference(package)); pages.build(staged, built)"
    )
    folders = [
        str(tmp_path / "staged"),
        str(tmp_path / "built"),
        str(ROOT / "packages" / "goldfish"),
    ]
    output_of([sys.executable, "-c", program, *folders], ROOT / "scripts")
    text = re.sub(r"<[^>]+>", "", (tmp_path / "built" / "index.html").read_text())
    assert "Bool[Tensor, 'batch row']" in text
    assert "rouge_l" in (tmp_path / "built" / "searchindex.js").read_text()
