"""Compiled sources of ours, each made once and kept in the cache under a name made of all that decides it."""

import hashlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fourfold_hpc_coder.judge.toolchain import gcc_version
from fourfold_hpc_coder.sandbox.backends import Sandbox
from fourfold_hpc_coder.sandbox.job import Job, JobResult, Limits, Mount
from fourfold_hpc_coder.sandbox.process import run
from fourfold_parallel.common.files import cache_folder, whole_folder

COMPILING = Limits(wall_s=120, cpu_s=25, memory_bytes=3 << 29, processes=64, file_bytes=256 << 20)
"""A compile bomb ends here; an honest answer takes half a second."""

_LOCKS: dict[str, threading.Lock] = {}
"""Two jobs that need one artifact make it once."""


def compiling(sandbox: Sandbox, command: tuple[str, ...], mounts: tuple[Mount, ...]) -> JobResult:
    """Run a compiler, a linker or a tool of theirs."""
    return run(sandbox, Job(command=command, mounts=mounts, limits=COMPILING))


def in_their_places(folders: Sequence[Path]) -> tuple[Mount, ...]:
    """Folders to read inside where they are outside."""
    return tuple(Mount(source=folder, target=str(folder)) for folder in folders)


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A file that a command makes of sources of ours."""

    compiler: str
    """The command's first word."""
    command: tuple[str, ...]
    """The others; the sources are in `/in`, and what is made goes to `/out`."""
    sources: Mapping[str, str]
    """Texts by name."""
    beside: Mapping[str, str] = field(default_factory=dict)
    """Texts that are put next to what is made."""
    given: tuple[Path, ...] = ()
    """Folders that the command reads, each at its own place."""

    @property
    def folder(self) -> Path:
        """The folder in the cache that holds what was made, where it was."""
        words = [gcc_version(), self.compiler, *self.command, *self.sources, *self.sources.values()]
        key = hashlib.sha256("\0".join(words).encode()).hexdigest()[:24]
        return cache_folder() / "hpc_coder" / "built" / key / "out"

    def make(
        self, sandbox: Sandbox, *, sooner: tuple[str, ...] = (), mounts: tuple[Mount, ...] = ()
    ) -> Path:
        """The folder with what is made; made on first use.

        Args:
            sandbox: where the compiler runs: the sources are ours, yet compilers are better kept apart.
            sooner: words that change how soon it is made, not what.
            mounts: what those words name.

        Raises:
            RuntimeError: where our own source does not compile, with the compiler's words.
        """
        whole = self.folder.parent
        with _LOCKS.setdefault(whole.name, threading.Lock()):
            if not whole.exists():
                with whole_folder(whole) as partial:
                    self._make_in(partial, sandbox, sooner, mounts)
        return self.folder

    def _make_in(
        self, folder: Path, sandbox: Sandbox, sooner: tuple[str, ...], mounts: tuple[Mount, ...]
    ) -> None:
        source, made = folder / "in", folder / "out"
        for place, texts in ((source, self.sources), (made, self.beside)):
            place.mkdir()
            for name, text in texts.items():
                (place / name).write_text(text, encoding="utf-8")
        given = Mount(source=source, target="/in")
        taken = Mount(source=made, target="/out", writable=True)
        words = (self.compiler, *sooner, *self.command)
        result = compiling(sandbox, words, (given, taken, *mounts, *in_their_places(self.given)))
        if result.code:
            raise RuntimeError(
                f"{self.compiler} {' '.join(self.command)} failed ({result.limit}): {result.stderr}"
            )
