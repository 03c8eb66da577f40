"""Chinchilla's law: a term of size and a term of data."""

from fourfold_gemstones.laws import CHINCHILLA
from fourfold_gemstones.parametric import ParametricLaw
from fourfold_gemstones.registry import Entry

ENTRY = Entry(
    law=ParametricLaw(variables=CHINCHILLA, delta=1e-3),
    equation="L = E + A N^-alpha + B T^-beta",
    source="Hoffmann et al. 2022, equation 2",
    use="The size and the tokens of least loss for a budget.",
)
