"""Goldfish loss (Hans et al. 2024): train without reciting."""

from fourfold_goldfish.loss import Goldfish
from fourfold_goldfish.memorization import Extraction, extract, rouge_l

__all__ = ["Extraction", "Goldfish", "extract", "rouge_l"]
