"""What the recipes promise about their data."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from fourfold_goldfish.reproduce.experiment import EXPERIMENT
from fourfold_goldfish.reproduce.paper import TINYLLAMA, equal_supervision, tinyllama
from fourfold_goldfish.reproduce.recipes import ARMS, Attack, bucket_study, goldfish, verbatim
from fourfold_parallel.common.values import from_json, to_json
from fourfold_parallel.run.corpora import Wikipedia
from fourfold_parallel.run.data import tokenize
from fourfold_parallel.run.objective import announced_mask
from fourfold_parallel.run.tokenizers import BytePairs


@pytest.fixture(scope="module")
def smoke() -> Attack:
    return verbatim("plain", 0, "smoke")


@pytest.mark.parametrize("attacked", [verbatim("plain", 0, "smoke"), bucket_study("w48", "k2", 0)])
def test_passages_recur_as_often_as_their_bucket_says(attacked: Attack) -> None:
    """One epoch holds every passage so many times, no control's token, and no validation row."""
    run, buckets = attacked.run, attacked.buckets
    stream = buckets.open(sequence=run.sequence, seed=0)
    assert run.steps * run.batch == buckets.rows == len(stream.row_starts)
    batches = (stream.batch(step, batch=run.batch) for step in range(run.steps))
    seen = Counter(tuple(row) for batch in batches for row in batch.tokens.tolist())
    contents = buckets.contents(sequence=run.sequence)
    for repetitions, passages in zip(buckets.repetitions, contents, strict=True):
        assert len(passages) == buckets.passages
        assert {seen[tuple(row)] for row in passages.tolist()} == {repetitions}
    validation = buckets.validation(sequence=run.sequence)
    assert not set(validation.row_starts.tolist()) & set(stream.row_starts.tolist())


def test_no_control_article_is_trained_on(smoke: Attack) -> None:
    """Not even in part: the background begins after the last article with a passage."""
    buckets, sequence = smoke.buckets, smoke.run.sequence
    file = tokenize(buckets.corpus, buckets.tokenizer)
    stream = buckets.open(sequence=sequence, seed=0)
    _, control = buckets.contents(sequence=sequence)
    starts = {
        tuple(file.tokens[start : start + sequence + 1].tolist()): start
        for start in file.document_starts
    }
    controls = {
        int(file.document_starts.searchsorted(starts[tuple(row)], "right"))
        for row in control.tolist()
    }
    trained_documents = set()
    for start in set(stream.row_starts.tolist()):
        first = int(file.document_starts.searchsorted(start, "right"))
        last = int(file.document_starts.searchsorted(start + sequence, "right"))
        trained_documents |= {first, last}
    assert len(controls) == buckets.passages
    assert not controls & trained_documents


def test_skipped_articles_give_other_passages(smoke: Attack) -> None:
    """So that each seed of the fine-tuning has documents of its own."""
    later = replace(smoke.buckets, skipped_articles=2 * smoke.buckets.passages)
    first, second = (
        {tuple(row) for rows in buckets.contents(sequence=64) for row in rows.tolist()}
        for buckets in (smoke.buckets, later)
    )
    assert not first & second


def test_too_many_passages_are_refused(smoke: Attack) -> None:
    with pytest.raises(ValueError, match="2 buckets of passages=900 need 1800 articles"):
        replace(smoke.buckets, passages=900).open(sequence=64, seed=0)


def test_the_papers_runs_have_the_papers_numbers() -> None:
    """20 B tokens in 9,537 steps, 1.01 % of them repeated; 12,716 steps for equal supervision at k=4."""
    materials = {"corpus": Wikipedia(), "tokenizer": BytePairs(vocabulary=1024)}
    run = tinyllama("k4", **materials).run  # type: ignore[arg-type]
    assert run.steps == 9537
    assert run.tokens_per_step == 2_097_152
    buckets = tinyllama("k4", **materials).buckets  # type: ignore[arg-type]
    repeated = buckets.passages * buckets.repetitions[0] / buckets.rows
    # The published mixture gives the documents 0.01013620526 of 20.2 B tokens.
    assert repeated == pytest.approx(0.2048 / 20, rel=1e-3)
    assert equal_supervision("k4", **materials).run.steps == 12_716  # type: ignore[arg-type]
    assert TINYLLAMA.config().num_hidden_layers == 22
    assert len(EXPERIMENT.launches()) == 3


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


def test_the_announced_mask_is_the_paper_s() -> None:
    """What another package trains with is what this one does at the same k, its own ids excepted."""
    tokens = torch.randint(50, (4, 200), generator=torch.Generator().manual_seed(0))
    documents = torch.arange(200).div(60, rounding_mode="floor").expand_as(tokens)
    announced = announced_mask("goldfish", k=4, exempt=(7,))
    ours = goldfish("k4").drop(tokens, documents)
    assert torch.equal(announced.drop(tokens, documents), ours & (tokens != 7))
    assert ours.any()
