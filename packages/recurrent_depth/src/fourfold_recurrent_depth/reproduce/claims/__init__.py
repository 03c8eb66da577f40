"""The claims ledger: rules by the runs they judge, and the table of claims."""

from fourfold_recurrent_depth.reproduce.claims.automaton import accuracies
from fourfold_recurrent_depth.reproduce.claims.common import (
    ADDITION,
    AUTOMATON,
    DRAWS,
    EXACT,
    LANGUAGE,
    RETROFIT,
    of,
    seeds_of,
)
from fourfold_recurrent_depth.reproduce.claims.ledger import CLAIMS

__all__ = [
    "ADDITION",
    "AUTOMATON",
    "CLAIMS",
    "DRAWS",
    "EXACT",
    "LANGUAGE",
    "RETROFIT",
    "accuracies",
    "of",
    "seeds_of",
]
