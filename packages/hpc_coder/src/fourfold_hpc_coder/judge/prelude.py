"""The precompiled headers under which answers are compiled, of which there are two.

At the end of every unit GCC instantiates what the inline functions of the standard headers refer to, streams
and special functions above all, used or not: two thirds of the time of compiling an answer. The short prelude
leaves out the headers that do so. It serves answers that could not tell the difference: that have no name
which only the whole prelude's headers hold.
"""

import re
from functools import cache
from pathlib import Path

from fourfold_hpc_coder.judge.artifacts import Artifact
from fourfold_hpc_coder.judge.parallelism import without_comments
from fourfold_hpc_coder.judge.toolchain import NO_MACROS, PLAIN, Flavour, driver_texts
from fourfold_hpc_coder.sandbox.backends import Sandbox

# One prelude serves with and without OpenMP, with and without lines. GCC refuses one made under other
# macros, so OpenMP's two are defined after it; it lacks what OpenMP's pragmas need unless made with OpenMP;
# it may have lines where an answer has none. The last flag, of memory, saves a tenth of the time.
_PRECOMPILED = ("-g1", "-fopenmp", *NO_MACROS, "--param", "ggc-min-heapsize=1000000")

INCLUDED = ("-include", "/prelude/prelude.hpp")
"""Words that put a prelude, mounted at /prelude, before a source."""

_HEADER = re.compile(r"#\s*include\s*<([\w/+.]+)>")
_NAME = re.compile(r"[A-Za-z_]\w+")
"""Of one letter no standard header names anything but members and parameters."""
_LITERAL = re.compile(r'"(?:\\.|[^"\\\n])*"\w*')


def prelude(flavour: Flavour, *, whole: bool) -> Artifact:
    """The folder with a precompiled prelude.

    Its text stays beside it: where GCC refuses what was precompiled, compiling is slow, not impossible.
    """
    # A library that is built with OpenMP wants its macro.
    precompiled = [
        word for word in _PRECOMPILED if "-fopenmp" not in flavour.prelude or word not in NO_MACROS
    ]
    command = (*flavour.prelude, *precompiled, "-x", "c++-header", "/in/prelude.hpp")
    texts = _texts(whole=whole)
    return Artifact(
        compiler=flavour.compiler,
        command=(*command, "-o", "/out/prelude.hpp.gch"),
        sources=texts,
        beside=texts,
        given=flavour.given,
    )


def _texts(*, whole: bool) -> dict[str, str]:
    text = driver_texts()["prelude.hpp" if whole else "short.hpp"]
    return {"prelude.hpp": text, "openmp.hpp": driver_texts()["openmp.hpp"]}


def includes_more(flavour: Flavour, text: str) -> bool:
    """Whether a text includes a header that the short prelude lacks, or its model has no short one."""
    if flavour.prelude != PLAIN:
        return True
    included = {name for name in _HEADER.findall(text) if "/" in name or not name.endswith(".h")}
    return not included <= set(_HEADER.findall(driver_texts()["short.hpp"]))


def needs_whole(flavour: Flavour, text: str, sandbox: Sandbox) -> bool:
    """Whether a text might mean something else under the short prelude.

    Raises:
        RuntimeError: where a prelude of ours cannot be preprocessed.
    """
    if includes_more(flavour, text):
        return True
    names = _NAME.findall(without_comments(text))
    if not names:
        return False
    whole, short = (_names_file(flavour, sandbox, whole=whole) for whole in (True, False))
    return not _only_in_first(whole, short).isdisjoint(names)


def _names_file(flavour: Flavour, sandbox: Sandbox, *, whole: bool) -> Path:
    """The file with a prelude's headers as the preprocessor leaves them, macros included."""
    words = ("-fopenmp", *NO_MACROS, "-E", "-dD", "-P", "-x", "c++", "/in/prelude.hpp")
    preprocessed = Artifact(
        compiler=flavour.compiler,
        command=(*flavour.prelude, *words, "-o", "/out/names"),
        sources=_texts(whole=whole),
    )
    return preprocessed.make(sandbox) / "names"


@cache
def _only_in_first(first: Path, second: Path) -> frozenset[str]:
    return _names(first) - _names(second)


def _names(file: Path) -> frozenset[str]:
    text = file.read_text(encoding="utf-8", errors="replace")
    return frozenset(_NAME.findall(_LITERAL.sub(" ", text)))
