"""Seeds: whole functions of real parallel code, found by parsing, with their place and licence.

From a seed the rule-based teacher makes a task without any model: the function with its OpenMP directives
taken out is the question, the function as its authors wrote it is the answer. Such a sample is kept only if
the function compiles by itself; most of real code does not, and the share that does is reported.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tree_sitter_cpp
from tree_sitter import Language, Node, Parser

from fourfold_hpc_coder.instruct.dedup import TextMemory
from fourfold_hpc_coder.instruct.samples import InstructionSample, Provenance
from fourfold_hpc_coder.instruct.sources import CONSTRUCTS, Construct, SourceFile
from fourfold_hpc_coder.judge.artifacts import compiling
from fourfold_hpc_coder.sandbox.backends import Sandbox
from fourfold_hpc_coder.sandbox.job import Mount

_PARSER = Parser(Language(tree_sitter_cpp.language()))
LONGEST = 4000
"""Characters of a function that still makes a seed."""
SCRAPED = 0.7
"""MinHash similarity from which two real functions are one (Magicoder's cleaning)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seed:
    """A function of real code that uses a parallel model."""

    text: str
    constructs: tuple[Construct, ...]
    origin: str
    """`tree/path:first-last`, lines 1-based."""
    licence: str

    @property
    def key(self) -> str:
        """Digest of its text."""
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class Harvest:
    """The functions of some files that use a parallel model."""

    seeds: tuple[Seed, ...]
    """Near-duplicates once, in order."""
    unread: Mapping[Construct, int]
    """Functions left out since the parser finds an error in them, by what they use."""


def harvest(files: Sequence[SourceFile]) -> Harvest:
    """Functions of the files that use a parallel model."""
    seen = TextMemory.of((), threshold=SCRAPED)
    unread: Counter[Construct] = Counter()
    kept = [seed for file in files for seed in _of_file(file, unread) if seen.add(seed.text)]
    return Harvest(seeds=tuple(kept), unread=unread)


_FOREIGN = re.compile(
    rb"(?P<lambda>\bKOKKOS_(?:CLASS_)?LAMBDA\b)|"
    rb"(?<!\])(?<!\] )\b(?P<inline>KOKKOS_(?:DEFAULTED_|INLINE_|FORCEINLINE_)?FUNCTION|"
    rb"__(?:global|device|host|forceinline|noinline|shared|constant)__|C10_(?:HOST_DEVICE|DEVICE|HOST))\b|"
    rb"<<<[^;{}]*?>>>|\b(?:__launch_bounds__|C10_LAUNCH_BOUNDS_\w+)\s*\([^()]*\)|"
    rb"\b__(?:restrict|device|host)__\b"
)
"""Words of parallel models that are no C++ until a compiler of theirs has read them."""
_CPP = {"lambda": b"[=]", "inline": b"inline", None: b""}
"""C++ that stands where such a word does."""


def _plain(source: bytes) -> bytes:
    """The source with C++ in the place of such words; what stands around them stays in its place."""

    def stood_in(word: re.Match[bytes]) -> bytes:
        instead = _CPP[word.lastgroup]
        return instead + re.sub(rb"[^\n]", b" ", word.group()[len(instead) :])

    return _FOREIGN.sub(stood_in, source)


def _of_file(file: SourceFile, unread: Counter[Construct]) -> Iterator[Seed]:
    source = file.text.encode("utf-8", "surrogatepass")
    for node in _functions(_PARSER.parse(_plain(source)).root_node):
        text = source[node.start_byte : node.end_byte].decode("utf-8", "surrogatepass")
        constructs: tuple[Construct, ...] = tuple(
            name for name, pattern in CONSTRUCTS.items() if pattern.search(text)
        )
        if node.has_error and len(text) <= LONGEST:
            unread.update(constructs)
        elif constructs and len(text) <= LONGEST:
            first, last = node.start_point[0] + 1, node.end_point[0] + 1
            yield Seed(
                text=text,
                constructs=constructs,
                origin=f"{file.tree}/{file.path}:{first}-{last}",
                licence=file.licence,
            )


def _functions(node: Node) -> Iterator[Node]:
    """Function definitions below a node, not those within another."""
    for child in node.children:
        if child.type == "function_definition":
            yield child
        else:
            yield from _functions(child)


_DIRECTIVE = re.compile(r"^[ \t]*#[ \t]*pragma[ \t]+omp\b(?:[^\n]*\\\n)*[^\n]*\n?", re.MULTILINE)


def restoration(seed: Seed) -> InstructionSample:
    """The task to put a real function's OpenMP directives back.

    Raises:
        ValueError: for a seed that has none.
    """
    serial = _DIRECTIVE.sub("", seed.text)
    if serial == seed.text:
        raise ValueError(f"seed {seed.origin} has no OpenMP directive to take out; choose another")
    return InstructionSample(
        category="parallelization",
        model="omp",
        instruction=f"/* Parallelize this function with OpenMP. */\n{serial}",
        answer=seed.text,
        provenance=Provenance(
            teacher="restoration", task=seed.key, seed_origin=seed.origin, licence=seed.licence
        ),
        verdict="not judged",
    )


def compiled(
    samples: Sequence[InstructionSample], sandbox: Sandbox, folder: Path
) -> tuple[InstructionSample, ...]:
    """The samples with the compiler's verdict on their answers: "compiles" or "no build".

    Args:
        samples: whole functions.
        sandbox: where the compiler runs.
        folder: for the sources; emptied by the caller.
    """
    judged = []
    for index, sample in enumerate(samples):
        source = folder / f"{index}"
        source.mkdir(parents=True)
        (source / "answer.cpp").write_text(
            f"#include <bits/stdc++.h>\n#include <omp.h>\n{sample.answer}\n",
            encoding="utf-8",
            errors="replace",
        )
        command = ("g++", "-std=c++17", "-fopenmp", "-fsyntax-only", "/in/answer.cpp")
        mounts = (Mount(source=source, target="/in"),)
        result = compiling(sandbox, command, mounts)
        judged.append(replace(sample, verdict="no build" if result.code else "compiles"))
    return tuple(judged)
