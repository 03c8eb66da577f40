"""Gemstones' law in width, depth, size and data."""

from fourfold_gemstones.laws import WIDTH_DEPTH
from fourfold_gemstones.parametric import ParametricLaw
from fourfold_gemstones.registry import Entry

ENTRY = Entry(
    law=ParametricLaw(variables=WIDTH_DEPTH, delta=1e-3),
    equation="L = E + A w^-a + D d^-b + C N^-c + B T^-beta",
    source="McLeish et al. 2025, equation 2",
    use="The shape of least loss for a budget.",
)
