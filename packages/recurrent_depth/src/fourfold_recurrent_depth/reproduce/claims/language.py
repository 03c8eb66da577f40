"""Rules of the language runs and of what random weights can show."""

from __future__ import annotations

from fourfold_parallel.reproduce.claims import Finding, Records, over_seeds
from fourfold_recurrent_depth.reproduce.claims.common import (
    EXACT,
    LANGUAGE,
    all_or_none,
    finding,
    of,
    seeds_of,
)


def flops(records: Records) -> Finding:
    """C6."""
    events = records[EXACT].of("flops")
    worst = max(event.number("relative_error") for event in events)
    huginn = records[EXACT].last("huginn")
    materialised = huginn.number("materialised_parameters")
    training = huginn.number("training_flops")
    near = abs(materialised / 54.3e9 - 1) < 0.005 and abs(training / 172e9 - 1) < 0.01
    return finding(
        "reproduced" if worst <= 0.005 and near else "contradicted",
        f"worst difference {worst:.2%}; {materialised / 1e9:.1f} B parameters, "
        f"{training / 1e9:.0f} GFLOP a token",
        huginn,
        "formula and counter agree within 0.5 %, and the published totals follow",
        EXACT,
    )


def speculation_is_exact(records: Records) -> Finding:
    """C15."""
    events = records[LANGUAGE].of("speculation") if LANGUAGE in records else ()
    stage = LANGUAGE if events else EXACT
    events = events or records[EXACT].of("speculation")
    equal = all(bool(event.values["equals_greedy"]) for event in events)
    shares: dict[int, list[float]] = {}
    for event in events:
        shares.setdefault(int(event.number("draft_steps")), []).append(
            event.number("accepted_share")
        )
    means = {steps: sum(values) / len(values) for steps, values in sorted(shares.items())}
    rises = list(means.values()) == sorted(means.values())
    return finding(
        "reproduced" if equal and rises else "contradicted" if not equal else "inconclusive",
        "equal to greedy; accepted " + ", ".join(f"{v:.0%} at {k}" for k, v in means.items())
        if equal
        else "tokens differ from greedy",
        events[0],
        "the same tokens for every draft, and more of them accepted from deeper drafts",
        stage,
    )


def shared_cache(records: Records) -> Finding:
    """C12."""
    record = records[LANGUAGE]
    rises = []
    for seed in seeds_of(record, "cache"):
        loss = {
            int(e.number("recurrences_kept")): e.number("loss_nats")
            for e in of(record, "cache", seed=seed)
        }
        rises.append(loss[1] / loss[max(loss)] - 1)
    return finding(
        all_or_none([rise <= 0.01 for rise in rises], [rise > 0.05 for rise in rises]),
        f"loss rises by {over_seeds([100 * rise for rise in rises])} %",
        of(record, "cache", recurrences_kept=1)[0],
        "at most 1 % with one recurrence kept; contradicted above 5 %",
        LANGUAGE,
    )


def warm_start_saves(records: Records) -> Finding:
    """C13."""
    record = records[LANGUAGE]
    saved, changed = [], []
    for seed in seeds_of(record, "warm_start"):
        (cold,), (warm,) = (of(record, "warm_start", seed=seed, warm=w) for w in (False, True))
        saved.append(1 - warm.number("mean_recurrences") / cold.number("mean_recurrences"))
        changed.append(warm.number("loss_nats") / cold.number("loss_nats") - 1)
    pairs = list(zip(saved, changed, strict=True))
    return finding(
        all_or_none(
            [s >= 0.05 and c < 0.005 for s, c in pairs], [s <= 0 or c >= 0.005 for s, c in pairs]
        ),
        f"exit steps fall by {over_seeds([100 * s for s in saved])} %, loss changes by "
        f"{over_seeds([100 * c for c in changed])} %",
        of(record, "warm_start", warm=True)[0],
        "5 % fewer steps and less than 0.5 % change of loss in every seed",
        LANGUAGE,
    )


def diffusion(records: Records) -> Finding:
    """C16."""
    record = records[LANGUAGE]
    events = record.of("diffusion")
    speedups = [event.number("pass_ratio") for event in events]
    agreements = [event.number("agreement") for event in events]
    pairs = list(zip(speedups, agreements, strict=True))
    return finding(
        all_or_none(
            [s >= 2 and a >= 0.98 for s, a in pairs], [s > 1 and a < 0.95 for s, a in pairs]
        ),
        f"{over_seeds(speedups)} times fewer core passes, {over_seeds(agreements)} of tokens as greedy",
        events[0],
        "half the core passes at 98 % agreement in every seed",
        LANGUAGE,
    )
