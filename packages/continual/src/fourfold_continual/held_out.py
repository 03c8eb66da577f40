"""Losses on held-out rows, row by row, so that models can be compared on the very same text."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from transformers import PreTrainedModel

from fourfold_continual.forgetting import HeldOutLoss
from fourfold_parallel.common.progress import Progress, silent
from fourfold_parallel.common.records import Event, RecordWriter
from fourfold_parallel.run.data import Packed, TokenFile, TokenStream
from fourfold_parallel.run.objective import token_nats


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """A source that is validated on some of its held-out rows, evenly spaced from first to last."""

    source: Packed
    rows: int
    """At most so many."""

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"rows={self.rows} validate on nothing; use 1 or more")

    def open(self, *, sequence: int, seed: int) -> TokenStream:
        """The source's training rows."""
        return self.source.open(sequence=sequence, seed=seed)

    def validation(self, *, sequence: int) -> TokenStream:
        """The sample.

        Raises:
            ValueError: The source holds no row out.
        """
        whole = self.source.validation(sequence=sequence)
        places = np.linspace(0, whole.rows - 1, num=min(self.rows, whole.rows)).round()
        return TokenStream(
            file=whole.file,
            row_starts=whole.row_starts[places.astype(np.int64)],
            sequence=sequence,
            seed=0,
        )


@torch.inference_mode()
def held_out_losses(
    model: PreTrainedModel,
    streams: Mapping[str, TokenStream],
    *,
    batch: int,
    progress: Progress = silent,
) -> dict[str, HeldOutLoss]:
    """The losses of a model on the held-out rows of each part, in the order in which the rows stand.

    Args:
        model: in evaluation mode.
        streams: held-out rows by the part's name (`validation` of a source).
        batch: rows of a forward pass.
        progress: told after each pass.
    """
    losses: dict[str, HeldOutLoss] = {}
    passes = sum(-(-stream.rows // batch) for stream in streams.values())
    done = 0
    for name, stream in streams.items():
        nats: list[np.ndarray] = []
        ids = _rows(stream)
        for read in torch.from_numpy(ids).split(batch):
            rows = read.to(model.device)
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits
            row_nats = token_nats(logits, rows[:, 1:], model).double().sum(dim=1)
            nats.append(row_nats.cpu().numpy())
            done += 1
            progress(done, passes, f"held-out rows of {name}")
        losses[name] = HeldOutLoss(
            nats=np.concatenate(nats),
            targets=stream.sequence,
            text_bytes=bytes_of(stream.file, ids[:, 1:]),
        )
    return losses


def _rows(stream: TokenStream) -> Int[np.ndarray, "rows ids"]:
    places = stream.row_starts[:, None] + np.arange(stream.sequence + 1)
    return stream.file.tokens[places].astype(np.int64)


def bytes_of(file: TokenFile, ids: Int[np.ndarray, "rows ids"]) -> int:
    """UTF-8 bytes that ids stand for; what ends a document is no text.

    A character that a row's edge cuts is counted as one byte.
    """
    tokenizer = file.tokenizer().tokenizer
    texts = tokenizer.batch_decode(
        ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return sum(len(text.replace("\ufffd", "?").encode()) for text in texts)


def write_held_out(
    records: RecordWriter, losses: Mapping[str, HeldOutLoss], **also: object
) -> None:
    """Write an event "held_out" for each part, with the loss of every row.

    Args:
        records: the record of the model's run.
        losses: by part.
        also: further values of each event.
    """
    for name, loss in losses.items():
        records.write(
            "held_out",
            part=name,
            **also,
            loss_nats=round(loss.loss_nats, 6),
            bits_per_byte=round(loss.bits_per_byte, 6),
            targets=loss.targets,
            text_bytes=loss.text_bytes,
            row_nats=[round(float(nats), 3) for nats in loss.nats],
        )


def held_out_of(event: Event) -> HeldOutLoss:
    """The losses that an event "held_out" holds."""
    return HeldOutLoss(
        nats=np.asarray(event.numbers("row_nats")),
        targets=int(event.number("targets")),
        text_bytes=int(event.number("text_bytes")),
    )
