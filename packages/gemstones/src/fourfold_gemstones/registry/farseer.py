"""Farseer: coefficient and exponent of the data's term change with size."""

from fourfold_gemstones.form import Form, FormLaw, Shape
from fourfold_gemstones.registry import Entry


def _log_terms(s, x, c):
    del c
    size = (s["gamma"] * x["parameters"]).exp() - 1
    scale = (s["beta"] * x["parameters"]).exp() - 1
    exponent = (s["b1"] + s["a1"] * ((s["alpha"] * x["parameters"]).exp() - 1)).exp()
    return s["a3"] * size, s["a2"] * scale - exponent * x["tokens"]


_POWER = {"low": -1.5, "high": 1.5, "seeds": (-0.5, 0.5)}
_FACTOR = {"low": -20.0, "high": 20.0, "seeds": (-1.5, 1.5)}

ENTRY = Entry(
    law=FormLaw(
        form=Form(
            variables=("parameters", "tokens"),
            terms=("size", "data"),
            shapes=(
                Shape(name="gamma", meaning="power of N in the size's term", **_POWER),
                Shape(name="a3", meaning="factor of N^gamma", **_FACTOR),
                Shape(name="beta", meaning="power of N in the data's coefficient", **_POWER),
                Shape(name="a2", meaning="factor of N^beta", **_FACTOR),
                Shape(name="alpha", meaning="power of N in the data's exponent", **_POWER),
                Shape(name="a1", meaning="factor of N^alpha", **_FACTOR),
                Shape(
                    name="b1",
                    meaning="log of the data's exponent at the reference",
                    low=-6,
                    high=2,
                    seeds=(-1.8, 0),
                ),
            ),
            log_terms=_log_terms,
            floored=False,
            example={
                "size": 0.6,
                "data": -1.0,
                "gamma": -0.15,
                "a3": 1.2,
                "beta": -0.2,
                "a2": 0.5,
                "alpha": 0.1,
                "a1": 0.4,
                "b1": -0.7,
            },
        )
    ),
    equation="L = exp(a3 N^gamma + b3) + exp(a2 N^beta + b2) T^-exp(a1 N^alpha + b1)",
    source="Li et al. 2025, arXiv 2506.10972; N and T over their means",
    use="Extrapolation over both size and data, from a grid of some hundred runs.",
)
