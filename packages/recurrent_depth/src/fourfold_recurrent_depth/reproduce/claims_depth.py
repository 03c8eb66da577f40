"""Does more depth at test time help at all, and which recurrences' keys must be kept?"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from fourfold_parallel.common.records import Record
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
    AUTOMATON,
    DEPTH_ARMS,
    DEPTH_TASKS,
    LANGUAGE,
    DepthTask,
)

TASKS = (
    "additions of 6 digits and bytes of Python (mean recurrence 4), the hardest automaton (8); models of "
    "0.06 to 0.2 M parameters trained at random depth, at one depth, and with the loss averaged over all "
    "exits up to the mean; 3 seeds each"
)
TRAINED = "three trained seeds of each arm: the laptop scale"
BEYOND = (2, 4, 8)
"""Multiples of the mean recurrence."""
SLIGHT, CLEAR = 0.01, 0.05
"""Differences of a score that nobody would mind, and that matter."""


def _gains(records: Records, task: DepthTask, arm: str, multiple: float) -> list[float]:
    """Score at a multiple of the mean recurrence above that at the mean, by seed."""
    deep = round(task.mean * multiple)
    return [score[deep] - score[task.mean] for score in task.scores(records, arm)]


def _beyond(
    records: Records, arm: str, pick: Callable[[Iterable[float]], float]
) -> dict[str, list[float]]:
    """The worst or the best gain of each seed beyond the mean, by task."""
    return {
        task.name: [
            pick(gains)
            for gains in zip(*(_gains(records, task, arm, by) for by in BEYOND), strict=True)
        ]
        for task in DEPTH_TASKS
    }


def _kept(record: Record, field: str) -> list[tuple[float, float, list[float]]]:
    """A field of each seed with all keys, with the last, and with each vector of fewer bytes than those."""
    triples = []
    for seed in record.seeds("cache", arm="law"):
        (own,), (last,) = (record.of("cache", seed=seed, policy=name) for name in ("own", "last"))
        vectors = [
            event.number(field)
            for event in record.of("cache", seed=seed, policy="latent")
            if event.number("bytes_per_token") < last.number("bytes_per_token")
        ]
        triples.append((own.number(field), last.number(field), vectors))
    return triples


def _told(gains: dict[str, list[float]]) -> str:
    return "; ".join(f"{name} {over_seeds(values)}" for name, values in gains.items())


@claim(
    "D1",
    section="3.3",
    says="A model of random depth can be run deeper than it was trained",
    paper="stated; figure 1 and table 1 to r = 64",
    rule=(
        "at 2, 4 and 8 times the mean recurrence at most 0.01 below the mean's score (share of right "
        "answers, nats) in every seed of every task; contradicted if more than 0.05 below in every "
        "seed of one"
    ),
    conditions=TASKS,
    scales=("laptop",),
    needs=TRAINED,
)
def random_depth_runs_deeper(records: Records) -> Finding:
    """The worst score beyond the mean, less the mean's."""
    worst = _beyond(records, "law", min)
    return Finding(
        decide(
            reproduced=all(gain >= -SLIGHT for task in DEPTH_TASKS for gain in worst[task.name]),
            contradicted=any(max(worst[task.name]) < -CLEAR for task in DEPTH_TASKS),
        ),
        f"worst of 2, 4 and 8 times the mean: {_told(worst)}",
        records[LANGUAGE].of("held_out", arm="law")[0],
        "at most 0.01 lost in every seed of every task",
    )


@claim(
    "D2",
    section="3.3",
    says="A model of one fixed depth needs that depth, and gains nothing by more",
    paper="stated; no number",
    rule=(
        "at half the mean more than 0.05 below, and at 2, 4 and 8 times it at most 0.01 above, in every seed "
        "of every task; contradicted if it gains more than 0.01 by more depth in every seed of one"
    ),
    conditions=TASKS,
    scales=("laptop",),
    needs=TRAINED,
)
def fixed_depth_needs_its_depth(records: Records) -> Finding:
    """Scores of the models of one depth at half of it, and the best beyond."""
    half = {task.name: _gains(records, task, "fixed", 0.5) for task in DEPTH_TASKS}
    best = _beyond(records, "fixed", max)
    return Finding(
        decide(
            reproduced=all(
                max(half[task.name]) < -CLEAR and max(best[task.name]) <= SLIGHT
                for task in DEPTH_TASKS
            ),
            contradicted=any(min(best[task.name]) > SLIGHT for task in DEPTH_TASKS),
        ),
        f"at half its depth: {_told(half)}; best beyond it: {_told(best)}",
        records[LANGUAGE].of("held_out", arm="fixed")[0],
        "more than 0.05 lost at half, at most 0.01 gained beyond, in every seed of every task",
    )


@claim(
    "D3",
    section="2510.25741",
    says="Averaging the loss over exits makes the best shallow model",
    paper="stated; no number",
    rule=(
        "after one recurrence above models of random and of fixed depth in every seed of every task; "
        "contradicted if below one of them in every seed of one"
    ),
    conditions=TASKS,
    scales=("laptop",),
    needs=TRAINED,
)
def averaged_exits_are_best_when_shallow(records: Records) -> Finding:
    """Score of averaged exits after one recurrence, above the better of the others."""
    lead, behind = {}, []
    for task in DEPTH_TASKS:
        first = {arm: [score[1] for score in task.scores(records, arm)] for arm in DEPTH_ARMS}
        triples = list(zip(first["averaged"], first["law"], first["fixed"], strict=True))
        lead[task.name] = [own - max(law, fixed) for own, law, fixed in triples]
        behind.append(
            all(own < law for own, law, _ in triples) or all(o < f for o, _, f in triples)
        )
    return Finding(
        decide(
            reproduced=all(gap > 0 for gaps in lead.values() for gap in gaps),
            contradicted=any(behind),
        ),
        f"ahead of the better other after one recurrence by {_told(lead)}",
        records[LANGUAGE].of("held_out", arm="averaged")[0],
        "above both in every seed of every task",
    )


@claim(
    "D4",
    section="5",
    says="More depth at test time than in training makes a model better",
    paper="stated for hard tasks: GSM8K still rises from r = 32 to 64",
    rule=(
        "one way to train gains more than 0.02 at 2, 4 or 8 times the mean, in every seed of one task; "
        "contradicted if none gains more than 0.01 in any seed of any task"
    ),
    conditions=TASKS,
    scales=("laptop",),
    needs=TRAINED,
)
def more_depth_helps(records: Records) -> Finding:
    """The best gain beyond the mean, of any way to train."""
    gains = {
        (task.name, arm, by): _gains(records, task, arm, by)
        for task in DEPTH_TASKS
        for arm in DEPTH_ARMS
        for by in BEYOND
    }
    (name, arm, by), best = max(gains.items(), key=lambda item: min(item[1]))
    top = max(gain for values in gains.values() for gain in values)
    return Finding(
        decide(reproduced=min(best) > 0.02, contradicted=top <= 0.01),
        f"best in every seed: {name}, {arm}, {by} times the mean: {over_seeds(best)}; best of all {top:.3g}",
        records[ADDITION].of("addition", arm="law")[0],
        f"the best gain of any seed is {top:.3g}",
    )


@claim(
    "K1",
    section="6.2, ours",
    says="One vector for all recurrences keeps what their keys say, in fewer bytes than those of one",
    paper="none; Ouro's last loop alone: GSM8K 78.85 against 78.92 (2510.25741, table 14)",
    rule=(
        "some rank with fewer bytes a token than the last recurrence's keys has a loss at most 0.005 nats "
        "above that of all recurrences' keys, in every seed; contradicted if none within 0.02 in every seed"
    ),
    conditions=(
        "0.2 M parameters, bytes of Python's standard library, 16 recurrences of one block, 300 steps, 3 "
        "seeds; directions fitted to 64 rows of 80 tokens of the training text"
    ),
    scales=("laptop",),
    needs=TRAINED,
)
def one_vector_is_enough(records: Records) -> Finding:
    """The least loss of a latent cache smaller than the keys of one recurrence, above a whole cache's."""
    record = records[LANGUAGE]
    kept = _kept(record, "loss_nats")
    above = [min(vectors) - own for own, _, vectors in kept]
    above_last = [last - own for own, last, _ in kept]
    return Finding(
        unanimous(holds=[gap <= 0.005 for gap in above], fails=[gap > 0.02 for gap in above]),
        f"{over_seeds(above)} nats above a whole cache; the last recurrence's keys alone "
        f"{over_seeds(above_last)}",
        record.of("cache", policy="latent")[0],
        "at most 0.005 nats in every seed",
    )


@claim(
    "K2",
    section="6.2",
    says="Keys of the last recurrence are enough where the answer needs depth",
    paper="MT-Bench 5.86 against 5.66; Ouro: GSM8K 78.85 against 78.92 (2510.25741, table 14)",
    rule=(
        "accuracy of the hardest automaton, cell by cell, at most 1 point lower with the last recurrence's "
        "keys than with all, in every seed; contradicted if more than 5 points lower in every seed"
    ),
    conditions=(
        "0.13 M parameters, automaton of 3 steps, 16 recurrences of one block, 32 rows of 24 cells decoded "
        "behind their first cell, 3 seeds"
    ),
    scales=("laptop",),
    needs=TRAINED,
)
def last_keys_are_enough(records: Records) -> Finding:
    """Accuracy lost with the keys of the last recurrence, and with the best vector of fewer bytes."""
    record = records[AUTOMATON]
    kept = _kept(record, "accuracy")
    lost = [own - last for own, last, _ in kept]
    lost_by_vector = [own - max(vectors) for own, _, vectors in kept]
    return Finding(
        unanimous(holds=[gap <= 0.01 for gap in lost], fails=[gap > 0.05 for gap in lost]),
        f"accuracy lost {over_seeds(lost)}; by the best vector of fewer bytes {over_seeds(lost_by_vector)}",
        record.of("cache", policy="last")[0],
        "at most 1 point in every seed",
    )
