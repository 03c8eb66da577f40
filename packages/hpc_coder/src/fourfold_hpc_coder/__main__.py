"""`python -m fourfold_hpc_coder`: score outputs, make data, fine-tune, generate, reproduce the study."""

import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fourfold_hpc_coder.judge import toolchain
from fourfold_hpc_coder.judge.bench import JudgeSettings
from fourfold_hpc_coder.options import Finetune, Generate, MakeData, Score, Study, chosen_models
from fourfold_hpc_coder.pareval.checkout import open_checkout
from fourfold_hpc_coder.pareval.files import Question
from fourfold_hpc_coder.sandbox.process import find_sandbox
from fourfold_hpc_coder.score import report, score, tables
from fourfold_hpc_coder.score.schedule import AnyProblem
from fourfold_hpc_coder.vocabulary import Processors
from fourfold_parallel.common.progress import Progress as Work


def study(options: Study) -> None:
    """Hand over to the runtime's command line, which knows every package's experiment."""
    from fourfold_hpc_coder.reproduce.experiment import EXPERIMENT
    from fourfold_parallel.reproduce.cli import main as perform

    words = ["--scale", options.scale, "--out", str(options.out)]
    perform(EXPERIMENT, [*words, *(["--resume"] if options.resume else [])])


Command = (
    Annotated[Score, tyro.conf.subcommand("score")]
    | Annotated[MakeData, tyro.conf.subcommand("make-data")]
    | Annotated[Finetune, tyro.conf.subcommand("finetune")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Study, tyro.conf.subcommand("study")]
)


@contextmanager
def bar(target: Console, title: str) -> Iterator[Work]:
    """A bar with time left; nothing where nobody watches a terminal."""
    with Progress(
        TextColumn(f"[bold]{title}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=target,
        disable=not target.is_terminal,
    ) as bars:
        task = bars.add_task("", total=None, note="")

        def progress(done: int, total: int, note: str) -> None:
            bars.update(task, completed=done, total=total, note=note)

        yield progress


def score_outputs(options: Score, target: Console) -> None:
    """Score, write, and say in the terminal what came out."""
    models = chosen_models(options.models)
    numbers = (options.k, options.threads, options.ranks, (options.jobs, options.repetitions))
    if any(min(given, default=0) < 1 for given in numbers):
        raise ValueError(
            f"k={options.k}, threads={options.threads}, ranks={options.ranks}, jobs={options.jobs}, "
            f"repetitions={options.repetitions}: use numbers of 1 or more"
        )
    if not 0 < options.time_limit_s < math.inf:
        raise ValueError(
            f"--time-limit-s {options.time_limit_s:g} is no time to answer in; use seconds above 0"
        )
    if options.problem_sizes and not options.pareval:
        raise ValueError("--problem-sizes belongs to --pareval PATH; name the checkout as well")
    find: Callable[[Question], AnyProblem] = score.built_in
    if options.pareval:
        find = open_checkout(options.pareval, options.problem_sizes).find
    sandbox = find_sandbox(allow_none=options.unsafe_no_sandbox)
    settings = JudgeSettings(
        time_limit_s=options.time_limit_s, repetitions=options.repetitions
    ).with_launches(
        {
            "omp": tuple(Processors(threads=threads) for threads in options.threads),
            "mpi": tuple(Processors(ranks=ranks) for ranks in options.ranks),
        }
    )
    plan = score.Scoring(
        outputs=options.outputs,
        folder=options.out,
        models=models,
        settings=settings,
        sandbox=sandbox,
        jobs=options.jobs,
        ks=options.k,
        is_cached=not options.no_cache,
        extracts_bodies=options.extract_bodies,
        find=find,
    )
    with bar(target, "scoring") as progress:
        scored = score.score(plan, progress)
    facts = [f"sandbox: {sandbox.name}" + (f" ({sandbox.gap})" if sandbox.gap else "")]
    facts += sorted({toolchain.identity(one.question.model) for one in scored.judged})
    page = report.write(
        scored,
        options.out / "report.html",
        title=f"Scores of {options.outputs.name}",
        ks=options.k,
        settings=settings,
        facts=facts,
    )
    say(scored, target)
    target.print(f"{scored.reused} verdicts reused. Report: {page}", soft_wrap=True, markup=False)


def say(scored: tables.ScoringResult, target: Console) -> None:
    """Every failure in a sentence, what was left out, and the counts."""
    for one in scored.judged:
        for index, judgement in enumerate(one.judgements):
            if judgement.verdict != "correct":
                place = f"{one.question.name} ({one.question.model}) answer {index}"
                line = f"{place}: {judgement.verdict}: {judgement.because}"
                target.print(line, soft_wrap=True, markup=False)
    for problem in scored.omissions:
        target.print(f"left out: {problem.place}: {problem.because}", soft_wrap=True, markup=False)
    for note in scored.notes:
        target.print(note, soft_wrap=True, markup=False)
    for model, found in tables.counts(scored).items():
        shown = ", ".join(f"{count} {verdict}" for verdict, count in found.items())
        target.print(f"{model}: {shown}", markup=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Pick a subcommand and run it; messages about input go to standard error, with exit code 2."""
    target = Console(stderr=True, highlight=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    options = tyro.cli(Command, prog="python -m fourfold_hpc_coder", args=arguments)
    try:
        match options:
            case Score():
                score_outputs(options, target)
            case Study():
                study(options)
            case MakeData():
                from fourfold_hpc_coder.commands import make_data

                with bar(target, "samples") as progress:
                    make_data(options, target, progress)
            case Finetune():
                from fourfold_hpc_coder.commands import finetune

                with bar(target, "steps") as progress:
                    finetune(options, target, progress)
            case Generate():
                from fourfold_hpc_coder.commands import generate

                with bar(target, "prompts") as progress:
                    generate(options, target, progress)
    except (ValueError, OSError) as error:
        target.print(str(error), style="red", soft_wrap=True, markup=False)
        sys.exit(2)
    except KeyboardInterrupt:
        target.print("interrupted; the same command goes on from here")
        sys.exit(130)


if __name__ == "__main__":
    main()
