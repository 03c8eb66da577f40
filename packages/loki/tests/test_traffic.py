"""The traffic model: limits that follow from counting bytes."""

import pytest

from fourfold_loki.evaluate.traffic import DEVICES, Device, Shape, predict
from fourfold_loki.huggingface.reads import Reads


def shape(weights: int) -> Shape:
    return Shape(layers=2, heads=8, kv_heads=2, head_width=64, weights=weights, bytes_each=2)


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_without_weights_the_speedup_is_the_papers_bound(device: Device) -> None:
    """1 / (d_f / 2 + k_f), whatever the device (Singhania et al. 2024, section 4.2)."""
    told = predict(shape(0), device, tokens=4096, batch=3, share=0.25, width=16)
    assert told.speedup == pytest.approx(1 / (0.25 / 2 + 0.25))


def test_weights_take_the_speedup_away_and_batches_bring_it_back() -> None:
    def speedup(*, weights: int, batch: int) -> float:
        told = predict(shape(weights), DEVICES[0], tokens=4096, batch=batch, share=0.25, width=16)
        return told.speedup

    assert speedup(weights=10**12, batch=1) == pytest.approx(1, abs=1e-3)
    many = [speedup(weights=10**7, batch=batch) for batch in (1, 4, 16, 64)]
    assert many == sorted(many)
    assert many[-1] < 1 / (0.25 / 2 + 0.25)


def test_a_cache_of_numbers_is_what_it_says() -> None:
    """Keys and values of every head, counted by hand."""
    assert shape(0).cache_bytes(10) == 10 * (64 + 64) * 2 * 2 * 2


def test_nothing_counted_is_not_everything_read() -> None:
    """As where a compiled model generates, or a block is dense."""
    assert "counted nothing" in str(Reads(ranking=0.25))
    assert "over 2 queries" in str(Reads(ranking=0.25, kept=10, seen=40, queries=2))
