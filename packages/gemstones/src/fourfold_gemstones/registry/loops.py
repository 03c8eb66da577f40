"""The iso-depth law of looped models: a weight that is used r times is worth r^phi weights."""

import torch

from fourfold_gemstones.form import Form, FormLaw, Shape
from fourfold_gemstones.registry import Entry


def _log_terms(s, x, c):
    del c
    worth = torch.logaddexp(x["once_parameters"], s["phi"] * x["loops"] + x["looped_parameters"])
    return -s["alpha"] * worth, -s["beta"] * x["tokens"]


ENTRY = Entry(
    law=FormLaw(
        form=Form(
            variables=("once_parameters", "looped_parameters", "loops", "tokens"),
            terms=("size", "data"),
            shapes=(
                Shape(name="alpha", meaning="exponent of size", low=0, high=5, seeds=(0.1, 0.9)),
                Shape(name="beta", meaning="exponent of data", low=0, high=5, seeds=(0.1, 0.9)),
                Shape(
                    name="phi",
                    meaning="worth of a loop: 0 is none, 1 that of as many blocks of their own",
                    low=-1,
                    high=2,
                    seeds=(0, 1),
                ),
            ),
            log_terms=_log_terms,
            example={
                "size": -0.3,
                "data": -0.6,
                "alpha": 0.33,
                "beta": 0.36,
                "phi": 0.46,
                "floor": 0.6,
            },
        )
    ),
    equation="L = E + A (N_once + r^phi N_looped)^-alpha + B T^-beta",
    source="arXiv 2604.21106",
    use="The worth of another loop beside that of more weights.",
)
