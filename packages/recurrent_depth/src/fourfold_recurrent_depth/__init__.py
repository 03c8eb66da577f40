"""Recurrent-depth language models (Geiping et al. 2025)."""

from fourfold_recurrent_depth.cache import RecurrentCache, estimate_cache_bytes
from fourfold_recurrent_depth.configuration import RecurrentDepthConfig
from fourfold_recurrent_depth.interface import RecurrentDepthOutput
from fourfold_recurrent_depth.model import RecurrentDepthForCausalLM
from fourfold_recurrent_depth.objective import Always, LogNormalPoisson, RandomDepth
from fourfold_recurrent_depth.states import StateTable, state_table

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
