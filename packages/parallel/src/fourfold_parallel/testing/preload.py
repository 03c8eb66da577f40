"""Imported once by the server from which ranks are forked: the grid, with its shapes checked."""

import os

import jaxtyping
import pytest  # noqa: F401 - imported for the ranks
import torch._dynamo  # noqa: F401
import transformers.models.gemma.modeling_gemma
import transformers.models.gpt2.modeling_gpt2
import transformers.models.gpt_neox.modeling_gpt_neox
import transformers.models.llama.modeling_llama
import transformers.models.mistral.modeling_mistral
import transformers.models.opt.modeling_opt
import transformers.models.qwen2.modeling_qwen2
import transformers.models.qwen3.modeling_qwen3  # noqa: F401
from torch.distributed import tensor  # noqa: F401

if "JAXTYPING_DISABLE" not in os.environ:
    with jaxtyping.install_import_hook("fourfold_parallel", "beartype.beartype"):
        pass
