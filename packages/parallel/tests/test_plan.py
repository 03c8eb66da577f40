"""The planner's laws, its parity with the grid and with the authors' script, and its refusals."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from fourfold_parallel.certify.toys import NOT_BUILT, causal_types, default_toy, toy, toy_model
from fourfold_parallel.common.axes import AXES
from fourfold_parallel.grid.collectives import Trace
from fourfold_parallel.grid.huggingface import parallelize
from fourfold_parallel.grid.layout import Swapped, rules_for
from fourfold_parallel.plan import authors
from fourfold_parallel.plan import simulate as simulation
from fourfold_parallel.plan.authors import ranking
from fourfold_parallel.plan.cost import Work
from fourfold_parallel.plan.job import Job, Layout, grids
from fourfold_parallel.plan.machine import Machine
from fourfold_parallel.plan.machines import MACHINES, machine_of
from fourfold_parallel.plan.memory import fits, memory_of
from fourfold_parallel.plan.search import grid_of, plan_of, rank
from fourfold_parallel.plan.simulate import simulate
from fourfold_parallel.plan.transformer import Mixture, Transformer
from fourfold_parallel.testing.grids import Sizes, factorisations, mesh_of
from fourfold_parallel.testing.ranks import run_on_ranks

SMALL = Transformer.llama(
    name="small", layers=3, width=1024, hidden=2816, heads=16, kv_heads=8, vocabulary=32_000
)
JOB = Job(model=SMALL, batch=64, sequence=2048)
H100 = machine_of("dgx-h100")

layouts = st.builds(
    lambda data, depth, row, col, microbatch, recomputes, cuts, shards: Layout(
        data=2**data, depth=2**depth, row=2**row, col=2**col, microbatch=microbatch,
        recomputes=recomputes, cuts_tokens=cuts, shards_optimizer=shards,
    ),
    st.integers(0, 3), st.integers(0, 3), st.integers(0, 3), st.integers(0, 3),
    st.sampled_from([1, 2, 4]), st.booleans(), st.booleans(), st.booleans(),
)  # fmt: skip


# The authors' own model -------------------------------------------------------------------------------

GOLDEN = [
    (
        authors.PERLMUTTER,
        {"ranks": 32, "layers": 32, "width": 7168, "batch": 256, "least_tensor": 16},
        [
            ((1, 32, 1, 1), 1.335059), ((2, 16, 1, 1), 1.521680), ((1, 8, 4, 1), 3.445859),
            ((1, 16, 2, 1), 3.502519), ((2, 4, 4, 1), 3.503281), ((2, 8, 2, 1), 3.646073),
        ],
    ),
    (
        authors.FRONTIER,
        {"ranks": 64, "layers": 38, "width": 9216, "batch": 256, "least_tensor": 32},
        [
            ((1, 64, 1, 1), 5.326007), ((2, 32, 1, 1), 6.143225), ((1, 32, 2, 1), 6.235653),
            ((1, 32, 1, 2), 6.567049),
        ],
    ),
    (
        authors.PERLMUTTER,
        {"ranks": 1024, "layers": 42, "width": 12288, "batch": 2048, "least_tensor": 64},
        [
            ((1, 1024, 1, 1), 5.310434), ((2, 512, 1, 1), 5.332928), ((4, 256, 1, 1), 5.377917),
            ((8, 128, 1, 1), 5.467896), ((16, 64, 1, 1), 5.647852), ((1, 512, 2, 1), 6.548664),
        ],
    ),
]  # fmt: skip
"""Machine, case, and the first grids (data, depth, row, col) with their seconds, by the authors' script."""


@pytest.mark.parametrize(("links", "case", "first"), GOLDEN, ids=["20B", "40B", "80B"])
def test_the_authors_rankings_are_theirs(
    links: authors.Links, case: dict[str, int], first: list[tuple[tuple[int, ...], float]]
) -> None:
    """To six decimals."""
    ranked = ranking(links, sequence=2048, **case)[: len(first)]
    assert [(grid_of(grid), round(seconds, 6)) for grid, seconds in ranked] == first


# Models ------------------------------------------------------------------------------------------------

FAMILIES: dict[type[PretrainedConfig], dict[str, Any]] = {
    LlamaConfig: {}, MistralConfig: {}, Qwen2Config: {}, Qwen3Config: {}, GemmaConfig: {},
    GPT2Config: {}, OPTConfig: {}, GPTNeoXConfig: {},
}  # fmt: skip


@pytest.mark.parametrize("kind", FAMILIES, ids=lambda kind: kind.model_type)
def test_a_configuration_is_enough_to_know_a_model(kind: type[PretrainedConfig]) -> None:
    """The planner swaps the layers that the grid swaps, and counts the model's parameters."""
    config = kind()
    config.num_hidden_layers = 2
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    planned = Transformer.of(config)
    rules = rules_for(model, {})
    swapped = {name.rpartition(".")[2] for name, rule in rules.items() if isinstance(rule, Swapped)}
    assert {linear.name for linear in planned.linears if linear.swapped} == swapped
    assert planned.parameters == sum(p.numel() for p in model.parameters())


NOT_PLANNED = {
    "dbrx", "jetmoe", "llama4", "llama4_text", "longcat_flash", "phi4_multimodal", "xlnet",
}  # fmt: skip


def test_every_family_is_planned_or_refused_by_name() -> None:
    """174 of 181 types; of the others most weights lie in modules of a kind that is not planned."""
    kinds = [kind for kind in causal_types() if kind not in NOT_BUILT]
    refused = {}
    for kind in kinds:
        try:
            Transformer.of(default_toy(kind))
        except ValueError as error:
            refused[kind] = str(error)
    assert all("that are neither linear layers nor experts" in said for said in refused.values())
    assert (len(kinds), {*refused}) == (181, NOT_PLANNED)


MIXTURES = {"mixtral": 1, "deepseek_v3": 2, "gpt_oss": 1, "qwen3_next": 2, "jamba": 2}
"""Types with experts, and the kinds of their decoder layers."""


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_mixture_of_experts_is_known_by_what_a_token_meets(kind: str) -> None:
    """Every parameter is counted; of the experts' elements, a token meets the chosen ones'."""
    config = default_toy(kind)
    planned = Transformer.of(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert planned.parameters == sum(p.numel() for p in model.parameters())
    assert len(planned.stack) == MIXTURES[kind]
    assert planned.layers == config.num_hidden_layers
    experts = {
        name: p.numel()
        for name, p in model.named_parameters()
        if "experts." in name and "shared" not in name and not name.endswith("bias")
    }
    held = sum(
        n * p.parameters
        for layer, n in planned.stack
        for p in layer.parts
        if isinstance(p, Mixture)
    )
    assert held == sum(experts.values())
    assert planned.matrix_parameters - planned.active_parameters == held * 3 // 4  # two of eight


def test_a_configuration_that_cannot_be_planned_is_refused() -> None:
    """By the field, or by what the grid does not cut."""
    with pytest.raises(ValueError, match="lacks hidden_size, vocab_size"):
        Transformer.of(PretrainedConfig())
    with pytest.raises(ValueError, match=r"llama4_text: \d+% of .*Llama4TextMoe"):
        Transformer.of(toy(Llama4TextConfig()))


def test_operations_are_the_fields() -> None:
    """6 N T and attention in full; recomputation adds a forward of the decoder layers alone."""
    gpt = Transformer.gpt(name="gpt", layers=24, width=4096, heads=32, vocabulary=51_200)
    tokens, sequence = 2048 * 16, 2048
    formula = 72 * tokens * 24 * 4096**2 * (1 + sequence / (6 * 4096) + 51_200 / (12 * 24 * 4096))
    plain = gpt.flops(tokens=tokens, sequence=sequence, recomputes=False)
    assert plain == pytest.approx(formula, rel=0.02)
    paper = 96 * tokens * 24 * 4096**2 * (1 + sequence / (6 * 4096) + 51_200 / (16 * 24 * 4096))
    assert gpt.flops(tokens=tokens, sequence=sequence, recomputes=True) == pytest.approx(
        paper, rel=0.02
    )


# Time --------------------------------------------------------------------------------------------------


Events = list[tuple[str, str, int]]


def sent_on_grid(sizes: Sizes, config: PretrainedConfig, experts: Any = "gathered") -> Events:
    """Axis, kind and bytes of what a rank of the real grid sends in one forward and backward, in order."""
    trace = Trace()
    mesh = mesh_of(sizes).observed(trace)
    model = toy_model(config).float()
    parallelize(model, mesh, logits="split", checks=False, experts=experts)
    tokens = torch.arange(16 * 32).view(16, 32) * 7 % config.vocab_size
    tokens = tokens[mesh.batch_rank() :: mesh.batch_size()]
    for _ in range(2):
        trace.events.clear()
        model(input_ids=tokens, labels=tokens).loss.backward()
        model.zero_grad()
    return [(e.axis, e.what, e.payload_bytes) for e in trace.events if e.moment == "start"]


DENSE = LlamaConfig(
    hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=4, vocab_size=512, tie_word_embeddings=False,
)  # fmt: skip
MOVED: list[tuple[str, Sizes, str, float]] = [
    ("llama", (1, 8, 1, 1), "gathered", 0.02), ("llama", (2, 1, 4, 1), "gathered", 0.02),
    ("llama", (1, 2, 2, 2), "gathered", 0.02), ("mixtral", (1, 2, 2, 2), "gathered", 0.05),
    ("llama", (8, 1, 1, 1), "gathered", 0.02), ("mixtral", (1, 8, 1, 1), "gathered", 0.02),
    ("deepseek_v3", (1, 2, 2, 2), "gathered", 0.05), ("gemma2", (1, 1, 2, 4), "gathered", 0.05),
    ("mixtral of six", (1, 8, 1, 1), "gathered", 0.02), ("mixtral", (1, 8, 1, 1), "exchanged", 0.02),
    ("mixtral", (1, 2, 2, 2), "exchanged", 0.05),
]  # fmt: skip
"""A model, a grid of 8 ranks, what becomes of experts, and what the planner may leave out: the gains of norms
over depth, counts of targets, weights of the chosen experts."""


@pytest.mark.parametrize(("kind", "sizes", "experts", "left_out"), MOVED, ids=str)
def test_the_planner_moves_what_the_grid_moves(
    kind: str, sizes: Sizes, experts: Any, left_out: float
) -> None:
    """Bytes along each axis, of a real forward and backward."""
    config = DENSE if kind == "llama" else default_toy(kind.removesuffix(" of six"))
    if kind.endswith(" of six"):  # experts: fewer than ranks
        config.num_local_experts = 6
    data, depth, row, col = sizes
    ranks = run_on_ranks(8, sent_on_grid, sizes=sizes, config=config, experts=experts)
    layout = Layout(
        data=data, depth=depth, row=row, col=col, microbatch=16 // (data * depth), experts=experts
    )
    real = dict.fromkeys(AXES, 0.0)
    for same in zip(*ranks, strict=True):
        [(axis, verb)] = {(axis, verb) for axis, verb, _ in same}
        size, rounds = dict(zip(AXES, sizes, strict=True))[axis], 2 if verb == "all_reduce" else 1
        # Who gets more tokens than he sends, is asked for what he gets; sums of all their rows are conserved.
        typical = min if verb == "all_to_all" else fmean
        real[axis] += rounds * (size - 1) / size * typical(payload for _, _, payload in same)
    job = Job(model=Transformer.of(config), batch=16, sequence=32, precision="fp32")
    planned = simulate(job, layout, H100).moved_bytes
    for axis in AXES:
        assert planned[axis] == pytest.approx(real[axis], rel=left_out), axis


@pytest.mark.parametrize(("depth", "times"), [(8, 1), (16, 2), (128, 16)])
def test_ranks_without_experts_help_nobody(depth: int, times: int) -> None:
    """Of eight experts, a rank that has any computes for as many ranks as have none."""
    part = Mixture(name="experts", number=8, chosen=2, width=4096, hidden=14336, matrices=3)
    assert part.crowding(depth) == times
    even, crowded = (
        Work(JOB, Layout(depth=n, experts="exchanged"), H100).experts(part) for n in (8, depth)
    )
    assert crowded == pytest.approx(times * even, rel=0.2)


def test_experts_are_gathered_or_exchanged_with_as_is_faster() -> None:
    """Many tokens make weights the lighter load, many experts the tokens; dense models have no choice."""
    ways = {}
    for experts, batch in ((8, 4096), (128, 64)):
        config = default_toy("mixtral")
        config.update(
            {"hidden_size": 1024, "intermediate_size": 1024, "num_local_experts": experts}
        )
        job = Job(model=Transformer.of(config), batch=batch, sequence=2048)
        ranking = rank(job, H100, 8, grid=[Layout(depth=8)])
        assert {plan.layout.experts for plan in ranking.plans} == {"gathered", "exchanged"}
        ways[experts] = ranking.best.layout.experts
    assert ways == {8: "gathered", 128: "exchanged"}
    assert {plan.layout.experts for plan in rank(JOB, H100, 8).plans} == {"gathered"}


@settings(max_examples=40, deadline=None)
@given(layout=layouts)
def test_hiding_never_costs_and_faster_links_never_slow(layout: Layout) -> None:
    """Of any layout; and what is waited for, computed and the update make up no more than the step."""
    step = simulate(JOB, layout, H100)
    assert step.seconds <= simulate(JOB, layout, replace(H100, steals=1.0)).seconds * (1 + 1e-9)
    faster = replace(
        H100,
        node_bytes_per_s=2 * H100.node_bytes_per_s,
        rings=tuple(replace(ring, bytes_per_s=2 * ring.bytes_per_s) for ring in H100.rings),
    )
    assert simulate(JOB, layout, faster).seconds <= step.seconds * (1 + 1e-9)
    assert all(seconds >= 0 for seconds in step.exposed_s.values())
    assert step.seconds == pytest.approx(step.compute_s + sum(step.exposed_s.values()), rel=1e-6)


@settings(max_examples=20, deadline=None)
@given(layout=layouts, layers=st.integers(5, 9))
def test_layers_that_are_not_walked_take_what_a_walked_one_takes(
    layout: Layout, layers: int
) -> None:
    """Three layers stand for all of them within 2 %."""
    job = replace(JOB, model=replace(SMALL, stack=((SMALL.stack[0][0], layers),)))
    short = simulate(job, layout, H100).seconds
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulation, "SIMULATED_LAYERS", layers)
        assert simulate(job, layout, H100).seconds == pytest.approx(short, rel=0.02)


def test_one_rank_waits_for_nobody() -> None:
    """And sends nothing."""
    step = simulate(JOB, Layout(), H100)
    assert not any(step.exposed_s.values())
    assert not any(step.moved_bytes.values())


def test_recomputation_costs_time_and_hardware_flops_alone() -> None:
    """The model's own operations are as many."""
    kept, again = (plan_of(JOB, Layout(depth=8, recomputes=r), H100) for r in (False, True))
    assert again.seconds > kept.seconds
    assert again.memory.activations < kept.memory.activations
    assert again.hfu / again.mfu > 1.15
    assert kept.hfu == kept.mfu


# Search ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 6, 8, 24, 64])
def test_every_ordered_factorisation_is_tried_once(ranks: int) -> None:
    """A prime's power p^e falls in C(e + 3, 3) ways on four axes."""
    found = [grid_of(layout) for layout in grids(ranks)]
    exponents = []
    rest = ranks
    for prime in (2, 3):
        exponent = 0
        while rest % prime == 0:
            rest, exponent = rest // prime, exponent + 1
        exponents.append(exponent)
    assert len(found) == len(set(found)) == math.prod(math.comb(e + 3, 3) for e in exponents)
    assert all(math.prod(sizes) == ranks for sizes in found)
    if ranks == 8:
        assert set(found) == set(factorisations(8))


def test_nothing_is_planned_that_cannot_run() -> None:
    """Every plan fits and divides; every grid is planned or refused with a reason."""
    big = Transformer.llama(
        name="13b",
        layers=40,
        width=5120,
        hidden=13_824,
        heads=40,
        kv_heads=40,
        vocabulary=32_000,
    )
    job = Job(model=big, batch=96, sequence=4096)
    machine = machine_of("perlmutter")
    ranking = rank(job, machine, 24)
    planned = {grid_of(p.layout) for p in ranking.plans} | {
        grid_of(layout) for _, layout in ranking.scouted
    }
    refused = {grid_of(layout) for layout, _ in ranking.refusals}
    assert planned | refused == {grid_of(layout) for layout in grids(24)}
    assert not planned & refused
    for plan in ranking.plans:
        assert fits(plan.memory, machine)
        assert job.batch % plan.layout.shares == 0
        assert big.heads % plan.layout.row == 0
    assert all(reason for _, reason in ranking.refusals)


def test_a_model_that_fits_nowhere_is_told_how_many_devices_would_do() -> None:
    """And that many do."""
    big = Transformer.llama(
        name="405b",
        layers=126,
        width=16_384,
        hidden=53_248,
        heads=128,
        kv_heads=8,
        vocabulary=128_256,
    )
    job = Job(model=big, batch=1024, sequence=4096)
    with pytest.raises(
        ValueError, match=r"runs on no grid of 8 .*; (\d+) devices would do"
    ) as refusal:
        _ = rank(job, H100, 8).best
    enough = int(str(refusal.value).rpartition("; ")[2].split()[0])
    assert rank(job, H100, enough).best.layout.ranks == enough
    with pytest.raises(ValueError, match="no grid"):
        _ = rank(job, H100, enough // 2).best


def test_why_not_names_the_reason() -> None:
    """Of a grid that cannot run, of one that is slower, of the best, and of another number of ranks."""
    ranking = rank(JOB, H100, 32)
    best = ranking.best.layout
    assert "it is the best grid" in ranking.why_not(best)
    assert "16 heads do not divide over row 32" in ranking.why_not(Layout(row=32))
    assert "has 16 ranks" in ranking.why_not(Layout(depth=16))
    slow = ranking.why_not(Layout(col=32))
    assert "s a step more" in slow
    assert "waiting for col" in slow


def test_the_largest_model_is_planned_on_thousands_of_devices() -> None:
    """Llama-3.1-405B on 4,096 dies; the sentences on how firm that is are there."""
    config = LlamaConfig(
        hidden_size=16_384, intermediate_size=53_248, num_hidden_layers=126, num_attention_heads=128,
        num_key_value_heads=8, vocab_size=128_256, tie_word_embeddings=False,
    )  # fmt: skip
    model = Transformer.of(config)
    assert model.parameters == 405_853_388_800
    ranking = rank(Job(model=model, batch=4096, sequence=4096), machine_of("frontier"), 4096)
    assert ranking.best.mfu > 0.2
    assert next(ranking.sensitivities()).startswith("The second grid")


# Memory ------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(layout=layouts)
def test_memory_shrinks_where_something_is_cut_or_left_out(layout: Layout) -> None:
    """More depth, recomputation and ZeRO-1 never need more."""
    peak = memory_of(JOB, layout).peak
    if not layout.recomputes:
        assert memory_of(JOB, replace(layout, recomputes=True)).peak <= peak
    if not layout.shards_optimizer:
        assert memory_of(JOB, replace(layout, shards_optimizer=True)).peak <= peak
    if layout.depth > 1:  # the first step of depth adds gathered tiles
        assert memory_of(JOB, replace(layout, depth=2 * layout.depth)).peak <= peak


# Machines ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", MACHINES.values(), ids=lambda machine: machine.name)
def test_a_machine_is_written_and_read(machine: Machine, tmp_path: Path) -> None:
    """Equal, with its sources."""
    machine.save(tmp_path / "machine.json")
    assert Machine.load(tmp_path / "machine.json") == machine
    assert machine_of(tmp_path / "machine.json") == machine
    assert machine.sources


@pytest.mark.parametrize(
    ("name", "text"),
    [("marenostrum", "known are perlmutter"), ("x.json", "neither known nor a file")],
)
def test_an_unknown_machine_is_refused(name: str, text: str) -> None:
    """With the known ones."""
    with pytest.raises(ValueError, match=text):
        machine_of(name)


@pytest.mark.parametrize("text", ["{}", "[", '{"type": "parallel/Layout", "data": 2}'])
def test_a_file_that_is_no_machine_is_refused(text: str, tmp_path: Path) -> None:
    """By its name."""
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"other\.json holds no machine"):
        machine_of(path)
