"""StepLaw's optimal learning rate and batch, as a valley in what can be reduced."""

from fourfold_gemstones.form import Form, FormLaw, Shape
from fourfold_gemstones.registry import Entry


def _log_terms(s, x, c):
    del c
    rate = s["log_rate"] + s["rate_size"] * x["parameters"] + s["rate_data"] * x["tokens"]
    batch = s["log_batch"] + s["batch_data"] * x["tokens"]
    off = (
        s["rate_bend"] * (x["learning_rate"] - rate) ** 2
        + s["batch_bend"] * (x["batch_tokens"] - batch) ** 2
    )
    return -s["alpha"] * x["parameters"] + off, -s["beta"] * x["tokens"] + off


ENTRY = Entry(
    law=FormLaw(
        form=Form(
            variables=("parameters", "tokens", "learning_rate", "batch_tokens"),
            terms=("size", "data"),
            shapes=(
                Shape(name="alpha", meaning="exponent of size", low=0, high=5, seeds=(0.1, 0.9)),
                Shape(name="beta", meaning="exponent of data", low=0, high=5, seeds=(0.1, 0.9)),
                Shape(
                    name="log_rate",
                    meaning="log of the best rate over the reference",
                    low=-6,
                    high=6,
                    seeds=(-1, 1),
                ),
                Shape(
                    name="rate_size",
                    meaning="power of size in the best rate; StepLaw: -.713",
                    low=-3,
                    high=3,
                    seeds=(-1, 0),
                ),
                Shape(
                    name="rate_data",
                    meaning="power of data in the best rate; StepLaw: .307",
                    low=-3,
                    high=3,
                    seeds=(-0.3, 0.6),
                ),
                Shape(
                    name="log_batch",
                    meaning="log of the best batch over the reference",
                    low=-6,
                    high=6,
                    seeds=(-1, 1),
                ),
                Shape(
                    name="batch_data",
                    meaning="power of data in the best batch; StepLaw: .571",
                    low=-3,
                    high=3,
                    seeds=(0, 1),
                ),
                Shape(
                    name="rate_bend",
                    meaning="rise of the log reducible loss per squared log of the rate's error",
                    low=0,
                    high=5,
                    seeds=(0.01, 0.3),
                ),
                Shape(
                    name="batch_bend",
                    meaning="the same for the batch",
                    low=0,
                    high=5,
                    seeds=(0.01, 0.2),
                ),
            ),
            log_terms=_log_terms,
            example={
                "size": -0.4,
                "data": -0.6,
                "alpha": 0.33,
                "beta": 0.36,
                "log_rate": 0.2,
                "rate_size": -0.713,
                "rate_data": 0.307,
                "log_batch": -0.1,
                "batch_data": 0.571,
                "rate_bend": 0.12,
                "batch_bend": 0.05,
                "floor": 0.6,
            },
        )
    ),
    equation="L = E + (A N^-alpha + B T^-beta) exp(k log²(lr / lr*) + l log²(b / b*)), "
    "lr* = c N^g T^h, b* = d T^m",
    source="Li et al. 2025, arXiv 2503.04715, whose optima are powers; the valley around them is ours",
    use="The learning rate and batch of least loss, and the cost of missing them.",
)
