"""The claims of the ledger, in its order; each stands with its rule where its events are written."""

from __future__ import annotations

from fourfold_gemstones import suite_claims
from fourfold_gemstones.revisit import checkpoints, downstream, envelopes, optimum, plans, slopes
from fourfold_parallel.reproduce.claims import Claim


def _number(claim: Claim) -> tuple[str, int, str]:
    """P1 before C1 before C5b before C10 before S1."""
    digits = "".join(letter for letter in claim.id if letter.isdigit())
    return str("PCS".index(claim.id[0])), int(digits), claim.id


CLAIMS: tuple[Claim, ...] = tuple(
    sorted(
        (
            one
            for room in (optimum, slopes, envelopes, plans, checkpoints, downstream, suite_claims)
            for one in room.CLAIMS
        ),
        key=_number,
    )
)
"""P: what the published fits are; C: the paper's claims on its own measurements; S: on our suite."""
