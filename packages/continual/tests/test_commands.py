"""The commands on a small model and texts of one's own: train, stop, go on, report."""

import re
from pathlib import Path
from typing import Any

import pytest

from fourfold_continual import commands, report_of
from fourfold_parallel.common.records import read_record
from fourfold_parallel.reproduce import cli

COMMANDS = {"train": commands.train, "report": commands.report}


def run(*words: str) -> None:
    cli.main("continual", COMMANDS, words)


def call(place: Any, out: Path, *more: str, model: Path | None = None) -> None:
    sizes = ("--steps", "12", "--batch", "4", "--sequence", "16", "--learning-rate", "5e-3")
    texts = ("--old", str(place.old), "--new", str(place.new))
    run("train", str(model or place.model), *texts, *sizes, "--out", str(out), *more)


def test_one_goes_on_with_a_model_and_sees_what_it_forgot(
    place: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recipe, a table and a page; given again it does nothing anew; the checkpoint goes on itself."""
    out = tmp_path / "first"
    call(place, out, "--replay", "0.25")
    printed = capsys.readouterr().out
    assert '"type": "parallel/Mixed"' in printed
    assert re.search(r"continued.*new.*75 %.*gained", printed)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("<figure") == 2
    record = read_record(out / "continued.jsonl")
    report = report_of(record)
    assert [part.part for part in report.parts] == ["old", "new"]
    assert report.weights == {"old": 0.25, "new": 0.75}
    for part in report.parts:
        assert part.curve[0] == (0, part.before.loss_nats)
        assert [step for step, _ in part.curve] == [0, 2, 4, 6, 8, 10, 12]
        # The loop validates in batches of another size than the rows are read in.
        assert part.curve[-1][1] == pytest.approx(part.after.loss_nats, abs=1e-4)
    assert report.parts[1].change.nats < -0.2
    text = (out / "continued.jsonl").read_text()
    call(place, out, "--replay", "0.25")
    assert (out / "continued.jsonl").read_text() == text
    [last] = (out / "checkpoints").glob("step-00000012")
    call(place, tmp_path / "second", "--replay", "0", "--optimizer-state", "carried", model=last)
    second = read_record(tmp_path / "second" / "continued.jsonl")
    materials: Any = second.events[0].values["materials"]
    assert next(m["name"] for m in materials if m["kind"] == "model") == "continued"
    before = report_of(second).parts[1].before.loss_nats
    assert before == pytest.approx(report.parts[1].after.loss_nats, abs=1e-4)


def test_a_second_stage_ends_on_cleaner_text(place: Any, tmp_path: Path) -> None:
    call(place, tmp_path, "--clean", str(place.new), "--replay", "0.5")
    record = read_record(tmp_path / "continued.jsonl")
    report = report_of(record)
    assert [part.part for part in report.parts] == ["old", "new", "clean"]
    rates = [event.number("learning_rate") for event in record.of("step")]
    assert rates[:10] == [5e-3] * 10
    assert rates[-1] == pytest.approx(5e-4)
    cleaned = [event.number("targets_of_clean") for event in record.of("step")]
    assert not any(cleaned[:10])
    assert all(cleaned[10:])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--replay", "1.5"), "replay=1.5 is no share"),
        (("--optimizer-state", "carried"), "no checkpoint of ours"),
        (("--clean", "nowhere"), "nowhere"),
    ],
)
def test_mistakes_are_named(
    place: Any,
    tmp_path: Path,
    words: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        call(place, tmp_path, *words)
    assert message in capsys.readouterr().err


def test_a_report_needs_what_was_before(
    place: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run("report", str(tmp_path / "gone.jsonl"))
    assert "no such files" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("report", str(place.old), "--out", str(tmp_path / "page.txt"))
    assert "ends in .html" in capsys.readouterr().err
