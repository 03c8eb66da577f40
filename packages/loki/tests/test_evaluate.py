"""Measuring, diagnosing and tuning on a small model."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from fourfold_loki import Basis, Budget, Count, Share, Sparse, Statistics, cost, fit, loki
from fourfold_loki.basis import Label, PublishedSource
from fourfold_loki.evaluate.doctor import ENOUGH, TOO_LITTLE, Diagnosis, diagnose, explain
from fourfold_loki.evaluate.perplexity import FULL, score
from fourfold_loki.evaluate.tune import allocate, autotune, calibrated_mass
from fourfold_loki.selectors import H2O, Exact, Loki, Random, Streaming

ALL = Budget(amount=Share(of_visible=1.0))
SOME = Budget(amount=Count(keys=12), selection="per head")


def test_an_arm_that_reads_everything_scores_as_full_attention(
    llama: PreTrainedModel, tokens: Callable[..., Tensor]
) -> None:
    """By both protocols, and full attention scores as the plain model."""
    ids = tokens(2, 48)
    plain = llama(ids).logits[:, 31:-1]
    expected = F.cross_entropy(plain.transpose(1, 2), ids[:, 32:], reduction="none")
    for protocol in ("decode", "every query"):
        scored = list(
            score(llama, ids, {"all": Sparse(selector=Exact(), budget=ALL)}, prompt=32,
                  protocol=protocol, batch=2)  # type: ignore[arg-type]
        )  # fmt: skip
        assert [(each.arm, each.window) for each in scored] == [
            (FULL, 0), (FULL, 1), ("all", 0), ("all", 1),
        ]  # fmt: skip
        for each in scored:
            torch.testing.assert_close(each.nats, expected[each.window], atol=1e-4, rtol=0)
            assert each.kept_share == 1.0


def test_arms_do_not_disturb_one_another(
    llama: PreTrainedModel, tokens: Callable[..., Tensor]
) -> None:
    """Each scores alone as it does among others, H2O with its account included."""
    ids = tokens(1, 48)
    arms = {
        "h2o": Sparse(selector=H2O(), budget=SOME),
        "exact": Sparse(selector=Exact(), budget=SOME),
        "streaming": Sparse(selector=Streaming(sinks=2), budget=SOME),
    }
    together = {each.arm: each.nats for each in score(llama, ids, arms, prompt=32)}
    for name, mode in arms.items():
        alone = {each.arm: each.nats for each in score(llama, ids, {name: mode}, prompt=32)}
        torch.testing.assert_close(alone[name], together[name], atol=1e-5, rtol=0)
        assert not torch.allclose(alone[name], alone[FULL], atol=1e-3)


def test_windows_scored_together_score_as_alone(
    llama: PreTrainedModel, statistics: Statistics, tokens: Callable[..., Tensor]
) -> None:
    """For every window and arm, H2O's account included; in the order of their numbers."""
    ids = tokens(3, 48)
    arms = {
        "h2o": Sparse(selector=H2O(), budget=SOME),
        "loki": Sparse(selector=Loki(basis=fit(statistics), widths=(4, 4)), budget=SOME),
    }
    together = {(each.arm, each.window): each.nats for each in score(llama, ids, arms, prompt=32)}
    alone = {
        (each.arm, each.window): each.nats for each in score(llama, ids, arms, prompt=32, batch=1)
    }
    assert together.keys() == alone.keys()
    for place, nats in alone.items():
        torch.testing.assert_close(together[place], nats, atol=1e-4, rtol=0)


def test_the_published_protocol_keeps_more_than_its_share(
    llama: PreTrainedModel, tokens: Callable[..., Tensor]
) -> None:
    """2 k_f - k_f² of the pairs, since early queries see fewer keys than the budget."""
    ids = tokens(1, 129)
    mode = Sparse(
        selector=Exact(), budget=Budget(amount=Count(keys=32), selection="shared in groups")
    )
    _, each = score(llama, ids, {"exact": mode}, prompt=2, protocol="every query")
    assert each.kept_share == pytest.approx(2 / 4 - 1 / 16, abs=0.01)


def test_the_cost_of_a_session_is_that_of_its_selection(
    llama: PreTrainedModel, statistics: Statistics, tokens: Callable[..., Tensor]
) -> None:
    ids = tokens(1, 64)
    with loki(llama, fit(statistics), ALL) as session:
        pass
    assert cost(session, ids, prompt=32).nats == pytest.approx(0, abs=1e-5)
    with loki(llama, fit(statistics), Budget(amount=Count(keys=1))) as session:
        pass
    assert abs(cost(session, ids, prompt=32).nats) > 1e-3
    assert "on 32 tokens" in str(cost(session, ids, prompt=32))
    with pytest.raises(ValueError, match="prompt=64"):
        cost(session, ids, prompt=64)


def test_the_doctor_finds_a_perfect_ranking_perfect(
    llama: PreTrainedModel, statistics: Statistics, tokens: Callable[..., Tensor]
) -> None:
    """And a ranking by all coordinates likewise, random keys at their share, in every layer."""
    basis = fit(statistics)
    quarter = Budget(amount=Share(of_visible=0.25), selection="per head")
    diagnoses = diagnose(
        llama,
        tokens(1, 96)[0],
        {
            "exact": Sparse(selector=Exact(), budget=quarter),
            "whole": Sparse(selector=Loki(basis=basis, widths=(16, 16)), budget=quarter),
            "random": Sparse(selector=Random(seed=0), budget=quarter),
        },
        queries=32,
    )
    for each in diagnoses:
        if each.arm == "random":
            assert each.recall == pytest.approx(each.kept_share, abs=0.1)
        else:
            assert each.recall > 0.999
    exact = [each for each in diagnoses if each.arm == "exact"]
    random = [each for each in diagnoses if each.arm == "random"]
    assert all(a.mass_recall > b.mass_recall for a, b in zip(exact, random, strict=True))
    with pytest.raises(ValueError, match="keeps count"):
        diagnose(llama, tokens(1, 20)[0], {"h2o": Sparse(selector=H2O(), budget=quarter)})


def test_the_doctor_judges_what_would_select(
    llama: PreTrainedModel,
    make_llama: Callable[..., PreTrainedModel],
    statistics: Statistics,
    tokens: Callable[..., Tensor],
) -> None:
    """Neither layers that stay dense, nor another model's basis."""
    quarter = Budget(amount=Share(of_visible=0.25))
    mode = Sparse(selector=Exact(), budget=quarter)
    arms = {"all": mode, "last": replace(mode, dense_layers=(0,))}
    diagnoses = diagnose(llama, tokens(1, 48)[0], arms)
    assert [(each.arm, each.layer) for each in diagnoses] == [("all", 0), ("all", 1), ("last", 1)]
    other = make_llama()
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    foreign = Sparse(selector=Loki(basis=fit(statistics), widths=(4, 4)), budget=quarter)
    with pytest.raises(ValueError, match="calibrate this model"):
        diagnose(other, tokens(1, 48)[0], {"loki": foreign})


def layers_of(mass: float, *, sink_kept: float = 1.0) -> list[Diagnosis]:
    """Two layers alike, with a sink that holds half of the attention."""
    return [
        Diagnosis(
            arm="made up",
            layer=layer,
            recall=0.9,
            mass_recall=mass,
            sink_kept=sink_kept,
            sink_mass=0.5,
            kept_share=0.25,
        )
        for layer in range(2)
    ]


def test_a_diagnosis_says_what_to_expect_and_what_to_change() -> None:
    said = " ".join(explain(layers_of(0.96), layers_of(0.97)))
    assert "keeps 0.960" in said
    assert "little damage" in said
    assert "--share" not in said
    assert "larger --share" in explain(layers_of(0.8), layers_of(0.85))[-1]
    assert "smaller --divisor" in explain(layers_of(0.8), layers_of(0.95))[-1]
    assert "7 % added perplexity or more" in explain(layers_of(0.8), layers_of(0.95))[-1]
    assert "a few percent" in explain(layers_of(0.91), layers_of(0.92))[-1]
    dropped = explain(layers_of(0.96, sink_kept=0.2), layers_of(0.97))[1]
    assert "Layers 0, 1 drop the attention sink" in dropped
    assert "--sinks 4" in dropped


def test_the_doctors_limits_are_those_of_the_committed_records() -> None:
    """Selections that keep `ENOUGH` of the mass add at most 5 %, those below `TOO_LITTLE` 7 % or more."""
    from fourfold_loki.reproduce.measures import added_percent, arms_of, diagnosed
    from fourfold_parallel.common.records import read_record

    results = Path(__file__).parents[1] / "results"
    doctor = read_record(results / "diagnoses.jsonl")
    judged = 0
    for name in ("perplexity", "variants"):
        record = read_record(results / f"{name}.jsonl")
        for arm in arms_of(record):
            masses, cost = diagnosed(doctor, arm, "mass_recall"), added_percent(record, arm).value
            if masses and sum(masses) / len(masses) >= ENOUGH:
                assert cost < 5, arm
                judged += 1
            elif masses and sum(masses) / len(masses) < TOO_LITTLE:
                assert cost > 7, arm
                judged += 1
    assert judged == 17


def made_up(spectra: list[list[float]]) -> Basis:
    spectrum = torch.tensor(spectra)[:, None]
    maps = torch.eye(spectrum.shape[-1]).expand(len(spectra), 1, -1, -1)
    label = Label(kind="pca", stage="after rotary", source=PublishedSource(folder="made up"))
    return Basis(query_maps=maps, key_maps=maps, spectra=spectrum, label=label)


def test_no_division_of_the_same_coordinates_loses_less() -> None:
    """Against every division of 3 layers' widths."""
    basis = made_up([[8, 1, 1, 0.1], [4, 3, 2, 1], [5, 5, 5, 5]])

    def lost(widths: tuple[int, ...]) -> float:
        return sum(float(basis.lost(width)[layer, 0]) for layer, width in enumerate(widths))

    for mean in (1, 2, 3, 4):
        ours = allocate(basis, mean_width=mean)
        assert sum(ours) == 3 * mean
        every = itertools.product(range(1, 5), repeat=3)
        best = min(lost(widths) for widths in every if sum(widths) == 3 * mean)
        assert lost(ours) == pytest.approx(best, abs=1e-6)
    with pytest.raises(ValueError, match="mean_width=5"):
        allocate(basis, mean_width=5)


def test_a_calibrated_mass_is_truly_held(
    llama: PreTrainedModel, statistics: Statistics, tokens: Callable[..., Tensor]
) -> None:
    """On the text it was calibrated on, in the mean of every layer."""
    basis, ids = fit(statistics), tokens(1, 96)[0]
    mass = calibrated_mass(llama, ids, basis, widths=(4, 4), target=0.9, queries=32)
    mode = Sparse(selector=Loki(basis=basis, widths=(4, 4)), budget=Budget(amount=mass))
    for each in diagnose(llama, ids, {"loki": mode}, queries=32):
        assert each.mass_recall >= 0.9 - 1e-4
    with pytest.raises(ValueError, match="target=1"):
        calibrated_mass(llama, ids, basis, widths=(4, 4), target=1.0)


def test_autotune_takes_the_first_setting_that_is_good_enough(
    llama: PreTrainedModel, statistics: Statistics, tokens: Callable[..., Tensor]
) -> None:
    # The model foretells text of its own best by reading everything.
    ids, basis = llama.generate(tokens(2, 24), max_new_tokens=40, do_sample=False), fit(statistics)
    chosen, tried = autotune(
        llama, ids, basis, max_loss=50.0, prompt=32, page=1, shares=(0.25, 1.0), divisors=(4,)
    )
    assert tried == (chosen,)
    assert (chosen.share, chosen.divisor, chosen.width) == (0.25, 4, 4)
    strict, tried = autotune(
        llama, ids, basis, max_loss=1e-4, prompt=32, page=1, shares=(0.05, 1.0), divisors=(4,)
    )
    assert strict.share == 1.0
    assert strict.nats_bound <= math.log1p(1e-4)
    assert len(tried) == 2
    with pytest.raises(ValueError, match="no setting stays within"):
        autotune(llama, ids, basis, max_loss=1e-9, prompt=32, page=1, shares=(0.05,), divisors=(8,))


def test_bfloat16_costs_what_float32_costs(
    make_llama: Callable[..., PreTrainedModel],
    statistics: Statistics,
    tokens: Callable[..., Tensor],
) -> None:
    """The selection itself adds nothing to what rounding does to full attention."""
    model, ids = make_llama().bfloat16(), tokens(1, 64)
    mode = Sparse(
        selector=Loki(basis=fit(statistics), widths=(16, 16)), budget=replace(ALL, sinks=1)
    )
    full, ours = score(model, ids, {"loki": mode}, prompt=32)
    torch.testing.assert_close(full.nats, ours.nats, atol=0.1, rtol=0)
