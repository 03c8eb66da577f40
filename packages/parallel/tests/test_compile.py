"""`torch.compile` takes the grid as one graph, with overlaps on, and gives the same gradients.

Run with JAXTYPING_DISABLE=1: shape checks would break the graph.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from fourfold_parallel.grid.huggingface import parallelize
from fourfold_parallel.grid.linear import Linear, bias_cut, weight_cut
from fourfold_parallel.grid.mesh import Mesh
from fourfold_parallel.grid.products import Products
from fourfold_parallel.grid.schedule import Overlaps, Schedule
from fourfold_parallel.testing.grids import Sizes, close, mesh_of
from fourfold_parallel.testing.ranks import run_on_ranks

pytestmark = pytest.mark.compile

COMPILED = 1e-12
"""The same products and sums in float64; a compiler may fuse an addition."""


def pair(mesh: Mesh) -> nn.Sequential:
    torch.manual_seed(0)
    schedule = Schedule(Overlaps())
    layers: list[nn.Module] = []
    for n, k, swapped in ((24, 16, False), (16, 24, True)):
        weight = mesh.distribute(torch.randn(n, k).double(), weight_cut(swapped=swapped))
        bias = mesh.distribute(torch.randn(n).double(), bias_cut(swapped=swapped))
        layers.append(
            Linear(
                nn.Parameter(weight),
                nn.Parameter(bias),
                mesh=mesh,
                name=f"{n}x{k}",
                schedule=schedule,
                swapped=swapped,
                products=Products(),
            )
        )
    return nn.Sequential(layers[0], nn.GELU(), layers[1])


def results(model: nn.Module, run: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    y = run(x)
    y.square().sum().backward()
    gradients = [p.grad.to_local().clone() for p in model.parameters() if p.grad is not None]
    assert len(gradients) == len([*model.parameters()])
    return [y.detach(), *gradients]


def compiled_layers_are_eager(sizes: Sizes) -> None:
    mesh = mesh_of(sizes)
    model = pair(mesh)
    start, stop = mesh.col.bounds(16)
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(1)).double()[:, start:stop]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(results(model, compiled, x), results(model, model, x), strict=True):
        close(ours, eager, what=f"{sizes}", tolerance=COMPILED)


def compiled_model_is_eager(sizes: Sizes) -> None:
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1,
        intermediate_size=36, vocab_size=61, max_position_embeddings=32, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").double()
    parallel = parallelize(model, mesh_of(sizes))
    tokens = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(2))

    class Logits(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, tokens: Tensor) -> Tensor:
            return self.inner(input_ids=tokens, use_cache=False).logits

    eager = Logits(parallel.model)
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    pairs = zip(results(eager, compiled, tokens), results(eager, eager, tokens), strict=True)
    for ours, theirs in pairs:
        close(ours, theirs, what=f"{sizes}", tolerance=1e-6)  # its norms compute in float32


@pytest.mark.parametrize("sizes", [(1, 2, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2)], ids=str)
def test_compiled_layers_are_one_graph_with_the_same_gradients(sizes: Sizes) -> None:
    run_on_ranks(2, compiled_layers_are_eager, sizes=sizes)


@pytest.mark.parametrize("sizes", [(1, 2, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2)], ids=str)
def test_a_compiled_llama_is_one_graph_with_the_same_gradients(sizes: Sizes) -> None:
    run_on_ranks(2, compiled_model_is_eager, sizes=sizes)
