"""Recipes rebuild from their records, and rules judge made-up records as their words say."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fourfold_parallel.run.claims import judge
from fourfold_parallel.run.records import RecordWriter, header, read_record
from fourfold_parallel.run.values import from_json, to_json
from fourfold_recurrent_depth import recipes
from fourfold_recurrent_depth.claims import AUTOMATON, CLAIMS, LANGUAGE
from fourfold_recurrent_depth.experiment import EXPERIMENT
from fourfold_recurrent_depth.study import DEPTHS


def test_recipes_rebuild_from_their_records() -> None:
    plans = [recipes.cells("smoke"), recipes.cells("laptop"), recipes.language("laptop")]
    for plan in [*plans, recipes.exact("smoke"), recipes.table_1("paper")]:
        assert from_json(json.loads(json.dumps(to_json(plan)))) == plan


def test_arms_differ_in_the_draw_of_recurrences_alone() -> None:
    runs = {arm: run for arm, run in recipes.cells("laptop").members if run.seed == 1}
    law = runs["law"]
    for run in runs.values():
        assert replace(run, name=law.name, objective=law.objective) == law


def test_every_claim_of_the_page_has_a_row() -> None:
    assert [claim.id for claim in CLAIMS] == [f"C{n}" for n in range(1, 24)]
    for claim in CLAIMS:
        assert claim.scales or claim.needs
    assert EXPERIMENT.launches()[0].torchrun.startswith("torchrun")
    with pytest.raises(ValueError, match="use paper"):
        recipes.table_1("laptop")


def record(folder: Path, name: str, events: list[tuple[str, dict[str, Any]]]) -> Any:
    path = folder / f"{name}.jsonl"
    with RecordWriter(path) as records:
        plan = recipes.exact("smoke")
        records.write_header(header(plan, seed=0, world_size=1, materials=(), overrides=()))
        for kind, fields in events:
            records.write(kind, **fields)
        records.write("finished")
    return read_record(path)


def automaton(folder: Path, *, good: bool) -> Any:
    """A model that does what the paper says, or one that does the opposite."""
    events: list[tuple[str, dict[str, Any]]] = []
    for seed in range(3):
        for arm in ("law", "fixed", "shallow"):
            for k in (1, 2, 3):
                rights = {
                    r: 0.98 if (r >= k and arm != "shallow") or k == 1 else 0.6 for r in DEPTHS
                }
                if arm == "fixed":
                    rights[64] -= 0.2
                if not good:
                    rights = {r: 0.98 - 0.2 * (r == 64) for r in DEPTHS}
                own = {"arm": arm, "seed": seed, "k": k}
                events += [
                    ("accuracy", {**own, "recurrences": r, "accuracy": right})
                    for r, right in rights.items()
                ]
        law = {"arm": "law", "seed": seed}
        events.append(("trained", {**law, "steps": 100}))
        events += [
            ("on_the_way", {**law, "step": step, "k": 3, "recurrences": r,
             "accuracy": 0.6 if good or step < 40 else 0.9})
            for step in (10, 30, 40) for r in (1, recipes.MEAN)
        ]  # fmt: skip
        events.append(
            ("exits", {**law, "criterion": "kl", "spearman": 0.9 if good else 0.0, "mean_recurrences": 6.0,
             "full_recurrences": 16, "accuracy": 0.97, "full_accuracy": 0.975,
             "equal_cost_accuracy": 0.9 if good else 0.99})
        )  # fmt: skip
        events += [
            ("path", {**law, "recurrences": r, "mean_distance": 1 / r if good else 0.1 * r,
             "share_within_2_percent": 0.99 if good else 0.1, "share_same_prediction": 0.99})
            for r in (4, 16, 64)
        ]  # fmt: skip
        events.append(
            ("convergence", {**law, "variance_over_tokens": 8.0 if good else 0.5,
             "variance_over_initial_states": 1.0})
        )  # fmt: skip
        events.append(("ends", {**law, "fixed_point": 5, "orbit": 1, "slider": 0, "unsettled": 0}))
    return record(folder, AUTOMATON, events)


def language(folder: Path, *, good: bool) -> Any:
    events: list[tuple[str, dict[str, Any]]] = []
    for seed in range(3):
        own = {"seed": seed}
        for kept in (16, 1):
            loss = 2.0 if kept == 16 or good else 2.2
            events.append(("cache", {**own, "recurrences_kept": kept, "loss_nats": loss}))
        for warm in (False, True):
            steps = 9.0 if warm and good else 10.0
            events.append(
                ("warm_start", {**own, "warm": warm, "mean_recurrences": steps, "loss_nats": 2.0})
            )
        events += [
            ("speculation", {**own, "draft_steps": draft, "equals_greedy": good,
             "accepted_share": draft / 5})
            for draft in (1, 2, 4)
        ]  # fmt: skip
        events.append(("diffusion", {**own, "pass_ratio": 3.0, "agreement": 0.99 if good else 0.9}))
    return record(folder, LANGUAGE, events)


@pytest.mark.parametrize("good", [True, False])
def test_rules_judge_as_they_say(tmp_path: Path, good: bool) -> None:
    """Records that show what the paper says are reproduced; records that show the opposite, contradicted."""
    records = {AUTOMATON: automaton(tmp_path, good=good), LANGUAGE: language(tmp_path, good=good)}
    judged = [claim for claim in CLAIMS if claim.scales and claim.id not in ("C6", "C20")]
    rows = judge(judged, records, package="recurrent_depth", scale="laptop")
    expected = "reproduced" if good else "contradicted"
    assert {row.id: row.verdict for row in rows} == {claim.id: expected for claim in judged}
    assert len(rows) == 12
