"""The study's recipes and rules: one change per arm, and verdicts that follow the numbers."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from fourfold_hpc_coder.finetune import LowRank
from fourfold_hpc_coder.instruct.format import CodePairs
from fourfold_hpc_coder.reproduce.claims import CLAIMS
from fourfold_hpc_coder.reproduce.experiment import EXPERIMENT, held_out_nats
from fourfold_hpc_coder.reproduce.recipes import ARMS, SEEDS, Arm, tuned
from fourfold_parallel.common.records import Record, read_record
from fourfold_parallel.common.values import digest, from_json, to_json
from fourfold_parallel.reproduce.claims import judge, write_ledger
from fourfold_parallel.reproduce.experiment import load
from fourfold_parallel.run.optimizer import Constant
from fourfold_parallel.run.recipe import Steps
from fourfold_parallel.run.trained import TrainedBy


def changed(arm: Arm) -> set[str]:
    """Fields of the run in which an arm differs from `full`, apart from its name."""
    ours, full = tuned(arm, 0, "laptop").run, tuned("full", 0, "laptop").run
    names = {one.name for one in fields(ours)} - {"name"}
    return {name for name in names if getattr(ours, name) != getattr(full, name)}


@pytest.mark.parametrize(
    ("arm", "what"),
    [
        ("quarter", {"data"}),
        ("sixteenth", {"data"}),
        ("spoiled", {"data"}),
        ("mixed", {"data"}),
        ("masked", {"objective"}),
        ("instructed", {"model"}),
        ("small", {"model"}),
    ],
)
def test_an_arm_changes_one_thing(arm: Arm, what: set[str]) -> None:
    assert changed(arm) == what


@pytest.mark.parametrize("scale", ["smoke", "laptop"])
def test_recipes_survive_their_records_and_differ(scale) -> None:
    studies = [tuned(arm, seed, scale) for seed in SEEDS for arm in ARMS[scale]]
    assert all(from_json(to_json(one)) == one for one in studies)
    assert len({digest(one) for one in studies}) == len(studies)


def test_a_scale_without_runs_says_so() -> None:
    with pytest.raises(ValueError, match="paper"):
        tuned("full", 0, "paper")
    assert EXPERIMENT.stages("paper") == []


def records(folder: Path, losses: dict[Arm, tuple[float, ...]], counted: dict[Arm, int]):
    """Finished records with the given losses by seed, and answers that count of 20."""
    found: dict[str, Record] = {}
    for arm, values in losses.items():
        for seed, loss in enumerate(values):
            study = tuned(arm, seed, "laptop")
            right = counted.get(arm, 0)
            events = [
                {
                    "event": "run",
                    "schema": 1,
                    "run": to_json(study),
                    "run_sha256": digest(study),
                    "seed": seed,
                },
                {"event": "held-out", "answer_loss_nats": loss, "tokens": 10},
                {"event": "answers", "tasks": 20, "built": 20, "right": right, "counted": right},
                {"event": "finished"},
            ]
            path = folder / f"{study.run.name}.jsonl"
            path.write_text("".join(json.dumps(event) + "\n" for event in events))
            found[study.run.name] = read_record(path)
    return found


LOW, HIGH = (1.0, 1.01, 0.99), (1.5, 1.52, 1.49)
PAIRS: dict[str, tuple[Arm, Arm]] = {
    "H3": ("sixteenth", "full"),
    "H6": ("instructed", "full"),
    "H7": ("spoiled", "full"),
    "H8": ("small", "full"),
    "H9": ("mixed", "full"),
}


@pytest.mark.parametrize(
    "claim", [claim for claim in CLAIMS if claim.id in PAIRS], ids=lambda c: c.id
)
@pytest.mark.parametrize(
    ("worse", "better", "verdict"),
    [
        (HIGH, LOW, "reproduced"),
        (LOW, HIGH, "contradicted"),
        ((1.0, 1.4, 0.7), (1.1, 0.9, 1.2), "inconclusive"),
    ],
)
def test_a_difference_in_loss_is_judged_by_its_sign(
    claim, worse, better, verdict: str, tmp_path: Path
) -> None:
    arms = PAIRS[claim.id]
    found = claim.judge(records(tmp_path, {arms[0]: worse, arms[1]: better}, {}))
    assert found.verdict == verdict


@pytest.mark.parametrize(
    ("sixteenth", "quarter", "full", "verdict"),
    [
        ((3.0, 3.1, 2.9), (2.0, 2.1, 1.9), (1.8, 1.9, 1.7), "reproduced"),
        ((3.0, 3.1, 2.9), (2.9, 3.0, 2.8), (1.0, 1.1, 0.9), "contradicted"),
    ],
)
def test_a_plateau_is_a_second_gain_below_the_first(
    sixteenth, quarter, full, verdict: str, tmp_path: Path
) -> None:
    [claim] = [claim for claim in CLAIMS if claim.id == "H4"]
    losses: dict[Arm, tuple[float, ...]] = {
        "sixteenth": sixteenth,
        "quarter": quarter,
        "full": full,
    }
    assert claim.judge(records(tmp_path, losses, {})).verdict == verdict


@pytest.mark.parametrize(
    ("masked", "verdict"), [(10, "reproduced"), (2, "contradicted")], ids=["equal", "far"]
)
def test_little_difference_is_within_five_points(masked: int, verdict: str, tmp_path: Path) -> None:
    [claim] = [claim for claim in CLAIMS if claim.id == "H5"]
    losses: dict[Arm, tuple[float, ...]] = {"full": LOW, "masked": LOW}
    found = claim.judge(records(tmp_path, losses, {"full": 10, "masked": masked}))
    assert found.verdict == verdict


def test_todays_rules_give_the_committed_ledger(tmp_path: Path) -> None:
    """To the byte, from the committed records, none of which is left out."""
    results = Path(__file__).parents[1] / "results"
    found = load(EXPERIMENT, "laptop", results)
    assert found.keys() == {stage.name for stage in EXPERIMENT.stages("laptop")}
    rows = judge(CLAIMS, found, package="hpc_coder", scale="laptop")
    write_ledger(tmp_path / "ledger.jsonl", rows)
    assert (tmp_path / "ledger.jsonl").read_bytes() == (results / "ledger.jsonl").read_bytes()


def test_a_claim_that_no_scale_here_can_test_says_what_it_needs() -> None:
    untested = [claim for claim in CLAIMS if not claim.scales]
    assert {claim.id for claim in untested} == {"H1", "H2"}
    assert all("weights" in claim.needs for claim in untested)


def quick(steps: int):
    study = tuned("full", 0, "smoke")
    rows = replace(
        study.rows,
        parts=(replace(study.rows.parts[0], samples=6, verified=False),),
        tokenizer=CodePairs(vocabulary=300, samples=20),
        held_out_tasks=2,
    )
    run = replace(
        study.run,
        data=rows,
        model=replace(study.run.model, width=32, hidden=48, vocabulary=300, context=512),
        horizon=Steps(count=steps),
        sequence=256,
        batch=2,
        microbatch=2,
        schedule=Constant(warmup_steps=0),
    )
    return replace(study, run=run, rows=rows)


def test_fine_tuning_begins_where_the_base_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the base is trained once, however often it is built."""
    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path))
    base = quick(2)
    first = TrainedBy(run=base.run).build(seed=0)
    [record] = tmp_path.glob("trained/*/record.jsonl")
    written = record.read_bytes()
    second = TrainedBy(run=base.run).build(seed=5)
    assert record.read_bytes() == written
    fresh = base.run.model.build(seed=0)
    pairs = zip(first.parameters(), second.parameters(), fresh.parameters(), strict=True)
    moved = [(torch.equal(a, b), torch.equal(a, c)) for a, b, c in pairs]
    assert all(same for same, _ in moved)
    assert not all(still for _, still in moved)
    assert held_out_nats(first.eval(), base)[0] < held_out_nats(fresh.eval(), base)[0]


def test_low_rank_updates_begin_at_zero_and_alone_are_trained() -> None:
    run = quick(1).run
    plain = run.model.build(seed=0).eval()
    updated = LowRank(model=run.model, rank=2).build(seed=0).eval()
    tokens = torch.arange(12)[None]
    assert torch.equal(plain(tokens).logits, updated(tokens).logits)
    trained = [name for name, weight in updated.named_parameters() if weight.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
