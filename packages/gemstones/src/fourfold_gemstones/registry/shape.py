"""Gemstones' law in width, depth and data alone."""

from fourfold_gemstones.laws import SHAPE_ONLY
from fourfold_gemstones.parametric import ParametricLaw
from fourfold_gemstones.registry import Entry

ENTRY = Entry(
    law=ParametricLaw(variables=SHAPE_ONLY, delta=1e-3),
    equation="L = E + A w^-a + D d^-b + B T^-beta",
    source="McLeish et al. 2025, equation 3",
    use="The shape of least loss, where size follows from it.",
)
