"""Laws that every target mask keeps: ours in all their variants, and those that installed packages announce.

A mask announced under `fourfold.target_masks` is run through all of them, with no test of its own.
"""

import importlib.metadata
import itertools
import math
import pickle
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from fourfold_goldfish import CanonicalGoldfish, Goldfish, Spelling
from fourfold_parallel.common.values import from_json, to_json
from fourfold_parallel.run.data import Batch
from fourfold_parallel.run.objective import (
    IGNORE,
    TARGET_MASKS,
    NextToken,
    TargetMask,
    announced_mask,
)

K = 4
IDS = 4096
REACH = 24
"""Tokens before a target that no mask here looks beyond."""


@dataclass(frozen=True)
class Case:
    """A mask and the promises that it makes; an announced mask makes all of them."""

    mask: TargetMask
    reads_tokens: bool = True
    """It is a function of the ids: no control such as `static` and `random`."""
    reads_rows_alone: bool = True
    """A row's mask is the same in any batch."""
    ends_at_documents: bool = True
    """It never looks into the document before."""
    reads_before: bool = True
    """It decides a target by the ids before it alone."""
    is_recorded: bool = True
    """A record's first line rebuilds it."""


def cases() -> dict[str, Case]:
    announced = importlib.metadata.entry_points(group=TARGET_MASKS).names
    named = {f"announced {name}": Case(announced_mask(name, k=K)) for name in sorted(announced)}
    for window, boundary in itertools.product(
        ("exclusive", "inclusive"), ("reset", "prefix", "straddle")
    ):
        for family in ("ordered", "reference", "avalanche", "apertus", "apertus2"):
            if boundary == "prefix" and family != "ordered":
                continue  # the others have no shorter windows, and refuse it
            mask = Goldfish(k=K, context=7, hash=family, window=window, boundary=boundary)  # type: ignore[arg-type]
            named[f"{family} {window} {boundary}"] = Case(
                mask,
                ends_at_documents=boundary != "straddle",
                reads_before=window == "exclusive",
            )
    named["ordered keyed"] = Case(Goldfish(k=K, context=7, key=12345))
    for family in ("static", "random"):
        named[family] = Case(
            Goldfish(k=K, context=7, hash=family, key=1),  # type: ignore[arg-type]
            reads_tokens=False,
            reads_rows_alone=family == "static",
            ends_at_documents=False,
        )
    named["canonical"] = Case(
        CanonicalGoldfish(k=K, characters=9, spelling=spelling()), is_recorded=False
    )
    return named


def spelling() -> Spelling:
    """One to three letters for each id, and nothing for every 64th, as punctuation has."""
    spelled = [[97 + index % 26] * (1 + index % 3) * bool(index % 64) for index in range(IDS)]
    starts = torch.tensor([0, *itertools.accumulate(map(len, spelled))])
    return Spelling(torch.tensor([code for codes in spelled for code in codes]), starts)


CASES = cases()

every_mask = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def masks_that(*promises: str) -> pytest.MarkDecorator:
    """The cases that make every one of some promises."""
    keeping = {
        name: case for name, case in CASES.items() if all(getattr(case, p) for p in promises)
    }
    return pytest.mark.parametrize("case", keeping.values(), ids=keeping)


def ids(rows: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, IDS, (rows, length), generator=generator)


@every_mask
def test_a_mask_is_a_bool_for_every_token_and_nothing_else_changes(case: Case) -> None:
    """Neither the ids, nor any global random state, nor what the next call gives."""
    tokens = ids(3, 60)
    given, state = tokens.clone(), torch.random.get_rng_state()
    dropped = case.mask.drop(tokens)
    assert (dropped.shape, dropped.dtype) == (tokens.shape, torch.bool)
    assert torch.equal(tokens, given)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(case.mask.drop(tokens), dropped)


@every_mask
def test_one_target_in_k_is_left_out(case: Case) -> None:
    dropped = case.mask.drop(ids(64, 2048))[:, REACH:].float()
    # Five standard errors of independent decisions; the canonical mask's punctuation shares some.
    spread = 5 * math.sqrt((1 / K) * (1 - 1 / K) / dropped.numel())
    assert abs(dropped.mean().item() - 1 / K) < spread + 1e-3


@every_mask
def test_integer_types_do_not_matter(case: Case) -> None:
    tokens = ids(4, 60)
    assert torch.equal(case.mask.drop(tokens.int()), case.mask.drop(tokens))


@masks_that("reads_rows_alone")
def test_a_row_has_its_mask_alone_and_in_any_batch(case: Case) -> None:
    """So no sharding over ranks, workers or microbatches changes it."""
    tokens = ids(5, 60)
    together = case.mask.drop(tokens)
    for row in range(5):
        assert torch.equal(case.mask.drop(tokens[row : row + 1]), together[row : row + 1])


@masks_that("reads_rows_alone")
def test_later_tokens_decide_nothing(case: Case) -> None:
    tokens = ids(8, 80)
    assert torch.equal(case.mask.drop(tokens[:, :50]), case.mask.drop(tokens)[:, :50])


@masks_that("reads_tokens")
def test_a_passage_has_the_same_gaps_wherever_it_recurs(case: Case) -> None:
    passage = ids(1, 200)
    alone = case.mask.drop(passage)
    for offset in (1, 5, 64):
        embedded = torch.cat([ids(1, offset, seed=offset), passage], dim=1)
        assert torch.equal(case.mask.drop(embedded)[:, offset + REACH :], alone[:, REACH:])


def own_decisions(mask: TargetMask) -> tuple[Tensor, Tensor]:
    """Of the same target place in 256 rows, before and after the targets are replaced."""
    tokens = ids(256, 40)
    other = tokens.clone()
    other[:, 30] = ids(256, 1, seed=1)[:, 0]
    return mask.drop(tokens)[:, 30], mask.drop(other)[:, 30]


@masks_that("reads_before")
def test_a_target_has_no_part_in_its_own_decision(case: Case) -> None:
    before, after = own_decisions(case.mask)
    assert torch.equal(before, after)


def behind(mask: TargetMask, length: int) -> tuple[Tensor, Tensor]:
    """The mask of a document alone, and packed behind another of so many tokens."""
    document = ids(4, 100)
    packed = torch.cat([ids(4, length, seed=length), document], dim=1)
    document_ids = (torch.arange(packed.shape[1]) >= length).long().expand_as(packed)
    return mask.drop(document), mask.drop(packed, document_ids)[:, length:]


@masks_that("ends_at_documents")
def test_a_document_has_the_gaps_that_it_has_alone(case: Case) -> None:
    for length in (60, 20, 5):
        alone, packed = behind(case.mask, length)
        assert torch.equal(packed, alone)


@every_mask
def test_a_promise_that_is_not_made_is_not_kept(case: Case) -> None:
    """So that no variant is let off a law that it could keep."""
    if not case.reads_before:
        assert not torch.equal(*own_decisions(case.mask))
    if not case.ends_at_documents:
        assert not torch.equal(*behind(case.mask, 61))
    if not case.reads_tokens:
        assert torch.equal(case.mask.drop(ids(4, 60)), case.mask.drop(ids(4, 60, seed=1)))


@every_mask
def test_a_worker_of_a_loader_has_the_same_mask(case: Case) -> None:
    tokens = ids(4, 60)
    assert torch.equal(pickle.loads(pickle.dumps(case.mask)).drop(tokens), case.mask.drop(tokens))


@masks_that("is_recorded")
def test_a_record_rebuilds_the_mask(case: Case) -> None:
    assert from_json(to_json(case.mask)) == case.mask


@every_mask
def test_a_run_supervises_what_the_mask_keeps(case: Case) -> None:
    """The runtime's objective has every kept id for a target, and ignores the others."""
    tokens = ids(4, 60)
    batch = Batch(tokens=tokens, document_ids=torch.zeros_like(tokens), addresses=(0, 1, 2, 3))
    expected = tokens.masked_fill(case.mask.drop(tokens, batch.document_ids), IGNORE)
    assert torch.equal(NextToken(mask=case.mask).targets(batch), expected[:, 1:])


def with_exempt(name: str, exempt: tuple[int, ...]) -> TargetMask:
    mask = CASES[name].mask
    announced = name.removeprefix("announced ")
    if announced != name:
        return announced_mask(announced, k=K, exempt=exempt)
    assert isinstance(mask, Goldfish)
    return replace(mask, exempt=exempt)


@pytest.mark.parametrize("name", [name for name in CASES if name != "canonical"])
def test_exempt_ids_are_never_left_out_and_change_nothing_else(name: str) -> None:
    tokens = ids(16, 512).remainder(50) + 1
    plain = CASES[name].mask.drop(tokens)
    is_exempt = (tokens == 3) | (tokens == 7)
    assert plain[is_exempt].any()
    assert torch.equal(with_exempt(name, (3, 7)).drop(tokens), plain & ~is_exempt)
