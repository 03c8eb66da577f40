"""The choice of a twin: what a timing found fastest, else Triton on a GPU, C++ on a CPU, or torch."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from fourfold_loki.attention_mode import Sparse
from fourfold_loki.budget import Adaptive
from fourfold_loki.cache import LokiLayer
from fourfold_loki.kernels import cpu
from fourfold_loki.kernels.choice import sparse_forms
from fourfold_loki.kernels.page_read import PageRead
from fourfold_loki.selectors import Loki


def can_decode(mode: Sparse, queries: Tensor, layer: LokiLayer) -> bool:
    """True where a kernel computes what the reference would for this mode and cache."""
    budget = mode.budget
    group = queries.shape[1] // layer.rotation.query_map.shape[0]
    return (
        type(mode.selector) is Loki
        and queries.shape[2] == 1
        # They write into buffers, which autograd cannot follow.
        and not queries.requires_grad
        and not isinstance(budget.amount, Adaptive)
        and (budget.selection == "shared in groups" or group == 1)
        and layer.room % budget.page == 0
        # Where the forced pages alone fill the budget, the order of ties matters.
        and budget.sinks + budget.window + 2 * budget.page
        <= max(budget.units(layer.length) * budget.page, 2 * budget.page)
    )


def twin(
    queries: Tensor, keys: Tensor, values: Tensor, leading: Tensor
) -> Callable[..., Float[Tensor, "batch heads 1 value_width"]]:
    """The `decode` that is mostly fastest of those that take these tensors."""
    return next(iter(sparse_forms(queries, keys, values, leading).values()))


def decode(
    mode: Sparse,
    queries: Float[Tensor, "batch heads 1 head_width"],
    layer: LokiLayer,
    *,
    scaling: float,
) -> tuple[Float[Tensor, "batch heads 1 value_width"], int]:
    """Attention for one query a sequence, and how many keys it read."""
    budget, length = mode.budget, layer.length
    assert layer.keys is not None
    assert layer.values is not None
    pages = budget.units(length)
    if budget.is_dense_at(length) or pages * budget.page >= length:
        dense = cpu.dense if mode.forms is None else cpu.DENSE[mode.forms.dense]
        return dense(queries, layer.keys, layer.values, length=length, scaling=scaling), length
    read = PageRead(
        length=length,
        pages=pages,
        page=budget.page,
        sinks=budget.sinks,
        window=budget.window,
        scaling=scaling,
    )
    cached = (queries, layer.keys, layer.values, layer.leading)
    decode_by = sparse_forms(*cached)
    best = None if mode.forms is None else decode_by.get(mode.forms.sparse)
    return (best or next(iter(decode_by.values())))(*cached, read), pages * budget.page
