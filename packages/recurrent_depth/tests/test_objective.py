"""Laws of training at a random depth."""

from typing import Any

import numpy as np
import pytest
import torch

from fourfold_parallel.run.data import Batch
from fourfold_recurrent_depth import Always, LogNormalPoisson, RandomDepth
from fourfold_recurrent_depth.reproduce.tasks.automaton import (
    Automaton,
    EvolvedCells,
    evolve,
    targets_of,
)


def test_the_law_has_the_papers_moments() -> None:
    """Mean 33, median 29, under one percent below 8; n and k are a draw cut at the last 8."""
    draws = [LogNormalPoisson().draw(number) for number in range(6000)]
    totals = np.asarray([sum(draw) for draw in draws])
    assert totals.mean() == pytest.approx(33.0, abs=1.0)
    assert np.median(totals) == pytest.approx(29, abs=1)
    assert (totals < 8).mean() < 0.02
    assert all(k == min(8, n + k) and n == max(0, n + k - 8) for n, k in draws)


def test_a_draw_depends_on_the_number_alone() -> None:
    """Any rank, and a run that was resumed, draws the same."""
    law = LogNormalPoisson(mean=8, backprop=4)
    forward = [law.draw(number) for number in range(20)]
    torch.manual_seed(5)
    assert [law.draw(number) for number in reversed(range(20))] == forward[::-1]
    assert len(set(forward)) > 5


def test_the_curriculum_rises_to_the_law() -> None:
    ramped, plain = LogNormalPoisson(ramp=400), LogNormalPoisson()
    early = np.mean([sum(ramped.draw(number)) for number in range(40)])
    assert early < 6
    assert all(ramped.draw(number) == plain.draw(number) for number in range(399, 440))


def test_rows_rise_with_the_curriculum() -> None:
    """Whatever a row's place in the corpus is, the first microbatches are shallow."""
    law = LogNormalPoisson(ramp=400)
    early = [law.draw(0, row=row) for row in range(5000, 5100)]
    assert np.mean([sum(draw) for draw in early]) < 4
    assert {with_gradient for _, with_gradient in early} == {1}
    draws = [[law.draw(500 + number, row=row) for row in range(40)] for number in range(40)]
    for later in range(1, 40):
        shifted = sum(draws[0][row + later] == draws[later][row] for row in range(40 - later))
        assert shifted <= max(4, 40 - later) // 2, "neighbours must not share their draws"


def batch(rows: int, *, number: int = 0) -> Batch:
    stream = Automaton(hardest=3, rows=rows).open(sequence=8, seed=1)
    found = stream.batch(0, batch=rows)
    return Batch(
        tokens=found.tokens,
        document_ids=found.document_ids,
        addresses=found.addresses,
        number=number,
    )


@pytest.mark.parametrize("share", [1, 3])
@pytest.mark.parametrize("per", ["microbatch", "row"])
def test_the_loss_is_a_sum_over_rows(tiny: Any, per: Any, share: int) -> None:
    """Splitting a batch into ranks changes no gradient, down to one row each.

    Nor does the model's own number of recurrences with gradient, which is 3.
    """
    tiny.train()
    objective = RandomDepth(
        recurrences=Always(recurrences=3, backprop=2)
        if per == "microbatch"
        else LogNormalPoisson(mean=6, backprop=1),
        supervision=EvolvedCells(),
        per=per,
    )
    whole = batch(6)

    def gradient(parts: list[Batch]) -> torch.Tensor:
        tiny.zero_grad()
        for part in parts:
            objective.loss(tiny, part, objective.targets(part)).nats_sum.backward()
        return tiny.transformer["core_block"][0].attn.Wqkv.weight.grad.clone()

    rows = [
        Batch(
            tokens=whole.tokens[i : i + share],
            document_ids=whole.document_ids[i : i + share],
            addresses=whole.addresses[i : i + share],
            number=whole.number,
        )
        for i in range(0, 6, share)
    ]
    expected = gradient([whole])
    assert torch.allclose(gradient(rows), expected, rtol=1e-3, atol=1e-4 * expected.abs().max())


def test_the_automaton_is_rule_30_shifted() -> None:
    """Oracle in loops: y_t <- y_{t-2} xor (y_{t-1} or y_t); rule 30 is left xor (centre or right)."""
    cells = torch.randint(0, 2, (2, 12), generator=torch.Generator().manual_seed(0))
    for row in cells.tolist():
        now = row
        for steps in range(1, 5):
            before = [0, 0, *now]
            now = [before[t] ^ (before[t + 1] | before[t + 2]) for t in range(len(row))]
            assert evolve(torch.tensor([row]), steps)[0].tolist() == now


def test_every_row_is_asked_for_its_own_k() -> None:
    """Tokens carry cell and k; k covers 1 .. hardest, and rises where a ramp is asked for."""
    stream = Automaton(hardest=3, rows=300, ramp=200).open(sequence=8, seed=0)
    tokens = stream.batch(0, batch=300).tokens
    k = tokens // 2 + 1
    assert bool((k == k[:, :1]).all())
    assert k.unique().tolist() == [1, 2, 3]
    assert int(k[:60].max()) == 1
    assert torch.equal(targets_of(tokens)[0], evolve(tokens[:1] % 2, int(k[0, 0]))[0])
    other = Automaton(hardest=3, rows=300).validation(sequence=8)
    assert other.file.vocabulary == 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogNormalPoisson(mean=0), "mean=0"),
        (lambda: LogNormalPoisson(sigma=0.0), "sigma=0.0"),
        (lambda: LogNormalPoisson(ramp=-5), "ramp=-5"),
        (lambda: Always(recurrences=0, backprop=2), "recurrences=0"),
    ],
)
def test_laws_of_nothing_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("backprop", [0, -1])
def test_bad_input_is_refused(backprop: int) -> None:
    with pytest.raises(ValueError, match="use 1 or more"):
        RandomDepth(
            recurrences=Always(recurrences=3, backprop=backprop), supervision=EvolvedCells()
        )
