"""Near-duplicates: the same gaps in texts that say the same."""

import math
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch

from fourfold_goldfish import Goldfish
from fourfold_goldfish.canonical import CanonicalGoldfish, Spelling, canonical
from fourfold_goldfish.corpus_audit import PERTURBATIONS, audit, table
from fourfold_goldfish.reproduce.recipes import AUTHORS
from fourfold_parallel.common.records import Material
from fourfold_parallel.run.corpora import Documents
from fourfold_parallel.run.tokenizers import BytePairs


@pytest.fixture(scope="module")
def material() -> tuple[tuple[str, ...], Any, Spelling]:
    """40 pieces of 3,000 characters of Python's manual, with line breaks, and a tokenizer of 4,096 ids."""
    whole = tuple(text for _, text in sorted(topics.items()))
    source = Material(
        name="topics", kind="corpus", licence="PSF-2.0", sha256="", source="pydoc_data"
    )
    documents = Documents(texts=whole, material=source)
    tokenizer = BytePairs(vocabulary=4096).load(documents).tokenizer
    long = [text[:3000] for text in whole if len(text) >= 3000][:40]
    return tuple(long), tokenizer, Spelling.of(tokenizer)


def ids(tokenizer: Any, text: str) -> torch.Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_the_spelling_of_a_text_is_its_letters_and_digits(
    material: tuple[tuple[str, ...], Any, Spelling],
) -> None:
    """However it is cut into tokens."""
    texts, tokenizer, spelling = material
    for text in texts[:5]:
        characters, lengths = spelling.characters(ids(tokenizer, text))
        if text.isascii():
            assert "".join(map(chr, characters.tolist())) == canonical(text)
        assert int(lengths.sum()) == len(characters)
    assert canonical("Don’t\n wrap - THIS_1") == "dontwrapthis1"


def test_the_mask_is_decided_by_the_canonical_characters_before_a_target(
    material: tuple[tuple[str, ...], Any, Spelling],
) -> None:
    """An oracle in loops: equal histories of 24 characters, equal decisions, in any of the texts."""
    texts, tokenizer, spelling = material
    mask = CanonicalGoldfish(k=3, characters=24, spelling=spelling)
    decisions: dict[str, bool] = {}
    for text in texts[:4]:
        for copy in (text, text.upper(), text.replace("\n", " ")):
            tokens = ids(tokenizer, copy)
            dropped = mask.drop(tokens[None])[0].tolist()
            history = ""
            for token, drop in zip(tokens.tolist(), dropped, strict=True):
                window = history[-24:]
                assert decisions.setdefault(window, drop) == drop
                history += canonical(tokenizer.decode([token]))
            assert not dropped[0]
    share = sum(decisions.values()) / len(decisions)
    # Five standard errors of as many decisions as there are histories.
    assert abs(share - 1 / 3) < 5 * math.sqrt(2 / 9 / len(decisions))


def test_near_duplicates_give_nothing_away(
    material: tuple[tuple[str, ...], Any, Spelling],
) -> None:
    """What a hash of ids hides, an altered copy teaches; of what ours hides, under 0.05."""
    texts, tokenizer, spelling = material
    mask = CanonicalGoldfish(k=4, characters=24, spelling=spelling)
    names = (
        "exact copy",
        "lines re-wrapped",
        "blanks doubled",
        "capitals",
        "1 % of letters mistyped",
    )
    published, ours = (
        {
            leak.perturbation: leak
            for leak in audit(texts[:15], tokenizer, audited, perturbations=names).leaks
        }
        for audited in (AUTHORS, mask)
    )
    for name in ("lines re-wrapped", "blanks doubled", "capitals"):
        assert published[name].leaked > 0.4, name
        assert ours[name].leaked < 0.05, name
    assert published["exact copy"].leaked == ours["exact copy"].leaked == 0
    # Typing errors change what is said: a share e of them breaks 1 - (1 - e)^24 of the windows.
    assert 0 < ours["1 % of letters mistyped"].leaked < 0.3


def test_an_audit_counts_what_it_says(material: tuple[tuple[str, ...], Any, Spelling]) -> None:
    """Rate, cost, longest run and correlation, recomputed in plain loops."""
    texts, tokenizer, _ = material
    mask = Goldfish(k=4, context=13)
    audited = audit(texts[:6], tokenizer, mask, perturbations=())
    rows = [mask.drop(ids(tokenizer, text)[None])[0].tolist()[1:] for text in texts[:6]]
    flat = [drop for row in rows for drop in row]
    assert (audited.documents, audited.tokens) == (6, len(flat))
    assert audited.rate == pytest.approx(sum(flat) / len(flat))
    assert audited.cost == pytest.approx(len(flat) / (len(flat) - sum(flat)))
    runs = ["".join("x" if drop else "." for drop in row).split("x") for row in rows]
    assert audited.longest_run == max(len(run) for row in runs for run in row)
    assert abs(audited.correlation) < 0.1
    assert "left out" in table(audited)


def test_texts_too_short_for_a_mask_are_refused_or_counted(
    material: tuple[tuple[str, ...], Any, Spelling],
) -> None:
    texts, tokenizer, _ = material
    with pytest.raises(ValueError, match="the mask needs 14"):
        audit(["one two"], tokenizer, Goldfish(k=4, context=13))
    with pytest.raises(ValueError, match="a single text"):
        audit("one two", tokenizer, Goldfish(k=4, context=13))
    audited = audit(["one two", texts[0]], tokenizer, Goldfish(k=4, context=13))
    assert audited.unprotected_documents == 0.5
    assert len(audited.leaks) == len(PERTURBATIONS)


def test_ids_of_another_tokenizer_are_refused(
    material: tuple[tuple[str, ...], Any, Spelling],
) -> None:
    mask = CanonicalGoldfish(k=4, characters=24, spelling=material[2])
    with pytest.raises(ValueError, match="ids 5 to 5000, the spelling has 4096"):
        mask.drop(torch.tensor([[5, 5000]]))
