"""The stages by name, their records, and how a claim is made of a rule about one of them."""

from __future__ import annotations

from functools import partial

from fourfold_parallel.common.records import Record
from fourfold_parallel.reproduce.claims import NotTestedError, Records, claim
from fourfold_parallel.reproduce.scale import Scale

PUBLISHED = "published"
"""The stage that analyses the published measurements."""
SUITE = "suite"
"""The stage that trains our own suite."""
FRESH = "fresh"
"""The stage that trains runs of seeds that no other record has, after the rules that judge them."""
LAWS = "laws"
"""The stage that fits laws to our own suite."""
BOTH: tuple[Scale, ...] = ("smoke", "laptop")
LAPTOP: tuple[Scale, ...] = ("laptop",)

paper_claim = partial(
    claim, conditions="the paper's own measurements", scales=LAPTOP, needs="the laptop scale"
)
"""`claim` for a rule about what the paper measured."""
suite_claim = partial(
    claim,
    conditions="bytes of Python source, 17 shapes of 16 thousand to 1.1 million parameters, up to 229 "
    "thousand bytes each",
    scales=LAPTOP,
    needs="the laptop scale",
)
"""`claim` for a rule about our own suite."""
fresh_claim = partial(
    claim,
    conditions="bytes of Python source, shapes of 16 thousand to 1.1 million parameters, fresh seeds",
    scales=LAPTOP,
    needs="the laptop scale",
)
"""`claim` for a rule about runs of fresh seeds."""


def published(records: Records) -> Record:
    """The analysis of the published measurements.

    Raises:
        NotTestedError: It was not done.
    """
    return _record(records, PUBLISHED, "the stage that analyses the published measurements")


def own_suite(records: Records) -> Record:
    """The points of our own suite.

    Raises:
        NotTestedError: It was not trained.
    """
    return _record(records, SUITE, "the stage that trains our own suite")


def fresh(records: Records) -> Record:
    """The runs of fresh seeds.

    Raises:
        NotTestedError: They were not trained.
    """
    return _record(records, FRESH, "the stage that trains runs of fresh seeds")


def own_laws(records: Records) -> Record:
    """The laws fitted to our own suite.

    Raises:
        NotTestedError: They were not.
    """
    return _record(records, LAWS, "the stage that fits laws to our own suite")


def _record(records: Records, stage: str, needs: str) -> Record:
    if stage not in records:
        raise NotTestedError(needs)
    return records[stage]
