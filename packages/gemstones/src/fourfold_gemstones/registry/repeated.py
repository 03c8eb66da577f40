"""Muennighoff et al.'s law: tokens and weights lose their worth as the text is repeated."""

import torch

from fourfold_gemstones.form import Form, FormLaw, Shape
from fourfold_gemstones.registry import Entry


def _worth(unique, repeats, half):
    """Log of unique + unique R* (1 - exp(-R / R*)), R the repetitions beyond the first."""
    return unique + torch.log1p(half * -torch.expm1(-repeats / half))


def _log_terms(s, x, c):
    alpha, beta = s["alpha"], s["beta"]
    # Weights that unique tokens are enough for: Chinchilla's optimum of this law's own terms.
    optimal = (alpha.log() - beta.log() + c["size"] - c["data"] + beta * x["unique_tokens"]) / alpha
    base = torch.minimum(x["parameters"], optimal)
    more = torch.expm1((x["parameters"] - base).clamp(0, 12))
    again = torch.expm1((x["tokens"] - x["unique_tokens"]).clamp(0, 12))
    return (
        -alpha * _worth(base, more, s["log_half_size"].exp()),
        -beta * _worth(x["unique_tokens"], again, s["log_half_data"].exp()),
    )


ENTRY = Entry(
    law=FormLaw(
        form=Form(
            variables=("parameters", "tokens", "unique_tokens"),
            terms=("size", "data"),
            shapes=(
                Shape(name="alpha", meaning="exponent of size", low=0.01, high=5, seeds=(0.1, 0.9)),
                Shape(name="beta", meaning="exponent of data", low=0.01, high=5, seeds=(0.1, 0.9)),
                Shape(
                    name="log_half_data",
                    meaning="log R*_D, epochs beyond the first over which tokens lose their worth",
                    low=-3,
                    high=8,
                    seeds=(0, 4),
                ),
                Shape(
                    name="log_half_size",
                    meaning="log R*_N, the same of weights beyond what the unique tokens are enough for",
                    low=-3,
                    high=8,
                    seeds=(0, 4),
                ),
            ),
            log_terms=_log_terms,
            example={
                "size": -0.7,
                "data": -0.5,
                "alpha": 0.35,
                "beta": 0.37,
                "log_half_data": 2.73,
                "log_half_size": 1.67,
                "floor": 0.6,
            },
        )
    ),
    equation="L = E + A N'^-alpha + B T'^-beta, X' = U + U R* (1 - exp(-(X/U - 1) / R*))",
    source="Muennighoff et al. 2023, arXiv 2305.16264, equations 5 and 6",
    use="How many epochs of a text are worth their compute.",
)
