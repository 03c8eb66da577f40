"""Subcommands of `fourfold`, over all installed packages: reproduce them, write the report, list them."""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitSubcommandPrefixes, Positional, subcommand

from fourfold_parallel.common.sinks import SinkName, named
from fourfold_parallel.reproduce.cli import Switch
from fourfold_parallel.reproduce.scale import Scale


def reproduce(
    *,
    scale: Scale = "smoke",
    only: str = "all",
    resume: Switch = False,
    jobs: int = os.cpu_count() or 1,
    sink: tuple[SinkName, ...] = (),
    out: Path = Path("out"),
) -> None:
    """Reproduce the papers at a scale and write a report: what was found, and beside it this run.

    Args:
        scale: smoke: a few minutes on 2 cores. laptop: what the committed findings rest on; it says first
            what that took. paper: write, for each paper, job files with the paper's own hyper-parameters,
            and print how to start them.
        only: Packages, separated by commas: goldfish,loki.
        resume: Keep what is finished and go on from checkpoints, instead of starting over.
        jobs: Packages worked on at a time; they share the cores.
        sink: Where the events of the records go too, as they are written.
        out: Folder for records, ledgers, figures and the report.
    """
    sinks = named(sink)  # what is missing is said before anything heavy is imported
    from fourfold_parallel.reproduce import report, side_by_side, terminal
    from fourfold_parallel.reproduce.experiment import experiment_of, installed

    target = terminal.console()
    terminal.start(target)
    names = installed() if only == "all" else [name.strip() for name in only.split(",")]
    experiments = {name: experiment_of(name) for name in names}
    if scale == "paper":
        for name, experiment in experiments.items():
            terminal.write_launches(target, name, experiment.launches(), out / scale / name)
        return
    if scale != "smoke":
        terminal.print_costs(target, names, scale)
    ready = [name for name, experiment in experiments.items() if experiment.stages(scale)]
    started_s = time.perf_counter()
    outcomes = side_by_side.perform_all(
        ready, scale, out / scale, resume=resume, jobs=jobs, target=target, sinks=sinks
    )
    judged = [name for name in ready if outcomes[name].rows]
    if judged:
        elapsed_s = time.perf_counter() - started_s
        page = report.write(out / scale, scale=scale, elapsed_s=elapsed_s)
        for name in judged:
            entries = report.compare(name, out / scale / name)
            target.print(terminal.compared(name, entries), soft_wrap=True)
        terminal.print_next(target, page, scale, elapsed_s)
    errors = [f"{name}: {outcomes[name].error}" for name in ready if outcomes[name].error]
    if errors:
        raise ValueError("\n".join(errors))


def report(folder: Path, /) -> None:
    """Write the report again from the ledgers, figures and records of `out/SCALE`.

    Args:
        folder: Such as `out/smoke`.
    """
    from fourfold_parallel.reproduce.report import write

    print(write(folder, scale=folder.name))  # noqa: T201 - where it lies is the answer


def plan(
    *,
    model: str,
    gpus: int,
    batch: int,
    sequence: int,
    machine: str,
    precision: Literal["bf16", "fp32"] = "bf16",
    attention: Literal[
        "eager",
        "sdpa",
        "flex_attention",
        "flash_attention_2",
        "flash_attention_3",
        "flash_attention_4",
    ] = "sdpa",
    fused: Switch = False,
    top: int = 8,
    why_not: tuple[str, ...] = (),
    launch: Switch = False,
    verify_top: int = 0,
    page: Path = Path("plan.html"),
    trace: Path = Path("plan.trace.json"),
) -> None:
    """Rank every grid of a number of devices for a model, and say why.

    Args:
        model: A hub id, a folder, or a config.json of transformers; no weights are read.
        gpus: Devices. Any number; every ordered factorisation into data, depth, row and col is tried.
        batch: Sequences of a step, over all devices.
        sequence: Tokens of a sequence.
        machine: perlmutter, frontier, alps, dgx-a100, dgx-h100, dgx-h200, dgx-b200, p5-h100, or a file that
            `fourfold probe` wrote.
        precision: Of products: bf16 (autocast) or fp32.
        attention: As transformers names it.
        fused: Norms, activations and the loss are fused kernels (torch.compile, or written by hand).
        top: Grids shown.
        why_not: Grids to explain, such as row=8,data=512.
        launch: Print the engine and the torchrun and Slurm lines of the winner.
        verify_top: Run the first so many grids for a few steps on this machine's CPUs.
        page: Where the page goes.
        trace: Where the simulated step goes, for Perfetto.
    """
    from fourfold_parallel.plan.job import GRID, GRID_ON_CPU, Job
    from fourfold_parallel.plan.machines import machine_of
    from fourfold_parallel.plan.search import rank
    from fourfold_parallel.plan.simulate import simulate
    from fourfold_parallel.planning import terminal
    from fourfold_parallel.planning.jobs import config_of, layout_of, transformer_of
    from fourfold_parallel.planning.page import write_page
    from fourfold_parallel.planning.trace import write_trace

    on = machine_of(machine)
    job = Job(
        model=transformer_of(model), batch=batch, sequence=sequence, precision=precision,
        attention=attention, fused=fused, storage=GRID_ON_CPU if on.host_computes else GRID,
    )  # fmt: skip
    ranking = rank(job, on, gpus)
    terminal.show(ranking, top=top, why_not=[layout_of(text) for text in why_not])
    write_page(ranking, page)
    write_trace(simulate(job, ranking.best.layout, on, records=True).spans, trace)
    if launch:
        terminal.show_launch(ranking)
    if verify_top:
        from fourfold_parallel.planning.verify import verify

        terminal.show_verified(verify(config_of(model), ranking, first=verify_top))
    terminal.say(f"page: {page}   trace: {trace}")


def certify(
    model: str,
    /,
    *,
    ranks: int = 8,
    dtype: Literal["both", "float64", "bfloat16"] = "both",
    out: Path | None = None,
) -> None:
    """Show that a model on every grid is the model: a small one of its kind, against itself in one process.

    Loss, logits, every gradient and one optimizer step are compared on every factorisation of the ranks into
    data, depth, row and col, and parameters are carried from grid to grid through a saved folder. It takes
    minutes on a CPU. Status 0: some grid is equal, none is wrong or crashes; 1: one is, or all refuse.

    Args:
        model: A hub id, a folder, or a config.json of transformers; no weights are read. It is shrunk so that
            every kind of its layers occurs.
        ranks: Processes on this machine, 16 at most.
        dtype: float64 shows a missing term, bfloat16 what rounding does; both.
        out: A folder for certificate.html and certificate.json.
    """
    from contextlib import nullcontext

    import transformers

    from fourfold_parallel.certify import terminal
    from fourfold_parallel.certify.certificate import certify as compare
    from fourfold_parallel.common.progress import logged
    from fourfold_parallel.reproduce.terminal import Bars, console, start

    target = console()
    start(target)
    transformers.logging.set_verbosity_error()
    bars = Bars(target, 1)
    with bars.running() if target.is_terminal else nullcontext():
        certificate = compare(
            model,
            ranks=ranks,
            dtypes=("float64", "bfloat16") if dtype == "both" else (dtype,),
            progress=bars.named(model) if target.is_terminal else logged,
        )
    terminal.show(certificate)
    if out is not None:
        from fourfold_parallel.certify.page import write_page

        certificate.save(out / "certificate.json")
        write_page(certificate, out / "certificate.html")
        print(f"page: {out / 'certificate.html'}   {out / 'certificate.json'}")  # noqa: T201 - where it lies
    if not certificate.holds:
        sys.exit(1)


def watch(record: Path, /, *, once: Switch = False, patience_s: float = 600.0) -> None:
    """Follow a record while its run goes on: loss, tokens a second, time left, memory.

    Args:
        record: The .jsonl file that the run writes.
        once: Show how it stands and end.
        patience_s: A run that writes nothing for so many seconds is taken for dead.
    """
    from rich.console import Console

    from fourfold_parallel.reproduce.watch import watch as follow

    follow(record, Console(highlight=False), once=once, patience_s=patience_s)


def schedule(record: Path, /, *, out: Path | None = None) -> None:
    """Draw what a training out of core planned: computation, both ways of the store, what is resident.

    Args:
        record: The .jsonl file that the run wrote, under the engine OutOfCore.
        out: The figure; by default beside the record, with the ending .svg.
    """
    from fourfold_parallel.common.records import read_record
    from fourfold_parallel.planning import outofcore
    from fourfold_parallel.reproduce import figures

    plans = read_record(record).of("plan")
    if not plans:
        raise ValueError(f"{record} holds no plan: the run was not under the engine OutOfCore")
    path = out or record.with_suffix(".svg")
    with figures.style():
        figures.save(outofcore.schedule(plans[-1]), path)
    told = plans[-1].values
    print(f"{path}: {told['decisions']}, {told['predicted_s']:.3f} s")  # noqa: T201 - where it lies


def packages() -> None:
    """List the installed papers, with the command that says what each can do."""
    from importlib.metadata import metadata

    from fourfold_parallel.reproduce.experiment import installed

    for name in installed():
        summary = metadata(f"fourfold-{name.replace('_', '-')}")["Summary"]
        print(f"{summary}\n    python -m fourfold_{name} --help")  # noqa: T201 - the answer


def probe(
    *,
    out: Path,
    ranks: int = 2,
    model: Path | Literal["llama"] = "llama",
    width: int = 512,
    batch: int = 8,
    sequence: int = 128,
    precision: Literal["fp32", "bf16"] = "fp32",
    clock: Literal["wall", "processor"] = "wall",
) -> None:
    """Measure this machine for the planner: products and collectives at a model's local shapes.

    Started by torchrun it measures the ranks of that launch, else it launches `ranks` here.

    Args:
        out: The file to write, such as machine.json.
        ranks: Processes that compute and communicate at once.
        model: A folder or file with a configuration of transformers; llama: four layers of `width`.
        width: Of that Llama's residual stream.
        batch: Sequences of a step, over all ranks.
        sequence: Tokens of a sequence.
        precision: Of the products.
        clock: wall, or processor where other work shares the cores of a CPU: what the ranks would take
            on all cores by themselves.
    """
    from fourfold_parallel import launch
    from fourfold_parallel.planning.probing import probe_launched

    if not launch.is_launched():
        launch.relaunch(sys.argv[1:], ranks=ranks)
        return
    machine = probe_launched(
        width if model == "llama" else model, name=out.stem, batch=batch, sequence=sequence,
        precision=precision, clock=clock,
    )  # fmt: skip
    if launch.is_main_rank():
        machine.save(out)
        print(  # noqa: T201 - what was written
            f"{out}: {len(machine.products)} products, {len(machine.parts)} pieces of a step and "
            f"{len(machine.curves)} kinds of collectives, measured on {launch.world_size()} ranks"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class List:
    """Step, ranks, engine and size of each checkpoint in a folder, and which is the latest."""

    folder: Positional[Path]
    """Where a run writes its checkpoints, or one of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verify:
    """Read every byte and compare it with its checksum; name tensor and file of whatever differs."""

    folder: Positional[Path]
    """Where a run writes its checkpoints, or one of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """Write plain weights that `from_pretrained` reads, whatever grid and engine wrote the checkpoint."""

    folder: Positional[Path]
    """A checkpoint, or a folder of them, of which the last is taken."""
    out: Path
    """Gets model.safetensors, and configuration and tokenizer beside it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reshard:
    """Write a checkpoint anew in another number of files. Reading needs no such step: any grid reads any."""

    folder: Positional[Path]
    """A checkpoint, or a folder of them, of which the last is taken."""
    out: Path
    """Gets a checkpoint of the same name."""
    ranks: int
    """Each writes its files; 1 leaves whole tensors."""


def checkpoint(
    what: OmitSubcommandPrefixes[
        Annotated[List, subcommand("list")]
        | Annotated[Verify, subcommand("verify")]
        | Annotated[Export, subcommand("export")]
        | Annotated[Reshard, subcommand("reshard")]
    ],
) -> None:
    """Look at the checkpoints of a run, check them, and turn them into other files."""
    from rich.console import Console

    from fourfold_parallel.reproduce import checkpoints
    from fourfold_parallel.run import checkpoint as made

    target = Console(highlight=False)
    match what:
        case List(folder=folder):
            checkpoints.show(folder, target)
        case Verify(folder=folder):
            checkpoints.verify(folder, target)
        case Export(folder=folder, out=out):
            target.print(str(made.export(checkpoints.newest(folder), out)), soft_wrap=True)
        case Reshard(folder=folder, out=out, ranks=ranks):
            if ranks < 1:
                raise ValueError(f"ranks={ranks}; use 1 or more")
            path = made.reshard(checkpoints.newest(folder), out, ranks=ranks)
            target.print(str(path), soft_wrap=True)


def storm(
    run: str,
    /,
    *,
    kills: int = 100,
    ranks: int = 2,
    pairs: int = 8,
    seed: int = 0,
    out: Path = Path("out/storm"),
    record: Path = Path("out/storm.jsonl"),
) -> None:
    """Kill ranks of a training at random moments, start it again, and compare its end with one without kills.

    Needs `fourfold-parallel[testing]`. Ends with status 2 where a kill costs more than the steps since the
    last whole checkpoint, an ending differs by a bit, a process or half a file is left, or a planted fault
    is missed.

    Args:
        run: small: a little Llama, on five grids of two ranks in turn. Or the .jsonl record of a run.
        kills: Ranks to kill, as many in each part: data, forward, collective, optimizer, save, rename.
        ranks: Of each launch; processes of this machine.
        pairs: Save on each grid of so many ranks and load on each other one; 0 leaves that out.
        seed: Decides who dies when.
        out: Folder for checkpoints; it is emptied.
        record: JSONL file of every kill and what was left behind.
    """
    from rich.console import Console

    from fourfold_parallel.common.progress import Logged
    from fourfold_parallel.common.records import RecordWriter, header, read_record
    from fourfold_parallel.reproduce import terminal
    from fourfold_parallel.run.recipe import Run
    from fourfold_parallel.storm.storm import storm as rage
    from fourfold_parallel.storm.study import Small, Storm

    terminal.start(terminal.console())
    described = Small() if run == "small" else read_record(Path(run)).run
    if not isinstance(described, Run | Small):
        raise ValueError(f"{run} is no record of one training run; name one, or small")
    study = Storm(runs=described, kills=kills, ranks=ranks, pairs_of=pairs, seed=seed)
    record.unlink(missing_ok=True)
    with RecordWriter(record) as records:
        records.write_header(header(study, seed=seed, world_size=ranks, materials=(), overrides=()))
        toll = rage(study, out, records, Logged())
        records.write("finished")
    target = Console(highlight=False)
    target.print(
        f"{sum(toll.kills.values())} kills in {toll.lives} lives, {sum(toll.lost)} steps lost, at most "
        f"{max(toll.lost, default=0)} by one; {record}",
        soft_wrap=True,
    )
    if toll.faults:
        raise ValueError("; ".join(toll.faults))
