"""Goldfish loss (Hans et al. 2024): train without reciting."""

from fourfold_goldfish.collators import add_goldfish, goldfish_collator
from fourfold_goldfish.cross_entropy import goldfish_cross_entropy
from fourfold_goldfish.loss import Goldfish
from fourfold_goldfish.memorization import Extraction, extract
from fourfold_goldfish.metrics import rouge_l

__all__ = [
    "Extraction",
    "Goldfish",
    "add_goldfish",
    "extract",
    "goldfish_collator",
    "goldfish_cross_entropy",
    "rouge_l",
]
