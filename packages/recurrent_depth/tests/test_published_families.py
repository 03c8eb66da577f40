"""Ouro, Nanbeige and Parcae by one class: what their published code computes, and the laws of every family.

`published_families.json` holds what the published code of each family gave for a toy: its configuration, the
names and shapes of its weights, the logits of the last token after 1, 2 and 3 loops, and eight greedy tokens;
of Ouro its gate, and steps and logits by two thresholds of its exit. The code ran as it is (float32, eager,
uncached, Parcae from a zero state; Ouro and Nanbeige under transformers 4.54.1) with weights that `drawn` of
`conftest.py` draws for each name from NumPy's frozen generator, so that both sides have them without a file.
"""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from fourfold_parallel.grid.gradients import local
from fourfold_parallel.grid.huggingface import parallelize
from fourfold_parallel.run.data import Batch
from fourfold_parallel.testing.grids import Sizes, close, mesh_of, piece_of
from fourfold_parallel.testing.ranks import run_on_ranks
from fourfold_recurrent_depth import (
    KL,
    Always,
    Diffusion,
    EveryExit,
    Fixed,
    Gate,
    LatentDiff,
    RandomDepth,
    RecurrentCache,
    RecurrentDepthConfig,
    RecurrentDepthForCausalLM,
    Refill,
    Request,
    Speculation,
    TokenStates,
    estimate_cache_bytes,
    load_published,
    serve,
)
from fourfold_recurrent_depth.analysis.flops import costs
from fourfold_recurrent_depth.configuration import FAMILIES
from fourfold_recurrent_depth.model import Decay
from fourfold_recurrent_depth.states import RowStates
from fourfold_recurrent_depth.training.random_depth import beginning

PUBLISHED: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "published_families.json").read_text()
)
ROUNDING = 2e-5
"""Of logits up to 3, float32, recorded with six digits."""
FAMILY_NAMES = ("ouro", "nanbeige", "parcae")


@pytest.fixture(params=PUBLISHED)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(publish: Any, name: str, tmp_path: Path) -> RecurrentDepthForCausalLM:
    return load_published(publish(name, tmp_path))


def tokens_of(name: str) -> Tensor:
    return torch.tensor(PUBLISHED[name]["tokens"])


def logits_of(model: Any, tokens: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens, **options).logits


def started(name: str) -> dict[str, Any]:
    """Parcae's code was run from a state of zeros."""
    return {"init_scale": 0.0} if name == "parcae" else {}


def greedy(model: Any, tokens: Tensor, **options: Any) -> list[list[int]]:
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, **options}
    made = model.generate(tokens, pad_token_id=0, **options)
    return made[:, tokens.shape[1] :].tolist()


def test_logits_after_each_loop_are_the_published_codes(name: str, model: Any) -> None:
    """At one, two and three loops, though two families publish but one number of them."""
    tokens, expected = tokens_of(name), torch.tensor(PUBLISHED[name]["logits"])
    for loops, wanted in enumerate(expected.view(3, len(tokens), -1), start=1):
        ours = logits_of(model, tokens, num_steps=loops, **started(name))
        torch.testing.assert_close(ours[:, -1], wanted, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_tokens_are_the_published_codes(name: str, model: Any, use_cache: bool) -> None:
    """At the published number of loops; the cache has a slot for each layer in each loop."""
    options = {**started(name), "use_cache": use_cache, "max_new_tokens": 8}
    assert greedy(model, tokens_of(name), **options) == PUBLISHED[name]["greedy"]


def test_ouros_gate_and_exits_are_the_published_codes(publish: Any, tmp_path: Path) -> None:
    """Each token's probabilities after each loop; and, behind a prefix of full depth, where it stops."""
    known, tokens = PUBLISHED["ouro"], tokens_of("ouro")
    model = load_published(publish("ouro", tmp_path))
    with torch.no_grad():
        out = model(tokens, output_hidden_states=True)
        gates = [model.part("gate")(state).squeeze(-1) for state in out.hidden_states[1:]]  # type: ignore[index]
    expected = torch.tensor(known["gates"]).view(3, *tokens.shape)
    torch.testing.assert_close(torch.stack(gates), expected, rtol=0, atol=ROUNDING)
    for threshold, adaptive in known["adaptive"].items():
        gate = Gate(threshold=float(threshold))
        for place in range(tokens.shape[1]):
            cache = RecurrentCache(model.config, steps=3)
            with torch.no_grad():
                if place:
                    model(tokens[:, :place], past_key_values=cache, use_cache=True)
                out = model(tokens[:, place : place + 1], past_key_values=cache, exit=gate)
            assert out.exit_steps is not None
            assert out.exit_steps[:, 0].tolist() == [row[place] for row in adaptive["steps"]]
        assert out.logits is not None
        wanted = torch.tensor(adaptive["logits"]).view(len(tokens), -1)
        torch.testing.assert_close(out.logits[:, -1], wanted, rtol=0, atol=ROUNDING)


def test_a_gate_by_name_stops_where_the_configuration_says(publish: Any, tmp_path: Path) -> None:
    """As published at 1: nowhere before the last loop; a family without a gate says so."""
    model = load_published(publish("ouro", tmp_path))
    tokens = tokens_of("ouro")
    with torch.no_grad():
        assert model(tokens, exit="gate").exit_steps.unique().tolist() == [3]  # type: ignore[union-attr]
        model.config.early_exit_threshold = 0.5
        named, given = model(tokens, exit="gate"), model(tokens, exit=Gate(threshold=0.5))
    assert torch.equal(named.exit_steps, given.exit_steps)  # type: ignore[arg-type]
    assert sorted(named.exit_steps.unique().tolist()) == [2, 3]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="this Gate is of no model"):
        Gate().measure(tokens.float(), Gate().begin(tokens.float()))


def test_what_is_saved_is_what_was_published(
    draw: Any, name: str, model: Any, tmp_path: Path
) -> None:
    """Names, values and configuration; read again by `AutoModelForCausalLM`, without a warning's cause."""
    saved = tmp_path / "saved"
    model.save_pretrained(saved)
    weights = load_file(saved / "model.safetensors")
    shapes = {key: list(weight.shape) for key, weight in weights.items()}
    expected = dict(PUBLISHED[name]["shapes"])
    if name == "parcae":
        del expected["lm_head.weight"]  # tied
    assert shapes == expected
    assert all(
        torch.equal(weights[key], draw(key, shapes[key])) for key in shapes if key != "freqs_cis"
    )
    told = json.loads((saved / "config.json").read_text())
    given = PUBLISHED[name]["config"]
    dropped = {"use_cache", "rope_scaling", "layer_types", "recurrent_num_attention_heads"}
    assert {key: told.get(key) for key in given if key not in dropped} == {
        key: value for key, value in given.items() if key not in dropped
    }
    again, report = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert isinstance(again, RecurrentDepthForCausalLM)
    assert not any(report.values())
    ours, read = model.config.to_dict(), again.config.to_dict()
    assert {key for key in read if read[key] != ours.get(key)} <= {"_name_or_path", "dtype"}
    tokens = tokens_of(name)
    assert torch.equal(logits_of(again.eval(), tokens), logits_of(model, tokens))


def test_the_published_folder_is_read_by_transformers(publish: Any, tmp_path: Path) -> None:
    for name in ("ouro", "nanbeige"):
        folder = tmp_path / name
        folder.mkdir()
        publish(name, folder)
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        wanted = load_published(folder)
        assert torch.equal(logits_of(model, tokens_of(name)), logits_of(wanted, tokens_of(name)))


def test_keys_that_are_missing_are_named(publish: Any, tmp_path: Path) -> None:
    folder = publish("ouro", tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["model.early_exit_gate.bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 keys missing .*early_exit_gate\.bias"):
        load_published(folder)


@pytest.mark.parametrize("budget", [None, 1, 2])
def test_a_cache_changes_nothing(name: str, model: Any, budget: int | None) -> None:
    """In pieces as whole: with all slots as without a cache, with few as with as few at once."""
    tokens = tokens_of(name)
    whole = RecurrentCache(model.config, steps=3, budget=budget)
    pieces = RecurrentCache(model.config, steps=3, budget=budget)
    options: dict[str, Any] = {"num_steps": 3}
    expected = logits_of(model, tokens, **options)
    if budget is not None:
        expected = torch.cat(
            [
                logits_of(model, tokens[:, :1], past_key_values=whole, **options),
                *[
                    logits_of(model, tokens[:, i : i + 1], past_key_values=whole, **options)
                    for i in range(1, 7)
                ],
            ],
            dim=1,
        )
        shown = [logits_of(model, tokens[:, :1], past_key_values=pieces, **options)]
        shown += [
            logits_of(model, tokens[:, i : i + 1], past_key_values=pieces, **options)
            for i in range(1, 7)
        ]
        assert greedy(model, tokens, kv_budget=budget, num_steps=3)
    else:
        shown = [
            logits_of(model, tokens[:, first:last], past_key_values=pieces, **options)
            for first, last in ((0, 4), (4, 5), (5, 7))
        ]
    torch.testing.assert_close(torch.cat(shown, 1), expected, rtol=0, atol=ROUNDING)
    wanted = estimate_cache_bytes(
        model.config, tokens=7, steps=3, batch=len(tokens), budget=budget, element_bytes=4
    )
    assert pieces.nbytes() == wanted


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(name: str, model: Any, side: str) -> None:
    """Rows of other lengths beside one another are each as alone."""
    tokens = tokens_of(name)
    short, long = tokens[0, :4], tokens[1]
    pad = torch.zeros(3, dtype=torch.long)
    parts = [pad, short] if side == "left" else [short, pad]
    batch = torch.stack([torch.cat(parts), long])
    mask = torch.ones_like(batch)
    shown = slice(3, None) if side == "left" else slice(0, 4)
    mask[0] = 0
    mask[0, shown] = 1
    together = logits_of(model, batch, attention_mask=mask)
    torch.testing.assert_close(
        together[0, shown], logits_of(model, short[None])[0], rtol=0, atol=ROUNDING
    )
    torch.testing.assert_close(together[1], logits_of(model, long[None])[0], rtol=0, atol=ROUNDING)


def test_eager_attention_is_the_same(name: str, model: Any) -> None:
    tokens = tokens_of(name)
    expected = logits_of(model, tokens)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(logits_of(model, tokens), expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(
    "exits", [KL(threshold=0.3), LatentDiff(threshold=0.6), Fixed(threshold=2), Gate(threshold=0.6)]
)
def test_rows_exit_and_refill_as_alone(name: str, model: Any, exits: Any) -> None:
    """Tokens and depths of `generate`, of `serve` and of `Refill` are those of each request by itself."""
    if isinstance(exits, Gate) and name != "ouro":
        with pytest.raises(ValueError, match=f"{model.config.family} has no learned gate"):
            logits_of(model, tokens_of(name), exit=exits)
        return
    tokens, options = tokens_of(name), {"num_steps": 6, "exit": exits}
    alone = [greedy(model, row[None], **options)[0] for row in tokens]
    assert greedy(model, tokens, custom_generate=Refill(slots=2), **options) == alone
    requests = [
        Request(tokens=row.tolist(), max_new_tokens=6, label=label)
        for label, row in enumerate(tokens)
    ]
    answers = {a.request.label: a for a in serve(model, requests, slots=2, **options)}
    assert [answers[label].tokens for label in range(len(tokens))] == alone
    depths = {depth for answer in answers.values() for depth in answer.exit_steps}
    assert min(depths) < 6


def test_decoders_of_their_own(name: str, model: Any) -> None:
    """Speculation gives greedy tokens; diffusion needs recurrences that see their tokens again."""
    tokens = tokens_of(name)
    drafted = greedy(model, tokens, num_steps=4, custom_generate=Speculation(draft_steps=2))
    assert drafted == greedy(model, tokens, num_steps=4)
    if model.config.form.injects is None:
        with pytest.raises(ValueError, match="Diffusion changes a token under way"):
            greedy(model, tokens, num_steps=4, custom_generate=Diffusion())
        for wrong, message in (
            ({"initial_state": TokenStates()}, "begins with the embedding"),
            ({"init_scale": 0.0}, "begins with the embedding"),
            (
                {"warm_start": True, "use_cache": True},
                "warm_start begins with another token's state",
            ),
        ):
            with pytest.raises(ValueError, match=message):
                logits_of(model, tokens, **wrong)
    else:
        made = greedy(model, tokens, num_steps=4, custom_generate=Diffusion())
        assert [len(row) for row in made] == [6, 6]


def batch_of(tokens: torch.Tensor) -> Batch:
    rows = tuple(range(len(tokens)))
    return Batch(tokens=tokens, document_ids=torch.zeros_like(tokens), number=3, addresses=rows)


class Next:
    """Every token is asked for the next."""

    def targets(self, batch: Batch) -> Tensor:
        return batch.tokens[:, 1:]


def test_training_reaches_every_part_but_the_gate(name: str, model: Any) -> None:
    """At a depth of the law, recomputed or not; where nothing is injected, all recurrences carry gradient."""
    tokens = tokens_of(name)
    batch = batch_of(tokens)
    is_injected = model.config.form.injects is not None
    cut = RandomDepth(recurrences=Always(recurrences=4, backprop=2), supervision=Next())
    all_of_them = RandomDepth(recurrences=Always(recurrences=4, backprop=4), supervision=Next())
    objective = cut if is_injected else all_of_them
    targets = objective.targets(batch)
    gradients = []
    for recomputes in (False, True):
        trained = copied(model)
        if recomputes:
            trained.activation_checkpointing_enable()
        loss = objective.loss(trained, batch, targets).nats_sum
        loss.backward()
        assert 1 < loss.item() / targets.numel() < 3 * math.log(29)
        gradients.append({key: parameter.grad for key, parameter in trained.named_parameters()})
    plain, recomputed = gradients
    without = {key for key, gradient in plain.items() if gradient is None}
    assert {key.split(".")[-2] for key in without} == (
        {"early_exit_gate"} if name == "ouro" else set()
    )
    for key in plain.keys() - without:
        torch.testing.assert_close(recomputed[key], plain[key], rtol=1e-4, atol=1e-5)
    if not is_injected:
        with pytest.raises(ValueError, match="sees its tokens in the first alone"):
            cut.loss(copied(model), batch, targets)


def copied(model: Any) -> Any:
    again = RecurrentDepthForCausalLM(model.config)
    again.load_state_dict(model.state_dict())
    return again.train()


def test_a_model_in_half_precision_runs(name: str, model: Any) -> None:
    """Cast as a whole: angles stay in float32."""
    tokens = tokens_of(name)
    expected = logits_of(model, tokens)
    half = model.to(torch.bfloat16)
    assert (logits_of(half, tokens) - expected).abs().max() < 0.3
    assert len(greedy(half, tokens)[0]) == 6


@pytest.mark.parametrize("pair", [(1, 0), (4, 0), (0, 3), (2, 2)])
def test_costs_are_what_torch_counts(name: str, model: Any, pair: tuple[int, int]) -> None:
    """Forward and training, exactly, attention included."""
    model.set_attn_implementation("eager")
    tokens, (without, with_gradient) = tokens_of(name), pair
    price = costs(model.config, context=tokens.shape[1])
    model.train(with_gradient > 0)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(with_gradient > 0):
        out = model(tokens, labels=tokens, num_steps=pair)
        if with_gradient:
            out.loss.backward()
    expected = price.training(*pair) if with_gradient else price.forward(without)
    assert counter.get_total_flops() == expected * tokens.numel()


@pytest.mark.parametrize("seed", range(5))
def test_a_decays_norm_is_below_one(seed: int) -> None:
    """Whatever its parameters are (Parcae's bound); two states come nearer by its factor."""
    generator = torch.Generator().manual_seed(seed)
    decay = Decay(8).double()
    with torch.no_grad():
        for parameter in decay.parameters():
            parameter.copy_(3 * torch.randn(parameter.shape, generator=generator))
        first, second, e = torch.randn(3, 8, generator=generator, dtype=torch.float64)
        moved = decay(first, e) - decay(second, e)
    assert 0 < decay.kept().max() < 1
    torch.testing.assert_close(moved, (first - second) * decay.kept().detach())
    halves = decay(first, decay(e, half="embedding"), half="state")
    torch.testing.assert_close(halves, decay(first, e))


def test_parcaes_norm_is_the_published_codes(publish: Any, tmp_path: Path) -> None:
    model = load_published(publish("parcae", tmp_path))
    adapter: Any = model.part("adapter")
    assert adapter.kept().max().item() == pytest.approx(PUBLISHED["parcae"]["norm"][0], abs=1e-6)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_fresh_model_of_each_family(family: str) -> None:
    """Drawn by section 4.1: its first loss is that of a uniform guess; and compiled blocks decline it."""
    model = fresh(family)
    tokens = torch.randint(0, 31, (4, 7), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        loss = model.eval()(tokens, labels=tokens).loss
        stages = model.begin(tokens, None)[1].stages
    assert loss.item() == pytest.approx(math.log(31), abs=0.5)
    assert all(type(stage).__name__ == "partial" for stage in stages.values())


def fresh(family: str) -> RecurrentDepthForCausalLM:
    own: dict[str, dict[str, Any]] = {
        "ouro": {"num_key_value_heads": 2},
        "nanbeige": {"num_key_value_heads": 2, "head_width": 8},
        "parcae": {
            "n_embd": 48, "n_layers_in_prelude": 1, "n_layers_in_coda": 1, "padding_multiple": 1,
            "prelude_norm": True,
        },
    }  # fmt: skip
    shape: dict[str, Any] = {
        "n_embd": 24, "n_heads": 4, "n_layers_in_recurrent_block": 2, "intermediate_size": 10,
        "vocab_size": 31, "block_size": 16, "mean_recurrence": 4, "mean_backprop_depth": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    return RecurrentDepthForCausalLM(
        RecurrentDepthConfig(family=family, **{**shape, **own[family]})
    )


def stirred(family: str) -> RecurrentDepthForCausalLM:
    model, random = fresh(family), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random))
    return model.double().train()


def family_is_serial(sizes: Sizes, family: str) -> None:
    mesh = mesh_of(sizes)
    tokens = torch.randint(0, 31, (4, 7), generator=torch.Generator().manual_seed(3))
    states: Any = RowStates((0, 1, 2, 3)) if family == "parcae" else None
    alone = stirred(family)
    logits: Any = alone(tokens, num_steps=(2, 2), initial_state=states).logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    parallel = parallelize(stirred(family), mesh)
    out = parallel.model(tokens, labels=tokens, num_steps=(2, 2), initial_state=states)
    out.loss.backward()
    close(out.logits, logits, what=f"{family} {sizes}: logits", tolerance=1e-9)
    same_gradients(alone, parallel, mesh, f"{family} {sizes}")
    objective, batch = EveryExit(recurrences=3, supervision=Next()), batch_of(tokens)
    sums = []
    for model in (alone, parallel.model):
        model.zero_grad()
        sums.append(objective.loss(model, batch, objective.targets(batch)).nats_sum)
        sums[-1].backward()
    close(sums[1], sums[0], what=f"{family} {sizes}: loss of every exit", tolerance=1e-9)
    same_gradients(alone, parallel, mesh, f"{family} {sizes}, every exit")


def same_gradients(alone: nn.Module, parallel: Any, mesh: Any, what: str) -> None:
    gradients = {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}
    ours = {name: p for name, p in parallel.model.named_parameters() if p.grad is not None}
    assert ours.keys() == gradients.keys()
    for name, parameter in ours.items():
        expected = piece_of(parallel.stored[name].keep(gradients[name]), parameter, mesh)
        assert parameter.grad is not None
        close(local(parameter.grad), expected, what=f"{what}: d{name}", tolerance=1e-9)


def test_depths_of_one_pass_are_passes_of_their_own(name: str, model: Any) -> None:
    """Their logits, and what a gate says after each; the last are the pass's."""
    tokens = tokens_of(name)
    with torch.no_grad():
        out = model(tokens, num_steps=4, depths=(1, 3, 4), output_hidden_states=True)
    for depth, logits in zip((1, 3, 4), out.logits_by_depth, strict=True):
        expected = logits_of(model, tokens, num_steps=depth)
        torch.testing.assert_close(logits, expected, rtol=0, atol=ROUNDING)
    assert torch.equal(out.logits, out.logits_by_depth[-1])
    if name == "ouro":
        gates = [model.part("gate")(out.hidden_states[depth]).squeeze(-1) for depth in (1, 3, 4)]
        assert all(map(torch.equal, out.gates_by_depth, gates))
    else:
        assert out.gates_by_depth is None
    for wrong in ((0, 2), (1, 5)):
        with pytest.raises(
            ValueError, match=rf"depths=\[{wrong[0]}, {wrong[1]}\] of 4 recurrences"
        ):
            model(tokens, num_steps=4, depths=wrong)
    with pytest.raises(ValueError, match="leave out output_hidden_states and depths"):
        model(tokens, num_steps=4, depths=(1,), exit=KL())


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("entropy", [0.0, 0.4])
def test_the_loss_of_every_exit_token_by_token(family: str, entropy: float) -> None:
    """Ouro's mean over exits by its gate, less the gate's entropy; without a gate all exits count alike."""
    model = stirred(family).eval()
    tokens = torch.randint(0, 31, (2, 5), generator=torch.Generator().manual_seed(4))
    batch, objective = (
        batch_of(tokens),
        EveryExit(recurrences=3, supervision=Next(), entropy=entropy),
    )
    targets = objective.targets(batch).clone()
    targets[1, 2] = -100
    found = objective.loss(model, batch, targets)
    begin = beginning(model.config.form, batch)
    out: Any = model(tokens[:, :-1], num_steps=3, output_hidden_states=True, **begin)
    expected, exits = 0.0, 0.0
    spoken = [model(tokens[:, :-1], num_steps=r, **begin).logits.log_softmax(-1) for r in (1, 2, 3)]
    for row, place in product(range(2), range(4)):
        if targets[row, place] == -100:
            continue
        left, shares = 1.0, []
        for number in (1, 2):
            stops = 1 / 3
            if family == "ouro":
                said = model.part("gate")(out.hidden_states[number][row, place]).item()
                stops = 1 / (1 + math.exp(-said))
            shares.append(stops * left if family == "ouro" else 1 / 3)
            left -= shares[-1]
        for number, share in enumerate([*shares, left]):
            expected -= share * spoken[number][row, place, targets[row, place]].item()
            expected += entropy * share * math.log(share) if family == "ouro" else 0
            exits += share * (number + 1)
    assert found.nats_sum.item() == pytest.approx(expected, rel=1e-9)
    assert found.telemetry["exits_sum"].item() == pytest.approx(exits, rel=1e-9)


def test_a_gate_learns_where_its_loss_is_least(publish: Any, tmp_path: Path) -> None:
    """Where the first exit is best it learns to stop; entropy alone brings it to an even share."""
    model = load_published(publish("ouro", tmp_path)).double()
    batch = batch_of(tokens_of("ouro"))
    gate: Any = model.part("gate")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in gate.parameters():
        parameter.requires_grad_(True)
        torch.nn.init.zeros_(parameter)
    objective = EveryExit(recurrences=4, supervision=Next(), entropy=1000.0)
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        loss = objective.loss(model, batch, objective.targets(batch))
        loss.nats_sum.backward()
        optimizer.step()
    assert loss.telemetry["exits_sum"].item() / 2 / 6 == pytest.approx(2.5, abs=0.05)
    best = EveryExit(recurrences=4, supervision=Next(), entropy=0.0)
    before = best.loss(model, batch, best.targets(batch)).nats_sum.item()
    for _ in range(100):
        optimizer.zero_grad()
        best.loss(model, batch, best.targets(batch)).nats_sum.backward()
        optimizer.step()
    assert best.loss(model, batch, best.targets(batch)).nats_sum.item() < before - 0.1


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_family_on_a_grid_is_serial(family: str) -> None:
    """Heads over row and the stream over col; a block that no rule cuts is computed alike."""
    run_on_ranks(4, family_is_serial, sizes=(1, 1, 2, 2), family=family)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("ouro", {"layer_types": ["full_attention", "sliding_attention"]}, "names sliding windows"),
        ("ouro", {"use_sliding_window": True}, "use_sliding_window differs from False"),
        (
            "ouro",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling asks for other",
        ),
        ("ouro", {"rope_parameters": {"rope_type": "yarn"}}, "of type 'yarn'"),
        ("ouro", {"hidden_act": "gelu"}, "hidden_act differs from 'silu'"),
        ("ouro", {"early_exit_step": 1}, "early_exit_step differs"),
        ("ouro", {"quantization_config": {"bits": 4}}, "quantised weights are not read"),
        ("ouro", {"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide"),
        ("ouro", {"reference_semantics": True}, "reproduces Huginn's code"),
        ("nanbeige", {"enable_double_loop_split": True}, "enable_double_loop_split differs"),
        ("nanbeige", {"enable_hyper_connection": True}, "enable_hyper_connection differs"),
        ("nanbeige", {"emb_neighbor_num": 3}, "emb_neighbor_num differs"),
        ("nanbeige", {"loop_loss_weights": [0.3]}, "give num_loops"),
        ("nanbeige", {"pretraining_tp": 2}, "pretraining_tp differs from 1"),
        ("parcae", {"injection_type": "add"}, "injection_type differs from 'diagonal'"),
        ("parcae", {"recurrent_embedding_dimension": 64}, "states of their own shape"),
        ("parcae", {"logit_softcap": 15.0}, "logit_softcap differs"),
        ("parcae", {"n_embd": 24, "recurrent_embedding_dimension": 24}, "narrower than the 32"),
        ("parcae", {"num_key_value_heads": 1}, "the heads of parcae are not grouped"),
        ("parcae", {"rope_settings": {"use_rope": False}}, "rope_settings="),
    ],
)
def test_what_a_family_has_and_this_class_has_not_is_refused(
    name: str, changes: dict[str, Any], message: str
) -> None:
    """By name, before any weight is read."""
    with pytest.raises(ValueError, match=message):
        RecurrentDepthConfig.from_dict({**PUBLISHED[name]["config"], **changes})


def test_values_by_token_need_tokens(publish: Any, tmp_path: Path) -> None:
    model = load_published(publish("parcae", tmp_path))
    with pytest.raises(ValueError, match="inputs_embeds say no tokens"):
        logits_of(model, None, inputs_embeds=torch.zeros(1, 3, 48))  # type: ignore[arg-type]


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(ValueError, match="use one of huginn_raven, parcae, ouro, nanbeige"):
        RecurrentDepthConfig(family="loopformer")
    assert [*FAMILIES] == ["huginn_raven", "parcae", "ouro", "nanbeige"]
