"""The recital report: odds from one pass are those of drawing and decoding; what was read is kept."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fourfold_goldfish.memorization.extraction import (
    Greedy,
    Sampling,
    continuation,
    recital_probabilities,
    sample,
)
from fourfold_goldfish.memorization.page import levels_of, shown, tries_of, write_page
from fourfold_goldfish.memorization.personal import (
    Canary,
    canaries,
    chance_bits,
    exposures,
    others,
)
from fourfold_goldfish.memorization.recital import (
    Attacker,
    Reading,
    clustered,
    curve,
    read,
    reordered,
)
from fourfold_goldfish.memorization.report import Inquiry, Report, pieces_of, recital_report
from fourfold_parallel.common.records import Material, read_record
from fourfold_parallel.run.corpora import Documents
from fourfold_parallel.run.models import Llama
from fourfold_parallel.run.tokenizers import BytePairs, encoded

SMALL = Attacker(prompt=4, suffix=5, window=24, sampling=Sampling(top_k=3))
TEXT = "\n".join(
    f"In year {i} Anna Miller wrote to ann.miller{i}@example.org and called {i}30 5550 {i}; no reply."
    for i in range(12)
)


@pytest.fixture(scope="module")
def model():  # type: ignore[no-untyped-def]
    """A model of 13 ids whose logits are far from even."""
    shape = {"width": 16, "depth": 1, "heads": 2, "kv_heads": 2, "hidden": 16}
    built = Llama(**shape, vocabulary=13, context=64, tied=True).build(seed=1).eval()
    with torch.no_grad():
        built.get_output_embeddings().weight.mul_(60)
    return built


@pytest.fixture(scope="module")
def spelled():  # type: ignore[no-untyped-def]
    """A tokenizer and a model of its ids."""
    material = Material(name="test", kind="corpus", licence="none", sha256="", source="test")
    tokenizer = (
        BytePairs(vocabulary=300).load(Documents(texts=(TEXT,), material=material)).tokenizer
    )
    shape = {"width": 16, "depth": 1, "heads": 2, "kv_heads": 2, "hidden": 16}
    return tokenizer, Llama(**shape, vocabulary=300, context=128, tied=True).build(seed=0).eval()


def reading(log_chance: list[float], first: list[bool]) -> Reading:
    return Reading(name="a", log_chance=np.array(log_chance), is_first=np.array(first))


def test_a_window_gives_the_chance_of_every_stretch(model) -> None:  # type: ignore[no-untyped-def]
    """Each stretch's chance is the exact one of drawing it after the text before it in its window."""
    ids = torch.randint(0, 13, (20,), generator=torch.Generator().manual_seed(0))
    [mine] = read(model, {"a": ids.tolist()}, SMALL)
    for start, log_chance in enumerate(mine.stretches(5)):
        [exact] = recital_probabilities(
            model, ids[None, : 4 + start + 5], suffix=5, sampling=SMALL.sampling
        )
        assert math.exp(log_chance) == pytest.approx(float(exact), rel=1e-4)


def test_first_choices_are_what_greedy_decoding_writes(model) -> None:  # type: ignore[no-untyped-def]
    """A text that the model wrote itself is one recital from the prompt on, and its end is found."""
    prompt = torch.tensor([[3, 1, 4, 1]])
    written = continuation(model, prompt, 12, Greedy())[0].tolist()
    wrong = [(written[-1] + 1) % 13, 0, 0]
    ids = [*prompt[0].tolist(), *written[:11], (written[11] + 1) % 13, *wrong]
    [mine] = read(model, {"a": ids}, SMALL)
    assert mine.is_first[:11].all()
    assert not mine.is_first[11]
    assert mine.longest()[0] == 0
    assert mine.longest()[1] == 11


def test_windows_overlap_by_a_prompt_and_miss_no_token(model) -> None:  # type: ignore[no-untyped-def]
    """Texts of any length, read together or apart, have the odds of their own windows."""
    generator = torch.Generator().manual_seed(1)
    texts = {
        str(length): torch.randint(0, 13, (length,), generator=generator).tolist()
        for length in (9, 24, 25, 44, 70)
    }
    together = {mine.name: mine for mine in read(model, texts, SMALL)}
    for name, ids in texts.items():
        [alone] = read(model, {name: ids}, SMALL)
        assert len(alone.log_chance) == len(ids) - 4
        np.testing.assert_allclose(together[name].log_chance, alone.log_chance, atol=1e-4)
    # The second window begins a prompt before its first token.
    [whole], [later] = (read(model, {"a": ids}, SMALL) for ids in (texts["44"], texts["44"][20:]))
    np.testing.assert_allclose(whole.log_chance[20:], later.log_chance, atol=1e-4)


def test_drawing_finds_what_the_chance_promises(model) -> None:  # type: ignore[no-untyped-def]
    """Among 600 samples the share that is verbatim lies within four standard errors of the chance."""
    prompt = torch.tensor([[3, 1, 4, 1]]).expand(600, -1)
    drawn = sample(model, prompt, 3, sampling=SMALL.sampling, seed=0)
    likely = drawn.unique(dim=0, return_counts=True)
    ids = [3, 1, 4, 1, *likely[0][likely[1].argmax()].tolist()]
    [mine] = read(
        model, {"a": ids}, Attacker(prompt=4, suffix=3, window=8, sampling=SMALL.sampling)
    )
    chance = math.exp(mine.stretches(3)[0])
    assert abs(int(likely[1].max()) / 600 - chance) < 4 * math.sqrt(chance * (1 - chance) / 600)


def test_heat_and_cover_are_those_of_the_stretches_around_a_token() -> None:
    """Against loops over every stretch."""
    random = np.random.default_rng(0)
    chances, first = -random.exponential(size=17), random.random(17) < 0.8
    chances[4] = -np.inf
    mine = reading(chances.tolist(), first.tolist())
    stretches = mine.stretches(4)
    for token in range(17):
        around = [start for start in range(14) if start <= token < start + 4]
        assert mine.heat(4)[token] == max(stretches[start] for start in around)
        near = any(first[start : start + 4].sum() >= 3 for start in around)
        assert mine.covered(4, share=0.75)[token] == near
    assert stretches[1] == -np.inf
    assert stretches[5] == pytest.approx(chances[5:9].sum())


def test_a_curve_counts_stretches_by_the_samples_they_take() -> None:
    """Chances of 1, 1/10 and never: one of three at once, two of three after seven samples at p = 1/2."""
    mine = reading([0.0, math.log(0.1), -np.inf], [True, False, False])
    shares = [round(share.value, 3) for share in curve([mine], 1, p=0.5).shares]
    assert shares == [0.333, 0.667, 0.667, 0.667, 0.667, 0.667, 0.667]
    assert [s.value for s in curve([mine], 1, p=0.95).shares][:3] == pytest.approx(
        [1 / 3, 1 / 3, 2 / 3]
    )


def test_trials_of_one_cluster_count_for_fewer() -> None:
    """Alike within clusters: as wide as one trial a cluster. Independent: as narrow as all of them."""
    alike = clustered([10, 0, 0, 10], [10] * 4)
    apart = clustered([5, 5, 5, 5], [10] * 4)
    single = clustered([1, 0, 0, 1], [1] * 4)
    assert alike.high - alike.low > 2 * (apart.high - apart.low)
    assert alike.high - alike.low == pytest.approx(single.high - single.low, rel=0.2)
    nothing = clustered([0] * 20, [10] * 20)
    assert nothing.low == 0
    assert nothing.high == pytest.approx(0.161, abs=0.002)  # Wilson's for 0 of 20


def test_reordered_text_has_the_sentences_and_not_their_order() -> None:
    texts = [f"A{i}. B{i}. C{i}. D{i}. " for i in range(5)]
    made = reordered(texts, seed=0)
    assert sorted("".join(made).split()) == sorted("".join(texts).split())
    assert not set(made) & set(texts)
    assert all(len(text) > 16 for text in made[:-1])


def test_personal_data_is_found_by_kind_and_ranked_among_its_like(spelled) -> None:  # type: ignore[no-untyped-def]
    held = [
        *canaries(
            "a", "Write to Anna Miller, at ann.miller@example.org or +44 20 7946 0958, in 1999."
        )
    ]
    assert [(canary.kind, canary.value) for canary in held] == [
        ("mail", "ann.miller@example.org"),
        ("number", "+44 20 7946 0958"),
        ("name", "Anna Miller"),
    ]
    for canary in (*held, Canary(kind="mail", text="a", value="x@y.org", before="to ")):
        made = others(canary, 9, seed=0)
        assert canary.value not in made
        assert made == others(canary, 9, seed=0)
    tokenizer, model = spelled
    ranked = exposures(model, tokenizer, held, references=15)
    assert all(0 <= canary.bits <= 4 for canary in ranked)
    # By hand: the summed loss of a value in its place, against that of the others.
    [mail] = exposures(model, tokenizer, held[:1], references=15)
    nats = []
    for value in (held[0].value, *others(held[0], 15, seed=0)):
        before = encoded(tokenizer, held[0].before.rstrip())
        ids = torch.tensor([[*before, *encoded(tokenizer, " " + value)]])
        logits = model(input_ids=ids).logits.log_softmax(-1)
        nats.append(
            -logits[0, len(before) - 1 : -1].gather(-1, ids[0, len(before) :, None]).sum().item()
        )
    assert mail.bits == pytest.approx(
        math.log2(16 / (1 + sum(other < nats[0] for other in nats[1:])))
    )


def test_a_value_that_is_unknown_has_the_exposure_of_any_rank() -> None:
    assert chance_bits(1) == 0.5
    assert chance_bits(10_000) == pytest.approx(1 / math.log(2), abs=0.01)


def test_pieces_make_up_the_text(spelled) -> None:  # type: ignore[no-untyped-def]
    tokenizer, _ = spelled
    text = "Straße – 東京 \n\n ends here  "
    pieces = pieces_of(tokenizer, text)
    assert "".join(pieces) == text
    assert len(pieces) == len(encoded(tokenizer, text))


def test_levels_are_samples_at_even_odds() -> None:
    chances = np.log([0.6, 0.5, 0.4, 0.067, 0.06, 0.0007, 0.0006, 1e-6, 1e-7])
    assert levels_of(chances).tolist() == [4, 4, 3, 3, 2, 2, 1, 1, 0]
    assert [tries_of(math.log(chance)) for chance in (0.7, 0.1, 1e-9)] == [
        "1 try",
        "7 tries",
        "10^9 tries",
    ]
    assert tries_of(-math.inf) == "never"


def test_a_report_goes_on_where_it_was_and_shows_every_text(spelled, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    tokenizer, model = spelled
    texts = {"a.txt": TEXT, "b <b>.txt": TEXT[::-1], "c.txt": "too short"}
    asked = {
        "name": "folder/toy",
        "record": tmp_path / "r.jsonl",
        "attacker": SMALL,
        "canaries_of_a_kind": 2,
    }
    made = recital_report(model, tokenizer, texts, **asked)
    assert made.too_short == 1
    assert made.name == "toy"
    assert made.verdict == "recites nothing"
    lines = (tmp_path / "r.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "r.jsonl").write_text("".join(lines[:3]) + lines[3][:20])

    def forbidden(**_: object) -> None:
        raise AssertionError("a text is read twice")

    again = recital_report(model, tokenizer, texts, **asked)
    assert len(read_record(tmp_path / "r.jsonl").events) == len(lines)
    model.forward, forward = forbidden, model.forward
    try:
        thrice = recital_report(model, tokenizer, texts, **asked)
    finally:
        model.forward = forward
    for other in (again, thrice):
        assert other.sentence == made.sentence
        np.testing.assert_allclose(
            other.readings["texts"][0].log_chance, made.readings["texts"][0].log_chance, atol=1e-4
        )
        assert [c.bits for c in other.exposed["texts"]] == pytest.approx(
            [c.bits for c in made.exposed["texts"]]
        )
    write_page(made, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "b &lt;b&gt;.txt" in page
    assert "1 texts are left out" in page
    first = shown(made.readings["texts"][0], made)
    assert "".join(span.characters for span in first.spans) == TEXT
    with pytest.raises(ValueError, match="another inquiry"):
        recital_report(model, tokenizer, texts, **{**asked, "canaries_of_a_kind": 1})


def test_what_cannot_be_asked_is_refused(model) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="use 100 or more"):
        Attacker(window=60)
    with pytest.raises(ValueError, match="fewer than prompt"):
        [*read(model, {"a": [1, 2, 3]}, SMALL)]


def told(texts: list[Reading], control: list[Reading]) -> Report:
    """A report of made-up readings, in stretches of five tokens."""
    inquiry = Inquiry(model="m", attacker=SMALL, control="given", canaries=0, seed=0)
    sides = {"texts": tuple(texts), "control": tuple(control)}
    return Report(
        inquiry=inquiry, parameters=1, texts={}, pieces={}, readings=sides, exposed={}, too_short=0
    )


def test_the_verdict_is_recital_only_beyond_the_control() -> None:
    """Nine of twelve texts against none of twelve; one of twelve; as many on either side; none."""
    known = reading([-0.01] * 10, [True] * 10)
    unknown = reading([-np.inf] * 10, [False] * 10)
    for recited, unseen, verdict in (
        (9, 0, "recites"),
        (1, 0, "not told apart"),
        (9, 9, "not told apart"),
        (0, 0, "recites nothing"),
    ):
        report = told(
            [known] * recited + [unknown] * (12 - recited),
            [known] * unseen + [unknown] * (12 - unseen),
        )
        assert report.verdict == verdict
        assert f"for {2 * recited} of 24 stretches" in report.sentence
        assert f"somewhere in {recited} of 12 texts" in report.sentence


def test_of_a_book_the_warm_parts_are_shown_and_the_rest_is_counted() -> None:
    """Every token is either shown or in a gap whose size is said; a cold book is shown from its beginning."""
    book = reading([-9.0] * 4996, [False] * 4996)
    book.log_chance[2000:2010] = 0.0
    pieces = {"a": tuple(f"{place} " for place in range(5000))}
    report = told([book], [book])
    spans = shown(book, replace(report, pieces=pieces)).spans
    kept = "".join(span.characters for span in spans if span.level != -2).split()
    gaps = [
        int(span.characters.strip(" []").split()[0].replace(",", ""))
        for span in spans
        if span.level == -2
    ]
    assert len(kept) + sum(gaps) == 5000
    assert len(gaps) == 2
    assert {"2004", "2013", "1950", "2060"} <= set(kept)
    cold = reading([-9.0] * 4996, [False] * 4996)
    spans = shown(cold, replace(report, pieces=pieces)).spans
    assert "".join(span.characters for span in spans).split()[:3] == ["0", "1", "2"]
    assert spans[-1].characters == " [2,000 tokens] "
