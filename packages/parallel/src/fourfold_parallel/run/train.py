"""The training loop: one function, in the order in which things happen."""

import logging
import math
import os
import resource
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from fourfold_parallel.common.files import StrPath, check_writable
from fourfold_parallel.common.progress import Progress, logged, silent
from fourfold_parallel.common.records import RecordWriter, description_in, header
from fourfold_parallel.common.sinks import OpenSink
from fourfold_parallel.common.values import digest, to_json
from fourfold_parallel.launch import world_size
from fourfold_parallel.run import checkpoint, export
from fourfold_parallel.run.checkpoint import Checkpoint
from fourfold_parallel.run.data import Batch, TokenStream
from fourfold_parallel.run.engines import Session
from fourfold_parallel.run.objective import IGNORE, token_nats
from fourfold_parallel.run.optimizer import set_learning_rate
from fourfold_parallel.run.recipe import At, Run, departures
from fourfold_parallel.run.state import load_weights

log = logging.getLogger(__name__)


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

    Returns:
        The last checkpoint, a folder that `from_pretrained` reads (`export.files` says what it cannot);
        `trained_model` reads it back as a plain model, whatever the engine.

    Raises:
        ValueError: The run does not fit its data or its ranks, a place cannot be written to, or what lies
            there is of another run.
        FloatingPointError: At the first loss or gradient norm that is not finite, naming step, batch and
            last checkpoint, which is left as it was.
    """
    record, checkpoints = Path(record), Path(checkpoints)
    to_json([study, run])  # what no record could hold is refused before any work
    stream = run.data.open(sequence=run.sequence, seed=run.seed)
    held_out = run.data.validation(sequence=run.sequence)
    plain = run.model.build(seed=run.seed)
    _check_vocabulary(run, plain, stream)
    beside = export.files(plain, stream.file)
    begun = checkpoint.latest(checkpoints, run=run, extends=extends)
    if begun is not None:
        checkpoint.check_layout(begun, run)
        _check_record(record, study or run, extends=extends)
    _check_places(record, checkpoints)
    with run.engine.open(
        plain,
        run.optimizer.build(plain),
        precision=run.precision,
        batch=run.batch,
        microbatch=run.microbatch,
    ) as session:
        tell = progress if session.is_main else silent
        first_step = 0
        if begun is not None:
            log.info("resuming from %s", begun.path)
            session.load(begun.path)
            first_step = begun.step
        elif session.is_main:
            record.unlink(missing_ok=True)
        with _writer(run, session, stream, record, study or run, overrides, sinks) as records:
            if begun is not None:
                if checkpoint.planned_steps(begun, run) != run.steps:
                    records.write("extended", step=first_step, run=study or run)
                records.write(
                    "resumed", step=first_step, engine=run.engine, world_size=world_size()
                )
            session.model.train()
            for step in range(first_step, run.steps):
                started_s = time.perf_counter()
                learning_rate = run.optimizer.learning_rate * run.schedule.factor(step, run.steps)
                set_learning_rate(session.optimizer, learning_rate)
                seed_dropout(seed=run.seed, step=step, share=session.rank)

                # Targets first: the loss is divided by the number supervised in the whole step, over
                # all microbatches and ranks, so no grouping of the rows changes any gradient.
                batch = stream.batch(step, batch=run.batch, rank=session.rank, ranks=session.ranks)
                microbatches = batch.to(session.device).split(run.microbatch)
                targets = [run.objective.targets(microbatch) for microbatch in microbatches]
                kept = torch.stack([(target != IGNORE).sum() for target in targets]).sum().double()
                supervised = session.sum(kept)
                divisor = supervised.clamp(min=1)

                sums: dict[str, torch.Tensor] = {"nats_sum": torch.zeros((), dtype=torch.float64)}
                for index, (microbatch, target) in enumerate(
                    zip(microbatches, targets, strict=True)
                ):
                    with session.microbatch(is_last=index == len(microbatches) - 1):
                        loss = run.objective.loss(session.model, microbatch, target)
                        session.backward(loss.nats_sum / divisor.to(loss.nats_sum.dtype))
                    for name, value in {**loss.telemetry, "nats_sum": loss.nats_sum}.items():
                        sums[name] = sums.get(name, 0) + value.detach().double().cpu()

                totals = session.sum(torch.stack([*sums.values()]).to(session.device)).tolist()
                loss_nats = totals[0] / divisor.item()
                check_finite = partial(_check_finite, step + 1, batch, checkpoints)
                check_finite(loss_nats=loss_nats)
                grad_norm = session.update(run.max_grad_norm)
                check_finite(grad_norm=grad_norm)

                elapsed_s = time.perf_counter() - started_s
                done = step + 1
                records.write(
                    "step",
                    step=done,
                    loss_nats=loss_nats,
                    supervised_targets=int(supervised.item()),
                    **dict(zip(list(sums)[1:], totals[1:], strict=True)),
                    learning_rate=learning_rate,
                    grad_norm=grad_norm,
                    elapsed_s=round(elapsed_s, 4),
                    tokens_per_s=round(run.tokens_per_step / elapsed_s, 1),
                    peak_bytes=_peak_bytes(session.device),
                )
                tell(done, run.steps, f"loss {loss_nats:.3f} nats")
                if is_due(run.validate_every, done, run.steps):
                    validation = validate(run, held_out, session)
                    records.write("validation", step=done, **validation)
                    check_finite(validation_loss_nats=validation["validation_loss_nats"])
                if is_due(run.checkpoint_every, done, run.steps):
                    write_checkpoint(checkpoints, session, step=done, run=run, beside=beside)
            records.write("trained", step=run.steps)
        last = checkpoint.latest(checkpoints, run=run)
        assert last is not None
        return last


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
def validate(run: Run, held_out: TokenStream, session: Session) -> dict[str, float]:
    """Unmasked loss on the held-out rows, each once, shared over the ranks like training batches."""
    rows = len(held_out.row_starts)
    nats_sum = torch.zeros((), dtype=torch.float64, device=session.device)
    session.model.eval()
    for index in range(-(-rows // run.batch)):
        share = held_out.batch(index, batch=run.batch, rank=session.rank, ranks=session.ranks)
        # The last batch is filled up with rows of a second pass, which every rank computes and none counts.
        first = index * run.batch + session.rank * len(share.tokens)
        for microbatch in share.to(session.device).split(run.microbatch):
            with session.microbatch(is_last=True):
                logits = session.model(input_ids=microbatch.tokens[:, :-1], use_cache=False).logits
            nats = token_nats(logits, microbatch.tokens[:, 1:], session.model)
            nats_sum += nats[: max(0, rows - first)].double().sum()
            first += len(nats)
    session.model.train()
    tokens = rows * run.sequence
    return {"validation_loss_nats": session.sum(nats_sum).item() / tokens, "tokens": tokens}


def write_checkpoint(
    folder: Path, session: Session, *, step: int, run: Run, beside: Mapping[str, bytes]
) -> None:
    """Write a whole checkpoint of the session, then remove older ones."""
    checkpoint.write(
        folder,
        step=step,
        run=run,
        save=session.save,
        wait=session.wait,
        is_main=session.is_main,
        beside=beside,
    )


def trained_model(run: Run, last: Checkpoint) -> PreTrainedModel:
    """The plain transformers model with a checkpoint's weights, in evaluation mode, on the CPU."""
    model = run.model.build(seed=run.seed)
    load_weights(model, last.path)
    return model.eval()


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
    stream: TokenStream,
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
        materials = (*stream.file.materials, *run.model.materials())
        first = header(
            study, seed=run.seed, world_size=world_size(), materials=materials, overrides=overrides
        )
        writer.write_header(first)
    return writer


def _check_vocabulary(run: Run, model: PreTrainedModel, stream: TokenStream) -> None:
    embedding: Any = model.get_input_embeddings()
    embedded = embedding.weight.shape[0]
    if stream.file.vocabulary > embedded:
        raise ValueError(
            f"the tokenizer of run {run.name!r} has {stream.file.vocabulary} ids, the model embeds "
            f"{embedded}; use a model vocabulary of at least {stream.file.vocabulary}"
        )


def _check_finite(done: int, batch: Batch, checkpoints: Path, **quantities: float) -> None:
    for name, value in quantities.items():
        if not math.isfinite(value):
            whole = checkpoint.checkpoints(checkpoints)
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
