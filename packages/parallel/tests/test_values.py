"""Values survive their way through a record."""

import math
import re
import sys
import types
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from fourfold_parallel.common import values
from fourfold_parallel.common.values import (
    differences,
    digest,
    formerly,
    from_json,
    overridden,
    to_json,
)
from fourfold_parallel.run.recipe import Run, Tokens


def test_a_record_rebuilds_its_run(small_run: Run) -> None:
    assert from_json(to_json(small_run)) == small_run


def test_runs_are_told_apart_by_their_digest(small_run: Run) -> None:
    """Equal runs have one digest; any field that differs, at any depth, gives another."""
    assert digest(small_run) == digest(replace(small_run))
    others = [
        replace(small_run, seed=4),
        replace(small_run, optimizer=replace(small_run.optimizer, beta1=0.8)),  # type: ignore[type-var]
        replace(small_run, model=replace(small_run.model, tied=False)),  # type: ignore[type-var]
    ]
    assert len({digest(run) for run in [small_run, *others]}) == 4


def test_equal_runs_have_one_digest(small_run: Run) -> None:
    """1 and 1.0 clip alike."""
    runs = [replace(small_run, max_grad_norm=norm) for norm in (1, 1.0)]
    assert runs[0] == runs[1]
    assert digest(runs[0]) == digest(runs[1])


def test_differences_are_named_by_their_path(small_run: Run) -> None:
    """Through tuples and classes, in the words of the classes; what may differ is passed over."""
    described = to_json(small_run)
    assert differences(described, small_run) == ()
    corpus = replace(small_run.data.corpus, paths=small_run.data.corpus.paths[:-1])
    other = replace(
        small_run,
        horizon=Tokens(count=1),
        optimizer=replace(small_run.optimizer, beta1=0.8),
        data=replace(small_run.data, corpus=corpus),
        max_grad_norm=math.inf,
    )
    told = [other.told("the record") for other in differences(described, other)]
    assert told[0].startswith("data.corpus.paths: ('")
    assert told[1:] == [
        "optimizer.beta1: 0.9 in the record, 0.8 asked for",
        "horizon: Steps(count=6) in the record, Tokens(count=1) asked for",
        "max_grad_norm: 0.5 in the record, inf asked for",
    ]
    free = {"parallel/Run": ("horizon", "optimizer", "data", "max_grad_norm")}
    assert differences(described, other, apart_from=free) == ()
    assert differences(to_json(other), other) == ()
    assert [change.path for change in differences(["a", ["b"]], ["a", ["c"]])] == ["[1][0]"]


def test_what_no_record_could_rebuild_is_refused() -> None:
    with pytest.raises(TypeError, match="Tensor"):
        to_json({"weights": torch.zeros(2)})
    assert to_json(Path("a/b")) == "a/b"


def test_a_record_cannot_name_foreign_code() -> None:
    with pytest.raises(ValueError, match="not a fourfold type"):
        from_json({"type": "subprocess:Popen", "args": "true"})
    with pytest.raises(ValueError, match="not a dataclass"):
        from_json({"type": "fourfold_parallel.common.values:to_json"})


def test_a_tag_names_the_package_and_the_class_wherever_it_lies(small_run: Run) -> None:
    described = to_json(small_run)
    assert described["type"] == "parallel/Run"
    described["type"] = "fourfold_parallel.a.room.that.was:Run"
    assert from_json(described) == small_run


def test_a_renamed_class_and_a_dropped_field_are_still_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`formerly` stands in the source above a class; the source is searched, here one of its own."""
    module = types.ModuleType("fourfold_parallel.renamed")
    source = (
        '@formerly("parallel/Old", "loki/Borrowed", without=("dead",))\n'
        "@dataclass\nclass New:\n    kept: int\n"
    )
    exec(source, {**vars(module), "formerly": formerly, "dataclass": dataclass}, vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(values, "_sources", lambda home: ((module.__name__, source),))
    values._kind.cache_clear()
    for tag in ("parallel/Old", "loki/Borrowed", "fourfold_loki.somewhere:Borrowed"):
        assert from_json({"type": tag, "kept": 1, "dead": 2}).kept == 1
    with pytest.raises(ValueError, match=r"not of the installed version.*unknown"):
        from_json({"type": "parallel/New", "kept": 1, "unknown": 2})
    values._kind.cache_clear()


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    """A part with a number of each kind."""

    rate: float
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    """A whole."""

    name: str
    on: bool
    sizes: tuple[int, ...]
    inner: Inner


OUTER = Outer(name="a", on=True, sizes=(1, 2), inner=Inner(rate=0.5, steps=3))


def test_fields_are_set_by_words() -> None:
    words = ("name=b=c", "on=false", "sizes=[3]", "inner.rate=1", "inner.steps=4")
    assert overridden(OUTER, words) == Outer(
        name="b=c", on=False, sizes=(3,), inner=Inner(rate=1.0, steps=4)
    )
    assert type(overridden(OUTER, words).inner.rate) is float
    assert overridden(OUTER, ()) == OUTER


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("inner.speed=1", "Inner has no field 'speed'; it has rate, steps"),
        ("inner=1", "write the path of a number"),
        ("name.first=1", "write the path of a number"),
        ("inner.steps=1.5", "'1.5' is no int; it was 3"),
        ("inner.rate=true", "'true' is no float"),
        ("on=1", "'1' is no bool"),
        ("inner.steps=", "'' is no int"),
    ],
)
def test_what_a_field_cannot_be_is_refused(word: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        overridden(OUTER, (word,))
