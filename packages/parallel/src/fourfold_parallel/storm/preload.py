"""Imported once by the server from which the ranks of a storm are forked."""

import torch
import transformers.models.llama.modeling_llama  # noqa: F401
from torch.distributed import tensor  # noqa: F401

import fourfold_parallel.run.train
import fourfold_parallel.storm.pairs  # noqa: F401

torch.set_num_threads(1)
