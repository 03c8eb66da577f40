"""Private folders for jobs' files, which outlive neither the job nor a killed scorer."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A private folder for jobs' files; those that killed scorers left behind are removed first."""
    for left in _parent().iterdir():
        owner = left.name.partition("-")[0]
        if not (owner.isdigit() and Path("/proc", owner).exists()):
            _remove(left)
    with private_folder() as folder:
        folder.chmod(0o711)
        yield folder


def _parent() -> Path:
    parent = Path(tempfile.gettempdir()) / f"fourfold-hpc-coder-{os.geteuid()}"
    parent.mkdir(mode=0o700, exist_ok=True)
    return parent


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """A folder of our own, named after this process; it and its parent are removed."""
    parent = _parent()
    folder = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=parent))
    try:
        yield folder
    finally:
        _remove(folder)
        with contextlib.suppress(OSError):
            parent.rmdir()


def _remove(folder: Path) -> None:
    """Remove a folder with what is in it, folders that a job made unreadable too."""
    for place, folders, _ in os.walk(folder):
        for name in folders:
            path = Path(place, name)
            if not path.is_symlink():
                path.chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)
