"""Laws of schedules and parameter groups."""

import pytest

from fourfold_parallel.run.models import Llama
from fourfold_parallel.run.optimizer import AdamW, Constant, Cooldown, Cosine, Schedule


@pytest.mark.parametrize(
    "schedule",
    [
        Constant(warmup_steps=10),
        Cosine(warmup_steps=10, floor=0.1),
        Cooldown(warmup_steps=10, cooldown_steps=20),
    ],
)
def test_every_schedule_warms_up_linearly_to_one(schedule: Schedule) -> None:
    factors = [schedule.factor(step, 100) for step in range(11)]
    assert factors == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0], abs=2e-3
    )
    assert all(0 < schedule.factor(step, 100) <= 1 for step in range(100))


@pytest.mark.parametrize("steps", [6, 7, 100])
def test_cosine_ends_at_its_floor(steps: int) -> None:
    """With a single step after the warm-up, too."""
    assert Cosine(warmup_steps=5, floor=0.1).factor(steps - 1, steps) == pytest.approx(0.1)


def test_a_cooldown_forks_from_a_longer_run() -> None:
    """Before its cooldown, a short run has the rates of any longer one."""
    schedule = Cooldown(warmup_steps=5, cooldown_steps=20)
    assert [schedule.factor(s, 100) for s in range(80)] == [
        schedule.factor(s, 900) for s in range(80)
    ]
    assert schedule.factor(99, 100) == pytest.approx(1 / 20)


def test_only_matrices_decay() -> None:
    model = Llama(
        width=16, depth=1, heads=2, kv_heads=1, hidden=32, vocabulary=64, context=8, tied=True
    ).build(seed=0)
    optimizer = AdamW(learning_rate=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.95, epsilon=1e-8)
    groups = optimizer.build(model).param_groups
    assert {parameter.ndim for parameter in groups[0]["params"]} == {2}
    assert {parameter.ndim for parameter in groups[1]["params"]} == {1}
    assert (groups[0]["weight_decay"], groups[1]["weight_decay"]) == (0.1, 0.0)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
