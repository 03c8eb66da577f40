"""Measures on the records: functions that rules and figures share."""

from fourfold_continual.forgetting import Change, HeldOutLoss, due_to_shift, forgot
from fourfold_continual.held_out import held_out_of
from fourfold_continual.reproduce.recipes import SEEDS, Arm
from fourfold_parallel.common.records import Event
from fourfold_parallel.reproduce.claims import NotTestedError, Records, over_seeds
from fourfold_parallel.reproduce.tables import markdown


def event_of(records: Records, size: str, arm: str, seed: int, part: str) -> Event:
    """The event of a model's held-out rows.

    Raises:
        NotTestedError: That model was not trained.
    """
    name = f"{size}-{arm}-seed{seed}"
    if name not in records:
        raise NotTestedError(f"the record of {name}")
    return records[name].only("held_out", part=part)


def loss_of(records: Records, size: str, arm: str, seed: int, part: str) -> HeldOutLoss:
    """The losses of a model on held-out rows."""
    return held_out_of(event_of(records, size, arm, seed, part))


def forgotten(records: Records, size: str, arm: Arm, seed: int, part: str = "old") -> Change:
    """The loss that an arm added to its base's, on the same rows."""
    before = loss_of(records, size, "base", seed, part)
    return forgot(before, loss_of(records, size, arm, seed, part))


def shifted(records: Records, size: str, arm: Arm, seed: int) -> Change:
    """The loss on the old text that an arm has above the arm of old text alone."""
    only_old = loss_of(records, size, "only-old", seed, "old")
    return due_to_shift(loss_of(records, size, arm, seed, "old"), only_old)


def between(records: Records, size: str, arms: tuple[Arm, Arm], seed: int, part: str) -> Change:
    """The loss that the first arm has above the second."""
    first, second = (loss_of(records, size, arm, seed, part) for arm in arms)
    return forgot(second, first)


def headline(records: Records) -> str:
    """The finding in a sentence: the price of replay, and of none."""
    arms: tuple[Arm, ...] = ("none", "r05", "r25")
    lost = [
        over_seeds([forgotten(records, "small", arm, seed).nats for seed in SEEDS]) for arm in arms
    ]
    costs = [
        over_seeds([between(records, "small", (arm, "none"), seed, "new").nats for seed in SEEDS])
        for arm in arms[1:]
    ]
    return (
        f"A model that goes on with code forgets {lost[0].value:.2f} nats a token of Wikipedia, with 5 % "
        f"replay {lost[1].value:.2f}, with 25 % {lost[2].value:.2f}; the code pays {costs[0].value:.3f} and "
        f"{costs[1].value:.3f}."
    )


def trade_table(records: Records) -> str:
    """The gains and costs of replay, at equal tokens in all and at equal new tokens, as Markdown."""
    pairs: tuple[tuple[str, Arm, Arm], ...] = (
        ("none", "none", "none"),
        ("5 %", "r05", "r05-longer"),
        ("25 %", "r25", "r25-longer"),
    )

    def shown(arm: Arm) -> list[str]:
        lost = over_seeds([forgotten(records, "small", arm, seed).nats for seed in SEEDS])
        won = over_seeds([-forgotten(records, "small", arm, seed, "new").nats for seed in SEEDS])
        return [str(lost), str(won)]

    return markdown(
        (
            "replay", "forgotten, equal tokens in all", "gained", "forgotten, equal new tokens", "gained",
        ),
        [[name, *shown(equal), *shown(longer)] for name, equal, longer in pairs],
    )  # fmt: skip
