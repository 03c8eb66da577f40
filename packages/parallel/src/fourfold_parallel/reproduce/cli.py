"""The command line of every package: one subcommand a function, mistakes answered in a sentence.

A package's `commands.py` holds the functions: their signature is the options, their docstring the help.
They import what is heavy inside, so that `--help` and a mistake are answered at once.
"""

import importlib.metadata
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.text import Text

from fourfold_parallel.common.extras import remedy
from fourfold_parallel.common.sinks import SinkName, named
from fourfold_parallel.reproduce.scale import Scale

Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]
"""A flag that is off unless it is given."""


def main(
    package: str,
    commands: Mapping[str, Callable[..., None]],
    arguments: Sequence[str] | None = None,
) -> None:
    """Perform the subcommand that the arguments name; without arguments, say which there are.

    Exits with status 2 and a sentence where the command raises a `ValueError` or an `OSError`, or lacks a
    library of an extra; with 130 where it is interrupted.

    Args:
        package: `goldfish`; the name in `fourfold_goldfish`.
        commands: functions by the word that calls them.
        arguments: those of this process where none are given.
    """
    words = [*(sys.argv[1:] if arguments is None else arguments)] or ["--help"]
    distribution = importlib.metadata.metadata(f"fourfold-{package.replace('_', '-')}")
    if words == ["--version"]:
        print(f"{distribution['Name']} {distribution['Version']}")  # noqa: T201 - what was asked for
        return
    target = Console(stderr=True, highlight=False)
    chosen: dict[str, Callable[..., Any]] = {**commands}
    try:
        tyro.extras.subcommand_cli_from_dict(
            chosen,
            prog=f"python -m fourfold_{package}",
            description=f"{distribution['Summary']}. Version {distribution['Version']}.",
            args=words,
            sort_subcommands=False,
        )
    except ModuleNotFoundError as missing:
        target.print(
            Text.assemble(("error: ", "red"), remedy(missing, distribution=distribution["Name"])),
            soft_wrap=True,
        )
        sys.exit(2)
    except (ValueError, OSError) as error:
        target.print(Text.assemble(("error: ", "red"), str(error)), soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        target.print(
            "interrupted; the same command, with --resume where it has one, goes on from here"
        )
        sys.exit(130)


def reproduces(package: str) -> Callable[..., None]:
    """The subcommand `reproduce` of a package that announces an experiment."""

    def reproduce(
        *,
        scale: Scale = "smoke",
        out: Path = Path("out"),
        resume: Switch = False,
        sink: tuple[SinkName, ...] = (),
    ) -> None:
        """Reproduce the paper: run its experiment, judge its claims, draw its figures.

        Args:
            scale: smoke: minutes on 2 cores. laptop: longer, larger. paper: write the job files.
            out: Folder for records, ledger and figures; each scale and package gets its own inside.
            resume: Keep what is finished and go on from checkpoints, instead of starting over.
            sink: Where the events of the records go too, as they are written.
        """
        sinks = named(sink)
        from fourfold_parallel.common.progress import silent
        from fourfold_parallel.launch import is_main_rank
        from fourfold_parallel.reproduce import terminal
        from fourfold_parallel.reproduce.experiment import experiment_of, perform
        from fourfold_parallel.reproduce.report import compare

        target = terminal.console()
        terminal.start(target)
        experiment = experiment_of(package)
        if scale == "paper":
            terminal.write_launches(target, package, experiment.launches(), out / scale / package)
            return
        bars = terminal.Bars(target, len(experiment.stages(scale)))
        with bars.running():
            outcome = perform(
                experiment,
                scale,
                out / scale / package,
                resume=resume,
                sinks=sinks,
                progress=lambda stage: bars.named(stage.name) if is_main_rank() else silent,
            )
        target.print(terminal.compared(package, compare(package, outcome.folder)), soft_wrap=True)
        target.print(f"records, ledger and figures: {outcome.folder}", soft_wrap=True)
        target.print(f"the page of them: fourfold report {out / scale}", soft_wrap=True)

    return reproduce
