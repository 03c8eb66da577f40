"""What the recipes promise about their data."""

import pytest

from fourfold_goldfish.recipes import ARMS, Attacked, verbatim
from fourfold_parallel.run.data import tokenize
from fourfold_parallel.run.values import from_json, to_json


@pytest.fixture(scope="module")
def smoke() -> Attacked:
    return verbatim("plain", 0, "smoke")


def test_passages_recur_as_often_as_stated_and_controls_never(smoke: Attacked) -> None:
    """One epoch holds every passage `repetitions` times, no control token, and no validation row."""
    run, passages = smoke.run, smoke.passages
    stream = passages.open(sequence=run.sequence, seed=0)
    trained, control = passages.trained_and_control(sequence=run.sequence)
    assert run.steps * run.batch == passages.rows == len(stream.row_starts)
    rows = [tuple(stream.batch(step, batch=run.batch).tokens.tolist()) for step in range(run.steps)]
    seen = [tuple(row) for batch in rows for row in batch]
    for passage in trained.tolist():
        assert seen.count(tuple(passage)) == passages.repetitions
    assert not {tuple(row) for row in control.tolist()} & set(seen)
    validation = passages.validation(sequence=run.sequence)
    assert not set(validation.row_starts.tolist()) & set(stream.row_starts.tolist())


def test_no_control_article_is_trained_on(smoke: Attacked) -> None:
    """Not even in part: the background begins after the last article with a passage."""
    passages, sequence = smoke.passages, smoke.run.sequence
    file = tokenize(passages.corpus, passages.tokenizer)
    stream = passages.open(sequence=sequence, seed=0)
    _, control = passages.trained_and_control(sequence=sequence)
    text = file.tokens
    starts = {tuple(text[s : s + sequence + 1].tolist()): s for s in file.document_starts}
    controls = {
        int(file.document_starts.searchsorted(starts[tuple(row)], "right"))
        for row in control.tolist()
    }
    trained_documents = set()
    for start in set(stream.row_starts.tolist()):
        first = int(file.document_starts.searchsorted(start, "right"))
        last = int(file.document_starts.searchsorted(start + sequence, "right"))
        trained_documents |= {first, last}
    assert len(controls) == passages.passages
    assert not controls & trained_documents


@pytest.mark.parametrize("scale", ["smoke", "laptop"])
def test_arms_differ_in_the_loss_alone(scale: str) -> None:
    """Every arm of a scale has the same model, data, schedule and seed; a record rebuilds it."""
    arms = [verbatim(arm, 1, scale) for arm in ARMS[scale]]  # type: ignore[index, arg-type]
    first = to_json(arms[0].run)
    assert isinstance(first, dict)
    for arm in arms:
        fields = to_json(arm.run)
        assert isinstance(fields, dict)
        assert {name for name in first if first[name] != fields[name]} <= {"name", "objective"}
        assert from_json(to_json(arm)) == arm
