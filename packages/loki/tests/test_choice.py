"""The choice between forms, by a clock that is given."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fourfold_loki import Budget, Loki, Mass, Share, Sparse, Statistics, WhereItPays, fit, loki
from fourfold_loki.attention_mode import NEVER, Forms
from fourfold_loki.huggingface import session as sessions
from fourfold_loki.kernels import choice, cpu
from fourfold_loki.kernels.choice import Heads, forms_for

HEADS = Heads(
    heads=4, kv_heads=2, head_width=16, width=4, page=16, share=0.25,
    dtype=torch.float32, device=torch.device("cpu"), threads=1,
)  # fmt: skip
PAYS = Budget(amount=Share(of_visible=0.25), page=16, dense_below=WhereItPays())


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Callable[[int], float]]]:
    """Seconds by form and length, that the clock of `forms_for` gives instead of a machine's."""
    table: dict[str, Callable[[int], float]] = {
        "two products": lambda length: 1e-6 * length,
        "fused attention": lambda length: 2e-6 * length,
        "compiled": lambda length: 2e-3 + 0.4e-6 * length,
        "torch": lambda length: 4e-3 + 0.4e-6 * length,
    }
    now = [0.0]

    def ways(heads: Heads, length: int) -> dict[str, Callable[[], None]]:
        def spend(name: str) -> None:
            now[0] += table[name](length)

        return {name: lambda name=name: spend(name) for name in table}

    monkeypatch.setattr(choice, "_ways", ways)
    monkeypatch.setattr(choice.time, "perf_counter", lambda: now[0])
    table["clock"] = lambda _: now[0]
    choice._found.cache_clear()
    yield table
    choice._found.cache_clear()


def found(costs: dict[str, Callable[[int], float]]) -> Forms:
    clock = costs.pop("clock")
    return forms_for(HEADS, clock=lambda: clock(0))


def test_the_selection_begins_where_it_is_faster(costs: dict[str, Callable[[int], float]]) -> None:
    """2 ms of overhead at 0.4 us a token against 1 us: level at 3,333 tokens, so the next length timed."""
    forms = found(costs)
    assert (forms.pays_from, forms.dense, forms.sparse) == (4096, "two products", "compiled")


def test_the_best_dense_form_is_the_one_to_beat(costs: dict[str, Callable[[int], float]]) -> None:
    costs["fused attention"] = lambda length: 0.5e-6 * length
    forms = found(costs)
    assert (forms.pays_from, forms.dense) == (32768, "fused attention")


def test_a_selection_that_never_pays_is_never_made(
    costs: dict[str, Callable[[int], float]], caplog: pytest.LogCaptureFixture
) -> None:
    costs["compiled"] = costs["torch"] = lambda length: 0.96e-6 * length
    with caplog.at_level("INFO"):
        assert found(costs).pays_from == NEVER
    assert "pays at no length timed; dense attention by two products" in caplog.text


def test_every_form_is_timed_on_what_it_takes() -> None:
    """The real forms: the same shape from each."""
    outputs = [way() for way in choice._ways(HEADS, 1024).values()]
    assert len(outputs) >= 3
    for output in outputs:
        torch.testing.assert_close(output, torch.full((1, 4, 1, 16), 0.01))


@pytest.mark.parametrize("dense", list(cpu.DENSE))
def test_below_the_length_attention_is_dense_bit_for_bit(
    llama: PreTrainedModel,
    statistics: Statistics,
    tokens: Callable[..., Tensor],
    dense: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A session whose timing found 128: at 120 tokens all keys in the chosen form, at 140 a selection."""
    forms = Forms(dense=dense, sparse="torch", pays_from=128, instructions="native")
    monkeypatch.setattr(sessions, "forms_for", lambda heads, *, clock: forms)
    called: list[int] = []
    plain = cpu.DENSE[dense]

    def watched(*cached: Tensor, length: int, scaling: float) -> Tensor:
        called.append(length)
        return plain(*cached, length=length, scaling=scaling)

    monkeypatch.setitem(cpu.DENSE, dense, watched)
    with loki(llama, fit(statistics), PAYS, width=4) as session, torch.no_grad():
        assert isinstance(session.mode, Sparse)
        assert session.mode.budget == replace(PAYS, dense_below=128)
        for length, share in ((120, 1.0), (140, None)):
            cache = session.cache()
            llama(tokens(1, length), past_key_values=cache)
            llama(tokens(1, 1), past_key_values=cache)
            assert bool(called) == (share is not None)
            assert called == [length + 1] * len(called)
            called.clear()


@pytest.mark.parametrize(
    "budget",
    [
        replace(PAYS, amount=Mass(claimed=(0.9, 0.9), floor=1)),
        replace(PAYS, selection="per head"),
    ],
)
def test_what_no_kernel_takes_is_refused(
    llama: PreTrainedModel, statistics: Statistics, budget: Budget
) -> None:
    basis = fit(statistics)
    mode = Sparse(selector=Loki(basis=basis, widths=(4,) * basis.layers), budget=budget)
    with pytest.raises(ValueError, match="can be timed; give a number of keys"):
        sessions.timed(llama, mode)


def test_outside_a_session_the_number_is_not_known() -> None:
    scores = torch.zeros(1, 2, 1, 64)
    with pytest.raises(ValueError, match="known to a session"):
        PAYS.keep(scores, torch.ones(1, 1, 1, 64, dtype=torch.bool), kv_heads=2, layer=0)
