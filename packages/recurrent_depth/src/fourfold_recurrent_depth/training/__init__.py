"""Parts of a training run: a model, an objective of random depth, an optimizer."""

from fourfold_recurrent_depth.training.ellis import Ellis, ELLISAdam
from fourfold_recurrent_depth.training.every_exit import EveryExit
from fourfold_recurrent_depth.training.models import RecurrentDepth
from fourfold_recurrent_depth.training.random_depth import Always, LogNormalPoisson, RandomDepth

__all__ = [
    "Always",
    "ELLISAdam",
    "Ellis",
    "EveryExit",
    "LogNormalPoisson",
    "RandomDepth",
    "RecurrentDepth",
]
