"""Recurrent-depth language models (Geiping et al. 2025)."""

from fourfold_recurrent_depth.cache import RecurrentCache, estimate_cache_bytes
from fourfold_recurrent_depth.causal_lm import RecurrentDepthForCausalLM, RecurrentDepthOutput
from fourfold_recurrent_depth.configuration import RecurrentDepthConfig
from fourfold_recurrent_depth.states import FreshNoise, StateTable, TokenStates, state_table
from fourfold_recurrent_depth.training.random_depth import Always, LogNormalPoisson, RandomDepth

__all__ = [
    "Always",
    "FreshNoise",
    "LogNormalPoisson",
    "RandomDepth",
    "RecurrentCache",
    "RecurrentDepthConfig",
    "RecurrentDepthForCausalLM",
    "RecurrentDepthOutput",
    "StateTable",
    "TokenStates",
    "estimate_cache_bytes",
    "state_table",
]
