"""Laws of mixtures: exact shares in every prefix, parts read on over stages, no state, one tokenizer."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold_parallel.common.files import write_text
from fourfold_parallel.common.values import from_json, to_json
from fourfold_parallel.run.corpora import TextFiles
from fourfold_parallel.run.data import Packed, TokenFile, TokenStream
from fourfold_parallel.run.mixtures import (
    Mixed,
    MixedStream,
    MixturePart,
    MixtureStage,
    Staged,
    check_one_tokenizer,
    pattern,
)
from fourfold_parallel.run.optimizer import Constant, Cosine, Phase, Phases
from fourfold_parallel.run.recipe import Run, Steps
from fourfold_parallel.run.tokenizers import BytePairs, SharedBytePairs

SEQUENCE = 24


@st.composite
def shares(draw: st.DrawFn, most: int = 6) -> tuple[float, ...]:
    """Weights of 1 to 6 parts in thousandths, extreme and zero ones among them."""
    cuts = draw(
        st.lists(st.sampled_from([0, 1, 2, 50, 250, 333, 500, 998, 999, 1000]), max_size=most - 1)
    )
    edges = [0, *sorted(cuts), 1000]
    return tuple((high - low) / 1000 for low, high in pairwise(edges))


@settings(max_examples=200, deadline=None)
@given(weights=shares(), rows=st.integers(1, 5000))
def test_every_prefix_of_a_mixture_holds_its_shares(weights: tuple[float, ...], rows: int) -> None:
    """By less than a row; by at most half of one, where there are two parts."""
    parts, numbers = pattern(weights).at(np.arange(rows))
    done = np.arange(1, rows + 1)
    reading = sum(weight > 0 for weight in weights)
    bound = 1 - 1 / (2 * reading - 2) if reading > 1 else 0
    for part, weight in enumerate(weights):
        counts = np.cumsum(parts == part)
        # Counts are whole and weights thousandths: what rounds is far below.
        assert np.abs(counts - weight * done).max() <= bound + 1e-9 < 1
        assert numbers[parts == part].tolist() == list(range(counts[-1]))
        assert pattern(weights).counts(rows)[part] == counts[-1]


def test_two_parts_are_rounded() -> None:
    """Of two parts the second has `floor(w m + 1/2)` rows of m, ties going either way."""
    for weight in (0.05, 0.25, 0.001, 0.999, 0.37):
        parts, _ = pattern((round(1 - weight, 6), weight)).at(np.arange(4000))
        exact = weight * np.arange(1, 4001)
        assert np.abs(np.cumsum(parts) - exact).max() <= 0.5 + 1e-9


def megatron(weights: tuple[float, ...], rows: int) -> list[int]:
    """The parts of a blend's rows: the one with the largest deficit at `weight * max(row, 1)` is next."""
    counts = [0] * len(weights)
    parts = []
    for row in range(rows):
        deficits = [
            weight * max(row, 1.0) - count for weight, count in zip(weights, counts, strict=True)
        ]
        chosen = int(np.argmax(deficits))
        parts.append(chosen)
        counts[chosen] += 1
    return parts


def numbers_of_megatron(weights: tuple[float, ...], rows: int) -> list[int]:
    """The number of each row within its part: from 0 in every blend, which knows nothing of one before."""
    seen: dict[int, int] = {}
    numbers = []
    for part in megatron(weights, rows):
        numbers.append(seen.get(part, 0))
        seen[part] = numbers[-1] + 1
    return numbers


def of_stages(*stages: tuple[tuple[float, ...], int]) -> MixedStream:
    """A stream over row numbers alone: nothing is read."""
    streams = {f"p{index}": None for index in range(len(stages[0][0]))}
    return MixedStream(streams=streams, first_rows=(0,) * len(streams), stages=stages, seed=0)  # type: ignore[arg-type]


def repeated_and_lost(read: list[tuple[int, int]]) -> tuple[int, int]:
    """Rows of a part read twice, and passed over, before the part's last one."""
    parts = {part for part, _ in read}
    numbers = {part: [number for each, number in read if each == part] for part in parts}
    twice = sum(len(each) - len(set(each)) for each in numbers.values())
    lost = sum(max(each) + 1 - len(set(each)) for each in numbers.values())
    return twice, lost


def test_a_change_of_weights_repeats_and_loses_nothing() -> None:
    """Every row of every part comes once, none is left out, and each stage holds its shares.

    Megatron's index is built for one set of weights over all rows; with others it tells a resumed run which
    rows would come next if the new weights had held from the start (its issue 457).
    """
    first, second, steps, batch = (0.8, 0.2), (0.3, 0.7), 25, 8
    stream = of_stages((first, steps), (second, steps))
    ours = [
        (int(part), int(number))
        for step in range(2 * steps)
        for part, number in zip(*stream.numbers(step, batch=batch), strict=True)
    ]
    assert repeated_and_lost(ours) == (0, 0)
    rows = steps * batch
    indexes = [
        list(zip(megatron(w, 2 * rows), numbers_of_megatron(w, 2 * rows), strict=True))
        for w in (first, second)
    ]
    twice, lost = repeated_and_lost(indexes[0][:rows] + indexes[1][rows:])
    assert twice > 50
    assert lost > 50


def worst(parts: list[int], weights: tuple[float, ...]) -> float:
    """The largest distance of any prefix from any part's share, in rows."""
    done = np.arange(1, len(parts) + 1)
    counts = [np.cumsum(np.asarray(parts) == part) for part in range(len(weights))]
    return max(
        float(np.abs(count - weight * done).max())
        for count, weight in zip(counts, weights, strict=True)
    )


def test_the_largest_deficit_is_not_the_best_choice() -> None:
    """Megatron's index is half a row and more beyond the bound that every prefix of ours keeps."""
    weights = (0.9, 0.02, 0.02, 0.02, 0.02, 0.02)
    ours, _ = pattern(weights).at(np.arange(2000))
    assert worst(ours.tolist(), weights) < 1
    assert worst(megatron(weights, 2000), weights) == pytest.approx(1.5)


def test_a_part_that_ends_begins_anew(corpus: TextFiles) -> None:
    """Weights near 0 and 1 over two sources of one size: Megatron's index names rows that no set has (its
    issue 705); ours begins the part's next epoch, in which every row comes once again."""
    source = packed(corpus)
    rows = source.open(sequence=SEQUENCE, seed=3).rows
    weights = (0.001, 0.999)
    assert max(numbers_of_megatron(weights, 2 * rows)) >= rows
    mixed = mixture(source, weights)
    stream = mixed.open(sequence=SEQUENCE, seed=3)
    read = [stream.batch(step, batch=8) for step in range(-(-2 * rows // 8) + 1)]
    addresses = [
        address
        for batch in read
        for address, part in zip(batch.addresses, batch.parts.of_rows, strict=True)
        if part == 1
    ]
    epochs = [addresses[:rows], addresses[rows : 2 * rows]]
    every = sorted(source.open(sequence=SEQUENCE, seed=3).row_starts.tolist())
    assert sorted(epochs[0]) == every
    assert set(epochs[1]) <= set(every)
    assert len(set(epochs[1])) == len(epochs[1])


def packed(corpus: TextFiles) -> Packed:
    return Packed(corpus=corpus, tokenizer=BytePairs(vocabulary=320), held_out=0.1)


def mixture(source: Packed, weights: tuple[float, ...]) -> Mixed:
    return Mixed(
        parts=tuple(
            MixturePart(name=f"p{index}", source=source, weight=weight)
            for index, weight in enumerate(weights)
        )
    )


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_batch_is_a_function_of_the_step(corpus: TextFiles, ranks: int) -> None:
    """Laid side by side the ranks' shares are the batch of one rank, in any order of calls, and so are
    the parts of its rows; every rank knows every part."""
    staged = Staged(
        stages=(
            MixtureStage(mixture=mixture(packed(corpus), (0.75, 0.25)), steps=5),
            MixtureStage(mixture=mixture(packed(corpus), (0.1, 0.9)), steps=20),
        )
    )
    steps = [11, 0, 4, 5, 24, 11]
    wholes = {
        step: staged.open(sequence=SEQUENCE, seed=2).batch(step, batch=8) for step in range(25)
    }
    stream = staged.open(sequence=SEQUENCE, seed=2)
    for step in steps:
        shares = [stream.batch(step, batch=8, rank=rank, ranks=ranks) for rank in range(ranks)]
        assert torch.equal(torch.cat([share.tokens for share in shares]), wholes[step].tokens)
        assert torch.equal(
            torch.cat([share.document_ids for share in shares]), wholes[step].document_ids
        )
        assert sum((share.addresses for share in shares), ()) == wholes[step].addresses
        assert sum((share.parts.of_rows for share in shares), ()) == wholes[step].parts.of_rows
        assert {share.parts.names for share in shares} == {("p0", "p1")}


def test_parts_lie_in_a_drawn_order(corpus: TextFiles) -> None:
    """No rank gets one part only, as it would if the parts stood in the pattern's own order."""
    stream = mixture(packed(corpus), (0.5, 0.5)).open(sequence=SEQUENCE, seed=1)
    shares = [
        stream.batch(step, batch=8, rank=rank, ranks=2).parts.of_rows
        for step in range(40)
        for rank in range(2)
    ]
    assert len({sum(share) for share in shares}) > 2
    assert np.mean([sum(share) for share in shares[::2]]) == pytest.approx(2, abs=0.5)


def test_microbatches_keep_their_rows_parts(corpus: TextFiles) -> None:
    batch = mixture(packed(corpus), (0.5, 0.5)).open(sequence=SEQUENCE, seed=1).batch(3, batch=8)
    split = batch.to(torch.device("cpu")).split(3)
    assert sum((each.parts.of_rows for each in split), ()) == batch.parts.of_rows
    assert {each.parts.names for each in split} == {("p0", "p1")}


def test_two_stages_of_a_mixture_are_one_of_their_sum(corpus: TextFiles) -> None:
    """Bit for bit, where the first ends in the middle of the pattern too."""
    mixed = mixture(packed(corpus), (0.37, 0.63))
    whole = Staged(stages=(MixtureStage(mixture=mixed, steps=12),))
    cut = Staged(
        stages=(MixtureStage(mixture=mixed, steps=5), MixtureStage(mixture=mixed, steps=7))
    )
    for step in range(12):
        batches = [
            each.open(sequence=SEQUENCE, seed=4).batch(step, batch=8) for each in (whole, cut)
        ]
        assert torch.equal(batches[0].tokens, batches[1].tokens)
        assert batches[0].parts == batches[1].parts


def test_weights_of_0_and_1_are_the_single_sources(corpus: TextFiles) -> None:
    """Rows, their order, and the loss that validation gives the part."""
    source = packed(corpus)
    alone = source.open(sequence=SEQUENCE, seed=6)
    for weights in ((1.0, 0.0), (0.0, 1.0)):
        stream = mixture(source, weights).open(sequence=SEQUENCE, seed=6)
        for step in (0, 3, 50):
            assert torch.equal(
                stream.batch(step, batch=8).tokens, alone.batch(step, batch=8).tokens
            )


def test_a_part_goes_on_behind_what_was_read(corpus: TextFiles) -> None:
    """`first_row` is what an earlier run has read of it."""
    source = packed(corpus)
    mixed = Mixed(parts=(MixturePart(name="only", source=source, weight=1.0, first_row=24),))
    stream = mixed.open(sequence=SEQUENCE, seed=6)
    alone = source.open(sequence=SEQUENCE, seed=6)
    assert torch.equal(stream.batch(0, batch=8).tokens, alone.batch(3, batch=8).tokens)


def test_held_out_rows_come_once_and_know_their_part(corpus: TextFiles) -> None:
    """Also those of a part of weight 0; the weights are those over all stages."""
    source = packed(corpus)
    staged = Staged(
        stages=(
            MixtureStage(mixture=mixture(source, (1.0, 0.0)), steps=30),
            MixtureStage(mixture=mixture(source, (0.5, 0.5)), steps=10),
        )
    )
    held_out = staged.validation(sequence=SEQUENCE)
    alone = source.validation(sequence=SEQUENCE)
    assert held_out.rows == 2 * alone.rows
    assert dict(held_out.weights) == pytest.approx({"p0": 0.875, "p1": 0.125})
    read = held_out.batch(0, batch=held_out.rows)
    expected = sorted(alone.row_starts.tolist())
    for part in range(2):
        addresses = [
            address
            for address, own in zip(read.addresses, read.parts.of_rows, strict=True)
            if own == part
        ]
        assert sorted(addresses) == expected


def test_one_tokenizer_for_all_parts(corpus: TextFiles, tmp_path: Path) -> None:
    """Two that were trained apart are refused by name; one that was trained on both texts is not."""
    write_text(tmp_path / "other.txt", "a text of other words altogether, " * 400)
    other = TextFiles(paths=(tmp_path / "other.txt",), licence="made here")

    def mixed(tokenizers: tuple[object, object]) -> Mixed:
        sources = [
            Packed(corpus=each, tokenizer=tokenizer, held_out=0.1)  # type: ignore[arg-type]
            for each, tokenizer in zip((corpus, other), tokenizers, strict=True)
        ]
        parts = [
            MixturePart(name=n, source=s, weight=0.5)
            for n, s in zip(("a", "b"), sources, strict=True)
        ]
        return Mixed(parts=tuple(parts))

    apart = mixed((BytePairs(vocabulary=300), BytePairs(vocabulary=300)))
    with pytest.raises(
        ValueError, match=r"parts 'a' and 'b' .* different tokenizers .* SharedBytePairs"
    ):
        apart.open(sequence=SEQUENCE, seed=0)
    shared = SharedBytePairs(corpora=(corpus, other), vocabulary=300)
    stream = mixed((shared, shared)).open(sequence=SEQUENCE, seed=0)
    assert len([m for m in stream.materials if m.kind == "corpus"]) == 2
    assert len({m.sha256 for m in stream.materials if m.kind == "tokenizer"}) == 1


def test_a_shared_tokenizer_follows_its_files(tmp_path: Path) -> None:
    """Editing one corpus tokenizes the other anew, since the ids of both depend on both."""
    texts = [tmp_path / f"{name}.txt" for name in "ab"]
    for path in texts:
        write_text(path, f"words of {path.name}, " * 200)
    corpora = tuple(TextFiles(paths=(path,), licence="made here") for path in texts)
    shared = SharedBytePairs(corpora=corpora, vocabulary=290)
    source = Packed(corpus=corpora[0], tokenizer=shared, held_out=0.1)
    before = source.open(sequence=8, seed=0).materials
    write_text(texts[1], "entirely other content here; " * 200)
    after = source.open(sequence=8, seed=0).materials
    assert [m.sha256 for m in before if m.kind == "tokenizer"] != [
        m.sha256 for m in after if m.kind == "tokenizer"
    ]


def test_ids_without_a_tokenizer_are_not_mixed(corpus: TextFiles) -> None:
    known = packed(corpus).open(sequence=SEQUENCE, seed=0).file
    unknown = TokenFile(
        path=known.path, tokens=known.tokens, document_starts=known.document_starts,
        vocabulary=9, materials=(), characters=9,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"part 'drawn' .* which tokenizer .* Packed"):
        check_one_tokenizer({"text": known, "drawn": unknown})
    check_one_tokenizer({"drawn": unknown})


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ((0.5, 0.4), "sum to 0.9; make them sum to 1"),
        ((1.5, -0.5), "weight=1.5 of part 'p0' is no share"),
        ((-0.5, 1.5), "weight=-0.5 of part 'p0' is no share"),
        ((1 / 3, 2 / 3), "at most 6 digits"),
        ((float("nan"), 0.5), "weight=nan"),
    ],
)
def test_wrong_shares_are_refused(
    corpus: TextFiles, weights: tuple[float, ...], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        mixture(packed(corpus), weights)


def test_wrong_parts_are_refused(corpus: TextFiles, small_run: Run) -> None:
    """Each with its name and the way out."""
    source = packed(corpus)
    good = mixture(source, (0.5, 0.5))
    with pytest.raises(ValueError, match=r"share a name; give each its own"):
        Mixed(parts=(MixturePart(name="a", source=source, weight=0.5),) * 2)
    with pytest.raises(ValueError, match=r"name='My text'.*use lower-case"):
        MixturePart(name="My text", source=source, weight=0.5)
    with pytest.raises(ValueError, match=r"first_row=-1"):
        MixturePart(name="a", source=source, weight=0.5, first_row=-1)
    empty = MixturePart(name="all", source=replace(source, held_out=0.0), weight=0.0)
    with pytest.raises(ValueError, match=r"part 'all' .* held_out=0 leaves no row"):
        Mixed(parts=(*mixture(source, (1.0,)).parts, empty)).validation(sequence=SEQUENCE)
    with pytest.raises(ValueError, match=r"part 'p0' .* shorter sequence or a larger corpus"):
        good.open(sequence=10**6, seed=0)
    nested = Mixed(parts=(MixturePart(name="inner", source=good, weight=1.0),))
    with pytest.raises(ValueError, match=r"part 'inner' .* is a mixture itself"):
        nested.open(sequence=SEQUENCE, seed=0)
    other = replace(source, held_out=0.2)
    with pytest.raises(ValueError, match=r"'p0' has another source .* rename it"):
        Staged(
            stages=(
                MixtureStage(mixture=good, steps=1),
                MixtureStage(mixture=mixture(other, (1.0,)), steps=1),
            )
        )
    with pytest.raises(ValueError, match=r"steps=0 of a stage"):
        MixtureStage(mixture=good, steps=0)
    short = Staged(stages=(MixtureStage(mixture=good, steps=small_run.steps - 1),))
    with pytest.raises(ValueError, match=r"data of run 'small' lasts 5 steps, its horizon 6"):
        replace(small_run, data=short)


def test_phases_are_their_schedules_one_after_another(small_run: Run) -> None:
    """Each is laid over its own steps and has its own warm-up and peak; together they fill the run."""
    phases = Phases(
        phases=(
            Phase(schedule=Cosine(warmup_steps=2, floor=0.1), steps=10),
            Phase(schedule=Constant(warmup_steps=4), steps=5, peak=0.5),
        )
    )
    factors = [phases.factor(step, 15) for step in range(15)]
    assert factors[:10] == [Cosine(warmup_steps=2, floor=0.1).factor(s, 10) for s in range(10)]
    assert factors[10:] == [0.125, 0.25, 0.375, 0.5, 0.5]
    with pytest.raises(ValueError, match="step 15 of 20 lies behind the phases"):
        phases.factor(15, 20)
    with pytest.raises(ValueError, match="schedule of run 'small' lasts 15 steps, its horizon 6"):
        replace(small_run, schedule=phases)
    fitting = replace(small_run, schedule=phases, horizon=Steps(count=15))
    assert from_json(to_json(fitting)) == fitting


def test_a_mixed_run_is_rebuilt_from_its_record(corpus: TextFiles, small_run: Run) -> None:
    mixed = replace(small_run, data=mixture(packed(corpus), (0.5, 0.5)))
    assert from_json(to_json(mixed)) == mixed


def test_a_single_source_has_no_parts(corpus: TextFiles) -> None:
    stream = packed(corpus).open(sequence=SEQUENCE, seed=0)
    assert isinstance(stream, TokenStream)
    assert not stream.weights
    assert stream.batch(0, batch=4).parts.names == ()
