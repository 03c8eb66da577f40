"""Real parallel source code that is on this machine, with its licence; as a corpus and as seeds.

Permissive licences only, unless told otherwise. Headers and kernels that ship inside Python wheels need no
network; Debian's -dev and -examples packages, unpacked source packages and sdists are read where they lie.
"""

import hashlib
import importlib.metadata
import re
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fourfold_parallel.common.records import Material
from fourfold_parallel.run.corpora import Documents

Construct = Literal["openmp", "mpi", "cuda", "kokkos"]

CONSTRUCTS: dict[Construct, re.Pattern[str]] = {
    "openmp": re.compile(r"^[ \t]*#[ \t]*pragma[ \t]+omp\b", re.MULTILINE),
    "mpi": re.compile(r"\bMPI_[A-Z]\w+\s*\("),
    "cuda": re.compile(r"\b__global__\b|\bthreadIdx\."),
    "kokkos": re.compile(r"\bKokkos::\w+|\bKOKKOS_LAMBDA\b"),
}
"""The text that makes a file parallel, by the kind of parallelism."""

SUFFIXES = (".c", ".cc", ".cpp", ".cxx", ".h", ".hpp", ".cuh", ".cu", ".inl")
PERMISSIVE = ("Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "MIT", "MPICH", "ISC")
MAXIMUM_BYTES = 400_000
"""Longer files are generated or amalgamated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """A source tree: a folder, an archive, or a folder inside an installed wheel."""

    name: str
    """Package and version."""
    licence: str
    """SPDX identifier of its files."""
    path: str
    """A folder, a .tar.* or .zip archive, or, with `wheel`, a folder relative to where wheels install."""
    wheel: str = ""
    """Distribution that holds the folder; empty for a path of the file system."""

    def files(self) -> Iterator[tuple[str, str]]:
        """Path within the tree and text of every source file, in order of the paths.

        Raises:
            ValueError: where the tree is not on this machine.
        """
        root = self._root()
        if root.is_file():
            yield from _archived(root)
            return
        if not root.is_dir():
            raise ValueError(f"{self.name}: no folder or archive {self.path}; install or unpack it")
        for path in sorted(root.rglob("*")):
            if path.suffix in SUFFIXES and path.is_file() and path.stat().st_size <= MAXIMUM_BYTES:
                yield str(path.relative_to(root)), path.read_text("utf-8", errors="ignore")

    def is_here(self) -> bool:
        """Whether the tree can be read."""
        try:
            return self._root().exists()
        except ValueError:
            return False

    def _root(self) -> Path:
        if not self.wheel:
            return Path(self.path)
        try:
            return Path(str(importlib.metadata.distribution(self.wheel).locate_file(self.path)))
        except importlib.metadata.PackageNotFoundError:
            raise ValueError(f"{self.wheel} is not installed; pip install {self.wheel}") from None


def _archived(path: Path) -> Iterator[tuple[str, str]]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                if name.endswith(SUFFIXES) and archive.getinfo(name).file_size <= MAXIMUM_BYTES:
                    yield name, archive.read(name).decode(errors="ignore")
    elif tarfile.is_tarfile(path):
        with tarfile.open(path) as archive:
            for member in sorted(archive.getmembers(), key=lambda member: member.name):
                content = archive.extractfile(member) if member.isfile() else None
                if content and member.name.endswith(SUFFIXES) and member.size <= MAXIMUM_BYTES:
                    yield member.name, content.read().decode(errors="ignore")
    else:
        raise ValueError(
            f"{path} is neither a tar nor a zip archive; unpack it and name the folder"
        )


WHEELS = (
    Tree(name="deepspeed", licence="Apache-2.0", path="deepspeed/ops/csrc", wheel="deepspeed"),
    Tree(name="torch", licence="BSD-3-Clause", path="torch/include/ATen", wheel="torch"),
)
"""Trees that the two commands install: OpenMP and CUDA."""

DEBIAN = (
    Tree(name="libtrilinos-kokkos-dev", licence="BSD-3-Clause", path="/usr/include/trilinos"),
    Tree(
        name="libpetsc-dev-examples", licence="BSD-2-Clause", path="/usr/share/doc/petsc-examples"
    ),
)
"""Trees that Debian's packages add where installed: Kokkos and MPI."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """A parallel source file and where it is from."""

    tree: str
    path: str
    licence: str
    constructs: tuple[Construct, ...]
    text: str


def check_trees(trees: Sequence[Tree], *, licences: Sequence[str] = PERMISSIVE) -> None:
    """Refuse trees that could not be read later, before anything is done for them.

    Raises:
        ValueError: for a tree under another licence, or one that is not on this machine.
    """
    for tree in trees:
        if tree.licence not in licences:
            raise ValueError(
                f"{tree.name} is under {tree.licence}, not one of {', '.join(licences)}; "
                "name its licence if you may use it"
            )
        if not tree.is_here():
            raise ValueError(f"{tree.name}: no folder or archive {tree.path}; install or unpack it")


def parallel_files(
    trees: Sequence[Tree], *, licences: Sequence[str] = PERMISSIVE
) -> tuple[SourceFile, ...]:
    """The files of the trees that use a parallel model, in order.

    Args:
        trees: where to look; one that is not on this machine is an error.
        licences: SPDX identifiers that may be used.

    Raises:
        ValueError: for a tree under another licence.
    """
    check_trees(trees, licences=licences)
    files = []
    for tree in trees:
        for path, text in tree.files():
            constructs: tuple[Construct, ...] = tuple(
                name for name, pattern in CONSTRUCTS.items() if pattern.search(text)
            )
            if constructs:
                files.append(
                    SourceFile(
                        tree=tree.name,
                        path=path,
                        licence=tree.licence,
                        constructs=constructs,
                        text=text,
                    )
                )
    return tuple(files)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelSource:
    """Parallel source files as a corpus to pretrain on."""

    trees: tuple[Tree, ...] = WHEELS
    maximum_characters: int = 400_000
    """Taken from the front, in order of the files, interleaved between trees."""

    def load(self) -> Documents:
        """Read the files."""
        files = parallel_files(self.trees)
        texts, characters = [], 0
        for file in _interleaved(files):
            if characters >= self.maximum_characters:
                break
            texts.append(file.text)
            characters += len(file.text)
        whole = hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass"))
        return Documents(
            texts=tuple(texts),
            material=Material(
                name=f"{len(texts)} parallel source files",
                kind="corpus",
                licence=" and ".join(sorted({tree.licence for tree in self.trees})),
                sha256=whole.hexdigest(),
                source=", ".join(tree.name for tree in self.trees),
            ),
        )


def _interleaved(files: Sequence[SourceFile]) -> Iterator[SourceFile]:
    by_tree: dict[str, list[SourceFile]] = {}
    for file in files:
        by_tree.setdefault(file.tree, []).append(file)
    for turn in range(max(map(len, by_tree.values()), default=0)):
        for tree_files in by_tree.values():
            if turn < len(tree_files):
                yield tree_files[turn]


def trees_of(name: str) -> tuple[Tree, ...]:
    """The source trees of a word: `installed` for those of this machine, or `PATH:LICENCE`.

    Raises:
        ValueError: where a path has no licence.
    """
    if name == "installed":
        return tuple(tree for tree in (*WHEELS, *DEBIAN) if tree.is_here())
    path, separator, licence = name.rpartition(":")
    if not separator:
        raise ValueError(f"--trees {name}: say the licence, as in {name}:MIT, or `installed`")
    return (Tree(name=Path(path).name, licence=licence, path=path),)
