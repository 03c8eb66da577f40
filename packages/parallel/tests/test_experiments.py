"""Laws of experiments: what is finished is kept, what changed is done again, what died goes on."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from fourfold_parallel.common.progress import silent
from fourfold_parallel.common.records import read_record
from fourfold_parallel.reproduce.claims import (
    Finding,
    NotTestedError,
    Records,
    beyond_us,
    claim,
    decide,
    judge,
)
from fourfold_parallel.reproduce.costs import cost_of, note
from fourfold_parallel.reproduce.experiment import Drawing, Experiment, Stage, Workplace, perform
from fourfold_parallel.reproduce.figures import svg, touching
from fourfold_parallel.reproduce.tables import check_recipes


@dataclass(frozen=True, slots=True, kw_only=True)
class Toy:
    """A stage's value."""

    number: int


@claim(
    "T1",
    section="1",
    says="b measures more than one",
    paper="2",
    rule="reproduced if above 1",
    conditions="toy",
    scales=("smoke",),
    needs="nothing",
)
def more_than_one(records: Records) -> Finding:
    """The last measurement of b."""
    if "b" not in records:
        raise NotTestedError("the stage b")
    event = records["b"].last("measured")
    more = event.number("value") > 1
    return Finding(
        decide(reproduced=more, contradicted=not more),
        f"{event.number('value'):g}",
        event,
        "value above 1" if more else "value at most 1",
    )


def toy_experiment(done: list[str], numbers: dict[str, int], dies_at: str = "") -> Experiment:
    def stage(name: str) -> Stage:
        value = Toy(number=numbers[name])

        def perform_stage(workplace: Workplace) -> None:
            done.append(name)
            with workplace.recording(value, seed=0) as records:
                if name == dies_at:
                    raise KeyboardInterrupt
                records.write("measured", value=float(value.number))

        return Stage(name=name, run=value, perform=perform_stage)

    def draw(records: Records) -> Figure:
        figure = Figure()
        figure.subplots().plot([0, records["b"].last("measured").number("value")])
        return figure

    return Experiment(
        package="toy",
        title="Toy",
        paper="Nobody, nowhere",
        claims=(more_than_one,),
        stages=lambda scale: [stage(name) for name in numbers] if scale == "smoke" else [],
        drawings=lambda _: [Drawing(name="line", caption="a line", draw=draw)],
        launches=lambda: (),
    )


def go(experiment: Experiment, folder: Path, *, resume: bool) -> str:
    outcome = perform(experiment, "smoke", folder, resume=resume, progress=lambda _: silent)
    return outcome.rows[0].verdict


def test_finished_stages_are_kept_and_changed_ones_done_again(tmp_path: Path) -> None:
    done: list[str] = []
    assert go(toy_experiment(done, {"a": 1, "b": 2}), tmp_path, resume=False) == "reproduced"
    assert go(toy_experiment(done, {"a": 1, "b": 2}), tmp_path, resume=True) == "reproduced"
    assert done == ["a", "b"]
    assert go(toy_experiment(done, {"a": 1, "b": 0}), tmp_path, resume=True) == "contradicted"
    assert done == ["a", "b", "b"]
    go(toy_experiment(done, {"a": 1, "b": 0}), tmp_path, resume=False)
    assert done == ["a", "b", "b", "a", "b"]


def test_an_interrupted_experiment_goes_on_where_it_stopped(tmp_path: Path) -> None:
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        go(toy_experiment(done, {"a": 1, "b": 2}, dies_at="b"), tmp_path, resume=True)
    assert not (tmp_path / "ledger.jsonl").exists()
    assert go(toy_experiment(done, {"a": 1, "b": 2}), tmp_path, resume=True) == "reproduced"
    assert done == ["a", "b", "b"]


def test_a_scale_without_stages_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="toy has nothing to run here at scale 'paper'"):
        perform(toy_experiment([], {}), "paper", tmp_path, resume=False, progress=lambda _: silent)


def test_equal_figures_are_equal_files(tmp_path: Path) -> None:
    """A drawing is deterministic, so that a changed figure is a reviewable difference."""
    experiment = toy_experiment([], {"a": 1, "b": 2})
    texts = []
    for name in ("one", "two"):
        outcome = perform(
            experiment, "smoke", tmp_path / name, resume=False, progress=lambda _: silent
        )
        texts.append(outcome.figures[0].read_text())
    assert texts[0] == texts[1]
    assert "<dc:date>" not in svg(Figure())


def test_a_claim_that_lacks_something_says_what_and_links_nowhere() -> None:
    """Without its record, and where no scale here can test it."""
    far = beyond_us("T2", section="1", says="more", paper="1", rule="a number", needs="8 GPUs")
    rows = judge((more_than_one, far), {}, package="toy", scale="smoke")
    assert [row.because for row in rows] == ["needs: the stage b", "needs: 8 GPUs"]
    assert {(row.verdict, row.ours, row.record) for row in rows} == {("not tested", "", "")}


def test_a_stage_is_done_again_when_one_that_it_reads_is(tmp_path: Path) -> None:
    done: list[str] = []

    def experiment(number: int) -> Experiment:
        first, second = toy_experiment(done, {"a": number, "b": 2}).stages("smoke")
        stages = (first, replace(second, reads=("a",)))
        return replace(toy_experiment(done, {}), stages=lambda _: stages)

    go(experiment(1), tmp_path, resume=False)
    go(experiment(1), tmp_path, resume=True)
    assert done == ["a", "b"]
    go(experiment(3), tmp_path, resume=True)
    assert done == ["a", "b", "a", "b"]


def test_what_a_stage_took_stays_until_it_is_done_again(tmp_path: Path) -> None:
    assert cost_of(tmp_path, "smoke") is None
    go(toy_experiment([], {"a": 1, "b": 2}), tmp_path, resume=False)
    cost = cost_of(tmp_path, "smoke")
    assert cost
    assert 0 <= cost.seconds < 60
    assert cost.stages == 2
    for stage, seconds in (("a", 30.0), ("b", 900.0), ("a", 700.0)):
        note(tmp_path, stage, seconds)
    assert str(cost_of(tmp_path, "smoke")).startswith("27 min for 2 stages (")
    assert cost_of(tmp_path, "laptop") is None
    go(toy_experiment([], {"a": 1, "b": 3}), tmp_path, resume=True)
    again = cost_of(tmp_path, "smoke")
    assert again
    assert 700 <= again.seconds < 900


def test_a_marked_record_is_no_recipes(tmp_path: Path) -> None:
    """A stage is done again where its record's run had overrides, and no table takes such a record."""
    experiment = toy_experiment(done := [], {"a": 1, "b": 2})
    go(experiment, tmp_path, resume=True)
    path = tmp_path / "a.jsonl"
    path.write_text(path.read_text().replace('"overrides": []', '"overrides": ["number=1"]'))
    with pytest.raises(ValueError, match=re.escape("overrides ['number=1']; no table takes")):
        check_recipes({"a": read_record(path)})
    go(experiment, tmp_path, resume=True)
    assert done == ["a", "b", "a"]
    check_recipes({"a": read_record(path)})


def test_labels_of_an_axis_are_apart() -> None:
    """Less than a decade, and one and a half, in the width of a telephone."""
    for low, high in ((0.015, 0.6), (0.2, 0.9), (1.0, 1e6)):
        figure = Figure(figsize=(1.8, 1.5))
        axes = figure.subplots()
        axes.set_xscale("log")
        axes.plot([low, high], [0, 1])
        had = touching(figure)
        text = svg(figure)
        assert touching(figure) == [], (low, high)
        assert len(axes.get_xticklabels()) > 0
        assert not had or text
