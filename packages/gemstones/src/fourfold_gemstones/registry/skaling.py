"""Skaling: Chinchilla's two terms, coupled by one exponent as Kaplan et al.'s are."""

import torch

from fourfold_gemstones.form import Form, FormLaw, Shape
from fourfold_gemstones.registry import Entry


def _log_terms(s, x, c):
    del c
    size = -s["alpha"] * x["parameters"]
    data = s["log_ratio"] - s["beta"] * x["tokens"]
    return (s["gamma"] * torch.logaddexp(size, data),)


ENTRY = Entry(
    law=FormLaw(
        form=Form(
            variables=("parameters", "tokens"),
            terms=("reducible",),
            shapes=(
                Shape(
                    name="alpha", meaning="exponent of size inside", low=0, high=5, seeds=(0.1, 1.2)
                ),
                Shape(
                    name="beta", meaning="exponent of data inside", low=0, high=5, seeds=(0.1, 1.2)
                ),
                Shape(
                    name="gamma",
                    meaning="coupling; 1 is Chinchilla's law",
                    low=0.02,
                    high=5,
                    seeds=(0.2, 1.5),
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
                "reducible": -0.2,
                "alpha": 0.5,
                "beta": 0.6,
                "gamma": 0.6,
                "log_ratio": 0.2,
                "floor": 0.5,
            },
        )
    ),
    equation="L = E + R (N^-alpha + r T^-beta)^gamma",
    source="arXiv 2608.07222, after Kaplan et al. 2020, equation 1.5",
    use="A surface whose best split of a budget is not a power law's, from few runs.",
)
