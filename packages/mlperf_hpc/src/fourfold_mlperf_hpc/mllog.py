"""Time to quality as the benchmark world logs it, made from a training's record.

The lines are those of MLCommons' `mllog`, which their compliance checker (`mlperf-logging`) reads. It asks
whether keys are there and little else, so `RULES`, a rule file of ours for the same checker, asks the rest:
times in order, finite numbers, counts that add up, and a target that an evaluation has met before the run
stops.

    python -m mlperf_logging.compliance_checker --config RULES run.mllog
"""

import importlib.resources
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourfold_mlperf_hpc.trainings import run_of, target_of
from fourfold_parallel.common.records import Event, Record
from fourfold_parallel.run.recipe import Run

RULES = Path(str(importlib.resources.files("fourfold_mlperf_hpc").joinpath("fourfold.yaml")))
"""Our rule file. Rule files run code: never check a log with one from elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitter:
    """Who ran what, as the checker asks for it."""

    organization: str = "fourfold"
    platform: str = "unnamed"
    benchmark: str = "language_model"


def lines(
    record: Record, *, target_loss_nats: float | None = None, by: Submitter | None = None
) -> str:
    """A training's record as a log of MLCommons' format, to the first validation that meets the target.

    Staging is told before the run's start, as the HPC rules since 3.0 have it. A restart is told with the
    step it went on from; its time is in the run's.

    Args:
        record: of one training run.
        target_loss_nats: of a validation; the run's own (`Until`) where none is given.
        by: who ran what.

    Raises:
        ValueError: The record is of something else, lacks the times, or no target is named.
    """
    run = run_of(record)
    target = target_of(run, target_loss_nats)
    by = by or Submitter()
    staged = record.of("staged")
    first = staged[0]
    starts_ms = round(first.number("at_ms") - 1000 * first.number("elapsed_s"))
    log = _Log()
    log.add(starts_ms, "init_start", None, event="INTERVAL_START")
    for key, value in _facts(run, record, first, by, target).items():
        log.add(starts_ms, key, value)
    log.add(starts_ms, "staging_start", None, event="INTERVAL_START")
    log.add(first.number("at_ms"), "staging_stop", None, event="INTERVAL_END")
    log.add(first.number("at_ms"), "init_stop", None, event="INTERVAL_END")
    log.add(first.number("at_ms"), "run_start", None, event="INTERVAL_START")
    status = _blocks(log, record, run, target)
    last_ms = log.last_ms if status == "success" else record.events[-1].number("at_ms")
    log.add(last_ms, "run_stop", None, event="INTERVAL_END", status=status)
    return log.text()


def _facts(run: Run, record: Record, staged: Event, by: Submitter, target: float) -> dict[str, Any]:
    header = record.events[0].values
    optimizer: Any = run.optimizer
    ranks = int(record.events[0].number("world_size"))
    precision = "bf16" if run.precision == "bf16" else "fp32"
    engine: Any = run.engine
    return {
        "cache_clear": False,  # nothing was dropped: an honest answer, and any is taken
        "submission_org": by.organization,
        "submission_platform": by.platform,
        "submission_division": "open",
        "submission_status": "research",
        "submission_benchmark": by.benchmark,
        "quality_target": target,
        "quality_metric": "validation_loss_nats",
        "seed": run.seed,
        "global_batch_size": run.batch,
        "micro_batch_size": run.microbatch,
        "gradient_accumulation_steps": max(1, run.batch // run.microbatch // max(1, ranks)),
        "max_sequence_length": run.sequence,
        "opt_name": type(optimizer).__name__.lower(),
        "opt_base_learning_rate": optimizer.learning_rate,
        "opt_learning_rate_warmup_steps": getattr(run.schedule, "warmup_steps", 0),
        "opt_gradient_clip_norm": run.max_grad_norm if run.max_grad_norm < 1e30 else "none",
        "train_samples": int(staged.number("train_rows")),
        "eval_samples": int(staged.number("validation_rows")),
        "number_of_nodes": 1,
        "accelerators_per_node": len(_gpus(header)),
        "number_of_ranks": ranks,
        "lowest_numerical_precision_in_linear": precision,
        "lowest_numerical_precision_in_attn": precision,
        "lowest_numerical_precision_in_comm": precision,
        "tensor_parallelism": getattr(engine, "row", 1) * getattr(engine, "col", 1),
        "pipeline_parallelism": 1,
        "context_parallelism": 1,
        "expert_parallelism": 1,
        "config_filename": record.path.name,
        "run_sha256": header["run_sha256"],
    }


def _gpus(header: dict[str, Any]) -> list[Any]:
    hardware = header.get("hardware")
    return hardware.get("gpus", []) if isinstance(hardware, dict) else []


def _blocks(log: "_Log", record: Record, run: Run, target: float) -> str:
    """Training between validations as blocks, validations as evaluations; gives the run's status."""
    done, begun_ms = 0, log.last_ms
    rows = record.of("staged")[0].number("train_rows")
    restarts = list(record.of("resumed"))

    def about(step: int) -> dict[str, Any]:
        samples = step * run.batch
        return {"samples_count": samples, "epoch_num": samples / rows, "step": step}

    for validation in record.of("validation"):
        step = int(validation.number("step"))
        ends_ms = validation.number("at_ms")
        starts_ms = ends_ms - 1000 * validation.number("elapsed_s")
        block = {
            "first_epoch_num": done * run.batch / rows, "epoch_count": (step - done) * run.batch / rows,
            "samples_count": (step - done) * run.batch,
        }  # fmt: skip
        log.add(begun_ms, "block_start", None, event="INTERVAL_START", **block)
        while restarts and restarts[0].number("at_ms") < ends_ms:
            restart = restarts.pop(0)
            log.add(
                restart.number("at_ms"), "restart", int(restart.number("step")),
                number_of_ranks=int(restart.number("world_size")),
            )  # fmt: skip
        log.add(starts_ms, "block_stop", None, event="INTERVAL_END", **block)
        log.add(starts_ms, "eval_start", None, event="INTERVAL_START", **about(step))
        loss_nats = validation.number("validation_loss_nats")
        for key in (
            "eval_accuracy",
            "eval_error",
        ):  # one quantity: the rules disagree about its name
            log.add(ends_ms, key, loss_nats, metric="validation_loss_nats", **about(step))
        log.add(ends_ms, "eval_stop", None, event="INTERVAL_END", **about(step))
        done, begun_ms = step, ends_ms
        if loss_nats <= target:
            return "success"
    return "aborted"


class _Log:
    """Lines in the order of their times: what rounding would set back by a millisecond is not."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self.last_ms = 0

    def add(
        self,
        at_ms: float,
        key: str,
        value: object,
        *,
        event: str = "POINT_IN_TIME",
        **metadata: Any,
    ) -> None:
        self.last_ms = max(self.last_ms, round(at_ms))
        values = {
            "namespace": "", "time_ms": self.last_ms, "event_type": event, "key": key,
            "value": value, "metadata": {"file": "record", "lineno": len(self._lines) + 1, **metadata},
        }  # fmt: skip
        self._lines.append(f":::MLLOG {json.dumps(values)}")

    def text(self) -> str:
        return "\n".join(self._lines) + "\n"
