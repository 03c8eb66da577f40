"""Claims on costs and on decoding: of the language runs, and of random weights."""

from __future__ import annotations

from fourfold_parallel.reproduce.claims import Finding, Records, claim, over_seeds, unanimous
from fourfold_recurrent_depth.reproduce.measures import EXACT, LANGUAGE

BYTES = (
    "0.2 M parameters, bytes of Python's standard library, mean recurrence 4, 300 steps, 3 seeds"
)
RANDOM_WEIGHTS = "no training: random weights, or counts from the configuration"
TRAINED = "three trained seeds: the laptop scale"


@claim(
    "C6",
    section="3 and 4",
    says="Unrolled, the model is as large as 50 B parameters and trains at the cost of 32 B",
    paper="54.3 B at r=32; 172 GFLOP a token",
    rule="our count within 0.5 % of torch's counter for r in 1, 4, 32 and three pairs; totals as published",
    conditions=RANDOM_WEIGHTS,
    scales=("smoke", "laptop"),
    needs="nothing",
)
def flops(records: Records) -> Finding:
    """Our count of FLOPs against torch's, and the published totals."""
    events = records[EXACT].of("flops")
    worst = max(event.number("relative_error") for event in events)
    huginn = records[EXACT].last("huginn")
    materialised = huginn.number("materialised_parameters")
    training = huginn.number("training_flops")
    near = abs(materialised / 54.3e9 - 1) < 0.005 and abs(training / 172e9 - 1) < 0.01
    return Finding(
        "reproduced" if worst <= 0.005 and near else "contradicted",
        f"worst difference {worst:.2%}; {materialised / 1e9:.1f} B parameters, "
        f"{training / 1e9:.0f} GFLOP a token",
        huginn,
        "formula and counter agree within 0.5 %, and the published totals follow",
    )


@claim(
    "C15",
    section="6.3",
    says="Drafts of few recurrences can be verified by the full depth",
    paper="stated; no number",
    rule=(
        "the same tokens as greedy for every draft depth and batch, acceptance rising with it; contradicted "
        "by any other token"
    ),
    conditions=BYTES + "; at smoke scale random weights",
    scales=("smoke", "laptop"),
    needs="nothing",
)
def speculation_is_exact(records: Records) -> Finding:
    """Tokens of drafts against greedy tokens, and the share of drafts that is accepted."""
    events = records[LANGUAGE].of("speculation") if LANGUAGE in records else ()
    events = events or records[EXACT].of("speculation")
    equal = all(bool(event.values["equals_greedy"]) for event in events)
    shares: dict[int, list[float]] = {}
    for event in events:
        shares.setdefault(int(event.number("draft_steps")), []).append(
            event.number("accepted_share")
        )
    means = {steps: sum(values) / len(values) for steps, values in sorted(shares.items())}
    rises = list(means.values()) == sorted(means.values())
    return Finding(
        "reproduced" if equal and rises else "contradicted" if not equal else "inconclusive",
        "equal to greedy; accepted " + ", ".join(f"{v:.0%} at {k}" for k, v in means.items())
        if equal
        else "tokens differ from greedy",
        events[0],
        "the same tokens for every draft, and more of them accepted from deeper drafts",
    )


@claim(
    "C12",
    section="6.2",
    says="Keys of one recurrence are enough in the cache",
    paper="MT-Bench 5.86 against 5.66",
    rule="loss at most 1 % higher with one recurrence kept, in every seed; contradicted above 5 %",
    conditions=BYTES,
    scales=("laptop",),
    needs=TRAINED,
)
def shared_cache(records: Records) -> Finding:
    """Loss with the keys of one recurrence in the cache, above that with all."""
    record = records[LANGUAGE]
    rises = []
    for seed in record.seeds("cache"):
        loss = {
            int(e.number("recurrences_kept")): e.number("loss_nats")
            for e in record.of("cache", seed=seed)
            if e.values["policy"] != "latent"
        }
        rises.append(loss[1] / loss[max(loss)] - 1)
    return Finding(
        unanimous(holds=[rise <= 0.01 for rise in rises], fails=[rise > 0.05 for rise in rises]),
        f"loss rises by {over_seeds([100 * rise for rise in rises])} %",
        record.of("cache", recurrences_kept=1)[0],
        "at most 1 % with one recurrence kept; contradicted above 5 %",
    )


@claim(
    "C13",
    section="6.4",
    says="Starting from the last token's state saves steps",
    paper="14.6 to 13.5 (philosophy)",
    rule=(
        "5 % fewer steps with less than 0.5 % change of loss, in every seed; contradicted if no seed saves "
        "or all change"
    ),
    conditions=BYTES,
    scales=("laptop",),
    needs=TRAINED,
)
def warm_start_saves(records: Records) -> Finding:
    """Exit steps and loss, begun from the last token's state."""
    record = records[LANGUAGE]
    saved, changed = [], []
    for seed in record.seeds("warm_start"):
        (cold,), (warm,) = (record.of("warm_start", seed=seed, warm=w) for w in (False, True))
        saved.append(1 - warm.number("mean_recurrences") / cold.number("mean_recurrences"))
        changed.append(warm.number("loss_nats") / cold.number("loss_nats") - 1)
    pairs = list(zip(saved, changed, strict=True))
    return Finding(
        unanimous(
            holds=[s >= 0.05 and c < 0.005 for s, c in pairs],
            fails=[s <= 0 or c >= 0.005 for s, c in pairs],
        ),
        f"exit steps fall by {over_seeds([100 * s for s in saved])} %, loss changes by "
        f"{over_seeds([100 * c for c in changed])} %",
        record.of("warm_start", warm=True)[0],
        "5 % fewer steps and less than 0.5 % change of loss in every seed",
    )


@claim(
    "C16",
    section="2510.14961",
    says="Sampling like a diffusion model needs a fifth of the passes",
    paper="4.4 times faster on GSM8K (arXiv 2510.14961)",
    rule=(
        "half the core passes at 98 % agreement with greedy in every seed; contradicted below 95 % at any "
        "speed-up"
    ),
    conditions=BYTES,
    scales=("laptop",),
    needs=TRAINED,
)
def diffusion(records: Records) -> Finding:
    """Core passes and tokens of the diffusion-style sampler against greedy decoding."""
    record = records[LANGUAGE]
    events = record.of("diffusion")
    speedups = [event.number("pass_ratio") for event in events]
    agreements = [event.number("agreement") for event in events]
    pairs = list(zip(speedups, agreements, strict=True))
    return Finding(
        unanimous(
            holds=[s >= 2 and a >= 0.98 for s, a in pairs],
            fails=[s > 1 and a < 0.95 for s, a in pairs],
        ),
        f"{over_seeds(speedups)} times fewer core passes, {over_seeds(agreements)} of tokens as greedy",
        events[0],
        "half the core passes at 98 % agreement in every seed",
    )
