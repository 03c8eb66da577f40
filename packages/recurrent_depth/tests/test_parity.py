"""Our model against values computed with the published code (tiny shape, float32, one thread)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fourfold_recurrent_depth import (
    LogNormalPoisson,
    RecurrentCache,
    RecurrentDepthConfig,
    RecurrentDepthForCausalLM,
    StateTable,
)
from fourfold_recurrent_depth.decoding.diffusion import Diffusion, diffuse
from fourfold_recurrent_depth.decoding.speculate import Speculation, speculate
from fourfold_recurrent_depth.exits import (
    KL,
    ArgmaxStability,
    Cosine,
    Criterion,
    EntropyDiff,
    LatentDiff,
    MinPKL,
)
from fourfold_recurrent_depth.training.ellis import ELLISAdam

GOLDEN = Path(__file__).parents[4] / "shared" / "golden" / "recurrent_depth"

pytestmark = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="../shared/golden/recurrent_depth is not beside this checkout"
)

FP32 = 4e-5
"""Twice the difference that the published code has with itself, cached against uncached (1.7e-5)."""
STEP = 3e-7
"""Two units in the last place of weights near 2; a step moves them by 1e-5 and more."""
GRADIENT = 2e-4
"""Relative to each tensor's largest entry: sums over 32 tokens in another order."""

AUTO = {
    "kl": KL(threshold=1e-3),
    "minp-kl": MinPKL(threshold=1e-5),
    "entropy-diff": EntropyDiff(threshold=1e-3),
    "latent-diff": LatentDiff(threshold=0.03),
    "cosine": Cosine(threshold=1e-3),
    "argmax-stability": ArgmaxStability(threshold=5),
}
"""The published code's own thresholds."""


@pytest.fixture(scope="module")
def model() -> RecurrentDepthForCausalLM:
    return AutoModelForCausalLM.from_pretrained(GOLDEN).eval()


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "forward.safetensors")


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads((GOLDEN / "golden.json").read_text())


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max())


@pytest.mark.parametrize("reference_semantics", [False, True])
@pytest.mark.parametrize("r", [1, 4, 16])
def test_logits_and_latents(
    model: Any, tensors: dict[str, torch.Tensor], r: int, reference_semantics: bool
) -> None:
    """The split adapter and the concatenated one, at every published depth."""
    model.config.reference_semantics = reference_semantics
    with torch.no_grad():
        out = model(
            tensors["input_ids"],
            num_steps=r,
            initial_state=StateTable(tensors["init_table"]),
            output_hidden_states=True,
        )
    model.config.reference_semantics = False
    assert difference(out.logits, tensors[f"logits_r{r}"]) < FP32
    assert difference(out.latent_states, tensors[f"latents_r{r}"]) < FP32
    for mine, theirs in zip(out.hidden_states[1:], tensors["trajectory"], strict=False):
        assert difference(mine, theirs) < FP32


@pytest.mark.parametrize(("name", "budget"), [("full", None), ("s4", 1), ("s8", 2), ("s16", 4)])
def test_caches(
    model: Any, tensors: dict[str, torch.Tensor], name: str, budget: int | None
) -> None:
    """Chunks of 10, 3, 1, 1, 1 tokens; the published `compress-s4` keeps one recurrence of four layers."""
    cache = RecurrentCache(model.config, steps=12, budget=budget)
    logits, at = [], 0
    for count in (10, 3, 1, 1, 1):
        with torch.no_grad():
            out = model(
                tensors["input_ids"][:, at : at + count],
                past_key_values=cache,
                use_cache=True,
                num_steps=12,
                initial_state=StateTable(tensors["init_table"]),
            )
        logits.append(out.logits)
        at += count
    assert difference(torch.cat(logits, 1), tensors[f"cached_logits_{name}_r12"]) < FP32
    assert difference(torch.cat(logits, 1), tensors["uncached_logits_r12"]) < FP32 or budget


def continued(model: Any, tokens: torch.Tensor, **options: Any) -> list[list[int]]:
    made = model.generate(
        tokens, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0, **options
    )
    return made[:, tokens.shape[1] :].tolist()


@pytest.mark.parametrize("r", [1, 4, 16])
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_generation(
    model: Any, tensors: Any, golden: dict[str, Any], r: int, use_cache: bool
) -> None:
    prompt, table = tensors["input_ids"][:, :8], StateTable(tensors["init_table"])
    expected = golden["generation"]
    ours = continued(model, prompt, num_steps=r, use_cache=use_cache, init_scale=0.0)
    assert ours == expected[f"greedy_zero_r{r}"]
    ours = continued(model, prompt, num_steps=r, use_cache=use_cache, initial_state=table)
    assert ours == expected[f"greedy_table_r{r}"]


def test_shared_caches_and_warm_start_generate_the_published_tokens(
    model: Any, tensors: Any, golden: dict[str, Any]
) -> None:
    prompt, expected = tensors["input_ids"][:, :8], golden["generation"]
    for name, budget in (("compress-s4", 1), ("compress-s16", 4)):
        ours = continued(model, prompt, num_steps=16, kv_budget=budget, init_scale=0.0)
        assert ours == expected[f"greedy_zero_r16_{name}"]
    ours = continued(model, prompt, num_steps=8, warm_start=True, init_scale=0.0)
    assert ours == expected["adaptive_none_continuous_zero_r8"]


def test_every_adaptive_exit_of_a_single_row(
    model: Any, tensors: Any, golden: dict[str, Any]
) -> None:
    """Tokens and recurrences of each, for all criteria and thresholds with the paper's cache."""
    table, checked = StateTable(tensors["init_table"]), 0
    for key, expected in golden["generation"]["adaptive"].items():
        name, threshold, lookup, batch = key.split("|")
        if (lookup, batch) != ("latest-m4", "b1") or name not in AUTO:
            continue
        criterion = AUTO[name]
        if threshold != "auto":
            criterion = type(criterion)(threshold=float(threshold))
        cache = RecurrentCache(model.config, steps=16)
        ours = continued(
            model,
            tensors["input_ids"][:1, :8],
            num_steps=16,
            exit=criterion,
            past_key_values=cache,
            initial_state=table,
        )
        assert ours == expected["tokens"], key
        assert cache.exit_steps is not None
        assert cache.exit_steps[:, 7:].T.tolist() == expected["exit_steps"], key
        checked += 1
    assert checked >= 12


def test_teacher_forced_exits(model: Any, tensors: Any, golden: dict[str, Any]) -> None:
    """Token by token, and for criteria that read states also in one parallel pass."""
    for name, expected in golden["generation"]["forward_with_adaptive_compute"].items():
        kind = type(AUTO[name])
        criterion: Criterion = kind(threshold=expected["threshold"], scope="token")
        cache = RecurrentCache(model.config, steps=16)
        steps, argmax = [], []
        for place in range(16):
            with torch.no_grad():
                out = model(
                    tensors["input_ids"][:1, place : place + 1],
                    past_key_values=cache,
                    use_cache=True,
                    num_steps=16,
                    exit=criterion,
                    initial_state=StateTable(tensors["init_table"]),
                )
            steps.append(int(out.exit_steps))
            argmax.append(int(out.logits.argmax(-1)))
        assert steps == expected["compute_steps"], name
        assert argmax == expected["argmax"], name
        if criterion.reads == "state":
            with torch.no_grad():
                out = model(
                    tensors["input_ids"][:1],
                    num_steps=16,
                    exit=criterion,
                    initial_state=StateTable(tensors["init_table"]),
                )
            assert out.exit_steps[0].tolist() == expected["compute_steps"], name
            assert out.logits[0].argmax(-1).tolist() == expected["argmax"], name


@torch.no_grad()
def test_no_recurrence_predicts_from_the_first_state(
    model: Any, tensors: dict[str, torch.Tensor]
) -> None:
    """The published r=0: coda and head on s_0. A pass refuses it; its parts give it."""
    _, this_pass, positions = model.begin(tensors["input_ids"], None)
    states = StateTable(tensors["init_table"]).at(positions).expand(2, -1, -1)
    assert difference(model.predict(states, this_pass), tensors["logits_r0"]) < FP32
    with pytest.raises(ValueError, match="num_steps=0"):
        model(tensors["input_ids"], num_steps=0)


@pytest.mark.parametrize("draft", [1, 2, 4])
def test_speculation_makes_the_published_tokens(
    model: Any, tensors: Any, golden: dict[str, Any], draft: int
) -> None:
    """The published one makes one token more than asked for where all drafts are right."""
    found = speculate(
        model, tensors["input_ids"][:1, :8], speculation=Speculation(draft_steps=draft, lookahead=4),
        max_new_tokens=12, num_steps=16, init_scale=0.0,
    )  # fmt: skip
    expected = golden["generation"][f"speculative_zero_draft{draft}_look4_r16"]
    assert found.tokens[0].tolist() == expected[0][:12]


@pytest.mark.parametrize(
    ("rule", "threshold"), [("latent-diff", 0.03), ("fixed", 0.0), ("token-stability", 0.0)]
)
def test_the_diffusion_style_sampler_makes_the_published_tokens(
    model: Any, tensors: Any, golden: dict[str, Any], rule: str, threshold: float
) -> None:
    """With the published threshold, and with none, which freezes by count; no more passes either."""
    found = diffuse(
        model, tensors["input_ids"][:1, :8], diffusion=Diffusion(threshold=threshold),
        max_new_tokens=12, num_steps=16, init_scale=0.0,
    )  # fmt: skip
    expected = golden["generation"][f"diffusion_{rule}"]
    assert found.tokens.tolist() == expected["tokens"]


def test_the_optimizer_takes_the_published_steps() -> None:
    """Six steps of a matrix with weight decay and of a vector without, during and after warm-up."""
    given = load_file(GOLDEN / "train.safetensors")
    matrix, vector = (torch.nn.Parameter(given[f"optim.{name}0"].clone()) for name in "wb")
    groups = [
        {"params": [matrix], "weight_decay": 4e-5},
        {"params": [vector], "weight_decay": 0.0},
    ]
    optimizer = ELLISAdam(groups, lr=4e-5)
    for step, rate in enumerate(given["optim.lr"].tolist()):
        for parameter, name in ((matrix, "w"), (vector, "b")):
            parameter.grad = given[f"optim.g{name}{step}"]
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        for parameter, name in ((matrix, "w"), (vector, "b")):
            assert difference(parameter, given[f"optim.{name}{step + 1}"]) < STEP, (name, step)


def test_training_losses_and_gradients(model: Any, tensors: Any, golden: dict[str, Any]) -> None:
    """Four pairs of recurrences without and with gradient; labels shifted beforehand, as there."""
    train = load_file(GOLDEN / "train.safetensors")
    labels = train.get("labels")
    ids = train.get("input_ids", tensors["input_ids"])
    if labels is None:
        labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], dim=1)
    model.train()
    model.config.reference_semantics = True
    for key, expected in golden["training"].items():
        n, k = (int(part[1:]) for part in key.split("_"))
        model.zero_grad()
        out = model(
            ids, labels=labels, num_steps=(n, k), initial_state=StateTable(tensors["init_table"])
        )
        out.loss.backward()
        assert abs(out.loss.item() - expected["loss"]) < FP32, key
        for name, norm in expected["grad_norm"].items():
            gradient = model.get_parameter(name).grad
            if norm is None:
                assert gradient is None, name
            else:
                assert gradient is not None, name
                assert float(gradient.norm()) == pytest.approx(norm, rel=GRADIENT), name
        if (n, k) == (3, 2):
            for name, parameter in model.named_parameters():
                theirs = train[f"grad.{name}"]
                assert difference(parameter.grad, theirs) < GRADIENT * float(theirs.abs().max())
    model.zero_grad()
    model.config.reference_semantics = False
    model.eval()


def test_the_recurrence_sampler(golden: dict[str, Any]) -> None:
    """The first 64 draws, exactly."""
    law = LogNormalPoisson(mean=32, backprop=8)
    ours = [list(law.draw(number)) for number in range(64)]
    assert ours == golden["sampler"]["pairs_step1_to_64_mean32_k8"]


def test_published_files_come_back_byte_for_byte(model: Any, tmp_path: Path) -> None:
    """Config, names, shapes and bytes; the head's second copy is left out, as transformers does."""
    model.save_pretrained(tmp_path)
    ours, theirs = (
        load_file(tmp_path / "model.safetensors"),
        load_file(GOLDEN / "model.safetensors"),
    )
    assert set(theirs) - set(ours) == {"lm_head.weight"}
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name])
    ours, theirs = (json.loads((f / "config.json").read_text()) for f in (tmp_path, GOLDEN))
    ours.pop("dtype", None)
    ours.pop("transformers_version")
    theirs.pop("transformers_version")
    assert ours == theirs


def test_the_full_shape_has_the_77_published_keys() -> None:
    config = RecurrentDepthConfig.from_pretrained(GOLDEN / "huginn_0125_config.json")
    with torch.device("meta"):
        model = RecurrentDepthForCausalLM(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert len(shapes) == 77
    assert shapes["freqs_cis"] == (1, 4096, 1, 48, 2)
    assert shapes["transformer.adapter.weight"] == (5280, 10560)
    assert shapes["transformer.core_block.3.mlp.fc.weight"] == (35840, 5280)
    assert shapes["transformer.coda.1.attn.qk_bias"] == (2, 1, 55, 96)
    unique = {id(p): p.numel() for p in model.parameters()}
    assert sum(unique.values()) == 3_564_976_800
    assert set(shapes) == set(load_file(GOLDEN / "model.safetensors"))
