"""A soft maximum of order q of what size and what unique data leave: neither helps where the other binds."""

import torch

from fourfold_gemstones.form import Form, FormLaw, Shape
from fourfold_gemstones.registry import Entry


def _log_terms(s, x, c):
    del c
    q = s["log_q"].exp()
    size = -s["alpha"] * x["parameters"]
    data = s["log_ratio"] - s["beta"] * x["unique_tokens"]
    return (torch.logaddexp(q * size, q * data) / q,)


ENTRY = Entry(
    law=FormLaw(
        form=Form(
            variables=("parameters", "unique_tokens"),
            terms=("reducible",),
            shapes=(
                Shape(name="alpha", meaning="exponent of size", low=0, high=5, seeds=(0.1, 0.9)),
                Shape(
                    name="beta", meaning="exponent of unique data", low=0, high=5, seeds=(0.1, 0.9)
                ),
                Shape(
                    name="log_q",
                    meaning="log of the order; 0 adds the two, large takes the larger",
                    low=-2,
                    high=4,
                    seeds=(-0.5, 2),
                ),
                Shape(
                    name="log_ratio",
                    meaning="log of the data's over the size's part at the reference",
                    low=-15,
                    high=15,
                    seeds=(-2, 2),
                ),
            ),
            log_terms=_log_terms,
            example={
                "reducible": -0.1,
                "alpha": 0.3,
                "beta": 0.35,
                "log_q": 0.8,
                "log_ratio": 0.1,
                "floor": 0.7,
            },
        )
    ),
    equation="L = E + R (N^(-alpha q) + (r U^-beta)^q)^(1/q)",
    source="after SoftQ, arXiv 2606.06888, as its abstract describes it: its own equation was not at hand",
    use="The worth of more unique text, from runs whose epochs and regularisation were tuned.",
)
