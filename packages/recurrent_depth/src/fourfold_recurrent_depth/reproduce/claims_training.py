"""Claims that short trainings judge: draws, truncated gradients, additions, retrofitting."""

from __future__ import annotations

import statistics
from itertools import pairwise

from fourfold_parallel.reproduce.claims import (
    Finding,
    Records,
    claim,
    decide,
    over_seeds,
    unanimous,
)
from fourfold_recurrent_depth.reproduce.measures import (
    ADDITION,
    DRAWS,
    RETROFIT,
    recurrences_needed,
    sums,
)
from fourfold_recurrent_depth.reproduce.recipes import MEAN

DRAWS_RUN = (
    "57 k parameters, cellular automaton of k = 1 and 2 steps, core of one block, mean recurrence 4, "
    "420 steps of 32 rows of 12 cells, 3 seeds"
)
SUMS = (
    "57 k parameters, prefix sums modulo 10 of 6 digits, core of one block, mean recurrence 4, 800 steps "
    "of 64 rows, 3 seeds"
)
RETROFIT_RUN = (
    "a Llama of 6 layers, 0.3 M parameters, trained for 600 steps on bytes of Python's standard library, "
    "then on for the FLOPs of 400 steps at mean recurrence 4: dense, or cut into 2, 2 and 2 layers; 3 seeds"
)
TRAINED = "three trained seeds: the laptop scale"


def _held_out(records: Records, arm: str, field: str) -> list[float]:
    record = records[DRAWS]
    seeds = record.seeds("held_out", arm=arm)
    return [record.of("held_out", arm=arm, seed=seed)[0].number(field) for seed in seeds]


@claim(
    "C8",
    section="4.1",
    says="One draw for all ranks and rows costs no convergence",
    paper="stated, small scale",
    rule=(
        "held-out loss of one draw for all rows less that of one draw for each row, on average over paired "
        "seeds, below one standard deviation of the former over seeds; contradicted if it is above, and its "
        "95 % interval above 0"
    ),
    conditions=DRAWS_RUN,
    scales=("laptop",),
    needs=TRAINED,
)
def one_draw_for_all(records: Records) -> Finding:
    """Held-out loss of one draw for all rows, above that of one draw for each."""
    together, apart = (_held_out(records, arm, "loss_nats") for arm in ("last 4", "per row"))
    costs = [a - b for a, b in zip(together, apart, strict=True)]
    spread = statistics.stdev(together)
    is_small = statistics.fmean(costs) < spread
    interval = over_seeds(costs)
    verdict = decide(reproduced=is_small, contradicted=not is_small and interval.low > 0)
    return Finding(
        verdict,
        f"held-out loss {interval} nats above that of one draw per row; deviation over seeds {spread:.3g}",
        records[DRAWS].of("held_out", arm="per row")[0],
        "the mean difference stays below one standard deviation over seeds",
    )


@claim(
    "C9",
    section="3.3",
    says="Backpropagating through the last 8 recurrences is enough",
    paper="k = 8 of 32 on average",
    rule=(
        "accuracy with gradient through the last 4 recurrences, the mean, at most 2 points below that with "
        "all of them, in every seed; contradicted if more than 2 points below in every seed"
    ),
    conditions=DRAWS_RUN
    + "; 1, 2, 4 and all; 8, which all but a tenth of the draws lie within, was left out",
    scales=("laptop",),
    needs=TRAINED,
)
def truncation_is_enough(records: Records) -> Finding:
    """Accuracy lost where gradients reach the last 4 recurrences alone."""
    arms = {
        arm: _held_out(records, arm, "accuracy") for arm in ("last 1", "last 2", "last 4", "all")
    }
    lost = [full - last for full, last in zip(arms["all"], arms["last 4"], strict=True)]
    means = ", ".join(f"{statistics.fmean(values):.3f} {arm}" for arm, values in arms.items())
    return Finding(
        unanimous(holds=[loss <= 0.02 for loss in lost], fails=[loss > 0.02 for loss in lost]),
        f"accuracy lost by the last 4 against all {over_seeds(lost)} (means: {means})",
        records[DRAWS].of("held_out", arm="all")[0],
        "at most 2 points in every seed",
    )


@claim(
    "C22",
    section="7, figure 14",
    says="Additions of more operands need more recurrences",
    paper="1.0 to 0 for 2 to 6 operands",
    rule=(
        "for 2 to 6 operands accuracy non-decreasing in r within 2 points, the least r with 90 % of the "
        "final accuracy non-decreasing in operands and larger for 6 than for 2, in every seed; contradicted "
        "if the mean recurrence is within 5 points of r=1 for all of them in every seed"
    ),
    conditions=SUMS,
    scales=("laptop",),
    needs=TRAINED,
)
def more_operands_need_more(records: Records) -> Finding:
    """Recurrences that sums need for 90 % of their final accuracy, by operands."""
    record = records[ADDITION]
    holds, fails, columns = [], [], []
    for seed in record.seeds("addition", arm="law"):
        table = sums(record, "law", seed)
        operands = sorted({m for m, _ in table if m >= 2})
        depths = sorted({r for _, r in table})
        rises = all(
            table[m, b] >= table[m, a] - 0.02 for m in operands for a, b in pairwise(depths)
        )
        needed = [*recurrences_needed(table).values()]
        later = needed == sorted(needed) and needed[-1] > needed[0]
        holds.append(rises and later)
        fails.append(all(abs(table[m, MEAN] - table[m, 1]) <= 0.05 for m in operands))
        columns.append(",".join(map(str, needed)))
    return Finding(
        unanimous(holds=holds, fails=fails),
        f"r90 for 2 to 6 operands: {'; '.join(columns)}",
        record.of("addition", arm="law")[0],
        f"rises with r and saturates later for more operands in {sum(holds)} of {len(holds)} seeds",
    )


@claim(
    "C23",
    section="2511.07384",
    says="A pretrained model can be made recurrent",
    paper=("a curriculum on recurrences keeps quality at lower cost (arXiv 2511.07384)"),
    rule=(
        "at equal FLOPs and the mean recurrence, a curriculum loses neither to a constant mean nor to the "
        "dense model trained on nor to fresh weights of the same shape, in every seed; contradicted if it "
        "loses to the constant mean and the dense model in every seed"
    ),
    conditions=RETROFIT_RUN,
    scales=("laptop",),
    needs=TRAINED,
)
def curriculum_keeps_up(records: Records) -> Finding:
    """Loss of the curriculum above that of a constant mean, of the dense model and of fresh weights."""
    record = records[RETROFIT]
    seeds = record.seeds("held_out", arm="dense")

    def losses(arm: str, recurrences: int | None) -> list[float]:
        return [
            record.of("held_out", arm=arm, seed=seed, recurrences=recurrences)[0].number(
                "loss_nats"
            )
            for seed in seeds
        ]

    dense = losses("dense", None)
    risen, constant, fresh = (losses(arm, MEAN) for arm in ("curriculum", "constant", "fresh"))
    above = {
        name: [a - b for a, b in zip(risen, others, strict=True)]
        for name, others in (("constant", constant), ("dense", dense), ("fresh", fresh))
    }
    holds = [all(gap <= 0 for gap in gaps) for gaps in zip(*above.values(), strict=True)]
    fails = [c > 0 and d > 0 for c, d in zip(above["constant"], above["dense"], strict=True)]
    return Finding(
        unanimous(holds=holds, fails=fails),
        f"loss above that of a constant mean {over_seeds(above['constant'])}, of the dense model trained on "
        f"{over_seeds(above['dense'])}, of fresh weights {over_seeds(above['fresh'])} nats",
        record.of("held_out", arm="curriculum", recurrences=MEAN)[0],
        f"below all three in {sum(holds)} of {len(holds)} seeds, above constant and dense in {sum(fails)}",
    )
