"""Losses row by row are those of a loop over targets, and the rows are held-out ones."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fourfold_continual import Sampled, held_out_losses
from fourfold_continual.held_out import bytes_of, held_out_of, write_held_out
from fourfold_parallel.common.records import RecordWriter, header, read_record

SEQUENCE = 16


def test_rows_cost_what_their_targets_cost(place: Any) -> None:
    """The loss of each row in a loop over its targets, in the order of the rows, for any batch."""
    model = AutoModelForCausalLM.from_pretrained(place.model).eval()
    stream = Sampled(source=place.source(place.old), rows=5).validation(sequence=SEQUENCE)
    [loss] = held_out_losses(model, {"old": stream}, batch=2).values()
    again = held_out_losses(model, {"old": stream}, batch=5)["old"]
    assert loss.nats == pytest.approx(again.nats, rel=1e-5)
    assert loss.targets == SEQUENCE
    for start, nats in zip(stream.row_starts, loss.nats, strict=True):
        ids = torch.from_numpy(stream.file.tokens[start : start + SEQUENCE + 1].astype(np.int64))
        total = 0.0
        with torch.inference_mode():
            for place_of in range(SEQUENCE):
                logits = model(input_ids=ids[None, : place_of + 1]).logits[0, -1]
                total -= torch.log_softmax(logits, dim=0)[ids[place_of + 1]].item()
        # float32 sums over 16 targets, in passes of another length.
        assert nats == pytest.approx(total, rel=1e-4)


def test_bytes_are_those_of_the_text(place: Any) -> None:
    """Of every target but what ends a document."""
    file = place.source(place.old).open(sequence=SEQUENCE, seed=0).file
    text = place.old.read_text(encoding="utf-8")
    assert bytes_of(file, np.asarray(file.tokens)[None].astype(np.int64)) == len(text.encode())


def test_a_sample_is_spread_over_the_held_out_rows(place: Any) -> None:
    """First and last among them; training never sees any; all of them where there are fewer."""
    source = place.source(place.old)
    whole = source.validation(sequence=SEQUENCE).row_starts
    few = Sampled(source=source, rows=4)
    starts = few.validation(sequence=SEQUENCE).row_starts
    assert len(starts) == 4
    assert (starts[0], starts[-1]) == (whole[0], whole[-1])
    assert set(starts) <= set(whole)
    assert not set(starts) & set(few.open(sequence=SEQUENCE, seed=0).row_starts)
    many = Sampled(source=source, rows=10**6)
    assert many.validation(sequence=SEQUENCE).row_starts.tolist() == whole.tolist()
    with pytest.raises(ValueError, match="rows=0 validate on nothing"):
        Sampled(source=source, rows=0)


def test_events_give_the_losses_back(place: Any, tmp_path) -> None:
    model = AutoModelForCausalLM.from_pretrained(place.model).eval()
    stream = Sampled(source=place.source(place.new), rows=3).validation(sequence=SEQUENCE)
    losses = held_out_losses(model, {"new": stream}, batch=3)
    path = tmp_path / "r.jsonl"
    with RecordWriter(path) as records:
        records.write_header(header({}, seed=0, world_size=1, materials=(), overrides=()))
        write_held_out(records, losses, when="before")
    event = read_record(path).only("held_out", part="new", when="before")
    back = held_out_of(event)
    # Rows are written to a thousandth of a nat.
    assert back.nats == pytest.approx(losses["new"].nats, abs=6e-4)
    assert (back.targets, back.text_bytes) == (SEQUENCE, losses["new"].text_bytes)
