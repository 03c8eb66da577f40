"""The recital report: what a model recites of some texts, beside text that it cannot have seen.

The record beside the page holds each text's odds as they are read, so that a report that was stopped goes on
where it was, and the page is a function of the record and the texts.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedModel

from fourfold_goldfish.memorization.personal import (
    Canary,
    Exposed,
    Kind,
    canaries,
    chosen_of,
    exposures,
    mean_bits,
)
from fourfold_goldfish.memorization.recital import (
    TRIES,
    Attacker,
    Curve,
    Reading,
    clustered,
    curve,
    identity,
    read,
    reordered,
)
from fourfold_parallel.common.progress import Progress, silent
from fourfold_parallel.common.records import Event, RecordWriter, header, read_record
from fourfold_parallel.common.values import to_json
from fourfold_parallel.reproduce.claims import Interval
from fourfold_parallel.run.tokenizers import beginning, encoded

Side = Literal["texts", "control"]
SIDES: tuple[Side, ...] = ("texts", "control")
EVEN = 0.5
"""The chance at which a stretch counts as recited: more likely than not."""
NEAR = 0.9
"""Share of a stretch that must be the model's first choice for it to be known nearly word for word."""
REFERENCES = 15
"""Values that a canary is ranked among: an exposure of at most four bits."""


READER = Attacker()
"""Gives 50 tokens and asks for 50."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inquiry:
    """The question that a report answers; the first line of its record."""

    model: str
    attacker: Attacker
    control: Literal["given", "reordered"]
    """Texts that somebody says the model has not seen, or the sentences of the texts in another order."""
    canaries: int
    """Values of each kind that are ranked, on either side."""
    seed: int


@dataclass(frozen=True, kw_only=True)
class Report:
    """The odds of all texts and of their control."""

    inquiry: Inquiry
    parameters: int
    texts: Mapping[str, str]
    """By name; those that are long enough."""
    pieces: Mapping[str, tuple[str, ...]]
    """The characters of each token of a text."""
    readings: Mapping[Side, tuple[Reading, ...]]
    exposed: Mapping[Side, tuple[Exposed, ...]]
    too_short: int
    """Texts left out, of fewer tokens than a prompt and a stretch."""

    @cached_property
    def suffix(self) -> int:
        """Tokens of a stretch."""
        return self.inquiry.attacker.suffix

    @cached_property
    def curves(self) -> Mapping[Side, Mapping[float, Curve]]:
        """(n, p) curves, by side and p."""
        return {
            side: {p: curve(self.readings[side], self.suffix, p=p) for p in (0.1, EVEN, 0.9)}
            for side in SIDES
        }

    def stretches(self, side: Side) -> int:
        """Stretches that the shares are of."""
        return sum(
            len(reading.stretches(self.suffix)[:: self.suffix]) for reading in self.readings[side]
        )

    def share(self, side: Side, samples: int = 1) -> Interval:
        """Stretches that come out verbatim within so many samples, more likely than not."""
        return self.curves[side][EVEN].shares[TRIES.index(samples)]

    def covered(self, side: Side, share: float) -> Interval:
        """Tokens inside stretches of which the model has this share as its first choice."""
        marks = [reading.covered(self.suffix, share=share) for reading in self.readings[side]]
        return clustered([int(mark.sum()) for mark in marks], [len(mark) for mark in marks])

    def recited(self, side: Side) -> Interval:
        """Texts with a stretch that is recited at the first try, more likely than not, wherever it begins."""
        even = math.log(EVEN)
        flags = [
            int(
                (reading.stretches(self.suffix) >= even).any()
                or reading.longest()[1] >= self.suffix
            )
            for reading in self.readings[side]
        ]
        return clustered(flags, [1] * len(flags))

    @cached_property
    def longest(self) -> tuple[tuple[Reading, int, int], ...]:
        """Each text with first token and tokens of its longest recital (`Reading.longest`); longest first."""
        runs = [(reading, *reading.longest()) for reading in self.readings["texts"]]
        return tuple(sorted(runs, key=lambda run: -run[2]))

    def bits(self, side: Side, kind: Kind) -> tuple[int, Interval | None]:
        """Canaries of a kind and their mean exposure."""
        mine = [canary for canary in self.exposed[side] if canary.kind == kind]
        return len(mine), mean_bits(mine)

    @cached_property
    def verdict(self) -> Literal["recites", "not told apart", "recites nothing"]:
        """A word for all of it: whether texts or stretches are recited beyond the control's interval."""
        measures = [
            [self.recited(side) for side in SIDES],
            *([self.share(side, samples) for side in SIDES] for samples in (TRIES[0], TRIES[-1])),
        ]
        if any(texts.low > control.high for texts, control in measures):
            return "recites"
        return "not told apart" if any(texts.value for texts, _ in measures) else "recites nothing"

    @cached_property
    def sentence(self) -> str:
        """The finding for a lawyer and an engineer."""
        texts, control = (self.share(side) for side in SIDES)
        count, others = (self.stretches(side) for side in SIDES)
        unseen = (
            "of text that it has not seen"
            if self.inquiry.control == "given"
            else "of the same sentences in an order that nobody wrote"
        )
        reading, _, tokens = self.longest[0]
        longest = (
            f" Its longest recital of your texts has {tokens} tokens, in {reading.name}."
            if tokens
            else ""
        )
        held = self.recited("texts")
        return (
            f"Given the text before it, {self.name} writes the next {self.suffix} tokens word for word at "
            f"the first try, more likely than not, for {round(texts.value * count)} of {count} stretches "
            f"({percent(texts)}), and somewhere in {round(held.value * held.seeds)} of {held.seeds} texts; "
            f"{unseen}, for {round(control.value * others)} of {others} ({percent(control)}).{longest}"
        )

    @property
    def name(self) -> str:
        """The model, by the last part of its place."""
        return Path(self.inquiry.model).name


def percent(share: Interval) -> str:
    """`1.4 %, 95 % interval 0.3 to 4.0`."""
    return (
        f"{100 * share.value:.2g} %, 95 % interval {100 * share.low:.2g} to {100 * share.high:.2g}"
    )


def recital_report(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: Mapping[str, str],
    *,
    name: str,
    record: Path,
    control: Mapping[str, str] | None = None,
    attacker: Attacker = READER,
    canaries_of_a_kind: int = 6,
    seed: int = 0,
    progress: Progress = silent,
) -> Report:
    """Read all texts and their control, and rank the personal data that stands in them.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        texts: by name.
        name: of the model, for the record and the page.
        record: JSONL file; what it holds of this inquiry is not computed again.
        control: texts that the model has not seen; without them the sentences of `texts` are put in another
            order (`reordered`).
        attacker: the reader that is assumed.
        canaries_of_a_kind: values of each kind that are ranked on either side; 0 for none.
        seed: of the order, and of the choice of canaries.
        progress: told as tokens are read and canaries ranked.

    Raises:
        ValueError: where no text is long enough, or the record is of another inquiry.
    """
    inquiry = Inquiry(
        model=name,
        attacker=attacker,
        control="reordered" if control is None else "given",
        canaries=canaries_of_a_kind,
        seed=seed,
    )
    if control is None:
        made = reordered([*texts.values()], seed=seed)
        control = {f"reordered {index}": text for index, text in enumerate(made, start=1)}
    start = beginning(tokenizer)
    documents: dict[Side, Mapping[str, str]] = {"texts": texts, "control": control}
    rows: dict[Side, dict[str, list[int]]] = {
        side: {
            title: ids
            for title, text in documents[side].items()
            if len(ids := [*start, *encoded(tokenizer, text)]) >= attacker.needs
        }
        for side in SIDES
    }
    for side in SIDES:
        if not rows[side]:
            raise ValueError(
                f"none of {len(documents[side])} {side} has prompt + suffix = {attacker.needs} tokens; use a "
                "shorter prompt or suffix" + (", or longer texts" if side == "texts" else "")
            )
    known = _known(record, inquiry)
    readings: dict[Side, tuple[Reading, ...]] = {}
    exposed: dict[Side, tuple[Exposed, ...]] = {}
    with RecordWriter(record) as records:
        if not record.stat().st_size:
            records.write_header(
                header(inquiry, seed=seed, world_size=1, materials=(), overrides=())
            )
        for side in SIDES:
            done = dict(_readings(known, side, rows[side]))
            left = {title: ids for title, ids in rows[side].items() if title not in done}
            for reading in read(model, left, attacker, progress=_titled(progress, side)):
                done[reading.name] = reading
                records.write("text", side=side, **_values(reading, rows[side][reading.name]))
            readings[side] = tuple(done[title] for title in rows[side])
        for side in SIDES:
            exposed[side] = _ranked(
                model, tokenizer, {title: documents[side][title] for title in rows[side]}, side, inquiry,
                known, records, progress,
            )  # fmt: skip
    return Report(
        inquiry=inquiry,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        texts={title: texts[title] for title in rows["texts"]},
        pieces={
            title: ("",) * len(start) + pieces_of(tokenizer, texts[title])
            for title in rows["texts"]
        },
        readings=readings,
        exposed=exposed,
        too_short=len(texts) - len(rows["texts"]),
    )


def _ranked(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: Mapping[str, str],
    side: Side,
    inquiry: Inquiry,
    known: Sequence[Event],
    records: RecordWriter,
    progress: Progress,
) -> tuple[Exposed, ...]:
    """The exposures of a side; those in the record are taken from it."""
    if not inquiry.canaries:
        return ()
    there = [canary for title, text in texts.items() for canary in canaries(title, text)]
    chosen = chosen_of(there, inquiry.canaries, seed=inquiry.seed)
    held = {
        (event.values["text"], event.values["value"]): event.number("bits")
        for event in known
        if event.kind == "canary" and event.values["side"] == side
    }
    ranked: list[Exposed] = []
    for done, canary in enumerate(chosen, start=1):
        key = canary.text, canary.value
        if key in held:
            ranked.append(_exposed(canary, held[key]))
        else:
            ranked += exposures(
                model, tokenizer, [canary], references=REFERENCES, seed=inquiry.seed
            )
            records.write("canary", side=side, **_fields(ranked[-1]))
        progress(done, len(chosen), f"personal data in {side}")
    return tuple(ranked)


def _exposed(canary: Canary, bits: float) -> Exposed:
    return Exposed(kind=canary.kind, text=canary.text, value=canary.value, bits=bits)


def _fields(exposed: Exposed) -> dict[str, object]:
    return {
        "kind": exposed.kind,
        "text": exposed.text,
        "value": exposed.value,
        "bits": round(exposed.bits, 6),
    }


def _known(record: Path, inquiry: Inquiry) -> tuple[Event, ...]:
    """Events of a record of this inquiry; none where there is no record yet."""
    if not record.exists() or not record.stat().st_size:
        return ()
    held = read_record(record)
    if to_json(held.run) != to_json(inquiry):
        raise ValueError(f"{record} is of another inquiry ({held.run}); name another --out")
    return held.events


def _values(reading: Reading, ids: Sequence[int]) -> dict[str, object]:
    chances = [None if np.isneginf(c) else round(float(c), 4) for c in reading.log_chance]
    return {
        "text": reading.name,
        "ids": identity(ids),
        "log_chance_nats": chances,
        "first_choices": "".join("1" if first else "0" for first in reading.is_first),
    }


def _readings(
    known: Sequence[Event], side: Side, rows: Mapping[str, Sequence[int]]
) -> Iterator[tuple[str, Reading]]:
    for event in known:
        name = str(event.values.get("text"))
        if event.kind != "text" or event.values["side"] != side or name not in rows:
            continue
        if event.values["ids"] == identity(rows[name]):
            chances: Any = event.values["log_chance_nats"]
            yield (
                name,
                Reading(
                    name=name,
                    log_chance=np.array([-np.inf if c is None else c for c in chances]),
                    is_first=np.array([c == "1" for c in str(event.values["first_choices"])]),
                ),
            )


def pieces_of(tokenizer: Any, text: str) -> tuple[str, ...]:
    """The characters of each token, which make up the text end to end."""
    if not tokenizer.is_fast:
        return tuple(tokenizer.decode([index]) for index in encoded(tokenizer, text))
    spans = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True,
        verbose=False,
    )["offset_mapping"]  # fmt: skip
    pieces: list[str] = []
    done = 0
    for index, (_, stop) in enumerate(spans):
        # Blanks that a tokenizer drops belong to the token behind them, a cut character to its first part.
        end = len(text) if index == len(spans) - 1 else max(stop, done)
        pieces.append(text[done:end])
        done = end
    return tuple(pieces)


def _titled(progress: Progress, side: Side) -> Progress:
    def report(done: int, total: int, note: str) -> None:
        progress(done, total, f"{note} of the {side}")

    return report
