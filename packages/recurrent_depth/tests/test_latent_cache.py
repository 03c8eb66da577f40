"""A latent cache with all directions is a whole cache; with fewer, what is lost is what they leave out."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fourfold_recurrent_depth import (
    KL,
    LatentBasis,
    LatentCache,
    LatentDiff,
    RecurrentCache,
    RecurrentDepthConfig,
    RecurrentDepthForCausalLM,
    estimate_cache_bytes,
)

STEPS, WHOLE = 4, 128
"""Recurrences; and the features of a layer: keys and values of 16 numbers at each recurrence."""
ROUNDING = 2e-5


def fresh(family: str = "huginn_raven", **changes: Any) -> RecurrentDepthForCausalLM:
    shape: dict[str, Any] = {
        "n_embd": 16, "n_heads": 2, "n_layers_in_recurrent_block": 2, "intermediate_size": 24,
        "vocab_size": 32, "padding_multiple": 1, "block_size": 48, "mean_recurrence": STEPS,
    }  # fmt: skip
    if family == "huginn_raven":
        shape |= {"n_layers_in_prelude": 1, "n_layers_in_coda": 1}
    torch.manual_seed(0)
    config = RecurrentDepthConfig(family=family, **{**shape, **changes})
    model = RecurrentDepthForCausalLM(config).eval()
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=random))
    return model


@pytest.fixture(params=["huginn_raven", "ouro"])
def model(request: pytest.FixtureRequest) -> RecurrentDepthForCausalLM:
    return fresh(request.param)


def tokens_of(rows: int, length: int, seed: int = 3) -> Tensor:
    return torch.randint(1, 32, (rows, length), generator=torch.Generator().manual_seed(seed))


def basis_of(model: RecurrentDepthForCausalLM, rank: int = WHOLE) -> LatentBasis:
    return LatentBasis.fit(model, tokens_of(12, 20), steps=STEPS, rank=rank)


@torch.no_grad()
def decoded(model: Any, tokens: Tensor, cache: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Logits and exit steps of a prompt of 5 tokens and of each further one by itself."""
    outs = [model(tokens[:, :5], past_key_values=cache, use_cache=True, num_steps=STEPS, **options)]
    for place in range(5, tokens.shape[1]):
        step = tokens[:, place : place + 1]
        outs.append(model(step, past_key_values=cache, use_cache=True, num_steps=STEPS, **options))
    return torch.cat([out.logits for out in outs], dim=1), cache.exit_steps


@pytest.mark.parametrize(
    "exits",
    [None, KL(threshold=0.05), LatentDiff(threshold=0.3), LatentDiff(threshold=0.3, scope="token")],
)
def test_all_directions_are_a_whole_cache(model: RecurrentDepthForCausalLM, exits: Any) -> None:
    """Logits and depths, with rows and tokens that exit apart from each other."""
    tokens, options = tokens_of(3, 12, seed=5), {} if exits is None else {"exit": exits}
    whole, depths = decoded(model, tokens, RecurrentCache(model.config, steps=STEPS), **options)
    logits, same = decoded(model, tokens, LatentCache(model.config, basis_of(model)), **options)
    torch.testing.assert_close(logits, whole, rtol=0, atol=ROUNDING)
    assert torch.equal(same, depths)
    assert exits is None or len(depths.unique()) > 1


def test_what_is_read_is_the_projection(model: RecurrentDepthForCausalLM) -> None:
    """Of each token by itself, its keys turned back to the first place: written out by loops."""
    basis, tokens, config = basis_of(model, rank=9), tokens_of(2, 7, seed=8), model.config
    whole, latent = RecurrentCache(config, steps=STEPS), LatentCache(config, basis)
    with torch.no_grad():
        for cache in (whole, latent):
            model(tokens, past_key_values=cache, use_cache=True, num_steps=STEPS)
    pairs = model.begin(tokens, None)[1].rotary[0, :, 0]
    halves = config.form.rotates == "halves"

    def turned(key: Tensor, angle: Tensor) -> Tensor:
        half = len(angle)
        first, second = (key[:half], key[half:]) if halves else (key[::2], key[1::2])
        both = torch.complex(first, second) * angle
        if halves:
            return torch.cat([both.real, both.imag])
        return torch.stack([both.real, both.imag], dim=-1).flatten()

    around, heads = whole.around, config.num_key_value_heads
    for layer, row, place in product(range(2), range(2), range(7)):
        slots = [around + layer + 2 * step for step in range(STEPS)]
        keys = [
            turned(whole.read(slot)[0][row, head, place], pairs[place].conj())
            for slot, head in product(slots, range(heads))
        ]
        values = [
            whole.read(slot)[1][row, head, place] for slot, head in product(slots, range(heads))
        ]
        x, u = torch.cat([*keys, *values]), basis.directions[layer]
        near = basis.mean[layer] + u @ (u.T @ (x - basis.mean[layer]))
        for number, (slot, head) in enumerate(product(slots, range(heads))):
            key, value = near.view(2, -1, config.head_dim)[:, number]
            read = [part[row, head, place] for part in latent.read(slot)]
            torch.testing.assert_close(read[0], turned(key, pairs[place]), rtol=0, atol=ROUNDING)
            torch.testing.assert_close(read[1], value, rtol=0, atol=ROUNDING)


def test_directions_are_the_principal_ones(model: RecurrentDepthForCausalLM) -> None:
    """Orthonormal, in order, their shares those of the spectrum; fewer tokens than features give the same."""
    basis = basis_of(model)
    eye = torch.eye(WHOLE).expand(2, -1, -1)
    torch.testing.assert_close(basis.directions.mT @ basis.directions, eye, rtol=0, atol=ROUNDING)
    assert bool((basis.shares.diff(dim=1) <= 1e-7).all())
    torch.testing.assert_close(basis.shares.sum(1), torch.ones(2), rtol=0, atol=1e-6)
    first = basis.first(5)
    assert torch.equal(first.directions, basis.directions[..., :5])
    assert first.rank == 5


def test_few_tokens_of_many_features_have_the_same_directions(
    model: RecurrentDepthForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = tokens_of(2, 10)
    expected = LatentBasis.fit(model, few, steps=STEPS, rank=6)
    monkeypatch.setattr("fourfold_recurrent_depth.decoding.latent_cache._SMALL", 0)
    found = LatentBasis.fit(model, few, steps=STEPS, rank=6)
    overlap = (found.directions.mT @ expected.directions).abs()
    torch.testing.assert_close(overlap, torch.eye(6).expand(2, -1, -1), rtol=0, atol=1e-4)
    torch.testing.assert_close(found.shares, expected.shares, rtol=1e-4, atol=1e-7)


def test_bytes_are_those_of_vectors_and_of_prelude_and_coda() -> None:
    model = fresh()
    for rank in (3, 40):
        cache = LatentCache(model.config, basis_of(model, rank))
        decoded(model, tokens_of(3, 12), cache)
        around = 2 * 2 * 16
        assert cache.nbytes() == 4 * 3 * 12 * (2 * rank + around)
        told = {"tokens": 12, "steps": STEPS, "batch": 3, "element_bytes": 4}
        assert estimate_cache_bytes(model.config, rank=rank, **told) == cache.nbytes()
    for wrong in ({"rank": 0}, {"rank": 3, "budget": 2}):
        with pytest.raises(ValueError, match="are of no cache; use a rank"):
            estimate_cache_bytes(model.config, **told, **wrong)  # type: ignore[arg-type]


def test_a_saved_basis_is_read_again(tmp_path: Path) -> None:
    basis = basis_of(fresh(), rank=7).first(5)
    basis.save(tmp_path / "basis.safetensors")
    again = LatentBasis.load(tmp_path / "basis.safetensors")
    assert again.steps == STEPS
    for name in ("mean", "directions", "shares"):
        assert torch.equal(getattr(again, name), getattr(basis, name))
    save_file({"mean": basis.mean}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds mean and no basis of a latent cache"):
        LatentBasis.load(tmp_path / "other.safetensors")


def test_generation_beams_and_padding(model: RecurrentDepthForCausalLM) -> None:
    """Through `generate`: rows padded on the left, repeated and reordered, and a draft taken back."""
    tokens = tokens_of(2, 6, seed=9)
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    options: dict[str, Any] = {
        "attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "num_steps": STEPS,
        "pad_token_id": 0, "eos_token_id": None,
    }  # fmt: skip
    for beams in (1, 3):
        expected = model.generate(tokens, num_beams=beams, **options)  # type: ignore[operator]
        cache = LatentCache(model.config, basis_of(model))
        found = model.generate(tokens, num_beams=beams, past_key_values=cache, **options)  # type: ignore[operator]
        assert torch.equal(found, expected)
    cache = LatentCache(model.config, basis_of(model))
    logits, _ = decoded(model, tokens, cache)
    cache.crop(-1)
    with torch.no_grad():
        again = model(tokens[:, 5:], past_key_values=cache, use_cache=True, num_steps=STEPS).logits
    torch.testing.assert_close(again, logits[:, 5:], rtol=0, atol=ROUNDING)
    cache.reset()
    assert (cache.get_seq_length(), cache.batch_size, cache.nbytes()) == (0, -1, 0)
    torch.testing.assert_close(decoded(model, tokens, cache)[0], logits, rtol=0, atol=ROUNDING)


def test_what_it_cannot_hold_is_refused(model: RecurrentDepthForCausalLM) -> None:
    basis = basis_of(model, rank=4)
    for rank in (0, 129, 240):
        with pytest.raises(
            ValueError, match=rf"rank={rank} of 128 features over 240 tokens; use 1 to 128"
        ):
            basis_of(model, rank)
    with pytest.raises(ValueError, match="rank=5 of a basis of 4; use 1 to 4"):
        basis.first(5)
    cache = LatentCache(model.config, basis)
    with pytest.raises(ValueError, match="5 recurrences for a basis of 4; fit one with steps=5"):
        model(tokens_of(1, 3), past_key_values=cache, use_cache=True, num_steps=5)
    decoded(model, tokens_of(2, 6), cache)
    with pytest.raises(ValueError, match="the cache holds 2 rows, the pass has 1"):
        model(tokens_of(1, 1), past_key_values=cache, use_cache=True, num_steps=STEPS)
    with pytest.raises(ValueError, match="this model does not say them"):
        cache.update(torch.zeros(2, 2, 1, 8), torch.zeros(2, 2, 1, 8), 0)
    with pytest.raises(ValueError, match="this cache holds nothing"):
        RecurrentCache(model.config, steps=2).slots(slice(None))
