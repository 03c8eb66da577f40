"""Chinchilla's law with size counted as FLOPs per token over six."""

from fourfold_gemstones.parametric import ParametricLaw
from fourfold_gemstones.registry import Entry

ENTRY = Entry(
    law=ParametricLaw(variables=("effective_parameters", "tokens"), delta=1e-3),
    equation="L = E + A (F/6)^-alpha + B T^-beta",
    source="Hoffmann et al. 2022, with the FLOPs of attention counted",
    use="Extrapolation over sizes of several shapes.",
)
