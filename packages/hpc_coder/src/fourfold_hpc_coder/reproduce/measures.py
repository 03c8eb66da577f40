"""Measures of the study's records, which rules and figures share."""

from fourfold_hpc_coder.reproduce.recipes import SEEDS, Arm
from fourfold_parallel.reproduce.claims import Interval, Records, over_seeds, proportion


def losses(records: Records, arm: Arm) -> list[float]:
    """Loss per token of held-out right answers, for each seed."""
    return [
        records[f"{arm}-seed{seed}"].last("held-out").number("answer_loss_nats") for seed in SEEDS
    ]


def shares(records: Records, arm: Arm, key: str) -> list[float]:
    """Share of held-out tasks whose answer is `built`, `right` or `counted`, for each seed."""
    events = [records[f"{arm}-seed{seed}"].last("answers") for seed in SEEDS]
    return [event.number(key) / event.number("tasks") for event in events]


def pooled(records: Records, arm: Arm, key: str) -> Interval:
    """The same share, over tasks and seeds together, with Wilson's interval."""
    events = [records[f"{arm}-seed{seed}"].last("answers") for seed in SEEDS]
    done = sum(int(event.number(key)) for event in events)
    return proportion(done, sum(int(event.number("tasks")) for event in events), seeds=len(SEEDS))


def paired(first: list[float], second: list[float]) -> Interval:
    """The first less the second, paired by seed."""
    return over_seeds([a - b for a, b in zip(first, second, strict=True)])


def gap(records: Records, worse: Arm, better: Arm) -> Interval:
    """Held-out loss of one arm above another's, paired by seed."""
    return paired(losses(records, worse), losses(records, better))


def headline(records: Records) -> str:
    """The finding in a sentence: what less data costs, and where more stops helping."""
    sixteenth, quarter = gap(records, "sixteenth", "quarter"), gap(records, "quarter", "full")
    return (
        f"Four times the verified data is worth {sixteenth.value:.2f} nats a token, four times more only "
        f"{quarter.value:.2f}."
    )
