"""Imported once by the server from which ranks are forked: the grid, with its shapes checked."""

import os

import jaxtyping
import pytest  # noqa: F401: imported for the ranks
import torch._dynamo  # noqa: F401
import transformers  # noqa: F401
import transformers.models.auto.modeling_auto  # noqa: F401
from torch.distributed import tensor  # noqa: F401

if "JAXTYPING_DISABLE" not in os.environ:
    with jaxtyping.install_import_hook("fourfold_parallel", "beartype.beartype"):
        import fourfold_parallel.grid.laws
        import fourfold_parallel.grid.linear  # noqa: F401
