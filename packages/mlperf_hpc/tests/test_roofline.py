"""The roofline's counts, against arithmetic by hand and the law of what crosses ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fourfold_mlperf_hpc.roofline import (
    Ceilings,
    Roofline,
    Traffic,
    Work,
    counted_work,
    roofline_of,
)
from fourfold_parallel.run.recipe import Run


def test_bytes_of_a_product_are_its_operands() -> None:
    """Read once, written once; a view moves nothing, and what is read twice counts once at least."""
    x, y = torch.rand(8, 16), torch.rand(16, 4)
    with Traffic() as traffic:
        z = x @ y
    assert traffic.most_bytes == traffic.least_bytes == 4 * (8 * 16 + 16 * 4 + 8 * 4)
    with Traffic() as traffic:
        z.t().reshape(4, 8)[1:].detach()
    assert traffic.most_bytes == 0
    with Traffic() as traffic:
        _ = z + z.t().t()
    assert traffic.most_bytes == 3 * 4 * 32
    assert traffic.least_bytes == 2 * 4 * 32


def test_memory_that_is_used_again_counts_anew() -> None:
    """An allocator gives freed memory to the next tensor under the same address."""
    with Traffic() as traffic:
        for _ in range(5):
            torch.rand(1000).add(1.0)
    assert traffic.least_bytes == 5 * 2 * 4000


def test_flops_of_a_step_are_those_counted_by_hand(small_run: Run) -> None:
    """6 a weight and token in products; attention has 2 products forward, 5 backward."""
    model = small_run.model.build(seed=0)
    rows = torch.randint(0, 320, (4, 24))
    norms = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    weights = (
        sum(p.numel() for p in model.parameters()) - norms
    )  # the tied table is the head's product
    width, depth = 32, 2
    attention = depth * (2 + 5) * 2 * 4 * 24 * 24 * width

    def step() -> None:
        model(input_ids=rows, labels=rows, use_cache=False).loss.backward()

    flops, least, most = counted_work(step)
    assert flops == pytest.approx(6 * weights * rows.numel() + attention, rel=0.01)
    assert 3 * 4 * weights < least < most


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_is_slower_than_its_bounds_and_sends_its_gradient(
    small_run: Run, ranks: int
) -> None:
    run = replace(small_run, batch=8, microbatch=8)
    line = roofline_of(run, ranks=ranks, steps=2)
    parameters = sum(p.numel() for p in run.model.build(seed=0).parameters())
    assert line.parameters == parameters
    assert line.work.wire_bytes == 2 * (ranks - 1) / ranks * 4 * parameters
    assert (line.work.calls > 0) == (ranks > 1)
    assert line.tokens == 8 * 24 // ranks
    assert max(line.bounds_s.values()) < line.step_s
    assert 0 < line.efficiency < 1


def test_the_longest_bound_is_the_resource_that_binds() -> None:
    """Make each resource in turn a thousand times as slow."""
    work = Work(flops=1e9, least_bytes=1e9, most_bytes=2e9, wire_bytes=1e9, calls=1, io_bytes=1e9)
    tops = Ceilings(
        flops_per_s=1e9, memory_bytes_per_s=1e9, wire_bytes_per_s=1e9, cold_bytes_per_s=1e9,
        warm_bytes_per_s=1e9,
    )  # fmt: skip
    named = {
        "flops_per_s": "arithmetic", "memory_bytes_per_s": "memory", "wire_bytes_per_s": "network",
        "cold_bytes_per_s": "files",
    }  # fmt: skip
    for field, resource in named.items():
        line = Roofline(
            name="x", ranks=1, parameters=1, tokens=1, work=work,
            ceilings=replace(tops, **{field: 1e6}), step_s=2000.0,
        )  # fmt: skip
        assert line.bound == resource
        assert line.efficiency == pytest.approx(0.5)
    assert line.unfused_s == 2.0


def test_a_batch_that_the_ranks_do_not_divide_is_refused(small_run: Run) -> None:
    with pytest.raises(ValueError, match="batch=9 does not divide over 2 ranks"):
        roofline_of(replace(small_run, batch=9, microbatch=9), ranks=2)
