"""Files that are whole or absent, and where caches go."""

import errno
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

StrPath = str | os.PathLike[str]
"""A path as a user writes it."""


def named_folder(variable: str) -> Path | None:
    """The folder that an environment variable names; None where it is not set."""
    named = os.environ.get(variable)
    return Path(named) if named else None


def cache_folder() -> Path:
    """Folder of tokenized corpora and converted models: `FOURFOLD_CACHE`, else the XDG cache."""
    if named := named_folder("FOURFOLD_CACHE"):
        return named
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fourfold"


def sha256_of(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name to write to; on leaving without an error it is synced and becomes `path`.

    A reader finds the old file or the new one, never part of one. Two writers, on one machine or several,
    are safe: each has its own temporary name and the last rename wins.
    """
    partial = _partial(path)
    try:
        yield partial
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to fill; on leaving without an error its files are synced and it becomes `path`.

    Where another writer was first, its folder is kept, since somebody may be reading it: what is made must
    be a function of its path.
    """
    partial = _partial(path)
    partial.mkdir()
    try:
        yield partial
        for file in partial.rglob("*"):
            sync(file)
        sync(partial)
        try:
            partial.replace(path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        sync(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def copy_folder(source: Path, target: Path) -> None:
    """Copy what is in a folder into another that is there; `whole_folder` syncs it."""
    for path in sorted(source.rglob("*")):
        place = target / path.relative_to(source)
        if path.is_dir():
            place.mkdir(exist_ok=True)
        else:
            shutil.copyfile(path, place)


def _partial(path: Path) -> Path:
    """A name beside `path` that no other writer has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")


def check_writable(folder: Path, *, purpose: str) -> None:
    """Make a folder, unless it is there, and try whether files can be made in it.

    Args:
        folder: that files will be written to.
        purpose: names it in the message, such as `checkpoints='out'`.

    Raises:
        ValueError: No file can be made there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{purpose} cannot be written to ({error.strerror}: {folder}); name a folder of yours"
        ) from error


def append_line(handle: int, line: str) -> None:
    """Append one line to a file opened for appending: it is there whole or, where the disk is full, not.

    Raises:
        OSError: The line does not fit; what was written of it is taken back.
    """
    start = os.fstat(handle).st_size
    rest = f"{line}\n".encode()
    try:
        # A disk that fills up takes part of a line without an error, and refuses the rest.
        while rest:
            rest = rest[os.write(handle, rest) :]
    except OSError:
        os.ftruncate(handle, start)
        raise


def read_text(path: Path) -> str:
    """The text of a file that a person names.

    Raises:
        ValueError: It is not UTF-8; file and place are named.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it or leave it out"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file whole."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Push a file's bytes, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
