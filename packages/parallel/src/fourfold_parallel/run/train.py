"""The training loop: one function, in the order in which things happen."""

import logging
import math
import os
import resource
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from transformers import PreTrainedModel

from fourfold_parallel.common.activity import NOW
from fourfold_parallel.common.files import StrPath, check_writable
from fourfold_parallel.common.held import take_group
from fourfold_parallel.common.progress import Progress, logged, silent
from fourfold_parallel.common.records import (
    RecordWriter,
    description_in,
    header,
    read_record,
)
from fourfold_parallel.common.sinks import OpenSink
from fourfold_parallel.common.values import digest, strict, to_json
from fourfold_parallel.launch import Ranks, is_main_rank, world_size
from fourfold_parallel.run import checkpoint, export
from fourfold_parallel.run.checkpoint import Checkpoint, Keep, Saver
from fourfold_parallel.run.data import Batch, Stream
from fourfold_parallel.run.engines import Session
from fourfold_parallel.run.models import CarriesState, outline
from fourfold_parallel.run.objective import IGNORE, token_nats
from fourfold_parallel.run.optimizer import set_learning_rate
from fourfold_parallel.run.recipe import At, Horizon, Run, Until, departures
from fourfold_parallel.run.state import load_weights
from fourfold_parallel.run.watchdog import Meetings, StopRequest, TerminatedError, Watchdog

log = logging.getLogger(__name__)

KEEP = Keep()
"""The last two checkpoints, in one place."""


class Observer(Protocol):
    """Looks on while a run validates, such as through hooks on the model; it changes nothing."""

    event: ClassVar[str]
    """Name of the record's event that holds its numbers."""

    def watching(self, session: Session) -> AbstractContextManager[Callable[[], dict[str, object]]]:
        """The scope of a validation's forward passes, on every rank alike.

        It gives a function that every rank calls after the last pass, for the values of the event. Rows that
        fill up the last batch are seen too: use as many held-out rows as batches hold.
        """
        ...


def train(
    run: Run,
    *,
    record: StrPath,
    checkpoints: StrPath,
    progress: Progress = logged,
    study: object | None = None,
    overrides: Sequence[str] = (),
    extends: bool = False,
    sinks: Sequence[OpenSink] = (),
    keep: Keep = KEEP,
    observers: Sequence[Observer] = (),
) -> Checkpoint:
    """Train a run to its horizon, or from its last whole checkpoint to it.

    Launched on several ranks (torchrun, accelerate launch, srun), every rank calls this with the same
    arguments. The losses recorded are the same for any number of ranks, up to the rounding of sums, and a run
    may go on under another engine or on other ranks than it began with.

    Args:
        run: what to do.
        record: JSONL file; appended to when a run is resumed.
        checkpoints: folder of this run's checkpoints.
        progress: told after each step, on the first rank only. By default a log line at level INFO every few
            seconds.
        study: the value that the record stands for, where it is more than the run.
        overrides: fields that differ from the recipe, for the record.
        extends: go on from the checkpoint of the same run with a shorter horizon. The steps are those of the
            run that is trained through at once: a schedule that would have had other rates is refused.
        sinks: get every event that the record gets: `(TensorBoard,)`, `(Wandb,)`, `(Trackio,)`.
        keep: the checkpoints that stay, and whether they are copied to a second place.
        observers: look on at every validation and add an event each to the record.

    Returns:
        The last checkpoint, a folder that `from_pretrained` reads (`export.files` says what it cannot);
        `trained_model` reads it back as a plain model, whatever the engine.

    Raises:
        ValueError: The run does not fit its data or its ranks, a place cannot be written to, or what lies
            there is of another run.
        RankLostError: Another rank ended, hangs or does not answer within the launch's patience
            (`FOURFOLD_PATIENCE_S`, ten minutes); the message says which, and what was waited for.
        TerminatedError: The scheduler sent SIGTERM; the state after the step then under way is saved.
        OSError: The last checkpoint could not be written. One before it that could not is logged only.
        FloatingPointError: At the first loss or gradient norm that is not finite, naming step, batch and
            last checkpoint, which is left as it was.
    """
    record, checkpoints = Path(record), Path(checkpoints)
    to_json([study, run])  # what no record could hold is refused before any work
    NOW.enter("staging")
    opened_s = time.perf_counter()
    stream = run.data.open(sequence=run.sequence, seed=run.seed)
    held_out = run.data.validation(sequence=run.sequence)
    candidates = checkpoint.resumable(checkpoints, run=run, extends=extends, also=keep.also)
    # What a checkpoint is read into needs no values, where the engine gives each rank its pieces only.
    plain = outline(run.model, seed=run.seed) if candidates and run.engine.takes_outlines else None
    if plain is None:
        plain = run.model.build(seed=run.seed)
    _check_vocabulary(run, plain, stream)
    beside = export.files(plain, stream.file)
    if candidates:
        _check_record(record, study or run, extends=extends)
    _check_places(record, checkpoints)
    with (
        run.engine.open(
            plain,
            run.optimizer.build(plain),
            precision=run.precision,
            batch=run.batch,
            microbatch=run.microbatch,
        ) as session,
        Watchdog() as watchdog,
        StopRequest() as stop,
        watchdog.explaining(),
    ):
        begun = None
        if candidates:
            log.info("resuming from %s", candidates[0].path)
            begun = checkpoint.restore_last(session, candidates)
        else:
            if isinstance(run.model, CarriesState):
                _carry(run.model, session)
            if session.is_main:
                record.unlink(missing_ok=True)
        with _writer(run, session, stream, record, study or run, overrides, sinks) as records:
            first_step = begun.step if begun else 0
            if begun is not None:
                if checkpoint.planned_steps(begun, run) != run.steps:
                    records.write("extended", step=first_step, run=study or run)
                records.write(
                    "resumed", step=first_step, engine=run.engine, world_size=world_size()
                )
            staged_s = time.perf_counter() - opened_s
            records.write(
                "staged",
                step=first_step,
                elapsed_s=round(staged_s, 4),
                train_rows=stream.rows,
                validation_rows=held_out.rows,
            )
            described: Any = strict(to_json(run))
            saver = Saver(checkpoints, session, run=described, beside=beside, keep=keep)
            tell = progress if session.is_main else silent
            if begun is None or not _was_reached(run.horizon, record, first_step):
                try:
                    _steps(
                        run, session, stream, held_out, first_step, saver, records, tell, stop, observers
                    )  # fmt: skip
                except BaseException:
                    saver.abandon()
                    raise
            last = checkpoint.latest(checkpoints, run=run)
            assert last is not None
            if session.is_main:
                checkpoint.plain(last)
            records.write("trained", step=last.step)
            session.wait()
        NOW.enter("end")
        return last


def _steps(
    run: Run,
    session: Session,
    stream: Stream,
    held_out: Stream,
    first_step: int,
    saver: Saver,
    records: RecordWriter,
    tell: Progress,
    stop: StopRequest,
    observers: Sequence[Observer],
) -> None:
    """The loop: from a step to the horizon, with the last checkpoint whole at its end."""
    meetings = Meetings(Ranks(), sees_waits=session.sees_waits)
    session.model.train()
    for step in range(first_step, run.steps):
        NOW.step = step
        NOW.enter("data")
        started_s, waited_s = time.perf_counter(), NOW.waits_s()
        learning_rate = run.optimizer.learning_rate * run.schedule.factor(step, run.steps)
        set_learning_rate(session.optimizer, learning_rate)
        seed_dropout(seed=run.seed, step=step, share=session.rank)

        # Targets first: the loss is divided by the number supervised in the whole step, over
        # all microbatches and ranks, so no grouping of the rows changes any gradient.
        batch = stream.batch(step, batch=run.batch, rank=session.rank, ranks=session.ranks)
        microbatches = batch.to(session.device).split(run.microbatch)
        targets = [run.objective.targets(microbatch) for microbatch in microbatches]
        kept = torch.stack([(target != IGNORE).sum() for target in targets]).sum().double()
        data_s = time.perf_counter() - started_s
        with NOW.waiting("the count of targets"):
            supervised = session.sum(kept)
        divisor = supervised.clamp(min=1)

        sums: dict[str, torch.Tensor] = {"nats_sum": torch.zeros((), dtype=torch.float64)}
        for index, (microbatch, target) in enumerate(zip(microbatches, targets, strict=True)):
            NOW.enter("forward")
            with session.microbatch(is_last=index == len(microbatches) - 1):
                loss = run.objective.loss(session.model, microbatch, target)
                NOW.enter("backward")
                session.backward(loss.nats_sum / divisor.to(loss.nats_sum.dtype))
            for name, value in {**loss.telemetry, "nats_sum": loss.nats_sum}.items():
                sums[name] = sums.get(name, 0) + value.detach().double().cpu()

        NOW.enter("update")
        with NOW.waiting("the sum of the losses"):
            summed = session.sum(torch.stack([*sums.values()]).to(session.device))
        totals = summed.tolist()
        loss_nats = totals[0] / divisor.item()
        check_finite = partial(_check_finite, step + 1, batch, saver)
        check_finite(loss_nats=loss_nats)
        grad_norm = session.update(run.max_grad_norm)
        check_finite(grad_norm=grad_norm)

        NOW.enter("record")
        elapsed_s = time.perf_counter() - started_s
        done = step + 1
        counts, news = NOW.take()
        for event, values in news:
            records.write(event, step=done, **values)
        records.write(
            "step",
            step=done,
            loss_nats=loss_nats,
            supervised_targets=int(supervised.item()),
            **dict(zip(list(sums)[1:], totals[1:], strict=True)),
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            elapsed_s=round(elapsed_s, 4),
            data_s=round(data_s, 4),
            waited_s=round(NOW.waits_s() - waited_s, 4),
            tokens_per_s=round(run.tokens_per_step / elapsed_s, 1),
            peak_bytes=_peak_bytes(session.device),
            **counts,
        )
        tell(done, run.steps, f"loss {loss_nats:.3f} nats")
        is_over = done == run.steps
        if is_due(run.validate_every, done, run.steps):
            with ExitStack() as scopes:
                looks = [scopes.enter_context(each.watching(session)) for each in observers]
                validation = validate(run, held_out, session)
            records.write("validation", step=done, **validation)
            for observer, values in zip(observers, [look() for look in looks], strict=True):
                records.write(observer.event, step=done, **values)
            check_finite(validation_loss_nats=validation["validation_loss_nats"])
            if _is_reached(run.horizon, validation["validation_loss_nats"]):
                is_over = True
                records.write("reached", step=done)
        NOW.enter("meeting")
        is_asked = meetings.meet(asked=stop.is_made)
        _tell_straggler(records, done, meetings)
        NOW.enter("checkpoint")
        if is_over or is_asked or is_due(run.checkpoint_every, done, run.steps):
            saver.save(done)
        if is_over or is_asked:
            saver.finish()
        _tell_saves(records, saver)
        if is_over:
            return
        if is_asked:
            records.write("terminated", step=done)
            log.warning("asked to end by SIGTERM; the state after step %d is saved", done)
            raise TerminatedError


def _carry(model: CarriesState, session: Session) -> None:
    """Give the optimizer the state of the checkpoint that a model begins from, if it is carried.

    Rates, decays and the like are the run's own.
    """
    source = model.carried()
    if source is None:
        return
    own = [dict(group) for group in session.optimizer.param_groups]
    checkpoint.restore(session, source)
    for group, before in zip(session.optimizer.param_groups, own, strict=True):
        take_group(group, before)


def seed_dropout(*, seed: int, step: int, share: int) -> None:
    """Make what dropout draws a function of the step and of this rank's share of the batch.

    A resumed run then draws what the uninterrupted one would have, and on a grid the ranks that
    hold the same rows draw the same.
    """
    torch.manual_seed(int(digest([seed, step, share])[:15], 16))


def is_due(every: int | At, done: int, steps: int) -> bool:
    """True after the steps at which it is due, every so many or those named, and at the end."""
    match every:
        case At(steps=chosen):
            return done in chosen or done == steps
        case period:
            return done % period == 0 or done == steps


@torch.no_grad()
def validate(run: Run, held_out: Stream, session: Session) -> dict[str, float]:
    """Unmasked loss on the held-out rows, each once, shared over the ranks like training batches.

    Of a mixture, the loss of each part too (`validation_loss_nats_of_NAME`), and instead of the mean over
    rows that of the parts in the mixture's shares: how many rows of a part are held out does not weigh.
    """
    NOW.enter("validation")
    started_s = time.perf_counter()
    rows = held_out.rows
    names = tuple(held_out.weights)
    # The whole first, then each part's nats and rows.
    sums = torch.zeros(1 + 2 * len(names), dtype=torch.float64, device=session.device)
    session.model.eval()
    for index in range(-(-rows // run.batch)):
        share = held_out.batch(index, batch=run.batch, rank=session.rank, ranks=session.ranks)
        # The last batch is filled up with rows of a second pass, which every rank computes and none counts.
        first = index * run.batch + session.rank * len(share.tokens)
        for microbatch in share.to(session.device).split(run.microbatch):
            with session.microbatch(is_last=True):
                logits = session.model(input_ids=microbatch.tokens[:, :-1], use_cache=False).logits
            nats = token_nats(logits, microbatch.tokens[:, 1:], session.model)
            counted = nats[: max(0, rows - first)].double()
            sums[0] += counted.sum()
            of_rows = torch.tensor(microbatch.parts.of_rows[: len(counted)], device=sums.device)
            if names and len(counted):
                sums[1::2].index_add_(0, of_rows, counted.sum(dim=1))
                sums[2::2].index_add_(0, of_rows, torch.ones_like(counted[:, 0]))
            first += len(nats)
    session.model.train()
    tokens = rows * run.sequence
    with NOW.waiting("the sum of the validation"):
        total, *of_parts = session.sum(sums).tolist()
    losses = {
        name: of_parts[2 * part] / (of_parts[2 * part + 1] * run.sequence)
        for part, name in enumerate(names)
    }
    elapsed_s = round(time.perf_counter() - started_s, 4)
    mean = sum(held_out.weights[name] * loss for name, loss in losses.items())
    return {
        "validation_loss_nats": mean if names else total / tokens,
        **{f"validation_loss_nats_of_{name}": loss for name, loss in losses.items()},
        "tokens": tokens,
        "elapsed_s": elapsed_s,
    }


def trained_model(run: Run, last: Checkpoint) -> PreTrainedModel:
    """The plain transformers model with a checkpoint's weights, in evaluation mode, on the CPU."""
    model = run.model.build(seed=run.seed)
    load_weights(model, last.path)
    return model.eval()


def _is_reached(horizon: Horizon, validation_loss_nats: float) -> bool:
    return isinstance(horizon, Until) and validation_loss_nats <= horizon.loss_nats


def _was_reached(horizon: Horizon, record: Path, step: int) -> bool:
    """Whether the run that a record is of has met its quality after that step."""
    if not isinstance(horizon, Until) or not record.exists():
        return False
    return any(event.number("step") == step for event in read_record(record).of("reached"))


def _tell_saves(records: RecordWriter, saver: Saver) -> None:
    """Write what became of the saves that have ended."""
    for outcome in saver.news():
        values: dict[str, object] = {
            "step": outcome.step, "stall_s": round(outcome.stall_s, 4),
            "elapsed_s": round(outcome.elapsed_s, 4), "rank_bytes": outcome.nbytes,
        }  # fmt: skip
        if outcome.failure:
            records.write("save_failed", **values, reason=outcome.failure)
        else:
            records.write("saved", **values)


def _tell_straggler(records: RecordWriter, done: int, meetings: Meetings) -> None:
    """Write and log that a rank keeps the others waiting, once a window."""
    slow = meetings.news()
    if slow is None:
        return
    records.write(
        "straggler", step=done, rank=slow.rank, share=round(slow.share, 4), phase=slow.phase,
        own_s=round(slow.own_s, 4), others_s=round(slow.others_s, 4), steps=slow.steps,
    )  # fmt: skip
    if is_main_rank():
        log.warning(
            "rank %d is slow: it worked %.2f s in the last %d steps, the others %.2f s (median), mostly in "
            "%s; they waited for it %.0f %% of the time",
            slow.rank, slow.own_s, slow.steps, slow.others_s, slow.phase, 100 * slow.share,
        )  # fmt: skip


def _check_record(record: Path, study: object, *, extends: bool) -> None:
    described = description_in(record)
    others = () if described is None else departures(described, study)
    others = [other for other in others if not (extends and "horizon" in other.path.split("."))]
    if others:
        raise ValueError(
            f"{record} is the record of another run: {checkpoint.told(others, 'the record')}. Name a "
            f"record of its own for this one, or remove {record} to begin it there"
        )


def _check_places(record: Path, checkpoints: Path) -> None:
    if record.is_dir():
        raise ValueError(f"record={str(record)!r} is a folder; name a file, such as run.jsonl")
    check_writable(record.parent, purpose=f"the folder of record={str(record)!r}")
    check_writable(checkpoints, purpose=f"checkpoints={str(checkpoints)!r}")
    if record.exists() and not os.access(record, os.W_OK):
        raise ValueError(f"record={str(record)!r} cannot be written to; name a file of yours")


def _writer(
    run: Run,
    session: Session,
    stream: Stream,
    record: Path,
    study: object,
    overrides: Sequence[str],
    sinks: Sequence[OpenSink],
) -> RecordWriter:
    """A record with its first line written, or the record of the run that is resumed."""
    if not session.is_main:
        return RecordWriter(None)
    writer = RecordWriter(record, sinks)
    if description_in(record) is None:
        materials = (*stream.materials, *run.model.materials())
        first = header(
            study, seed=run.seed, world_size=world_size(), materials=materials, overrides=overrides
        )
        writer.write_header(first)
    return writer


def _check_vocabulary(run: Run, model: PreTrainedModel, stream: Stream) -> None:
    embedding: Any = model.get_input_embeddings()
    embedded = embedding.weight.shape[0]
    if stream.file.vocabulary > embedded:
        raise ValueError(
            f"the tokenizer of run {run.name!r} has {stream.file.vocabulary} ids, the model embeds "
            f"{embedded}; use a model vocabulary of at least {stream.file.vocabulary}"
        )


def _check_finite(done: int, batch: Batch, saver: Saver, **quantities: float) -> None:
    for name, value in quantities.items():
        if not math.isfinite(value):
            saver.abandon()  # one may be on its way
            whole = checkpoint.checkpoints(saver.folder)
            raise FloatingPointError(
                f"{name}={value} at step {done}; this rank's rows start at tokens "
                f"{list(batch.addresses[:8])} of the corpus; the last checkpoint is "
                f"{whole[-1].path if whole else 'none'}. Lower the learning rate, lengthen the warm-up, "
                "or look at those rows"
            )


def _peak_bytes(device: torch.device) -> int:
    """Peak memory of this process: on a GPU what torch allocated there, on a CPU the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
