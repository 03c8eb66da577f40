"""Laws by name, one file each. A file that is added here, or given by its path, is a law like any other.

Every file holds `ENTRY`: an estimator with its equation, source and a sentence on its use. The same suite of
tests runs through all of them (`tests/test_registry.py`).
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from fourfold_gemstones.architecture import Embeddings
from fourfold_gemstones.form import FormLaw
from fourfold_gemstones.parametric import ParametricLaw


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A law of the registry."""

    law: ParametricLaw | FormLaw
    equation: str
    source: str
    use: str
    """The question that it answers, in a sentence."""


def names() -> tuple[str, ...]:
    """All laws of the registry, without importing any."""
    files = Path(__file__).parent.glob("*.py")
    return tuple(sorted(path.stem.replace("_", "-") for path in files if path.stem != "__init__"))


@cache
def entry(name: str) -> Entry:
    """A law by its name, or by the path of a file that holds `ENTRY`.

    Raises:
        ValueError: There is no such law, or the file holds none.
    """
    if name in names():
        return importlib.import_module(f"{__name__}.{name.replace('-', '_')}").ENTRY
    path = Path(name)
    if path.suffix != ".py" or not path.is_file():
        raise ValueError(
            f"no law {name!r}; there are {', '.join(names())}, or give the path of a .py file with an ENTRY"
        )
    described = importlib.util.spec_from_file_location(path.stem, path)
    assert described is not None
    assert described.loader is not None
    module = importlib.util.module_from_spec(described)
    described.loader.exec_module(module)
    given = getattr(module, "ENTRY", None)
    if not isinstance(given, Entry):
        raise ValueError(
            f"{path} holds no ENTRY = Entry(law=..., equation=..., source=..., use=...); see the files of "
            "fourfold_gemstones/registry"
        )
    return given


def law(
    name: str,
    *,
    delta: float = 1e-3,
    embeddings: Embeddings = Embeddings.BOTH,
    overestimate: float = 1.0,
) -> ParametricLaw | FormLaw:
    """The estimator of a law, with settings other than its own."""
    return replace(entry(name).law, delta=delta, embeddings=embeddings, overestimate=overestimate)
