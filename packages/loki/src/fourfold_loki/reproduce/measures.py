"""Numbers that claims, figures and tables take from the records.

Perplexity is compared on the same tokens: a difference in nats a token for each window, its mean over
windows and Student's 95 % interval.
"""

import math
from collections.abc import Sequence

from fourfold_parallel.common.records import Event, Record
from fourfold_parallel.reproduce.claims import Interval, Records, over_seeds

FULL = "full"
AFTER, BEFORE = "after rotary", "before rotary"
WIKIPEDIA = "English Wikipedia, first articles"


def arms_of(record: Record) -> list[str]:
    """Arms of a record but full attention, in order."""
    arms = dict.fromkeys(str(event.values["arm"]) for event in record.of("scored"))
    return [arm for arm in arms if arm != FULL]


def losses(record: Record, arm: str) -> list[float]:
    """Nats a token of every window under an arm."""
    return [event.number("loss_nats") for event in record.of("scored", arm=arm)]


def added_by_window(record: Record, arm: str, against: str = FULL) -> list[float]:
    """Nats a token that an arm loses more than another, window by window."""
    pairs = zip(losses(record, arm), losses(record, against), strict=True)
    return [mine - theirs for mine, theirs in pairs]


def added_nats(record: Record, arm: str, against: str = FULL) -> Interval:
    """The same in the mean over windows."""
    return over_seeds(added_by_window(record, arm, against))


def added_percent(record: Record, arm: str, against: str = FULL) -> Interval:
    """The same as a change of perplexity, in percent."""
    nats = added_nats(record, arm, against)
    value, low, high = (100 * math.expm1(each) for each in (nats.value, nats.low, nats.high))
    return Interval(value=value, low=low, high=high, seeds=nats.seeds)


def tokens_scored(record: Record) -> int:
    """Tokens that each arm was scored on."""
    return sum(int(event.number("tokens")) for event in record.of("scored", arm=FULL))


def mean_share(record: Record, arm: str, key: str) -> float:
    """`kept_share` or `read_share` of an arm, in the mean over windows."""
    shares = [event.number(key) for event in record.of("scored", arm=arm)]
    return math.fsum(shares) / len(shares)


def rank_events(record: Record, stage: str, corpus: str = WIKIPEDIA) -> tuple[Event, ...]:
    """Events of a stage, in order of layers."""
    return record.of("rank", stage=stage, corpus=corpus)


def rank_shares(record: Record, stage: str, corpus: str = WIKIPEDIA) -> list[float]:
    """Rank at 90 % over head width, mean over heads, layer by layer."""
    return [
        math.fsum(event.numbers("rank")) / len(event.numbers("rank")) / event.number("head_width")
        for event in rank_events(record, stage, corpus)
    ]


def captured(record: Record, fitted_on: str) -> list[float]:
    """Share of Wikipedia's variance that 16 directions of a corpus hold, layer by layer."""
    event = record.only("transfer", stage=AFTER, fitted_on=fitted_on, corpus=WIKIPEDIA, width=16)
    return event.numbers("held_by_layer")


def diagnosed(record: Record, arm: str, key: str) -> list[float]:
    """A number of the doctor's, layer by layer."""
    return [event.number(key) for event in record.of("diagnosis", arm=arm)]


def retrieved(record: Record, arm: str) -> list[bool]:
    """True where an arm finds the passkey, window by window."""
    return [bool(event.values["is_found"]) for event in record.of("passkey", arm=arm)]


def certified(record: Record, arm: str, context: int) -> tuple[Event, ...]:
    """Windows of a length under an arm of `certificates`."""
    return tuple(record.of("certified", arm=arm, context=context))


def certified_share(events: Sequence[Event]) -> Interval:
    """Elements read over those of dense attention: mean over windows, interval over layers."""
    by_layer = zip(*(_read_by_layer(event) for event in events), strict=True)
    return over_seeds([math.fsum(layer) / len(layer) for layer in by_layer])


def _read_by_layer(event: Event) -> list[float]:
    kept = event.numbers("kept_share")
    index = event.number("read_share") - math.fsum(kept) / len(kept)
    return [share + index for share in kept]


def competed(record: Record, arm: str, context: int, share: float) -> tuple[Event, ...]:
    """Windows of a length under a method at a share of the bytes; none where it cannot read so little."""
    return tuple(record.of("fair", arm=arm, context=context, share=share))


def fair_arms(record: Record) -> list[str]:
    """Methods of the fair table, in order."""
    return list(dict.fromkeys(str(event.values["arm"]) for event in record.of("entry")))


def nearer(record: Record, arm: str, other: str, context: int, share: float) -> Interval:
    """Divergence from full attention under a method less that under another, window by window."""
    pairs = zip(
        competed(record, arm, context, share), competed(record, other, context, share), strict=True
    )
    key = "divergence_nats"
    return over_seeds([ours.number(key) - theirs.number(key) for ours, theirs in pairs])


def headline(records: Records) -> str:
    """The finding in a sentence: two bases in the longest windows."""
    record = records["long-context"]
    published, ours = (
        added_percent(record, arm).value for arm in ("loki-pca", "loki-balanced-shared")
    )
    return (
        f"Reading a quarter of the keys, the published basis adds {published:.0f} % perplexity: it drops the "
        f"attention sink. One that looks at queries too adds {ours:.2g} %."
    )
