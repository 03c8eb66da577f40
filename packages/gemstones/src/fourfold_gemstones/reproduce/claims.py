"""The claims of the ledger, in its order; each stands with its rule where its events are written."""

from __future__ import annotations

from fourfold_gemstones.reproduce.paper import (
    downstream,
    envelopes,
    optimum,
    prescriptions,
    schedules,
    slopes,
)
from fourfold_gemstones.reproduce.suite import claims as suite
from fourfold_gemstones.reproduce.suite import cooling
from fourfold_parallel.reproduce.claims import Claim, claims_of


def _number(claim: Claim) -> tuple[int, int, str]:
    """P1 before C1 before C5b before C10 before S1."""
    digits = "".join(letter for letter in claim.id if letter.isdigit())
    return "PCS".index(claim.id[0]), int(digits), claim.id


CLAIMS: tuple[Claim, ...] = tuple(
    sorted(
        claims_of(optimum, slopes, envelopes, prescriptions, schedules, downstream, suite, cooling),
        key=_number,
    )
)
"""P: the published fits themselves; C: the paper's claims on its own measurements; S: on our suite."""
