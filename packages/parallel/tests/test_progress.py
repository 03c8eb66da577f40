"""Laws of the log lines that say how far a work has come."""

import logging

import pytest

from fourfold_parallel.common import progress
from fourfold_parallel.common.progress import Logged


def test_lines_come_every_few_seconds_and_at_both_ends(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred steps of a second: a line every ten of them, with the time that is left."""
    caplog.set_level(logging.INFO)
    seconds = iter(range(1000, 2000))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    tell = Logged(every_s=10)
    for _ in range(2):  # a second work begins anew
        caplog.clear()
        for step in range(1, 101):
            tell(step, 100, "loss 2.000 nats")
        assert len(caplog.messages) == 11
        assert caplog.messages[0] == "step 1 of 100: loss 2.000 nats"
        assert caplog.messages[1] == "step 11 of 100: loss 2.000 nats, 89 s left"
        assert caplog.messages[-1] == "step 100 of 100: loss 2.000 nats"
