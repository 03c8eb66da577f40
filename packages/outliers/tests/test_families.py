"""Five families of transformers: their residual stream is seen, disabled, put back."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fourfold_outliers.disabling import (
    averaged,
    gains_of,
    masked,
    matched_sets,
    norms_of,
    random_sets,
    removed,
    silenced,
)
from fourfold_outliers.effects import FROM, attending_eagerly, behaviour
from fourfold_outliers.geometry import Sums
from fourfold_outliers.stream import Documents, layers_of, looking, measure, width_of
from fourfold_parallel.certify.toys import default_toy, toy_model

FAMILIES = ("llama", "gpt2", "gpt_neox", "qwen2", "gemma3_text")
"""Root-mean-square and layer norms, with bias and without, gains stored as they are and less one."""
EXACT = 1e-10
COORDINATES = (3, 17)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return toy_model(default_toy(request.param, telling=False))


def ids(windows: int = 6, tokens: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, 128, (windows, tokens), generator=generator)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids(), use_cache=False).logits


def test_the_stream_is_that_of_transformers(model: PreTrainedModel) -> None:
    """All hidden states but the last, which transformers takes behind the final norm."""
    seen: dict[int, Tensor] = {}
    with torch.no_grad(), looking(model, lambda layer, h: seen.update({layer: h.clone()})):
        told = model(input_ids=ids(), use_cache=False, output_hidden_states=True).hidden_states
    assert sorted(seen) == list(range(len(told)))
    for layer, states in enumerate(told[:-1]):
        torch.testing.assert_close(seen[layer], states, atol=0, rtol=0)
    assert not torch.allclose(seen[len(told) - 1], told[-1])


def test_measuring_agrees_with_a_slow_twin(model: PreTrainedModel) -> None:
    """Position 0 is left out, documents are apart, and batches change nothing."""
    read = Documents(ids=ids(), of=(0, 0, 1, 1, 2, 2))
    with torch.no_grad():
        told = model(input_ids=ids(), use_cache=False, output_hidden_states=True).hidden_states
    twin = Sums.empty(3, len(told) - 1, width_of(model))
    for layer, states in enumerate(told[:-1]):
        for window, document in enumerate(read.of):
            for token in states[window, 1:]:
                twin.add_(document, layer, token[None])
    for batch in (1, 4):
        meter = measure(model, read, batch=batch)
        ours = meter.sums.mapped(lambda name, m=meter: getattr(m.sums, name)[:, :-1])
        for name in ("tokens", "beyond", "unit", "square", "norm"):
            torch.testing.assert_close(
                getattr(ours, name), getattr(twin, name), atol=1e-8, rtol=1e-10
            )
        first = torch.stack([states[:, 0].norm(dim=1).mean() for states in told[:-1]])
        torch.testing.assert_close(meter.first().norm[:-1], first, atol=EXACT, rtol=EXACT)
        torch.testing.assert_close(
            meter.first().held.sum(-1), torch.ones(len(told), dtype=torch.float64)
        )


def test_a_zero_gain_is_a_norm_that_gives_zero(model: PreTrainedModel) -> None:
    """The same by parameters and by hooks, another than before, and in some layers alone."""
    before = logits(model)
    for layers in (None, (1,)):
        with silenced(model, COORDINATES, layers=layers):
            by_gain = logits(model)
        with masked(model, COORDINATES, layers=layers):
            by_hook = logits(model)
        torch.testing.assert_close(by_gain, by_hook, atol=EXACT, rtol=0)
        assert (by_gain - before).abs().max() > 1e-4


@pytest.mark.parametrize("way", ["silenced", "masked", "removed", "averaged"])
def test_a_scope_leaves_the_model_as_it_was_bit_for_bit(model: PreTrainedModel, way: str) -> None:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    given = logits(model)
    means = torch.zeros(len(layers_of(model)) + 1, width_of(model))
    scopes = {
        "silenced": lambda: silenced(model, COORDINATES),
        "masked": lambda: masked(model, COORDINATES),
        "removed": lambda: removed(model, COORDINATES),
        "averaged": lambda: averaged(model, COORDINATES, means),
    }

    def interrupted() -> None:
        with scopes[way]():
            assert not torch.equal(logits(model), given)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(logits(model), given)


def test_what_is_removed_is_zero_after_every_layer(model: PreTrainedModel) -> None:
    """Position 0 is spared where that is asked for; a mean is put where it is asked for."""
    layers = len(layers_of(model))
    means = torch.arange(layers + 1.0)[:, None].expand(-1, width_of(model))
    for scope, value, begin in (
        (removed(model, COORDINATES), torch.zeros(layers + 1), 0),
        (removed(model, COORDINATES, spares_first=True), torch.zeros(layers + 1), 1),
        (averaged(model, COORDINATES, means), torch.arange(layers + 1.0), 1),
    ):
        seen: dict[int, Tensor] = {}
        with torch.no_grad(), scope, looking(model, lambda at, h, s=seen: s.update({at: h})):
            model(input_ids=ids(), use_cache=False)
        for layer in range(1, layers + 1):
            changed = seen[layer][:, begin:, list(COORDINATES)]
            assert torch.equal(changed, torch.full_like(changed, float(value[layer])))
            assert begin == 0 or bool(seen[layer][:, 0, list(COORDINATES)].ne(0).all())


def test_norms_are_those_over_the_stream(model: PreTrainedModel) -> None:
    """At least two a layer and one behind; gains of heads are none of them."""
    norms = norms_of(model)
    layers = len(layers_of(model))
    assert {norm.layer for norm in norms} == set(range(layers + 1))
    assert len(norms) in {2 * layers + 1, 4 * layers + 1}
    assert gains_of(norms).shape == (len(norms), width_of(model))
    is_offset = "gemma" in model.config.model_type
    assert {norm.offset for norm in norms} == ({1.0} if is_offset else {0.0})
    assert all((norm.bias is not None) == ("gpt" in model.config.model_type) for norm in norms)


def test_loss_and_attention_are_the_models_own(model: PreTrainedModel) -> None:
    """Against the loss that transformers computes and maps that are averaged in loops."""
    read = Documents.each_once(ids())
    marks = torch.zeros(128, dtype=torch.bool)
    marks[20:60] = True
    with attending_eagerly(model):
        seen = behaviour(model, read, delimiters=marks, batch=4)
        with torch.no_grad():
            told = model(input_ids=ids(), use_cache=False, output_attentions=True)
    for window, row in enumerate(ids()):
        with torch.no_grad():
            loss = model(input_ids=row[None], labels=row[None], use_cache=False).loss
        assert float(seen.loss_nats[window]) == pytest.approx(float(loss), abs=1e-6)
        for layer, weights in enumerate(told.attentions):
            late = weights[window, :, FROM:].mean((0, 1))
            marked = sum(float(late[k]) for k in range(1, len(row)) if marks[row[k]])
            assert float(seen.to_first[layer, window]) == pytest.approx(float(late[0]), abs=1e-9)
            assert float(seen.to_delimiters[layer, window]) == pytest.approx(marked, abs=1e-9)


def test_other_sets_are_others_and_of_like_gains() -> None:
    gains = torch.linspace(0, 1, 50)[None].repeat(3, 1)
    for chosen in random_sets(50, 4, besides=(1, 2), times=30, seed=0):
        assert len(set(chosen)) == 4
        assert not {1, 2} & set(chosen)
    for chosen in matched_sets(gains, (10, 40), besides=(10, 40), times=30, seed=0, near=4):
        assert not {10, 40} & set(chosen)
        assert [min(abs(d - like) for d in chosen) <= 2 for like in (10, 40)] == [True, True]


def test_a_coordinate_that_is_not_there_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"coordinates \[64\] of a residual stream of 64"):
        silenced(model, (64,)).__enter__()
