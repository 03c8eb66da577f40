"""Numbers of records, for rules, tables and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from jaxtyping import Float

from fourfold_mlperf_hpc.decomposition import DRAWS, Attempt, bootstrap, expected, factors
from fourfold_mlperf_hpc.published import Submission, submission_of, submissions
from fourfold_parallel.common.records import Event
from fourfold_parallel.reproduce.claims import Interval, Records
from fourfold_parallel.run.timeline import PartName


def pairs() -> tuple[tuple[str, Submission, Submission], ...]:
    """Pairs of public systems whose times are taken apart, with what lies between them."""
    cosmoflow = [
        ("twice the nodes", "Piz Daint 128", "Piz Daint 256"),
        ("16 times the nodes", "Fugaku 512", "Fugaku 8,192"),
        ("four times the devices, open", "ABCI 512", "ABCI 2,048"),
        ("another machine", "Frontera RTX 64", "ABCI 512"),
    ]
    return (
        *((what, submission_of(a), submission_of(b)) for what, a, b in cosmoflow),
        (
            "another machine",
            submission_of("Cori GPU 64", "deepcam"),
            submission_of("ABCI 1,024", "deepcam", "closed"),
        ),
    )


def attempts_of(records: Records, stage: str, target_nats: float) -> tuple[Attempt, ...]:
    """The attempts of a stage's seeds at a target."""
    return tuple(
        attempt(event) for event in records[stage].of("attempt", target_loss_nats=target_nats)
    )


def attempt(event: Event) -> Attempt:
    """An attempt read back."""
    seconds = cast("Mapping[PartName, float]", event.values["seconds"])
    return Attempt(
        samples=event.number("samples"),
        is_reached=bool(event.values["is_reached"]),
        seconds=seconds,
    )


def targets_of(records: Records, stage: str) -> tuple[float, ...]:
    """The targets of a stage, from the easiest to the hardest."""
    events: Any = records[stage].of("attempt")
    return tuple(sorted({event.number("target_loss_nats") for event in events}, reverse=True))


def batches_of(records: Records) -> tuple[int, ...]:
    """Batches that were trained on one rank, ascending."""
    names = [name for name in records if name.startswith("batch") and "-" not in name]
    return tuple(sorted(int(name.removeprefix("batch")) for name in names))


def convergence(a: Sequence[Attempt], b: Sequence[Attempt]) -> Interval:
    """Samples to quality of one set over another's, with the bootstrap's interval over seeds."""
    low, high = bootstrap(a, b, lambda parts: parts.convergence)
    value = factors(expected(a), expected(b)).convergence
    return Interval(value=value, low=low, high=high, seeds=min(len(a), len(b)))


def ratio_of_means(
    a: Float[np.ndarray, " run"], b: Float[np.ndarray, " run"]
) -> tuple[float, float]:
    """The 95 % interval of one mean over another, by bootstrap over the runs of each."""
    generator = np.random.default_rng(0)
    drawn = [
        generator.choice(a, len(a)).mean() / generator.choice(b, len(b)).mean()
        for _ in range(DRAWS)
    ]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)


def systems(records: Records, **fields: object) -> tuple[Event, ...]:
    """The public systems with these values."""
    return records["published"].of("system", **fields)


def numbers(event: Event, key: str) -> Mapping[str, float]:
    """Numbers by name in an event."""
    return cast("Mapping[str, float]", event.values[key])


def share(event: Event) -> float:
    """Of staging in the seconds of an event."""
    seconds = numbers(event, "seconds")
    return seconds["staging"] / sum(seconds.values())


def closed_cosmoflow() -> tuple[Submission, ...]:
    """The systems whose batches and epochs are compared."""
    return tuple(
        submission
        for submission in submissions()
        if (submission.benchmark, submission.division) == ("cosmoflow", "closed")
    )


def headline(records: Records) -> str:
    """The finding in a sentence: where the largest gain came from."""
    event = records["published"].last("pair", benchmark="deepcam")
    return (
        f"DeepCAM's {event.number('whole'):.1f} times shorter run is {event.number('compute'):.1f} times the "
        f"samples a second, {1 / event.number('convergence'):.2f} times the samples, and "
        f"{event.number('overhead'):.2f} from what lies beside training."
    )
