"""Additive over-fitting: weights on few unique tokens cost a term of their own."""

from fourfold_gemstones.form import Form, FormLaw, Shape
from fourfold_gemstones.registry import Entry


def _log_terms(s, x, c):
    del c
    return (
        -s["alpha"] * x["parameters"],
        -s["beta"] * x["tokens"],
        s["gamma"] * x["parameters"] - s["delta"] * x["unique_tokens"],
    )


ENTRY = Entry(
    law=FormLaw(
        form=Form(
            variables=("parameters", "tokens", "unique_tokens"),
            terms=("size", "data", "over-fitting"),
            shapes=(
                Shape(name="alpha", meaning="exponent of size", low=0, high=5, seeds=(0.1, 0.9)),
                Shape(
                    name="beta", meaning="exponent of all tokens", low=0, high=5, seeds=(0.1, 0.9)
                ),
                Shape(name="gamma", meaning="growth with size", low=0, high=5, seeds=(0, 1)),
                Shape(
                    name="delta", meaning="fall with unique tokens", low=0, high=5, seeds=(0.1, 1.2)
                ),
            ),
            log_terms=_log_terms,
            example={
                "size": -0.5,
                "data": -0.6,
                "over-fitting": -2.5,
                "alpha": 0.35,
                "beta": 0.4,
                "gamma": 0.4,
                "delta": 0.8,
                "floor": 0.6,
            },
        )
    ),
    equation="L = E + A N^-alpha + B T^-beta + C N^gamma U^-delta",
    source="the three parts of arXiv 2605.09189, added; arXiv 2605.01640 has one coefficient for the last",
    use="Whether a larger model or another epoch over-fits a text.",
)
