"""The report of a toy with a planted outlier, and the command that prints it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fourfold_outliers import commands
from fourfold_outliers.frequency import counted
from fourfold_outliers.page import write_page
from fourfold_outliers.report import Report, delimiters_of, outlier_report
from fourfold_outliers.stream import documents
from fourfold_parallel.common.records import Material
from fourfold_parallel.run.corpora import Documents
from fourfold_parallel.run.models import Llama
from fourfold_parallel.run.tokenizers import BytePairs, encoded

PLANTED = 11
WORDS = "the grid holds four axes, and every axis carries one kind of split; of the work it does."


def texts() -> list[str]:
    words = WORDS.split()
    return [
        " ".join(words[(i * i + 7 * i * document + document) % len(words)] for i in range(300))
        for document in range(9)
    ]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    material = Material(name="t", kind="corpus", licence="none", sha256="0", source="here")
    corpus = Documents(texts=tuple(texts()), material=material)
    return BytePairs(vocabulary=300).load(corpus).tokenizer


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    built = Llama(
        width=32, depth=4, heads=2, kv_heads=2, hidden=48, vocabulary=300, context=64, tied=False
    ).build(seed=0)
    with torch.no_grad():
        built.get_input_embeddings().weight[:, PLANTED] = 2.0
    return built.eval()


@pytest.fixture(scope="module")
def made(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Report:
    return outlier_report(
        model, tokenizer, texts(), name="toy", corpus="words", tokens=600, context=40
    )


def test_the_planted_coordinate_is_reported_with_all_that_is_asked(made: Report) -> None:
    assert made.outliers == (PLANTED,)
    assert [layer.layer for layer in made.layers] == [0, 1, 2, 3, 4]
    inner = made.layers[1:-1]
    assert all(PLANTED in layer.outliers for layer in inner)
    assert all(layer.contributions[str(PLANTED)] > 0.5 for layer in inner)
    assert all(layer.cosine > 0.9 and layer.without < layer.cosine for layer in inner)
    assert all(0 < layer.isotropy <= 1 and 0 < layer.isotropy_without <= 1 for layer in inner)
    assert [each.coordinates for each in made.effects] == [(PLANTED,)]
    assert all(PLANTED not in each.coordinates for each in made.random)
    assert made.as_it_is.rise.value == 0
    assert made.tokens == 15 * 39
    assert f"Of 32 coordinates, {PLANTED} is far from the others" in made.sentence


def test_the_command_prints_a_table_or_json_and_writes_a_page(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    made: Report,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    files = []
    for number, text in enumerate(texts()):
        files.append(tmp_path / f"{number}.txt")
        files[-1].write_text(text)
    options = {"text": tuple(files), "tokens": 600, "context": 40, "out": tmp_path / "page.html"}
    commands.report(str(tmp_path / "m"), **options)
    table = capsys.readouterr().out
    assert "3 of 3" in table
    assert table.count("%") > 5
    commands.report(str(tmp_path / "m"), **options, json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["outliers"] == [PLANTED]
    assert told["layers"][2]["cosine"] == pytest.approx(made.layers[2].cosine, abs=1e-6)
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 3
    assert made.sentence.partition(".")[0].partition("toy")[2] in page


def test_a_model_without_outliers_is_reported_too(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    plain = Llama(
        width=32, depth=2, heads=2, kv_heads=2, hidden=48, vocabulary=300, context=64, tied=True
    ).build(seed=0)
    told = outlier_report(
        plain.eval(), tokenizer, texts(), name="plain", corpus="words", tokens=400, context=40
    )
    assert told.outliers == told.links == told.effects == told.random == ()
    assert told.sentence.startswith("No coordinate of plain is an outlier")
    write_page(told, tmp_path / "plain.html")
    assert "No coordinate" in (tmp_path / "plain.html").read_text()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"text": (Path("gone.txt"),)}, "--text gone.txt is no file"),
        ({"context": 8}, "--context 8 of --tokens 8192; use 32 to 8192"),
        ({"out": Path("page.txt")}, "--out page.txt is no page"),
    ],
)
def test_mistakes_are_answered_before_anything_is_read(options: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        commands.report("smollm2", **options)


def test_windows_are_of_every_document_in_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    """The first window of each before the second of any; windows of few texts count as documents."""
    read = documents(tokenizer, texts(), tokens=40 * 11, context=40)
    assert read.of == (*range(9), 0, 1)
    second = encoded(tokenizer, texts()[0])[40:80]
    assert read.ids[9].tolist() == second
    few = documents(tokenizer, texts()[:2], tokens=40 * 6, context=40)
    assert few.of == tuple(range(6))
    with pytest.raises(ValueError, match="no text has 40 tokens"):
        documents(tokenizer, ["short"], tokens=400, context=40)


def test_delimiters_are_ids_of_marks_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    marks = delimiters_of(tokenizer, 310)
    told = {str(tokenizer.decode([i])) for i in torch.nonzero(marks).flatten().tolist()}
    assert {".", ",", ";", "\n"} <= told
    assert not {" ", "the", "a"} & told
    assert counted([np.asarray(encoded(tokenizer, "a;"))], 310)[marks.numpy()].sum() == 1
