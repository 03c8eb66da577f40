"""Remedies side by side on passages that were inserted at random: recipes, the study, and its measures."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, assert_never

from jaxtyping import Int
from scipy import stats
from torch import Tensor

from fourfold_goldfish.insertions import Cell, Insertions
from fourfold_goldfish.loss import Goldfish
from fourfold_goldfish.memorization.extraction import Sampling, extract
from fourfold_goldfish.memorization.membership import token_statistics
from fourfold_goldfish.memorization.near_verbatim import near_verbatim
from fourfold_goldfish.reproduce.mitigations import (
    LossTruncation,
    PromptMask,
    Sinks,
    SpelledGoldfish,
)
from fourfold_goldfish.reproduce.recipes import AUTHORS, goldfish
from fourfold_parallel.common.records import Event
from fourfold_parallel.launch import is_main_rank
from fourfold_parallel.reproduce.claims import Interval, Records, over_seeds, proportion
from fourfold_parallel.reproduce.experiment import Workplace
from fourfold_parallel.run.corpora import Wikipedia
from fourfold_parallel.run.engines import Single
from fourfold_parallel.run.models import Llama
from fourfold_parallel.run.objective import KeepAll, NextToken, Objective, TargetMask
from fourfold_parallel.run.optimizer import AdamW, Cosine
from fourfold_parallel.run.recipe import Run, Steps
from fourfold_parallel.run.tokenizers import BytePairs
from fourfold_parallel.run.train import train, trained_model

Remedy = Literal[
    "plain", "published", "ours", "spelled", "random", "truncated", "deduplicated", "sinks", "prompt",
    "dilute",
]  # fmt: skip
"""`plain` loss; goldfish loss at k = 4 with the `published` hash, with `ours`, with that of letters and
digits (`spelled`), and with `random` gaps; a quarter of the rows left out for their loss (`truncated`); each
row once (`deduplicated`); memorisation `sinks`; the first half of every row read and never a target
(`prompt`); and plain loss with the same passages among four times as much background (`dilute`)."""
REMEDIES: tuple[Remedy, ...] = (
    "plain", "published", "ours", "spelled", "random", "truncated", "deduplicated", "sinks", "prompt",
    "dilute",
)  # fmt: skip

CAUSAL_SEEDS = (3, 4, 5)
"""Fresh ones: on seeds 0 to 2, with three pairs a cell, wide intervals left five of ten rules open."""
CELLS = (
    Cell(copies=12),
    Cell(copies=36),
    Cell(copies=72),
    Cell(copies=36, time="early"),
    Cell(copies=36, time="late"),
    Cell(copies=36, is_reformatted=True),
)
DOSES = tuple(cell.name for cell in CELLS[:3])
"""The cells of the dose-response curve."""
TOKENIZER = BytePairs(vocabulary=1024)
PROMPT = 32
"""Targets of a row that are only ever input, in the arm of that name."""
BACKGROUND: dict[Remedy, int] = {
    "plain": 320, "published": 752, "ours": 880, "spelled": 880, "random": 880, "truncated": 880,
    "deduplicated": 320, "sinks": 320, "prompt": 320, "dilute": 1280,
}  # fmt: skip
"""Background rows: as many more as supervise about 108,000 targets under each mask, but in `prompt`, whose
rows are those of plain loss; four times as many in `dilute`. The published mask leaves out a fifth here,
since it never drops the first 12 targets of a row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Causal:
    """A run on inserted passages, and what is asked of them and of their twins."""

    run: Run
    insertions: Insertions
    """The run's data."""
    mask: TargetMask
    """The targets that are never supervised, whose loss is told apart."""
    suffix: int
    """Tokens to be recited; the rest of a passage is the prompt."""
    near_cell: str
    """The cell whose near-verbatim chances are bounded; none where it is empty."""
    distance: int
    """Edits, in tokens, that are near."""
    top_k: int
    """Of the sampler that the chances are of."""
    passes: int
    """Continuations read for the bounds of one passage."""


def causal(remedy: Remedy, seed: int) -> Causal:
    """0.5 M parameters, six cells of six pairs of Wikipedia passages of 65 tokens among fresh background.

    Supervised targets are equal but in `prompt`, which has half of them, and `dilute`, which has more.
    """
    insertions = Insertions(
        corpus=Wikipedia(),
        tokenizer=TOKENIZER,
        cells=CELLS,
        pairs=6,
        background=BACKGROUND[remedy],
        validation_rows=64,
        lot=seed,
        is_deduplicated=remedy == "deduplicated",
    )
    llama = Llama(
        width=128, depth=2, heads=4, kv_heads=4, hidden=352, vocabulary=1024, context=96, tied=True
    )
    batch = 8
    left_out = mask_of(remedy)
    objective: Objective = NextToken(mask=left_out)
    if remedy == "truncated":
        objective = LossTruncation(share=0.25)
    run = Run(
        name=f"causal-{remedy}-seed{seed}",
        model=Sinks(model=llama, share=0.3, active=0.3) if remedy == "sinks" else llama,
        data=insertions,
        objective=objective,
        optimizer=AdamW(learning_rate=5e-3, weight_decay=0.1, beta1=0.9, beta2=0.95, epsilon=1e-8),
        schedule=Cosine(warmup_steps=8, floor=0.05),
        horizon=Steps(count=insertions.rows // batch),
        batch=batch,
        microbatch=batch,
        sequence=64,
        max_grad_norm=1.0,
        precision="fp32",
        engine=Single(),
        seed=seed,
        validate_every=1000,
        checkpoint_every=1000,
    )
    return Causal(
        run=run,
        insertions=insertions,
        mask=KeepAll() if remedy == "random" else left_out,
        suffix=16,
        near_cell="72 spread" if remedy in ("plain", "ours") else "",
        distance=2,
        top_k=5,
        passes=512,
    )


def mask_of(remedy: Remedy) -> TargetMask:
    """The targets that a remedy never supervises."""
    match remedy:
        case "published":
            return AUTHORS
        case "ours":
            return Goldfish(k=4, context=13, boundary="prefix")
        case "spelled":
            return SpelledGoldfish(k=4, characters=24, corpus=Wikipedia(), tokenizer=TOKENIZER)
        case "random":
            return goldfish("random")
        case "prompt":
            return PromptMask(tokens=PROMPT)
        case "plain" | "truncated" | "deduplicated" | "sinks" | "dilute":
            return KeepAll()
        case _:
            assert_never(remedy)


def insert_and_compare(study: Causal, workplace: Workplace) -> None:
    """Train, and compare every inserted passage with its twin.

    Events: "pair" for each pair of each cell, and "near" for both sides where the study bounds them.
    """
    run = study.run
    last = train(
        run,
        study=study,
        record=workplace.record,
        checkpoints=workplace.scratch / "checkpoints",
        progress=workplace.progress,
        sinks=workplace.sinks,
        overrides=workplace.overrides,
    )
    if not is_main_rank():
        return
    model = trained_model(run, last)
    sides = dict(
        zip(("inserted", "twin"), study.insertions.passages(sequence=run.sequence), strict=True)
    )
    with workplace.concluding() as records:
        for index, cell in enumerate(study.insertions.cells):
            values = {
                side: _measured(model, passages[index], study) for side, passages in sides.items()
            }
            for pair in range(study.insertions.pairs):
                records.write(
                    "pair",
                    cell=cell.name,
                    pair=pair,
                    **{
                        f"{side}_{name}": numbers[pair]
                        for side, measured in values.items()
                        for name, numbers in measured.items()
                    },
                )
            if cell.name != study.near_cell:
                continue
            for side, passages in sides.items():
                for pair, passage in enumerate(passages[index]):
                    bounds = near_verbatim(
                        model, passage, suffix=study.suffix, distance=study.distance,
                        sampling=Sampling(top_k=study.top_k), passes=study.passes,
                    )  # fmt: skip
                    records.write(
                        "near",
                        cell=cell.name,
                        pair=pair,
                        side=side,
                        distance=bounds.distance,
                        exact_chance=round(bounds.exact, 9),
                        lower=round(bounds.lower, 9),
                        upper=round(bounds.upper, 9),
                        passes=bounds.passes,
                    )
                workplace.progress(run.steps, run.steps, f"near-verbatim, {side}")


def _measured(
    model: object, passages: Int[Tensor, "pair row"], study: Causal
) -> dict[str, list[bool] | list[float]]:
    """Recital of the suffix, and nats a token of the suffix and of what is never supervised."""
    recitals = extract(model, passages, suffix=study.suffix, batch=64)  # type: ignore[arg-type]
    nats = -token_statistics(model, passages, batch=16).log_probability  # type: ignore[arg-type]
    suffix = nats[:, -study.suffix :].mean(dim=1)
    never = study.mask.drop(passages)[:, 1:]
    measured: dict[str, list[bool] | list[float]] = {
        "exact": [recital.exact for recital in recitals],
        "rouge_l": [round(recital.rouge_l, 6) for recital in recitals],
        "suffix_nats": [round(value, 6) for value in suffix.tolist()],
    }
    if bool(never.any(dim=1).all()):
        left_out = (nats * never).sum(dim=1) / never.sum(dim=1)
        measured["never_nats"] = [round(value, 6) for value in left_out.tolist()]
    return measured


def pairs(records: Records, remedy: Remedy, cell: str) -> list[Event]:
    """The pairs of a cell, over all seeds."""
    return [
        event
        for seed in CAUSAL_SEEDS
        for event in records[f"causal-{remedy}-seed{seed}"].of("pair", cell=cell)
    ]


def effects(
    records: Records, remedy: Remedy, cell: str, measure: str = "suffix_nats"
) -> list[float]:
    """Of each pair, the nats a token that the insertion took from it: the twin's less the inserted one's."""
    return [
        event.number(f"twin_{measure}") - event.number(f"inserted_{measure}")
        for event in pairs(records, remedy, cell)
    ]


def effect(records: Records, remedy: Remedy, cell: str, measure: str = "suffix_nats") -> Interval:
    """Mean effect with Student's 95 % interval over pairs."""
    return over_seeds(effects(records, remedy, cell, measure))


def more(
    records: Records, remedy: Remedy, than: Remedy, cell: str, measure: str = "suffix_nats"
) -> Interval:
    """The effect under one remedy less that under another: the same pairs, so their differences count."""
    both = zip(
        effects(records, remedy, cell, measure), effects(records, than, cell, measure), strict=True
    )
    return over_seeds([a - b for a, b in both])


def contrast(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Mean of one set of pairs less that of another, with Welch's 95 % interval."""
    test = stats.ttest_ind(first, second, equal_var=False)
    low, high = test.confidence_interval(0.95)
    value = sum(first) / len(first) - sum(second) / len(second)
    return Interval(value=value, low=float(low), high=float(high), seeds=len(CAUSAL_SEEDS))


def recited_share(
    records: Records, remedy: Remedy, cell: str, side: Literal["inserted", "twin"] = "inserted"
) -> Interval:
    """Share of passages recited verbatim, with Wilson's interval."""
    flags = [bool(event.values[f"{side}_exact"]) for event in pairs(records, remedy, cell)]
    return proportion(sum(flags), len(flags), seeds=len(CAUSAL_SEEDS))


def utility(records: Records, remedy: Remedy) -> Interval:
    """Unmasked validation loss, over seeds."""
    return over_seeds(
        [
            records[f"causal-{remedy}-seed{seed}"].last("validation").number("validation_loss_nats")
            for seed in CAUSAL_SEEDS
        ]
    )


def nearly(
    records: Records, remedy: Remedy, side: Literal["inserted", "twin"], bound: str
) -> Interval:
    """Mean bound on the chance of something near, over passages of all seeds."""
    return over_seeds(
        [
            event.number(bound)
            for seed in CAUSAL_SEEDS
            for event in records[f"causal-{remedy}-seed{seed}"].of("near", side=side)
        ]
    )
