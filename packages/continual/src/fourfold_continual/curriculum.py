"""Go on training a model of yours with text of yours: the run, and what is read before and after it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fourfold_continual.forgetting import HeldOutLoss, annealed, replayed
from fourfold_continual.held_out import Sampled, held_out_losses, held_out_of, write_held_out
from fourfold_parallel.common.progress import Progress, logged
from fourfold_parallel.common.records import Record, RecordWriter, read_record
from fourfold_parallel.common.sinks import OpenSink
from fourfold_parallel.launch import is_main_rank
from fourfold_parallel.run.corpora import Corpus, TextFiles
from fourfold_parallel.run.data import Packed
from fourfold_parallel.run.engines import Single
from fourfold_parallel.run.models import Model
from fourfold_parallel.run.objective import KeepAll, NextToken
from fourfold_parallel.run.optimizer import AdamW, Constant, Cosine, Phase, Phases
from fourfold_parallel.run.recipe import Run, Steps
from fourfold_parallel.run.tokenizers import Tokenizer
from fourfold_parallel.run.train import train, trained_model

ENDINGS = (".txt", ".md", ".rst", ".py")
"""Of the files that are read of a folder."""
ANNEALED = 6
"""With cleaner text the last of so many parts of the steps is the second stage."""


def text_files(paths: Sequence[Path]) -> TextFiles:
    """Files of yours, and all text files of folders of yours, as a corpus.

    Raises:
        ValueError: A path is missing, or a folder holds no text.
    """
    files: list[Path] = []
    for path in paths:
        inside = sorted(each for each in path.rglob("*") if each.suffix in ENDINGS)
        if path.is_dir() and not inside:
            raise ValueError(
                f"{path} holds no text ({' '.join(ENDINGS)}); name another folder, or files"
            )
        files += inside if path.is_dir() else [path]
    corpus = TextFiles(paths=tuple(files), licence="yours")
    corpus.files()
    return corpus


@dataclass(frozen=True, slots=True, kw_only=True)
class Curriculum:
    """New text with a share of old, and possibly a second stage on cleaner text with a falling rate."""

    old: Sampled
    new: Sampled
    replay: float
    """Share of the rows that are old."""
    clean: Sampled | None = None
    """Half of what is new in the last sixth of the steps; without it there is one stage."""

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer,
        *,
        old: Corpus,
        new: Corpus,
        replay: float,
        clean: Corpus | None = None,
        held_out: float = 0.05,
        rows: int = 128,
    ) -> "Curriculum":
        """Texts in the ids of one tokenizer, each with rows held out.

        Args:
            tokenizer: the model's.
            old: text of the kind that the model knows.
            new: text that it is to learn.
            replay: share of the rows that are old.
            clean: text to end on.
            held_out: share of each text that is only measured on.
            rows: held-out rows of each text that are read, at most.
        """

        def sampled(corpus: Corpus) -> Sampled:
            source = Packed(corpus=corpus, tokenizer=tokenizer, held_out=held_out)
            return Sampled(source=source, rows=rows)

        return cls(
            old=sampled(old),
            new=sampled(new),
            replay=replay,
            clean=None if clean is None else sampled(clean),
        )

    def sources(self) -> dict[str, Sampled]:
        """The texts by the names of their parts."""
        named = {"old": self.old, "new": self.new}
        return named if self.clean is None else {**named, "clean": self.clean}

    def run(
        self,
        model: Model,
        *,
        name: str,
        steps: int,
        batch: int,
        sequence: int,
        learning_rate: float,
        seed: int = 0,
    ) -> Run:
        """The run on one process in float32; `dataclasses.replace` changes what else it should be.

        Rates warm up over a thirtieth of the steps. In one stage they fall by a cosine to a tenth; before
        cleaner text they stay, and fall on it.
        """
        warmup = -(-steps // 30)
        mixed = replayed(self.old, self.new, replay=self.replay)
        if self.clean is None:
            data, schedule = mixed, Cosine(warmup_steps=warmup, floor=0.1)
        else:
            last = max(1, steps // ANNEALED)
            stages = (steps - last, last)
            share = round((1 - self.replay) / 2, 6)
            data = annealed(mixed, self.clean, share=share, steps=stages)
            schedule = Phases(
                phases=(
                    Phase(schedule=Constant(warmup_steps=warmup), steps=stages[0]),
                    Phase(schedule=Cosine(warmup_steps=0, floor=0.1), steps=stages[1]),
                )
            )
        return Run(
            name=name,
            model=model,
            data=data,
            objective=NextToken(mask=KeepAll()),
            optimizer=AdamW(
                learning_rate=learning_rate, weight_decay=0.1, beta1=0.9, beta2=0.95, epsilon=1e-8
            ),
            schedule=schedule,
            horizon=Steps(count=steps),
            batch=batch,
            microbatch=batch,
            sequence=sequence,
            max_grad_norm=1.0,
            precision="fp32",
            engine=Single(),
            seed=seed,
            validate_every=max(1, steps // 6),
            checkpoint_every=max(1, steps // 3),
        )


def go_on(
    curriculum: Curriculum,
    run: Run,
    *,
    record: Path,
    checkpoints: Path,
    progress: Progress = logged,
    sinks: Sequence[OpenSink] = (),
) -> dict[str, tuple[HeldOutLoss, HeldOutLoss]]:
    """Train, and read the held-out rows of each text with the model as it was and as it is.

    Called again after an interruption it goes on; every rank calls it.

    Args:
        curriculum: whose run it is.
        run: as `Curriculum.run` gave it, or changed.
        record: JSONL file; the losses before and after are its last events ("held_out").
        checkpoints: folder of the run's checkpoints.
        progress: told after each step.
        sinks: get every event of the record.

    Returns:
        (before, after) by the name of the text; empty on all ranks but the first.
    """
    started_s, names = time.perf_counter(), curriculum.sources()
    if record.exists():
        whole = read_record(record)
        if whole.is_finished and whole.run == run:
            return {
                name: (_read(whole, name, "before"), _read(whole, name, "after")) for name in names
            }
    last = train(run, record=record, checkpoints=checkpoints, progress=progress, sinks=sinks)
    if not is_main_rank():
        return {}
    streams = {
        name: source.validation(sequence=run.sequence)
        for name, source in curriculum.sources().items()
    }
    models = {"before": run.model.build(seed=run.seed).eval(), "after": trained_model(run, last)}
    losses = {
        when: held_out_losses(model, streams, batch=run.microbatch)
        for when, model in models.items()
    }
    with RecordWriter(record, sinks) as records:
        for when, parts in losses.items():
            write_held_out(records, parts, when=when)
        records.write("finished", elapsed_s=round(time.perf_counter() - started_s, 1))
    return {name: (losses["before"][name], losses["after"][name]) for name in streams}


def _read(record: Record, part: str, when: str) -> HeldOutLoss:
    return held_out_of(record.only("held_out", part=part, when=when))
