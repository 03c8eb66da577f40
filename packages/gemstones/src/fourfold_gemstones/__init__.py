"""Gemstones (McLeish et al. 2025): scaling laws over width, depth, tokens and time."""

from fourfold_gemstones.allocate import (
    Aspect,
    Compute,
    DeviceHours,
    Free,
    Lattice,
    MeasuredThroughput,
    Planner,
    SixNT,
    allocate,
)
from fourfold_gemstones.compare import Split, compare
from fourfold_gemstones.architecture import GEMSTONES, Architecture, Embeddings
from fourfold_gemstones.next_run import suggest_next
from fourfold_gemstones.envelope import Bins, EnvelopeLaw, Hull, IsoFlopLaw
from fourfold_gemstones.laws import CHINCHILLA, SHAPE_ONLY, WIDTH_DEPTH, PowerLaw
from fourfold_gemstones.parametric import LawWarning, ParametricFit, ParametricLaw
from fourfold_gemstones.simulate import coverage, design_null
from fourfold_gemstones.runs import RunTable
from fourfold_gemstones.uncertainty import (
    bootstrap,
    difference,
    leave_one_out,
    paired_bootstrap,
    profile,
    slope,
)

__all__ = [
    "CHINCHILLA",
    "GEMSTONES",
    "SHAPE_ONLY",
    "WIDTH_DEPTH",
    "Architecture",
    "Aspect",
    "Bins",
    "Compute",
    "DeviceHours",
    "Embeddings",
    "EnvelopeLaw",
    "Free",
    "Hull",
    "IsoFlopLaw",
    "Lattice",
    "LawWarning",
    "MeasuredThroughput",
    "ParametricFit",
    "ParametricLaw",
    "Planner",
    "PowerLaw",
    "RunTable",
    "SixNT",
    "Split",
    "allocate",
    "bootstrap",
    "compare",
    "coverage",
    "design_null",
    "difference",
    "leave_one_out",
    "paired_bootstrap",
    "profile",
    "slope",
    "suggest_next",
]
