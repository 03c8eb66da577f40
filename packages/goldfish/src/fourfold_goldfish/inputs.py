"""Texts that a person names: files and folders."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fourfold_parallel.common.files import read_text
from fourfold_parallel.common.records import Material
from fourfold_parallel.run.corpora import Documents

PLAIN = (".txt", ".text", ".md", ".rst")
"""Endings of files that are one document each."""
LINES = (".jsonl", ".ndjson")
"""Endings of files with a document a line, in a field of a JSON object."""


@dataclass(frozen=True, slots=True)
class Text:
    """A document and where it stands."""

    name: str
    """The file's path; for a line of a JSON file `path:line`."""
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Texts of yours: a corpus for a run, an audit or an attack.

    Plain files (.txt, .text, .md, .rst) are one document each, JSON lines (.jsonl, .ndjson) one document a
    line. A file that is named itself is read whatever its ending, as plain text.
    """

    paths: tuple[str | os.PathLike[str], ...]
    """Files, and folders that are searched with all folders in them."""
    field: str = "text"
    """Key of the text in each object of a JSON lines file."""
    licence: str = "not stated"
    """What you may do with them; stated in every record."""

    def __post_init__(self) -> None:
        if isinstance(self.paths, str):
            raise ValueError(f"paths={self.paths!r} is one path; give a tuple: ({self.paths!r},)")

    def files(self) -> tuple[Path, ...]:
        """The files in the order given, those of a folder in the order of their names.

        Raises:
            ValueError: where a path is missing, or a folder holds no text.
        """
        files: list[Path] = []
        for path in map(Path, self.paths):
            if not path.exists():
                raise ValueError(f"{path} does not exist; name text files, or folders of them")
            inside = [file for file in _inside(path) if _is_text(file)]
            if path.is_dir() and not inside:
                others = _counted(_inside(path)) or "no file at all"
                kinds = " ".join(PLAIN + LINES)
                raise ValueError(
                    f"{path} holds no text ({kinds}), but {others}; name another folder"
                )
            files += inside if path.is_dir() else [path]
        if not files:
            raise ValueError("no paths are given; name text files, or folders of them")
        return tuple(files)

    def skipped(self) -> str:
        """The files of the folders that are not read, counted by their ending: "3 .pdf, 1 .png"; or ""."""
        folders = [path for path in map(Path, self.paths) if path.is_dir()]
        return _counted([file for path in folders for file in _inside(path) if not _is_text(file)])

    def read(self) -> tuple[Text, ...]:
        """All documents, in order.

        Raises:
            ValueError: for a file that is not UTF-8, or a line without the field.
        """
        return tuple(text for file in self.files() for text in self._documents(file))

    def load(self) -> Documents:
        """The documents as a run's corpus."""
        texts = tuple(text.content for text in self.read())
        whole = hashlib.sha256()
        for text in texts:
            whole.update(text.encode("utf-8", "surrogatepass") + b"\x00")
        return Documents(
            texts=texts,
            material=Material(
                name=f"{len(texts)} texts",
                kind="corpus",
                licence=self.licence,
                sha256=whole.hexdigest(),
                source="local files",
            ),
        )

    def _documents(self, file: Path) -> Iterator[Text]:
        content = read_text(file)
        if file.suffix.lower() not in LINES:
            yield Text(str(file), content)
            return
        for number, line in enumerate(content.split("\n"), start=1):
            if line.strip():
                yield Text(f"{file}:{number}", self._text_of(line, f"{file}:{number}"))

    def _text_of(self, line: str, where: str) -> str:
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where} is not JSON ({error.msg}); mend or remove the line"
            ) from error
        text = value.get(self.field) if isinstance(value, dict) else None
        if not isinstance(text, str):
            fields = ", ".join(value) if isinstance(value, dict) else "no fields"
            raise ValueError(
                f"{where} has no text in field {self.field!r}; it has {fields}: "
                "name one of them as field (--field)"
            )
        return text


def _inside(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


def _is_text(file: Path) -> bool:
    return file.suffix.lower() in PLAIN + LINES


def _counted(files: Sequence[Path]) -> str:
    kinds = Counter(file.suffix or file.name for file in files)
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
