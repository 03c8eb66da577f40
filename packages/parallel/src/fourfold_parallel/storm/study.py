"""The runs that a storm rages over, and its length."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from fourfold_parallel.grid.engine import Fourfold
from fourfold_parallel.run.corpora import TextFiles
from fourfold_parallel.run.data import Packed
from fourfold_parallel.run.engines import DDP, FSDP2, Engine
from fourfold_parallel.run.models import Llama
from fourfold_parallel.run.objective import KeepAll, NextToken
from fourfold_parallel.run.optimizer import AdamW, Cosine
from fourfold_parallel.run.recipe import Run, Steps
from fourfold_parallel.run.tokenizers import BytePairs

TEXT = "the grid holds four axes and every axis carries one kind of split of the work"

ENGINES_OF_TWO: tuple[Engine, ...] = (
    Fourfold(data=2), Fourfold(depth=2), Fourfold(row=2), Fourfold(col=2),
    Fourfold(data=2, shards_optimizer=True), DDP(), FSDP2(reshard_after_forward=True),
)  # fmt: skip
"""What the small run goes through."""


def small_run(folder: Path, *, steps: int = 40, every: int = 4) -> Run:
    """A little Llama on text made here: what a storm rages over where no other run is named."""
    words = TEXT.split()
    paths = []
    for document in range(10):
        text = [words[(i * i + 7 * i * document + document) % len(words)] for i in range(400)]
        path = folder / f"document-{document}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(" ".join(text), encoding="utf-8")
        paths.append(str(path))
    return Run(
        name="storm",
        model=Llama(
            width=32, depth=2, heads=4, kv_heads=2, hidden=64, vocabulary=320, context=32, tied=True
        ),
        data=Packed(
            corpus=TextFiles(paths=tuple(paths), licence="made here"),
            tokenizer=BytePairs(vocabulary=320), held_out=0.1,
        ),
        objective=NextToken(mask=KeepAll()),
        optimizer=AdamW(learning_rate=3e-3, weight_decay=0.1, beta1=0.9, beta2=0.95, epsilon=1e-8),
        schedule=Cosine(warmup_steps=2, floor=0.1),
        horizon=Steps(count=steps),
        batch=8, microbatch=4, sequence=24, max_grad_norm=0.5, precision="fp32",
        engine=Fourfold(data=2), seed=3, validate_every=10, checkpoint_every=every,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Small:
    """A little Llama on text made here, on every kind of grid of two ranks in turn."""

    steps: int = 40
    checkpoint_every: int = 4
    engines: tuple[Engine, ...] = ENGINES_OF_TWO

    def runs(self, folder: Path) -> tuple[Run, ...]:
        """One for each engine; the text is written into the folder."""
        run = small_run(folder, steps=self.steps, every=self.checkpoint_every)
        return tuple(replace(run, engine=engine) for engine in self.engines)


@dataclass(frozen=True, slots=True, kw_only=True)
class Storm:
    """Kills over runs, one life each in turn, until there have been enough."""

    runs: Small | Run
    kills: int
    """Ranks to kill in all, as many in each of `ranks.MOMENTS`."""
    ranks: int = 2
    """Of each launch."""
    pairs_of: int = 0
    """Ranks whose grids are tried in all pairs; 0 leaves that out."""
    seed: int = 0
    """Decides who dies when."""
