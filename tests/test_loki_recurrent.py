"""Loki in a recurrent-depth model: a rotation for every layer and step. Papers combined, so it lives here."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

pytest.importorskip(
    "fourfold_recurrent_depth.causal_lm", reason="needs the package recurrent_depth"
)
loki = pytest.importorskip("fourfold_loki", reason="needs the package loki")

STEPS = 3
CALLS = 1 + 2 * STEPS + 1
"""Prelude, core at every step, coda."""
FLOAT32 = 1e-4
OTHER_ORDER = 1e-3
"""Where the whole model sums in another order: enlarged so, float32 is 2e-4 to 5e-4 from float64."""


@pytest.fixture(scope="module")
def recurrent() -> PreTrainedModel:
    """Random weights, enlarged where attention is made."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "huginn_raven",
        n_embd=32,
        n_heads=2,
        n_layers_in_prelude=1,
        n_layers_in_recurrent_block=2,
        n_layers_in_coda=1,
        intermediate_size=48,
        vocab_size=64,
        padding_multiple=64,
        block_size=64,
        mean_recurrence=STEPS,
        mean_backprop_depth=1,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "Wqkv" in name:
                parameter.mul_(8)
    return model


@pytest.fixture(scope="module")
def statistics(recurrent: PreTrainedModel) -> object:
    from fourfold_loki.calibration import calibrate_tokens

    return calibrate_tokens(recurrent, ids(8, 48))


def ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(1))


def logits(model: PreTrainedModel, mode: object, **options: object) -> torch.Tensor:
    from fourfold_loki import attending

    with attending(model, mode), torch.no_grad():  # type: ignore[arg-type]
        return model(ids(1, 40), use_cache=False, init_scale=0.0, **options).logits


def planned(statistics: object, width: int, share: float) -> object:
    from fourfold_loki import Budget, Share, Sparse, fit
    from fourfold_loki.selectors import Loki

    basis = fit(statistics)  # type: ignore[arg-type]
    assert basis.layers == CALLS
    return Sparse(
        selector=Loki(basis=basis, widths=(width,) * CALLS),
        budget=Budget(amount=Share(of_visible=share)),
        reach="every query",
    )


def test_reading_everything_changes_nothing(recurrent: PreTrainedModel, statistics: object) -> None:
    with torch.no_grad():
        plain = recurrent(ids(1, 40), use_cache=False, init_scale=0.0).logits
    ours = logits(recurrent, planned(statistics, 4, 1.0))
    torch.testing.assert_close(ours, plain, atol=OTHER_ORDER, rtol=0)


def test_all_coordinates_rank_as_exact_scores_do(
    recurrent: PreTrainedModel, statistics: object
) -> None:
    """Each step turns by its own rotation: with another step's, queries and keys would still agree, but
    fewer coordinates would choose other keys."""
    from fourfold_loki import Budget, Share, Sparse
    from fourfold_loki.selectors import Exact

    exact = Sparse(
        selector=Exact(), budget=Budget(amount=Share(of_visible=0.25)), reach="every query"
    )
    expected = logits(recurrent, exact)
    whole = logits(recurrent, planned(statistics, 16, 0.25))
    torch.testing.assert_close(whole, expected, atol=FLOAT32, rtol=0)
    few = logits(recurrent, planned(statistics, 2, 0.25))
    assert not torch.allclose(few, expected, atol=100 * FLOAT32)


def test_each_step_has_a_basis_of_its_own(statistics: object) -> None:
    """Keys of one block differ from recurrence to recurrence, so their covariances do."""
    covariance = statistics.keys.covariance(centred=True)  # type: ignore[attr-defined]
    first, second = covariance[1], covariance[3]
    assert float((first - second).norm() / first.norm()) > 1e-3


def test_another_depth_is_refused(recurrent: PreTrainedModel, statistics: object) -> None:
    mode = planned(statistics, 4, 0.25)
    for steps in (STEPS - 1, STEPS + 1):
        with pytest.raises(ValueError, match="as many recurrences as it was calibrated with"):
            logits(recurrent, mode, num_steps=steps)


def test_their_own_cache_decodes(recurrent: PreTrainedModel, statistics: object) -> None:
    """Token by token through the model's own cache: as in one block with every query masked."""
    from fourfold_loki import attending

    mode = planned(statistics, 4, 0.5)
    expected = logits(recurrent, mode)
    with attending(recurrent, mode) as session, torch.no_grad():  # type: ignore[arg-type]
        first = recurrent(ids(1, 40)[:, :38], use_cache=True, init_scale=0.0)
        cache, steps = first.past_key_values, [first.logits[:, -1]]
        for place in (38, 39):
            out = recurrent(
                ids(1, 40)[:, place : place + 1],
                past_key_values=cache,
                use_cache=True,
                init_scale=0.0,
            )
            steps.append(out.logits[:, -1])
        with pytest.raises(ValueError, match="a cache of its own"):
            session.cache()
    torch.testing.assert_close(torch.stack(steps, 1), expected[:, 37:], atol=FLOAT32, rtol=0)
