"""Text to train on: real material that installs with packages, local files, or any hub data set.

Every corpus carries its licence and the sha256 of its bytes, which end up in each record that used it.
"""

import ast
import bz2
import hashlib
import importlib.metadata
import inspect
import os
import pkgutil
import platform
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from fourfold_parallel.common.files import StrPath, read_text, sha256_of
from fourfold_parallel.common.records import Material

WIKIPEDIA_REMEDY = "pip install 'gensim>=4.3'"
"""Installs what `Wikipedia` needs: the wheel that holds the articles and takes their markup away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Documents:
    """A corpus in memory: its texts in a fixed order and what is known about them."""

    texts: tuple[str, ...]
    material: Material


class Corpus(Protocol):
    """Something that gives documents, the same ones in the same order each time."""

    def load(self) -> Documents:
        """Read the documents.

        Raises:
            ValueError: The material is not on this machine; the way to get it is named.
        """
        ...


@runtime_checkable
class _ReadsFiles(Protocol):
    """A corpus or tokenizer that reads local files, which may be edited under the same name."""

    def files(self) -> Sequence[Path]:
        """The files, in the order in which they are read."""
        ...


def files_of(value: object) -> Sequence[Path]:
    """The local files that a corpus or a tokenizer reads; none where what it reads has a version."""
    return value.files() if isinstance(value, _ReadsFiles) else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Wikipedia:
    """About 100 long English Wikipedia articles that ship inside the `gensim` wheel, without markup.

    Articles shorter than `minimum_characters` (redirects, stubs) are left out.
    """

    minimum_characters: int = 1000

    def load(self) -> Documents:
        """Read and clean the articles (about 4 s)."""
        path = packaged_file(
            "gensim",
            "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
            WIKIPEDIA_REMEDY,
        )
        from gensim.corpora.wikicorpus import extract_pages, filter_wiki

        texts = []
        with bz2.open(path, "rb") as file:
            articles: Any = ("0",)  # the main namespace
            for _title, markup, _page in extract_pages(file, articles):
                text = _plain(filter_wiki(markup))
                if len(text) >= self.minimum_characters:
                    texts.append(text)
        return Documents(
            texts=tuple(texts),
            material=Material(
                name="English Wikipedia, first articles",
                kind="corpus",
                licence="CC BY-SA 3.0 and GFDL",
                sha256=sha256_of(path),
                source=f"gensim {importlib.metadata.version('gensim')}: {path.name}",
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PythonManual:
    """English technical prose: the language topics and the docstrings of CPython's standard library."""

    minimum_characters: int = 400

    def load(self) -> Documents:
        """Collect topics and module docstrings, without importing the modules."""
        from pydoc_data.topics import topics

        texts = [text for _, text in sorted(topics.items())]
        for path in _standard_library():
            texts.extend(_docstrings(ast.parse(path.read_bytes())))
        return _of_cpython(texts, "CPython manual topics and docstrings", self.minimum_characters)


@dataclass(frozen=True, slots=True, kw_only=True)
class PythonSource:
    """Source code: the modules of CPython's standard library, one document a file."""

    minimum_characters: int = 400

    def load(self) -> Documents:
        """Read the files in the order of their names."""
        texts = [path.read_text(encoding="utf-8") for path in _standard_library()]
        return _of_cpython(texts, "CPython standard library", self.minimum_characters)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFiles:
    """Plain UTF-8 text files of yours, one document a file."""

    paths: tuple[StrPath, ...]
    licence: str
    """Your rights in them, stated in every record."""

    def __post_init__(self) -> None:
        if isinstance(self.paths, str | os.PathLike):
            raise ValueError(f"paths={self.paths!r} is one path; write paths=({self.paths!r},)")
        object.__setattr__(self, "paths", tuple(os.fspath(path) for path in self.paths))

    def files(self) -> tuple[Path, ...]:
        """The files in the order given.

        Raises:
            ValueError: A file is missing.
        """
        missing = [path for path in self.paths if not Path(path).is_file()]
        if missing or not self.paths:
            raise ValueError(f"paths={missing or self.paths!r}: no such files; name existing ones")
        return tuple(Path(path) for path in self.paths)

    def load(self) -> Documents:
        """Read the files in the order given.

        Raises:
            ValueError: A file is missing, or not UTF-8.
        """
        texts = tuple(read_text(path) for path in self.files())
        return Documents(
            texts=texts,
            material=Material(
                name=f"{len(texts)} text files",
                kind="corpus",
                licence=self.licence,
                sha256=_sha256_of_texts(texts),
                source="local files",
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Hub:
    """A text column of any data set on the Hugging Face hub, by its ordinary id. Needs `datasets`."""

    dataset: str
    subset: str
    split: str
    column: str
    revision: str
    """A commit of the data set, so that the run can be repeated; "main" is refused."""
    licence: str

    def load(self) -> Documents:
        """Download (or read from the cache) and keep the column in memory."""
        if not re.fullmatch(r"[0-9a-f]{40}", self.revision):
            raise ValueError(
                f"revision={self.revision!r} of {self.dataset} is not a commit; "
                "name the 40 hex digits shown on the data set's page, so that the run can be repeated"
            )
        import datasets

        table = datasets.load_dataset(
            self.dataset, self.subset, split=self.split, revision=self.revision
        )
        texts = tuple(str(text) for text in table[self.column])
        return Documents(
            texts=texts,
            material=Material(
                name=f"{self.dataset}/{self.subset}",
                kind="corpus",
                licence=self.licence,
                sha256=_sha256_of_texts(texts),
                source=f"Hugging Face hub, revision {self.revision}",
            ),
        )


def packaged_file(distribution: str, name: str, remedy: str) -> Path:
    """A data file inside an installed wheel, found without importing the package."""
    try:
        path = Path(str(importlib.metadata.distribution(distribution).locate_file(name)))
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            f"{distribution} is not installed, which carries this data; {remedy}"
        ) from None
    if not path.is_file():
        raise ValueError(
            f"the installed {distribution} lacks {name}; {remedy} in the locked version"
        )
    return path


_HEADING = re.compile(r"^=+\s*(.*?)\s*=+$", re.MULTILINE)
_LEFTOVER = re.compile(r"^\s*[*#:;|!{}].*$|\[\[|\]\]|'{2,}|__\w+__", re.MULTILINE)
_BLANKS = re.compile(r"\n{3,}")


def _plain(text: str) -> str:
    """Drop what gensim's filter leaves of the markup: lists, tables, quotes, heading signs."""
    text = _HEADING.sub(r"\1", text)
    text = _LEFTOVER.sub("", text)
    return _BLANKS.sub("\n\n", text).strip()


def _standard_library() -> Iterator[Path]:
    root = Path(inspect.getfile(pkgutil)).parent
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(parts):
            yield path


def _docstrings(module: ast.Module) -> Iterator[str]:
    for node in ast.walk(module):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def _of_cpython(texts: list[str], name: str, minimum_characters: int) -> Documents:
    kept = tuple(text for text in texts if len(text) >= minimum_characters)
    return Documents(
        texts=kept,
        material=Material(
            name=name,
            kind="corpus",
            licence="PSF-2.0",
            sha256=_sha256_of_texts(kept),
            source=f"CPython {platform.python_version()}",
        ),
    )


def _sha256_of_texts(texts: tuple[str, ...]) -> str:
    whole = hashlib.sha256()
    for text in texts:
        whole.update(text.encode("utf-8", "surrogatepass") + b"\x00")
    return whole.hexdigest()
