"""The report on a run that went on: what was forgotten and gained, as a table and as a page with curves."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourfold_continual.forgetting import Change, HeldOutLoss, forgot
from fourfold_continual.held_out import held_out_of
from fourfold_parallel.common.files import write_text
from fourfold_parallel.common.records import Record
from fourfold_parallel.run.recipe import Run
from fourfold_parallel.run.trained import Continued

TEMPLATE = Path(__file__).with_name("report.html.jinja")


@dataclass(frozen=True, slots=True, kw_only=True)
class PartReport:
    """One text in one run."""

    part: str
    before: HeldOutLoss
    after: HeldOutLoss
    curve: tuple[tuple[int, float], ...]
    """Steps, and the loss in nats a token on held-out rows; step 0 is before."""

    @property
    def change(self) -> Change:
        """The loss that was added."""
        return forgot(self.before, self.after)

    @property
    def words(self) -> str:
        """The change as a person reads it."""
        change = self.change
        if abs(change.nats) < 2 * change.error_nats:
            return "unchanged within two standard errors"
        return "forgotten" if change.nats > 0 else "gained"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The losses on each text before and after a run."""

    name: str
    steps: int
    weights: dict[str, float]
    """Shares of the texts over the run."""
    parts: tuple[PartReport, ...]

    @property
    def rows(self) -> list[list[str]]:
        """The table: text, share, loss before and after, change with its error, the same in bits a byte."""
        return [
            [
                self.name, part.part, f"{100 * self.weights.get(part.part, 0.0):.3g} %",
                f"{part.before.loss_nats:.3f}", f"{part.after.loss_nats:.3f}",
                f"{part.change.nats:+.3f} ± {part.change.error_nats:.3f}",
                f"{part.change.bits_per_byte:+.4f}", part.words,
            ]
            for part in self.parts
        ]  # fmt: skip


HEAD = (
    "run", "text", "share", "before (nats)", "after (nats)", "change (nats a token)",
    "change (bits a byte)", "",
)  # fmt: skip


def report_of(record: Record, others: Sequence[Record] = ()) -> Report:
    """The report on the run of a record.

    Args:
        record: its losses before are events of its own, or those of its parent's record.
        others: among which the parent's record may be.

    Raises:
        ValueError: The record holds no losses on held-out rows, or none from before.
    """
    run = record.run
    if not isinstance(run, Run):
        raise ValueError(f"{record.path} is not the record of a run; name one that `train` wrote")
    after = _losses(record, "after")
    before = _losses(record, "before") or _of_parent(run, others)
    if not after:
        raise ValueError(f"{record.path} holds no losses on held-out rows; is the run unfinished?")
    if not before:
        raise ValueError(
            f"{record.path} does not say what the losses were before; name its parent's record too"
        )
    names = [name for name in after if name in before]
    return Report(
        name=run.name,
        steps=run.steps,
        weights=dict(run.data.open(sequence=run.sequence, seed=run.seed).weights),
        parts=tuple(
            PartReport(
                part=name,
                before=before[name],
                after=after[name],
                curve=((0, before[name].loss_nats), *_curve(record, name)),
            )
            for name in names
        ),
    )


def _losses(record: Record, when: str) -> dict[str, HeldOutLoss]:
    """By part; an event that does not say when is from after."""
    return {
        str(event.values["part"]): held_out_of(event)
        for event in record.of("held_out")
        if event.values.get("when", "after") == when
    }


def _of_parent(run: Run, others: Sequence[Record]) -> dict[str, HeldOutLoss]:
    if not isinstance(run.model, Continued):
        return {}
    for other in others:
        if other.run == run.model.parent:
            return _losses(other, "after")
    return {}


def _curve(record: Record, part: str) -> list[tuple[int, float]]:
    key = f"validation_loss_nats_of_{part}"
    return [
        (int(event.number("step")), event.number(key))
        for event in record.of("validation")
        if key in event.values
    ]


def write_page(reports: Sequence[Report], path: Path) -> None:
    """Write the reports as one HTML page: a table, and a chart for each text."""
    from fourfold_parallel.reproduce.figures import style, svg
    from fourfold_parallel.reproduce.page import inline, render

    texts = list(dict.fromkeys(part.part for report in reports for part in report.parts))
    with style():
        drawn = {text: inline(svg(curves(reports, text)), prefix=f"{text}-") for text in texts}
    write_text(path, render(TEMPLATE, reports=reports, drawn=drawn, head=HEAD))


def curves(reports: Sequence[Report], text: str) -> Any:
    """The loss on one text over the steps, a line a run, and what it was before.

    Returns:
        A `matplotlib.figure.Figure`.
    """
    from matplotlib.figure import Figure

    from fourfold_parallel.reproduce.figures import IDEAL, SHADES

    figure = Figure(figsize=(5.6, 3.2))
    axes = figure.subplots()
    for index, report in enumerate(reports):
        for part in report.parts:
            if part.part == text:
                steps, losses = zip(*part.curve, strict=True)
                color = SHADES[index % len(SHADES)]
                axes.plot(steps, losses, color=color, marker="o", markersize=3, label=report.name)
                axes.axhline(part.before.loss_nats, color=IDEAL, linestyle="--", linewidth=1)
    axes.set_title(f"Loss on held-out rows: {text}")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.legend()
    return figure
