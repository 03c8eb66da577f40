"""The commands for a user's own runs: fit, identify, forecast, compare; and a table to try them on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes, Positional, subcommand

if TYPE_CHECKING:
    from fourfold_gemstones.runs import RunTable

LEDGER = Path("forecasts.jsonl")
"""Where forecasts are registered unless another file is named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of runs and the way to read it."""

    columns: tuple[str, ...] = ()
    """Columns that are guessed wrong, or numbers for all rows: loss_nats=eval/loss depth=12."""
    about: Path | None = None
    """A second table with a row a run: its size, its shape."""
    tokens_per_step: float = 0.0
    """Tokens of a step, where the table counts steps."""
    duplicates: Literal["refuse", "last", "mean"] = "refuse"
    """Which of several losses of a run at one token count to take."""
    vocabulary: int = 50_304
    """Rows of each of the two embedding tables."""
    context: int = 2_048
    """Tokens a sequence."""
    head_width: int = 128
    """Size of one attention head."""


Reading = OmitArgPrefixes[Table]


def _read(paths: tuple[Path, ...], how: Table) -> RunTable:
    """The table, after the sentences on how it was read."""
    from fourfold_gemstones import reading
    from fourfold_gemstones.architecture import Architecture

    for choice in how.columns:
        if "=" not in choice:
            raise ValueError(
                f"--columns {choice!r} chooses nothing; write ours=theirs: loss_nats=eval/loss"
            )
    read = reading.read(
        *paths,
        columns=dict(choice.split("=", 1) for choice in how.columns),
        about=how.about,
        tokens_per_step=how.tokens_per_step,
        duplicates=how.duplicates,
        architecture=Architecture(
            vocabulary=how.vocabulary, context=how.context, head_width=how.head_width
        ),
    )
    for note in read.notes:
        _say(note, style="yellow" if "left out" in note else "dim")
    return read.table


def _say(text: str, *, style: str = "") -> None:
    from fourfold_parallel.reproduce.terminal import console

    console().print(text, style=style, markup=False, soft_wrap=True)


def _variables(texts: Iterable[str]) -> dict[str, float]:
    """Numbers by name, of texts such as tokens=2e10."""
    inputs = {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            inputs[name] = float(number)
        except ValueError:
            raise ValueError(
                f"{text!r} gives {name} no number; write name=number: tokens=2e10"
            ) from None
    return inputs


def fit(
    table: Path,
    /,
    *,
    budget: float,
    law: str = "parameters",
    delta: float = 1e-3,
    embeddings: Literal["both", "one", "none"] = "both",
    overestimate: float = 1.0,
    read: Reading = Table(),
    heads_multiple: int = 2,
    draws: int = 200,
    seed: int = 0,
    report: Path = Path("scaling-law.html"),
) -> None:
    """Fit a scaling law to training runs, prescribe a size and a shape for a budget, write a page.

    Args:
        table: A .csv, .jsonl or .parquet file, a row a checkpoint, or a folder of them: run, width, depth,
            parameters, tokens, loss.
        budget: Training FLOPs.
        law: parameters: in N and T. compute: in FLOPs per token and T. width-depth: in w, d, N and T.
            shape: in w, d and T. Only the last two prescribe a shape. For others, see `laws`.
        delta: Huber threshold of log loss.
        embeddings: Tables that count as parameters.
        overestimate: Factor on rows below the law; 9 fits a frontier, under which a tenth of the rows lies.
        read: How to read the table.
        heads_multiple: Heads of a shape that can be built are a multiple of this.
        draws: Bootstrap draws over runs.
        seed: Of the draws.
        report: Page to write.
    """
    import numpy as np

    from fourfold_gemstones import registry
    from fourfold_gemstones.architecture import Architecture, Embeddings
    from fourfold_gemstones.page import analyse, ready, said, write
    from fourfold_gemstones.parametric import ParametricLaw
    from fourfold_gemstones.questions.allocation import Lattice

    ready(report)
    estimator = registry.law(
        law, delta=delta, embeddings=Embeddings(embeddings), overestimate=overestimate
    )
    if not isinstance(estimator, ParametricLaw):
        raise ValueError(
            f"--law {law} prescribes no size; ask `identify` or `forecast` of it, or fit parameters, "
            "compute, width-depth or shape"
        )
    analysis = analyse(
        _read((table,), read),
        estimator,
        budget,
        architecture=Architecture(
            vocabulary=read.vocabulary, context=read.context, head_width=read.head_width
        ),
        lattice=Lattice(head_width=read.head_width, heads_multiple=heads_multiple),
        draws=draws,
        generator=np.random.default_rng(seed),
    )
    for text in analysis.warnings:
        _say(f"warning: {text}", style="yellow")
    for text in said(analysis):
        _say(text)
    write(report, analysis)
    _say(f"report: {report}")


def identify(
    table: Path,
    /,
    *,
    law: str = "parameters",
    draws: int = 200,
    seed: int = 0,
    read: Reading = Table(),
) -> None:
    """Say whether runs tell a law's exponents, with intervals, and which next run would help most.

    Args:
        table: As for `fit`.
        law: A name that `laws` lists, or the path of a file that holds one.
        draws: Bootstrap draws over runs.
        seed: Of the draws.
        read: How to read the table.
    """
    import numpy as np

    from fourfold_gemstones import registry
    from fourfold_gemstones.questions import identification

    told = identification.identify(
        registry.law(law), _read((table,), read), draws=draws, generator=np.random.default_rng(seed)
    )
    for text in identification.said(told):
        _say(text)


def contest(
    table: Path,
    /,
    *,
    first: str = "parameters",
    rival: str = "skaling",
    draws: int = 199,
    seed: int = 0,
    run_sd: float = 0.003,
    plan: tuple[str, ...] = (),
    read: Reading = Table(),
) -> None:
    """Test a law against a rival that can do more, and say with which power these runs could refuse it.

    Args:
        table: As for `fit`.
        first: The simpler law.
        rival: The law that can do more.
        draws: Tables made by each law.
        seed: Of their errors.
        run_sd: Spread of log loss between seeds, for the power.
        plan: Runs yet to be done, for the power: parameters=1e9,tokens=2e10 parameters=2e9,tokens=4e10.
        read: How to read the table.
    """
    import numpy as np

    from fourfold_gemstones import registry
    from fourfold_gemstones.questions.rivals import contest as test
    from fourfold_gemstones.questions.rivals import power

    runs, generator = _read((table,), read), np.random.default_rng(seed)
    laws = registry.law(first), registry.law(rival)
    _say(str(test(*laws, runs, draws=draws, generator=generator)))
    plans: list[dict[str, dict[str, float]]] = [{}]
    if plan:
        plans.append(
            {f"plan {row}": _variables(text.split(",")) for row, text in enumerate(plan, start=1)}
        )
    for more in plans:
        able = power(*laws, runs, more, run_sd=run_sd, draws=draws, generator=generator)
        added = f", {len(more)} of them yet to be done at {able.cost:.2g} FLOPs," if more else ""
        _say(
            f"were {rival} true as fitted, {able.runs} runs{added} would refuse {first} with power "
            f"{able.power:.2f}"
        )


def speedup(
    first: Path,
    second: Path,
    /,
    *,
    floors: Literal["shared", "apart"] = "shared",
    draws: int = 200,
    seed: int = 0,
    read: Reading = Table(),
) -> None:
    """Say how much faster the second recipe is than the first, with an interval over runs.

    Args:
        first: Table of the runs of recipe A, as for `fit`.
        second: Table of the runs of recipe B.
        floors: Whether both approach one loss.
        draws: Bootstrap draws over runs.
        seed: Of the draws.
        read: How to read the tables.
    """
    import numpy as np

    from fourfold_gemstones.questions.speedup import speed_up

    ratio = speed_up(
        _read((first,), read),
        _read((second,), read),
        shared=floors == "shared",
        draws=draws,
        generator=np.random.default_rng(seed),
    )
    _say(str(ratio))


def leave_future_out(
    table: Path,
    /,
    *,
    law: str = "parameters",
    level: float = 0.9,
    draws: int = 200,
    seed: int = 0,
    read: Reading = Table(),
) -> None:
    """Foretell each run by the law of all cheaper ones, and say how often the interval held.

    Args:
        table: As for `fit`.
        law: A name that `laws` lists, or the path of a file that holds one.
        level: Of the intervals.
        draws: Bootstrap draws over runs, for each run that is foretold.
        seed: Of the draws.
        read: How to read the table.
    """
    import numpy as np

    from fourfold_gemstones import registry
    from fourfold_gemstones.questions import forecast

    outcomes = []
    runs = _read((table,), read)
    for left in forecast.leave_future_out(
        runs, registry.law(law), draws=draws, generator=np.random.default_rng(seed), level=level
    ):
        outcomes.append(left)
        _say(
            f"{left.run}, by {left.runs} cheaper runs: {left.loss_nats:.4f} ({left.interval.low:.4f} to "
            f"{left.interval.high:.4f}) foretold, {left.measured_nats:.4f} measured: "
            f"{'held' if left.held else 'MISSED'}"
        )
    errors = np.asarray([left.error for left in outcomes])
    _say(
        f"{sum(left.held for left in outcomes)} of {len(outcomes)} intervals of level {level:g} held; mean "
        f"error {100 * np.abs(errors).mean():.2f} %, of which {100 * errors.mean():+.2f} % one way"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Register:
    """Write down the loss that a law expects of a run, with its interval, before the run."""

    table: Positional[Path]
    """Runs that are done, as for `fit`."""
    name: str
    """Of the run that is forecast."""
    inputs: tuple[str, ...]
    """Variables of that run: parameters=1e9 tokens=2e10."""
    law: str = "parameters"
    """A name that `laws` lists, or the path of a file that holds one."""
    level: float = 0.9
    """Of the interval."""
    draws: int = 400
    """Bootstrap draws over runs."""
    seed: int = 0
    """Of the draws."""
    ledger: Path = LEDGER
    """File to add the forecast to."""
    read: Reading = Table()
    """How to read the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Add the loss that a run reached to its forecast."""

    name: Positional[str]
    """Of the forecast."""
    loss_nats: float
    """Measured, in nats a token."""
    ledger: Path = LEDGER
    """File that holds the forecast."""


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """Show all forecasts, and the share of intervals that held, with its own interval."""

    ledger: Path = LEDGER
    """File that holds the forecasts."""


def forecast(
    what: OmitSubcommandPrefixes[
        Annotated[Register, subcommand("register")]
        | Annotated[Measured, subcommand("score")]
        | Annotated[History, subcommand("history")]
    ],
) -> None:
    """Register forecasts before runs, score them after, and see how often their intervals hold."""
    from fourfold_gemstones import registry
    from fourfold_gemstones.questions import forecast as made

    match what:
        case Register() as asked:
            inputs = _variables(asked.inputs)
            fit = registry.law(asked.law).fit(_read((asked.table,), asked.read))
            (told,) = made.written(
                fit,
                {asked.name: inputs},
                law=asked.law,
                draws=asked.draws,
                seed=asked.seed,
                when=made.now(),
                level=asked.level,
            )
            made.register(asked.ledger, told)
            _say(
                f"{told.name}: {told.loss_nats:.4f} nats ({100 * told.level:g} %: {told.low:.4f} to "
                f"{told.high:.4f}), by {told.law} on {told.runs} runs; registered in {asked.ledger}"
            )
        case Measured(name=name, loss_nats=loss, ledger=ledger):
            told = made.score(ledger, name, loss, when=made.now())
            held = told.low <= loss <= told.high
            _say(
                f"{name}: {'held' if held else 'MISSED'} ({told.low:.4f} to {told.high:.4f} foretold)"
            )
        case History(ledger=ledger):
            for text in made.summary(made.history(ledger)):
                _say(text)


def laws() -> None:
    """List the laws that can be fitted, with their equations and sources."""
    from fourfold_gemstones import registry

    for name in registry.names():
        entry = registry.entry(name)
        _say(f"{name}: {entry.equation}")
        _say(f"    {entry.use} Reads {', '.join(entry.law.variables)}. {entry.source}", style="dim")


def sample(path: Path = Path("runs.csv"), /) -> None:
    """Write a made-up table of runs to try `fit` on: twenty runs of a law in width and depth.

    Args:
        path: CSV file to write.
    """
    from fourfold_gemstones.questions.simulate import sample as table

    table().write(path)
    print(path)  # noqa: T201 - where it lies is the answer
