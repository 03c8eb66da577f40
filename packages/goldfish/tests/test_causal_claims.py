"""Claims on inserted passages are judged as their rules say, on made-up pairs whose verdicts follow."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fourfold_goldfish.reproduce import causal_claims
from fourfold_goldfish.reproduce.causal import CAUSAL_SEEDS, CELLS, REMEDIES, causal, mask_of
from fourfold_parallel.common.records import Event, Record
from fourfold_parallel.common.values import from_json, to_json
from fourfold_parallel.reproduce.claims import Claim

EFFECTS = {
    "12 spread": 2.0,
    "36 spread": 4.0,
    "72 spread": 5.0,
    "36 early": 3.0,
    "36 late": 4.0,
    "36 reformatted": 3.0,
}
"""Nats a token that a plain model saves, by cell."""


def made_up(
    effects: Mapping[tuple[str, str], float] = {},
    recited: Mapping[str, int] = {},
    *,
    price: float = 0.0,
    never: float = 0.0,
    bounds: tuple[float, float] = (0.0, 0.0),
) -> dict[str, Record]:
    """Records of all remedies: six pairs a cell whose effects differ by little around the given ones."""
    records = {}
    for remedy in REMEDIES:
        for seed in CAUSAL_SEEDS:
            events: list[dict[str, Any]] = []
            loss = 6.0 + (price if remedy == "sinks" else 0.0) + 0.001 * seed
            events.append({"event": "validation", "validation_loss_nats": loss})
            for cell in CELLS:
                effect = effects.get((remedy, cell.name), EFFECTS[cell.name])
                for pair in range(6):
                    wave = 0.05 * ((pair * 7 + seed) % 5 - 2)
                    events.append(
                        {
                            "event": "pair", "cell": cell.name, "pair": pair,
                            "inserted_exact": pair < recited.get(remedy, 0), "twin_exact": False,
                            "inserted_suffix_nats": 6.0 - effect + wave, "twin_suffix_nats": 6.0,
                            "inserted_never_nats": 6.0 - never + wave, "twin_never_nats": 6.0,
                        }
                    )  # fmt: skip
                    if cell.name == "72 spread":
                        events += [
                            {
                                "event": "near", "cell": cell.name, "pair": pair, "side": side,
                                "lower": bounds[0] + 0.01 * wave, "upper": bounds[1] + 0.01 * wave,
                            }
                            for side in ("inserted", "twin")
                        ]  # fmt: skip
            name = f"causal-{remedy}-seed{seed}"
            records[name] = Record(
                Path(f"{name}.jsonl"),
                tuple(Event(line, event, name) for line, event in enumerate(events, 2)),
            )
    return records


MOST = "72 spread"
ALL = {"plain": 6, "ours": 0, "random": 6, "truncated": 6}
CASES: list[tuple[Claim, dict[str, Any], str]] = [
    (causal_claims.dose_response, {}, "reproduced"),
    (causal_claims.dose_response, {"effects": {("plain", MOST): 1.0}}, "contradicted"),
    (causal_claims.dose_response, {"effects": {("plain", MOST): 2.0}}, "inconclusive"),
    (causal_claims.late_is_held, {}, "reproduced"),
    (causal_claims.late_is_held, {"effects": {("plain", "36 late"): 1.0}}, "contradicted"),
    (causal_claims.late_is_held, {"effects": {("plain", "36 late"): 3.0}}, "inconclusive"),
    (causal_claims.dilution_protects, {"effects": {("dilute", MOST): 4.0}}, "reproduced"),
    (causal_claims.dilution_protects, {"effects": {("dilute", MOST): 6.0}}, "contradicted"),
    (causal_claims.goldfish_ends_recital, {"recited": ALL}, "reproduced"),
    (causal_claims.goldfish_ends_recital, {"recited": {**ALL, "ours": 4}}, "contradicted"),
    (causal_claims.goldfish_ends_recital, {"recited": {**ALL, "random": 0}}, "inconclusive"),
    (causal_claims.letters_hold, {"effects": {("spelled", "36 reformatted"): 2.0}}, "reproduced"),
    (causal_claims.letters_hold, {"effects": {("spelled", "36 reformatted"): 4.0}}, "contradicted"),
    (causal_claims.sinks_take_it, {"effects": {("sinks", MOST): 4.0}}, "reproduced"),
    (
        causal_claims.sinks_take_it,
        {"effects": {("sinks", MOST): 4.0}, "price": 0.1},
        "inconclusive",
    ),
    (causal_claims.sinks_take_it, {"effects": {("sinks", MOST): 6.0}}, "contradicted"),
    (causal_claims.one_copy_holds_less, {"effects": {("deduplicated", MOST): 1.0}}, "reproduced"),
    (causal_claims.one_copy_holds_less, {"effects": {("deduplicated", MOST): 6.0}}, "contradicted"),
    (causal_claims.prompts_leak, {"never": 0.5}, "reproduced"),
    (causal_claims.prompts_leak, {"never": 0.0}, "contradicted"),
    (causal_claims.gaps_leak, {"never": 0.5}, "reproduced"),
    (causal_claims.gaps_leak, {"never": -0.5}, "contradicted"),
    (causal_claims.nothing_nearly, {"bounds": (0.01, 0.02)}, "reproduced"),
    (causal_claims.nothing_nearly, {"bounds": (0.3, 0.4)}, "contradicted"),
    (causal_claims.nothing_nearly, {"bounds": (0.02, 0.4)}, "inconclusive"),
]


@pytest.mark.parametrize(
    ("claim", "given", "verdict"), CASES, ids=lambda value: str(getattr(value, "id", value))[:30]
)
def test_a_rule_decides_as_it_says(claim: Claim, given: dict[str, Any], verdict: str) -> None:
    assert claim.judge(made_up(**given)).verdict == verdict


def test_a_record_rebuilds_every_study() -> None:
    for remedy in REMEDIES:
        study = causal(remedy, 3)
        assert from_json(to_json(study)) == study


def test_masks_supervise_as_many_targets() -> None:
    """Within 3 % of plain loss, but for the two arms that say otherwise."""
    from fourfold_goldfish.reproduce.mitigations import LossTruncation

    supervised = {}
    for remedy in REMEDIES:
        study = causal(remedy, 3)
        stream = study.insertions.open(sequence=64, seed=3)
        dropped = mask_of(remedy).drop(stream.batch(0, batch=study.insertions.rows).tokens)[:, 1:]
        kept = (
            1 - study.run.objective.share if isinstance(study.run.objective, LossTruncation) else 1
        )
        supervised[remedy] = int((~dropped).sum()) * kept
    for remedy in set(REMEDIES) - {"prompt", "dilute"}:
        assert supervised[remedy] == pytest.approx(supervised["plain"], rel=0.03), remedy
