"""Blocks that no rule covers: computed whole, their products divided, and equal to the plain model."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from fourfold_parallel.certify.toys import (
    NOT_BUILT,
    causal_types,
    default_toy,
    in_float64,
    toy_model,
)
from fourfold_parallel.grid.collectives import Trace
from fourfold_parallel.grid.engine import Fourfold
from fourfold_parallel.grid.gradients import local
from fourfold_parallel.grid.huggingface import Parallel, parallelize
from fourfold_parallel.grid.layout import Experts, Whole, check_sizes, refuse_quantised, rules_for
from fourfold_parallel.grid.schedule import Around
from fourfold_parallel.run.checkpoint import restore, save
from fourfold_parallel.testing.grids import Sizes, close, mesh_of, piece_of
from fourfold_parallel.testing.ranks import run_on_ranks

TOLERANCE = 1e-9
"""Sums of float64 in another order."""
GRIDS: list[Sizes] = [(1, 1, 2, 2), (1, 2, 1, 2), (2, 1, 2, 1)]


def toy(family: str, **settings: Any) -> PreTrainedModel:
    """A random toy model in float64; every rank builds the same."""
    config = default_toy(family)
    for name, value in settings.items():
        setattr(config, name, value)
    return toy_model(config)


def tokens_of(rows: int, length: int = 8) -> Tensor:
    return torch.randint(4, 100, (rows, length), generator=torch.Generator().manual_seed(5))


def mine_of(parallel: Parallel, tokens: Tensor) -> Tensor:
    return tokens.chunk(parallel.mesh.batch_size())[parallel.mesh.batch_rank()]


def trains_as_alone(family: str, grids: list[Sizes], steps: int = 3, **how: Any) -> None:
    tokens = tokens_of(4)
    with in_float64():
        for sizes in grids:
            plain = toy(family)
            parallel = parallelize(copy.deepcopy(plain), mesh_of(sizes), **how)
            optimizers = [
                torch.optim.AdamW(m.parameters(), lr=1e-2, eps=1e-3)
                for m in (plain, parallel.model)
            ]
            mine = mine_of(parallel, tokens)
            for step in range(steps):
                expected = plain(input_ids=tokens, labels=tokens, use_cache=False).loss
                ours = parallel.model(input_ids=mine, labels=mine, use_cache=False).loss
                what = f"{family} {sizes} step {step}"
                close(ours, expected, what=f"{what}: loss", tolerance=TOLERANCE)
                for loss, optimizer in zip((expected, ours), optimizers, strict=True):
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                parallel.settle(when="after a step")
            values = dict(plain.named_parameters())
            for name, whole in parallel.published():
                close(whole, values[name], what=f"{family} {sizes}: {name}", tolerance=1e-7)


@pytest.mark.parametrize(
    "family",
    ["mixtral", "bloom", "gpt_oss"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("deepseek_v3", "qwen3_next")],
)
def test_three_steps_are_those_of_the_plain_model(family: str) -> None:
    run_on_ranks(4, trains_as_alone, family=family, grids=GRIDS)


EXCHANGED: list[Sizes] = [(1, 4, 1, 1), (1, 2, 2, 1), (2, 2, 1, 1), (1, 2, 1, 2)]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_tokens_that_go_to_their_experts_train_them_alike(family: str) -> None:
    """Expert parallelism over depth, beside cuts of hidden units over row and col and replicas."""
    run_on_ranks(4, trains_as_alone, family=family, grids=EXCHANGED, experts="exchanged")


def exchanges(family: str) -> bool:
    """Whether the type has declared experts; those that have train on two grids as alone."""
    with in_float64():
        has_experts = any(isinstance(rule, Experts) for rule in rules_for(toy(family), {}).values())
    if has_experts:
        trains_as_alone(family, [(1, 4, 1, 1), (1, 2, 2, 1)], steps=2, experts="exchanged")
    return has_experts


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_experts_of_every_type_are_exchanged() -> None:
    """README's count of types with declared experts."""
    built = [family for family in causal_types() if family not in NOT_BUILT]
    trained = [family for family in built if run_on_ranks(4, exchanges, family=family)[0]]
    assert len(trained) == 52, trained


def routes_to_one_expert() -> None:
    """All tokens of all ranks choose one expert, of one rank; the others see no token."""
    tokens = tokens_of(4)
    with in_float64():
        plain = toy("mixtral")
        for module in plain.modules():
            router: Any = module
            if type(module).__name__ == "MixtralTopKRouter":
                router.top_k = 1
                router.weight.data.zero_()
        parallel = parallelize(
            copy.deepcopy(plain), mesh_of((1, 4, 1, 1)), experts="exchanged", checks=False
        )
        mine = mine_of(parallel, tokens)
        plain(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        parallel.model(input_ids=mine, labels=mine, use_cache=False).loss.backward()
        parallel.settle(when="after a backward")
        for name, parameter in plain.named_parameters():
            ours = parallel.model.get_parameter(name)
            assert parameter.grad is not None
            assert ours.grad is not None, name
            if "experts" in name:
                assert parameter.grad.flatten(1).any(1).sum() == 1, name
            kept = parallel.stored[name].keep(parameter.grad)
            close(
                local(ours.grad),
                piece_of(kept, ours, parallel.mesh),
                what=name,
                tolerance=TOLERANCE,
            )


def test_ranks_whose_experts_nobody_chose_take_part() -> None:
    """Their gradients are nought, not missing, and every exchange of backward meets its partners."""
    run_on_ranks(4, routes_to_one_expert)


def recomputes_exchanged() -> None:
    recomputes("mixtral", sizes=(1, 2, 2, 1), experts="exchanged")


def test_exchanged_experts_are_recomputed() -> None:
    run_on_ranks(4, recomputes_exchanged)


def goes_on_exchanged(folder: str) -> None:
    goes_on_elsewhere("mixtral", folder, experts="exchanged")


def test_exchanged_experts_are_stored_as_gathered_ones(tmp_path: Path) -> None:
    """A checkpoint of a grid that gathers goes on on grids that exchange."""
    run_on_ranks(4, goes_on_exchanged, folder=str(tmp_path))


def verbs_of_experts(experts: Literal["gathered", "exchanged"]) -> Counter[str]:
    trace = Trace()
    mesh = mesh_of((1, 2, 1, 1)).observed(trace)
    parallel = parallelize(toy("mixtral"), mesh, experts=experts, checks=False)
    tokens = mine_of(parallel, tokens_of(2))
    for _ in range(2):  # the second with gathers ahead
        trace.events.clear()
        parallel.model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        parallel.settle(when="after a step")
    return Counter(
        event.what
        for event in trace.events
        if event.moment == "start" and event.layer.endswith("experts")
    )


def test_tokens_move_to_exchanged_experts_and_no_weight_does() -> None:
    """Two layers: counts, rows, factors and choices go, results come; backward, rows, factors and results."""
    for gathered in run_on_ranks(2, verbs_of_experts, experts="gathered"):
        assert {*gathered} == {"all_gather", "reduce_scatter"}
    for exchanged in run_on_ranks(2, verbs_of_experts, experts="exchanged"):
        assert exchanged == {"all_to_all": 2 * (5 + 3)}


def keeps_no_published_tensor() -> None:
    for family in ("mixtral", "gpt2", "deepseek_v3"):
        parallel = parallelize(toy(family), mesh_of((1, 2, 1, 1)), checks=False)
        layers = [m for m in parallel.model.modules() if isinstance(m, Around)]
        assert layers
        for layer in layers:
            for name, parameter in layer._inner[0].named_parameters():
                assert isinstance(parameter, DTensor), (family, layer.name, name)


def test_what_is_cut_is_not_kept_whole_as_well() -> None:
    """A set of experts or a table of positions, in the module that the layer calls."""
    run_on_ranks(2, keeps_no_published_tensor)


def test_a_whole_block_in_the_sequence_form() -> None:
    run_on_ranks(4, trains_as_alone, family="mixtral", grids=[(1, 1, 2, 2)], cuts_tokens=True)


def test_a_whole_block_is_recomputed() -> None:
    run_on_ranks(4, recomputes, family="mixtral")


def recomputes(family: str, sizes: Sizes = (1, 1, 2, 2), **how: Any) -> None:
    tokens = tokens_of(2)
    plain = toy(family)
    parallel = parallelize(copy.deepcopy(plain), mesh_of(sizes), **how)
    parallel.model.gradient_checkpointing_enable({"use_reentrant": False})
    parallel.model.train()
    plain(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    mine = mine_of(parallel, tokens)
    parallel.model(input_ids=mine, labels=mine, use_cache=False).loss.backward()
    parallel.settle(when="after backward")
    expected = dict(plain.named_parameters())
    for name, parameter in parallel.model.named_parameters():
        assert parameter.grad is not None
        gradient = parallel.stored[name].publish(parameter.grad.full_tensor())
        close(gradient, expected[name].grad, what=name, tolerance=1e-5)  # parts are in float32


def saved_and_loaded(family: str, folder: str, sizes: Sizes) -> None:
    with in_float64():
        plain = toy(family)
        parallel = parallelize(copy.deepcopy(plain), mesh_of((1, 1, 2, 2)))
        parallel.save(folder)
        values = dict(plain.named_parameters())
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(
                plain.config, dtype=torch.float64, experts_implementation="eager"
            )
        again = parallelize(empty, mesh_of(sizes), weights=folder)
        for name, parameter in again.model.named_parameters():
            expected = again.stored[name].keep(values[name])
            assert torch.equal(
                parameter._local_tensor, piece_of(expected, parameter, again.mesh)
            ), name
        tokens = tokens_of(4)
        mine = mine_of(again, tokens)
        logits = plain(input_ids=tokens, use_cache=False).logits
        share = logits.chunk(again.mesh.batch_size())[again.mesh.batch_rank()]
        ours = again.model(input_ids=mine, use_cache=False).logits
        close(ours, share, what="logits after loading", tolerance=TOLERANCE)
        read: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        for name, value in read.state_dict().items():
            assert torch.equal(value, plain.state_dict()[name]), name


@pytest.mark.parametrize(
    ("family", "sizes"),
    [("mixtral", (1, 1, 2, 2)), ("gpt_oss", (1, 2, 2, 1)), ("bloom", (1, 2, 1, 2))],
)
def test_it_is_saved_and_loaded_onto_another_grid_from_meta(
    family: str, sizes: Sizes, tmp_path: Path
) -> None:
    run_on_ranks(4, saved_and_loaded, family=family, folder=str(tmp_path), sizes=sizes)


def session_step(session: Any, tokens: Tensor) -> float:
    share = tokens.chunk(session.ranks)[session.rank]
    with session.microbatch(is_last=True):
        loss = session.model(input_ids=share, labels=share, use_cache=False).loss
        session.backward(loss)
    session.update(1e9)  # a norm that clips nothing
    return float(loss.detach())


def goes_on_elsewhere(
    family: str, folder: str, experts: Literal["gathered", "exchanged"] = "gathered"
) -> None:
    """Two steps on a grid, saved, and the third on other grids, where experts are gathered or exchanged."""
    tokens = tokens_of(4)

    def opened(sizes: Sizes, model: PreTrainedModel) -> Any:
        data, depth, row, col = sizes
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
        engine = Fourfold(data=data, depth=depth, row=row, col=col, experts=experts)
        return engine.open(model, optimizer, precision="fp32", batch=4, microbatch=4)

    with in_float64():
        plain = toy(family)
        optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, eps=1e-3)
        losses = []
        for _ in range(3):
            loss = plain(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        with opened((1, 1, 2, 2), toy(family)) as session:
            ours = [session_step(session, tokens) for _ in range(2)]
            path = save(session, folder)
        for sizes in [(2, 1, 1, 2), (1, 4, 1, 1), (1, 1, 4, 1)]:
            with opened(sizes, toy(family)) as session:
                restore(session, path)
                for found, expected in zip(
                    [*ours, session_step(session, tokens)], losses, strict=True
                ):
                    assert abs(found - expected) < TOLERANCE, (sizes, found, expected)
                values = dict(plain.named_parameters())
                for name, whole in session.parallel.published():
                    close(whole, values[name], what=f"{sizes}: {name}", tolerance=1e-7)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_checkpoint_goes_on_on_other_grids(family: str, tmp_path: Path) -> None:
    run_on_ranks(4, goes_on_elsewhere, family=family, folder=str(tmp_path))


def generates(family: str) -> None:
    prompt = tokens_of(2, 5)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with in_float64():
        plain = toy(family)
        expected = plain.generate(prompt, **options)
        parallel = parallelize(copy.deepcopy(plain), mesh_of((1, 1, 2, 2)))
        with torch.no_grad():
            assert torch.equal(parallel.model.generate(prompt, **options), expected)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "bloom"])
def test_it_generates_the_same_tokens(family: str) -> None:
    run_on_ranks(4, generates, family=family)


def adapters_train(family: str, targets: list[str]) -> None:
    tokens = tokens_of(2)
    with in_float64():
        models = []
        for _ in range(2):
            torch.manual_seed(0)
            config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
            models.append(get_peft_model(toy(family), config).base_model.model.double())
        plain, ours = models
        parallel = parallelize(ours, mesh_of((1, 1, 2, 2)))
        plain(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        ours(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        parallel.settle(when="after backward")
        expected = dict(plain.named_parameters())
        for name, parameter in ours.named_parameters():
            assert (parameter.grad is None) == ("lora_" not in name), name
            if parameter.grad is not None:
                gradient = parallel.stored[name].publish(parameter.grad.full_tensor())
                close(gradient, expected[name].grad, what=name, tolerance=TOLERANCE)


@pytest.mark.parametrize(
    ("family", "targets"),
    [("mixtral", ["q_proj", "v_proj"]), ("bloom", ["query_key_value"])],
    ids=["beside experts", "in a whole block"],
)
def test_adapters_train(family: str, targets: list[str]) -> None:
    run_on_ranks(4, adapters_train, family=family, targets=targets)


def refusals() -> list[str]:
    said: list[str] = []
    with in_float64():
        try:
            parallelize(toy("phi3"), mesh_of((1, 2, 1, 1)), checks=False, whole="refuse")
        except ValueError as error:
            said.append(str(error))
        model = toy("mixtral", output_router_logits=True)  # experts are divided, so not refused
        parallel = parallelize(model, mesh_of((1, 2, 1, 1)), checks=False, whole="refuse")
        tokens = tokens_of(2)
        try:
            parallel.model(input_ids=tokens, labels=tokens)
        except ValueError as error:
            said.append(str(error))
    return said


def test_speed_or_nothing_and_a_balance_of_shares_are_refused() -> None:
    for whole, balance in run_on_ranks(2, refusals):
        assert "so that every rank would compute 'model.layers." in whole
        assert "pass whole='allow'" in whole
        assert "output_router_logits=True adds a loss" in balance


def test_hidden_units_that_do_not_divide_are_refused() -> None:
    model = toy("mixtral")
    rules = rules_for(model, {})
    units = model.config.intermediate_size
    check_sizes(model, rules, {"row": 2, "col": 2})
    with pytest.raises(ValueError, match=rf"experts: hidden_units={units} .* row \* col = 7 ranks"):
        check_sizes(model, rules, {"row": 1, "col": 7})


def test_quantised_weights_are_refused() -> None:
    model: Any = toy("llama")
    packed = torch.zeros(64, 64, dtype=torch.int8)
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(packed, requires_grad=False)
    with pytest.raises(ValueError, match=r"up_proj.weight is quantised \(torch.int8\).*dequantize"):
        refuse_quantised(model)


def test_a_rule_of_ones_own_makes_a_block_whole() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(default_toy("llama"))
    rules = rules_for(model, {"model.layers.*.mlp": Whole()})
    assert {name for name, rule in rules.items() if isinstance(rule, Whole)} == {
        f"model.layers.{index}.mlp" for index in range(model.config.num_hidden_layers)
    }


def test_experts_are_cut_by_what_transformers_declares() -> None:
    rules = rules_for(toy("gpt_oss"), {})
    experts = rules["model.layers.0.mlp.experts"]
    assert experts == Experts(
        cuts={"gate_up_proj": 2, "down_proj": 1, "gate_up_proj_bias": 1},
        packed=(), once=("down_proj_bias",),
    )  # fmt: skip


def lies(family: str) -> str:
    """A model that computes a product otherwise than its class does is caught by the check."""
    with in_float64():
        model: Any = toy(family)
        projection = model.model.layers[0].self_attn.q_proj
        forward = projection.forward
        projection.forward = lambda x: forward(x) * 1.5  # on this object alone: no rule sees it
        try:
            parallelize(model, mesh_of((1, 1, 1, 2)))
        except ValueError as error:
            return str(error)
    return "accepted"


def test_the_check_refuses_a_model_that_became_another() -> None:
    for message in run_on_ranks(2, lies, family="llama"):
        assert "LlamaForCausalLM on the grid is another model" in message
