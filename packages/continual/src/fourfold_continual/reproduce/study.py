"""A stage of the study: train, then read the held-out rows of every text one by one."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from fourfold_continual.held_out import Sampled, held_out_losses, write_held_out
from fourfold_parallel.common.records import RecordWriter, read_record
from fourfold_parallel.reproduce.experiment import Workplace
from fourfold_parallel.run.checkpoint import Checkpoint
from fourfold_parallel.run.recipe import Run
from fourfold_parallel.run.train import train, trained_model
from fourfold_parallel.run.trained import ended, folder_of

THINNED = 10
"""Of so many training steps the mean loss is recorded: single steps would be megabytes."""


def begin(run: Run, read: Mapping[str, Sampled], workplace: Workplace) -> None:
    """Train a base, into the cache, from where the arms go on; see `measure`."""
    with _recording(run, workplace) as records:
        last = ended(run, progress=workplace.progress)
        measure(run, last, folder_of(run) / "record.jsonl", read, records)


def go_on(run: Run, read: Mapping[str, Sampled], workplace: Workplace) -> None:
    """Train an arm from its base; see `measure`."""
    with _recording(run, workplace) as records:
        training = workplace.scratch / "training.jsonl"
        last = train(
            run,
            record=training,
            checkpoints=workplace.scratch / "checkpoints",
            progress=workplace.progress,
            sinks=workplace.sinks,
        )
        measure(run, last, training, read, records)


def _recording(run: Run, workplace: Workplace) -> AbstractContextManager[RecordWriter]:
    stream = run.data.open(sequence=run.sequence, seed=run.seed)
    materials = (*stream.materials, *run.model.materials())
    return workplace.recording(run, seed=run.seed, materials=materials)


def measure(
    run: Run, last: Checkpoint, training: Path, read: Mapping[str, Sampled], records: RecordWriter
) -> None:
    """Write a training's losses on the way, and those of its end on held-out rows.

    Events: "losses" (means of ten steps, of each part and of all), "validation" (each part on the way) and
    "held_out" for each text.
    """
    whole = read_record(training)
    steps = whole.of("step")
    for first in range(0, len(steps), THINNED):
        group = steps[first : first + THINNED]
        supervised = sum(event.number("supervised_targets") for event in group)
        nats = sum(
            event.number("loss_nats") * event.number("supervised_targets") for event in group
        )
        records.write(
            "losses",
            step=int(group[-1].number("step")),
            loss_nats=round(nats / supervised, 5),
            learning_rate=group[-1].number("learning_rate"),
            grad_norm=round(max(event.number("grad_norm") for event in group), 4),
            elapsed_s=round(sum(event.number("elapsed_s") for event in group), 3),
        )
    for event in whole.of("validation"):
        values = {
            key: value for key, value in event.values.items() if key not in {"event", "at_ms"}
        }
        records.write("validation", **values)
    streams = {name: source.validation(sequence=run.sequence) for name, source in read.items()}
    losses = held_out_losses(trained_model(run, last), streams, batch=16)
    write_held_out(records, losses)
