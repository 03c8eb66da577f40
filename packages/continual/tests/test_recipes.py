"""The study's arms read the rows that they say."""

import ast
from dataclasses import replace

import numpy as np
import pytest

from fourfold_continual.reproduce.experiment import EXPERIMENT
from fourfold_continual.reproduce.paper import STEPS, aurora_m, launches
from fourfold_continual.reproduce.recipes import SIZES, base, continued
from fourfold_parallel.common.values import from_json, to_json
from fourfold_parallel.run.corpora import PythonManual, PythonSource, Wikipedia
from fourfold_parallel.run.data import Packed
from fourfold_parallel.run.mixtures import Mixed, Staged, pattern
from fourfold_parallel.run.recipe import Run
from fourfold_parallel.run.tokenizers import BytePairs
from fourfold_parallel.run.trained import Continued


def rows_of(run: Run) -> dict[str, int]:
    """Rows of each text in a whole run, from the values alone."""
    stages = (
        [(stage.mixture, stage.steps) for stage in run.data.stages]
        if isinstance(run.data, Staged)
        else [(run.data, run.steps)]
    )
    rows: dict[str, int] = {}
    for mixture, steps in stages:
        assert isinstance(mixture, Mixed)
        counts = pattern(tuple(part.weight for part in mixture.parts)).counts(steps * run.batch)
        for part, count in zip(mixture.parts, counts, strict=True):
            rows[part.name] = rows.get(part.name, 0) + int(count)
    return rows


def test_arms_read_what_they_say() -> None:
    """Equal rows in all, or equal new ones; joint training those of base and 25 % together."""
    rows = {arm: rows_of(continued("small", arm, 1)) for arm in ("none", "r05", "r25", "only-old")}  # type: ignore[arg-type]
    assert {sum(each.values()) for each in rows.values()} == {2400}
    assert [each["old"] for each in rows.values()] == [0, 120, 600, 2400]
    for arm in ("r05-longer", "r25-longer"):
        assert rows_of(continued("small", arm, 1))["new"] == pytest.approx(2400, abs=2)  # type: ignore[arg-type]
    whole = rows_of(continued("small", "joint", 1))
    assert whole["old"] == pytest.approx(rows_of(base("small", 1))["old"] + 600, abs=1)
    assert whole["new"] == pytest.approx(1800, abs=1)
    staged = rows_of(continued("small", "two-stage", 1))
    assert staged == {"old": 600, "new": 1650, "clean": 150}


def test_rates_of_the_control_are_those_of_the_two_stages() -> None:
    runs = [continued("small", arm, 1) for arm in ("two-stage", "steady")]  # type: ignore[arg-type]
    factors = [[run.schedule.factor(step, run.steps) for step in range(300)] for run in runs]
    assert factors[0] == factors[1]
    assert factors[0][249] == 1.0
    assert factors[0][-1] == pytest.approx(0.1)


@pytest.mark.parametrize("scale", ["smoke", "laptop"])
def test_stages_are_rebuilt_from_their_records(scale) -> None:
    """Every run, its parents within it; names are its own."""
    stages = EXPERIMENT.stages(scale)
    names = [stage.name for stage in stages]
    assert len(set(names)) == len(names)
    for stage in stages[:12]:
        assert from_json(to_json(stage.run)) == stage.run
        if isinstance(stage.run.model, Continued):  # type: ignore[attr-defined]
            assert stage.run.model.parent.name in stage.reads  # type: ignore[attr-defined]


def test_sizes_are_what_is_said() -> None:
    counts = {
        name: sum(p.numel() for p in model.build(seed=0).parameters())
        for name, model in SIZES.items()
    }
    assert counts["small"] == pytest.approx(0.33e6, rel=0.05)
    assert counts["large"] == pytest.approx(1.2e6, rel=0.05)


def test_the_clean_text_holds_no_held_out_docstring() -> None:
    """Docstrings stand in the modules too: those of held-out modules lie in the part that is held out."""
    modules, docstrings = PythonSource().load().texts, PythonManual().load().texts
    lengths = np.cumsum([len(text) for text in modules])
    # 2 % of the rows are held out; a little more of the characters may be, since rows are cut in ids.
    held_out = [t for t, end in zip(modules, lengths, strict=True) if end > 0.975 * lengths[-1]]
    of_modules = {
        text
        for module in held_out
        for node in ast.walk(ast.parse(module))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and (text := ast.get_docstring(node))
    }
    ends = np.cumsum([len(text) for text in docstrings])
    trained = {t for t, end in zip(docstrings, ends, strict=True) if end < 0.96 * ends[-1]}
    assert of_modules
    assert not of_modules & trained


def test_the_papers_curriculum_is_a_value() -> None:
    """Two stages of its steps over sources of six languages and code; the launch lines name this package."""
    names = ("en", "fi", "hi", "ja", "vi", "code")
    source = Packed(corpus=Wikipedia(), tokenizer=BytePairs(vocabulary=300), held_out=0.1)
    first = dict(zip(names, (0.25, 0.15, 0.15, 0.15, 0.15, 0.15), strict=True))
    staged = aurora_m(dict.fromkeys(names, source), (first, {**first, "en": 0.3, "code": 0.1}))
    assert staged.steps == sum(STEPS) == 104_000
    tokens = staged.steps * 2048 * 2048
    assert tokens == pytest.approx(435e9, rel=0.01)
    assert replace(staged) == staged
    for launch in launches():
        assert launch.command.startswith("-m fourfold_continual train ")
