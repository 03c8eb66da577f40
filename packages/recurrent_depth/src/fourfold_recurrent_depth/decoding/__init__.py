"""Decoders for transformers' `model.generate(..., custom_generate=...)`."""

from fourfold_recurrent_depth.decoding.compacting import compacting
from fourfold_recurrent_depth.decoding.diffusion import Diffusion, diffuse
from fourfold_recurrent_depth.decoding.speculate import Speculation, speculate

__all__ = ["Diffusion", "Speculation", "compacting", "diffuse", "speculate"]
