"""Decoders for `model.generate(..., custom_generate=...)`, and `serve` for requests that arrive."""

from fourfold_recurrent_depth.decoding.diffusion import Diffusion, diffuse
from fourfold_recurrent_depth.decoding.refill import Answer, Refill, Request, serve
from fourfold_recurrent_depth.decoding.speculate import Speculation, speculate

__all__ = [
    "Answer",
    "Diffusion",
    "Refill",
    "Request",
    "Speculation",
    "diffuse",
    "serve",
    "speculate",
]
