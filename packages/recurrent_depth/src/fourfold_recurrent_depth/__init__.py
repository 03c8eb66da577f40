"""Recurrent-depth language models (Geiping et al. 2025)."""

from fourfold_recurrent_depth.cache import RecurrentCache, estimate_cache_bytes
from fourfold_recurrent_depth.configuration import RecurrentDepthConfig
from fourfold_recurrent_depth.model import RecurrentDepthForCausalLM
from fourfold_recurrent_depth.states import StateTable, state_table
from fourfold_recurrent_depth.training.random_depth import Always, LogNormalPoisson, RandomDepth
from fourfold_recurrent_depth.transformers_base import RecurrentDepthOutput

__all__ = [
    "Always",
    "LogNormalPoisson",
    "RandomDepth",
    "RecurrentCache",
    "RecurrentDepthConfig",
    "RecurrentDepthForCausalLM",
    "RecurrentDepthOutput",
    "StateTable",
    "estimate_cache_bytes",
    "state_table",
]
