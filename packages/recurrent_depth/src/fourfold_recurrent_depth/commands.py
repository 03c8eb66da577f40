"""The commands of `python -m fourfold_recurrent_depth` besides reproducing the paper."""

from pathlib import Path
from typing import Literal

from fourfold_parallel.common.sinks import SinkName


def train(
    shape: Literal["tiny", "huginn"],
    /,
    *,
    text: tuple[Path, ...],
    licence: str = "not stated",
    steps: int = 300,
    set: tuple[str, ...] = (),  # noqa: A002
    sink: tuple[SinkName, ...] = (),
    out: Path = Path("recurrent-model"),
) -> None:
    """Train a recurrent-depth model on your own text, and leave a folder that `from_pretrained` reads.

    Args:
        shape: tiny: 0.2 M parameters on bytes, minutes on a laptop; `steps` says how long. huginn: the
            paper's own run, 3.5 B parameters, 47,360 steps on 4,096 GPUs (`reproduce --scale paper`).
        text: Plain UTF-8 files, one document each.
        licence: What you may do with them; stated in the record.
        steps: Optimizer steps of the tiny shape.
        set: Fields that shall differ from the recipe, such as optimizer.learning_rate=1e-3; the record is
            marked.
        sink: Where the events of the record go too, as they are written.
        out: Folder for the record, checkpoints and, in `model`, weights, configuration and tokenizer. The
            same command goes on from the last checkpoint.
    """
    from dataclasses import replace

    from fourfold_parallel.common.progress import silent
    from fourfold_parallel.common.sinks import named
    from fourfold_parallel.common.values import overridden
    from fourfold_parallel.launch import is_main_rank
    from fourfold_parallel.reproduce import terminal
    from fourfold_parallel.run.corpora import TextFiles
    from fourfold_parallel.run.data import Packed, tokenize
    from fourfold_parallel.run.train import train as train_run
    from fourfold_parallel.run.train import trained_model
    from fourfold_recurrent_depth.reproduce.recipes import language_run, table_1

    if steps < 1:
        raise ValueError(f"--steps {steps} trains nothing; use 1 or more")
    run = table_1("paper") if shape == "huginn" else language_run(0, steps=steps)
    corpus = TextFiles(paths=tuple(map(str, text)), licence=licence)
    corpus.files()  # refuses missing files before anything is loaded
    assert isinstance(run.data, Packed)
    data = replace(run.data, corpus=corpus)
    run = overridden(replace(run, name=f"{shape}-own-text", data=data), set)
    target = terminal.console()
    terminal.start(target)
    bars = terminal.Bars(target, 1)
    with bars.running():
        last = train_run(
            run,
            record=out / "record.jsonl",
            checkpoints=out / "checkpoints",
            progress=bars.named(run.name) if is_main_rank() else silent,
            sinks=named(sink),
            overrides=set,
        )
    if is_main_rank():
        trained_model(run, last).save_pretrained(out / "model")
        tokens = tokenize(corpus, data.tokenizer)
        tokens.tokenizer().tokenizer.save_pretrained(str(out / "model"))
        target.print(f"AutoModelForCausalLM.from_pretrained reads {out / 'model'}")
