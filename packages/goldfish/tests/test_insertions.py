"""Passages inserted by lot: the design is what it says, and the remedies beside goldfish do what they say."""

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from fourfold_goldfish.insertions import Cell, Insertions
from fourfold_goldfish.reproduce.causal import contrast
from fourfold_goldfish.reproduce.mitigations import LossTruncation, PromptMask, Sinks
from fourfold_parallel.common.records import Material
from fourfold_parallel.run.corpora import Documents
from fourfold_parallel.run.data import Batch
from fourfold_parallel.run.models import Llama
from fourfold_parallel.run.objective import KeepAll, NextToken
from fourfold_parallel.run.tokenizers import BytePairs

SEQUENCE = 16
SHAPE = Llama(
    width=16, depth=1, heads=2, kv_heads=2, hidden=20, vocabulary=300, context=32, tied=True
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """Texts of which no two rows are equal."""

    texts: int

    def load(self) -> Documents:
        texts = tuple(
            " ".join(f"{text} {place} {text * place}" for place in range(60))
            for text in range(self.texts)
        )
        material = Material(name="numbers", kind="corpus", licence="none", sha256="", source="test")
        return Documents(texts=texts, material=material)


SOURCE = Insertions(
    corpus=Numbers(texts=30),
    tokenizer=BytePairs(vocabulary=300),
    cells=(
        Cell(copies=2),
        Cell(copies=6, time="early"),
        Cell(copies=6, time="late"),
        Cell(copies=5, is_reformatted=True),
    ),
    pairs=3,
    background=60,
    validation_rows=8,
    lot=0,
)


def rows_of(source: Insertions) -> list[tuple[int, ...]]:
    """Every row of the run, in order."""
    stream = source.open(sequence=SEQUENCE, seed=0)
    return [tuple(row) for row in stream.batch(0, batch=source.rows).tokens.tolist()]


def test_what_is_inserted_is_seen_as_often_as_its_cell_says_and_its_twin_never() -> None:
    rows = rows_of(SOURCE)
    counts = Counter(rows)
    inserted, twins = SOURCE.passages(sequence=SEQUENCE)
    for index, cell in enumerate(SOURCE.cells):
        for passage in inserted[index].tolist():
            assert counts[tuple(passage)] == (0 if cell.is_reformatted else cell.copies)
    held_out = {tuple(row) for row in twins.reshape(-1, SEQUENCE + 1).tolist()}
    validation = SOURCE.validation(sequence=SEQUENCE).batch(0, batch=8).tokens.tolist()
    assert not held_out & set(rows)
    assert not {tuple(row) for row in validation} & set(rows)
    assert len(rows) == SOURCE.rows == 60 + 3 * (2 + 6 + 6 + 5)


def test_copies_lie_in_their_third() -> None:
    rows = rows_of(SOURCE)
    inserted, _ = SOURCE.passages(sequence=SEQUENCE)
    places = {
        cell.name: [i / len(rows) for i, row in enumerate(rows) if row in set(map(tuple, some))]
        for cell, some in zip(SOURCE.cells, inserted.tolist(), strict=True)
    }
    assert max(places["6 early"]) < 0.5
    assert min(places["6 late"]) > 0.5


def test_the_lot_decides_and_nothing_else_does() -> None:
    """An equal lot gives equal rows; another one changes sides and cells; the background may differ."""
    inserted, twins = SOURCE.passages(sequence=SEQUENCE)
    again, _ = replace(SOURCE, background=90).passages(sequence=SEQUENCE)
    assert torch.equal(inserted, again)
    others = [replace(SOURCE, lot=lot).passages(sequence=SEQUENCE)[0] for lot in range(1, 9)]
    sides = [
        sum(tuple(row) in set(map(tuple, twins.reshape(-1, SEQUENCE + 1).tolist())) for row in rows)
        for rows in (other.reshape(-1, SEQUENCE + 1).tolist() for other in others)
    ]
    assert 2 < np.mean(sides) < 10  # of 12 passages, half change sides by the coin


def test_altered_copies_differ_in_blanks_alone() -> None:
    file = SOURCE.open(sequence=SEQUENCE, seed=0).file
    inserted, _ = SOURCE.passages(sequence=SEQUENCE)
    decode = file.tokenizer().decode
    altered = [
        decode(file.tokens[start : start + SEQUENCE + 1].tolist())
        for start in file.document_starts[-15:]
    ]
    originals = [decode(row).replace(" ", "") for row in inserted[3].tolist() for _ in range(5)]
    assert sum("  " in text for text in altered) > 8
    for text, original in zip(altered, originals, strict=True):
        assert original.startswith(text.replace(" ", "")) or text.replace(" ", "") == original


def test_deduplicated_data_has_each_row_once_and_as_many_rows() -> None:
    rows = rows_of(replace(SOURCE, is_deduplicated=True))
    assert len(rows) == SOURCE.rows
    assert set(Counter(rows).values()) == {1}


def test_what_does_not_fit_the_corpus_is_refused() -> None:
    with pytest.raises(ValueError, match="use at most 7 pairs"):
        replace(SOURCE, pairs=9).open(sequence=SEQUENCE, seed=0)
    with pytest.raises(ValueError, match="are left after the passages"):
        replace(SOURCE, background=10_000).open(sequence=SEQUENCE, seed=0)
    with pytest.raises(ValueError, match="insert nothing"):
        Cell(copies=0)


def batch() -> Batch:
    tokens = torch.randint(0, 300, (4, 13), generator=torch.Generator().manual_seed(0))
    return Batch(tokens=tokens, document_ids=torch.zeros_like(tokens), addresses=(0,) * 4)


def test_loss_truncation_is_the_mean_of_the_rows_with_the_least_loss() -> None:
    model = SHAPE.build(seed=0)
    plain, truncated = NextToken(mask=KeepAll()), LossTruncation(share=0.25)
    targets = truncated.targets(batch())
    logits = model(input_ids=batch().tokens[:, :-1]).logits
    rows = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    by_row = rows.sum(1).sort().values
    ours = truncated.loss(model, batch(), targets).nats_sum
    torch.testing.assert_close(ours, by_row[:3].sum() * 4 / 3)
    torch.testing.assert_close(plain.loss(model, batch(), targets).nats_sum, by_row.sum())


def test_sinks_are_a_row_s_own_in_training_and_gone_in_evaluation() -> None:
    model = Sinks(model=SHAPE, share=0.5, active=0.3).build(seed=0)
    hidden: list[torch.Tensor] = []
    down = model.model.layers[0].mlp.down_proj  # type: ignore[union-attr]
    down.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
    tokens = batch().tokens
    doubled = torch.cat([tokens, tokens])
    model.train()(input_ids=doubled)
    open_units = (hidden[0] != 0).any(dim=1)
    assert open_units[:, :10].all()
    assert torch.equal(open_units[:4], open_units[4:])
    assert 0 < open_units[:, 10:].float().mean() < 0.6
    assert len({tuple(row) for row in open_units[:4].tolist()}) > 1
    model.eval()(input_ids=tokens)
    assert not hidden[1][..., 10:].any()
    plain = SHAPE.build(seed=0)
    with torch.no_grad():
        plain.model.layers[0].mlp.down_proj.weight[:, 10:] = 0  # type: ignore[union-attr]
    torch.testing.assert_close(
        model(input_ids=tokens).logits, plain(input_ids=tokens).logits, atol=1e-5, rtol=1e-4
    )


def test_a_prompt_mask_leaves_out_the_first_targets() -> None:
    targets = NextToken(mask=PromptMask(tokens=5)).targets(batch())
    assert (targets[:, :5] == -100).all()
    assert (targets[:, 5:] != -100).all()


def test_a_contrast_is_welch_s() -> None:
    gap = contrast([1.0, 2.0, 3.0], [0.0, 0.5, 1.0, 0.5])
    assert gap.value == pytest.approx(1.5)
    assert gap.low < 0.2 < gap.value < 3.2 < gap.high + 0.6
