"""Laws of experiments: what is finished is kept, what changed is done again, what died goes on."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from fourfold_parallel.common.progress import silent
from fourfold_parallel.common.records import RecordWriter, header
from fourfold_parallel.reproduce.claims import Claim, Finding, Records
from fourfold_parallel.reproduce.experiment import Drawing, Experiment, Stage, Workplace, perform
from fourfold_parallel.reproduce.figures import svg


@dataclass(frozen=True, slots=True, kw_only=True)
class Toy:
    """A stage's value."""

    number: int


def _rule(records: Records) -> Finding:
    event = records["b"].last("measured")
    value = event.number("value")
    return Finding(
        verdict="reproduced" if value > 1 else "contradicted",
        ours=f"{value:g}",
        evidence="b",
        line=event.line,
        because="value above 1" if value > 1 else "value at most 1",
    )


def toy_experiment(done: list[str], numbers: dict[str, int], dies_at: str = "") -> Experiment:
    def stage(name: str) -> Stage:
        value = Toy(number=numbers[name])

        def perform_stage(workplace: Workplace) -> None:
            done.append(name)
            with RecordWriter(workplace.record) as records:
                records.write_header(
                    header(value, seed=0, world_size=1, materials=(), overrides=())
                )
                if name == dies_at:
                    raise KeyboardInterrupt
                records.write("measured", value=float(value.number))
                records.write("finished")

        return Stage(name=name, run=value, perform=perform_stage)

    def draw(records: Records) -> Figure:
        figure = Figure()
        figure.subplots().plot([0, records["b"].last("measured").number("value")])
        return figure

    claim = Claim(
        id="T1",
        section="1",
        statement="b measures more than one",
        paper_value="2",
        conditions="toy",
        rule_text="reproduced if above 1",
        rule=_rule,
        scales=("smoke",),
        needs="nothing",
    )
    return Experiment(
        package="toy",
        title="Toy",
        paper="Nobody, nowhere",
        claims=(claim,),
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
    with pytest.raises(ValueError, match="toy has nothing to run here at scale 'gpu'"):
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
