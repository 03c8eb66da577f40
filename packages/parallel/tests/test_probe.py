"""A probe measures everything that the planner asks for, and what it writes is read back equal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fourfold_parallel.plan.job import Job, Layout
from fourfold_parallel.plan.machine import Curve, Machine
from fourfold_parallel.plan.machines import machine_of
from fourfold_parallel.plan.probe import (
    CLOCKS,
    ClockName,
    layouts_of,
    llama_config,
    probe,
    questions,
)
from fourfold_parallel.plan.simulate import simulate
from fourfold_parallel.plan.transformer import Transformer
from fourfold_parallel.planning.probing import probe_with_steps
from fourfold_parallel.testing.grids import factorisations
from fourfold_parallel.testing.ranks import run_on_ranks

WIDTH, BATCH, SEQUENCE = 64, 4, 8


def small_job(ranks: int = 4) -> Job:
    """A Llama whose probe takes seconds, with the batch that every grid of `ranks` divides."""
    config = llama_config(width=WIDTH, sequence=SEQUENCE)
    config.num_hidden_layers, config.vocab_size = 2, 128
    return Job(model=Transformer.of(config), batch=ranks, sequence=SEQUENCE, precision="fp32")


def probed() -> dict[ClockName, Machine]:
    """On every rank."""
    return probe(small_job(), name="here", device=torch.device("cpu"))


@pytest.fixture(scope="module")
def runs() -> list[dict[ClockName, Machine]]:
    """The machines that each of four ranks was given."""
    return run_on_ranks(4, probed)


def test_a_probe_is_read_back_equal(runs: list[dict[ClockName, Machine]], tmp_path: Path) -> None:
    """By value, so what was planned before a file was written is planned after it."""
    for clock in CLOCKS:
        machine = runs[0][clock]
        machine.save(tmp_path / "machine.json")
        again = machine_of(tmp_path / "machine.json")
        assert again == machine
        job, layout = small_job(), Layout(depth=2, col=2, microbatch=2)
        assert simulate(job, layout, again) == simulate(job, layout, machine)


def test_every_rank_gets_the_same_machine(runs: list[dict[ClockName, Machine]]) -> None:
    """Plans made on different ranks must agree."""
    assert all(run == runs[0] for run in runs)


def test_a_probed_machine_is_asked_for_nothing_that_was_not_measured(
    runs: list[dict[ClockName, Machine]],
) -> None:
    """On every grid: products, pieces, and a curve that reaches over every payload."""
    machine, job = runs[0]["wall"], small_job()
    asked = questions(job, layouts_of(job, 4))
    assert {(p.m, p.n, p.k) for p in machine.products} == asked.asked_products
    assert {(p.kind, p.shape) for p in machine.parts} == asked.asked_parts
    curves = {(c.kind, c.stride, c.size): c for c in machine.curves}
    assert {ask[:3] for ask in asked.asked_sums} == set(curves)
    for kind, stride, size, payload in asked.asked_sums:
        assert payload <= curves[kind, stride, size].points[-1][0] * 1.01


def test_measured_times_are_above_zero(runs: list[dict[ClockName, Machine]]) -> None:
    """By both clocks, and a CPU computes on its host."""
    for clock in CLOCKS:
        machine = runs[0][clock]
        assert machine.host_computes
        times = [p.seconds for p in machine.products]
        times += [s for part in machine.parts for s in (part.forward_s, part.backward_s)]
        times += [seconds for curve in machine.curves for _, seconds in curve.points]
        assert min(times) > 0
        # Differences of two measurements, which other work on the cores may bring to nothing.
        assert min(machine.kernel_s, machine.node_s, machine.seconds_per_tensor) >= 0
        assert 0 <= machine.steals <= 1


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_layouts_are_all_factorisations(ranks: int) -> None:
    """Where batch, heads and width divide; each rank takes its share at once."""
    sizes = [(g.data, g.depth, g.row, g.col) for g in layouts_of(small_job(8), ranks)]
    assert sorted(sizes) == sorted(factorisations(ranks))
    assert all(g.microbatches(8) == 1 for g in layouts_of(small_job(8), ranks))


def test_questions_hold_the_local_products_of_a_grid() -> None:
    """Written by hand: depth shares the batch, row the outputs of a plain layer, col its inputs."""
    job = small_job()
    asked = questions(job, [Layout(depth=2, row=2, microbatch=2)]).asked_products
    tokens = BATCH // 2 * SEQUENCE
    q, kv, o = (WIDTH // 2, WIDTH), (WIDTH // 4, WIDTH), (WIDTH, WIDTH // 2)
    up, down, head = (3 * WIDTH // 2, WIDTH), (WIDTH, 3 * WIDTH // 2), (64, WIDTH)
    assert asked == {(tokens, *tile) for tile in (q, kv, o, up, down, head)}


def test_questions_hold_the_collectives_of_a_grid() -> None:
    """On depth 2 x col 2: col neighbours are 1 apart, depth ones 2, each with its own payloads."""
    asked = questions(small_job(), [Layout(depth=2, col=2, microbatch=2)]).asked_sums
    assert {(kind, stride) for kind, stride, *_ in asked} == {
        ("all_reduce", 1), ("all_reduce", 2), ("all_gather", 2), ("reduce_scatter", 2),
    }  # fmt: skip
    gathers = {payload for kind, _, _, payload in asked if kind == "all_gather"}
    assert 4.0 * 3 * WIDTH * WIDTH / 2 in gathers  # a tile of the MLP: its columns over col


def test_a_measured_time_replaces_the_computed_one(
    runs: list[dict[ClockName, Machine]],
) -> None:
    """Twice as slow measurements make a step that is slower by what they add, and no less."""
    machine, job = replace(runs[0]["processor"], steals=1.0), small_job()  # nothing is hidden
    layout = Layout(data=4, microbatch=1)
    slower = replace(
        machine, products=tuple(replace(p, seconds=2 * p.seconds) for p in machine.products)
    )
    model = job.model
    tiles = [(m.outputs, m.inputs) for m in model.linears] * model.layers
    tiles.append((model.vocabulary, model.width))
    added = 3 * sum(machine.product(SEQUENCE, n, k, "fp32") or 0.0 for n, k in tiles)
    difference = simulate(job, layout, slower).seconds - simulate(job, layout, machine).seconds
    assert difference == pytest.approx(added)


def with_steps() -> dict[ClockName, Machine]:
    config = llama_config(width=WIDTH, sequence=SEQUENCE)
    config.num_hidden_layers, config.vocab_size = 2, 128
    return probe_with_steps(config, small_job(2), name="here", device=torch.device("cpu"))


def test_computing_together_is_measured_in_real_steps() -> None:
    """Equal on all ranks, above a half, and it scales what is computed and nothing else."""
    first, second = run_on_ranks(2, with_steps)
    for clock in CLOCKS:
        machine = first[clock]
        assert second[clock].together == machine.together >= 0.5
        alone, layout = replace(machine, together=1.0), Layout(depth=2, microbatch=1)
        slow, fast = (
            simulate(small_job(2), layout, m) for m in (replace(machine, together=2.0), alone)
        )
        assert slow.compute_s - slow.update_s == pytest.approx(2 * (fast.compute_s - fast.update_s))
        assert slow.update_s == fast.update_s


def test_a_curve_joins_its_points() -> None:
    """By lines; below the first it is flat, beyond the last proportional."""
    curve = Curve(kind="all_reduce", stride=1, size=2, points=((8.0, 1.0), (16.0, 3.0)))
    assert [curve.seconds(p) for p in (2, 8, 12, 16, 32)] == [1.0, 1.0, 2.0, 3.0, 6.0]
