"""The texts and models that a person names."""

import json
from pathlib import Path

import pytest

from fourfold_goldfish.inputs import Texts
from fourfold_parallel.common.values import from_json, to_json


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two plain texts, one in a folder below, three JSON lines, and three files that are no text."""
    (tmp_path / "below").mkdir()
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "below" / "b.MD").write_text("# second")
    lines = [json.dumps({"text": f"line \u2028 {n}", "body": f"body {n}"}) for n in range(2)]
    (tmp_path / "c.jsonl").write_text("\n\n".join(lines) + "\n")
    for name in ("x.pdf", "y.pdf", "z.png"):
        (tmp_path / name).write_bytes(b"\xff\xd8")
    return tmp_path


def test_plain_files_are_documents_and_so_is_each_json_line(folder: Path) -> None:
    texts = Texts(paths=(folder,))
    assert [text.content for text in texts.read()] == [
        "first",
        "# second",
        "line \u2028 0",
        "line \u2028 1",
    ]
    assert [text.name for text in texts.read()][2:] == [
        f"{folder / 'c.jsonl'}:1",
        f"{folder / 'c.jsonl'}:3",
    ]
    assert texts.skipped() == "2 .pdf, 1 .png"
    other = Texts(paths=(folder / "c.jsonl",), field="body")
    assert [text.content for text in other.read()] == ["body 0", "body 1"]


def test_a_path_may_be_a_string_and_a_run_s_record_rebuilds_the_corpus(folder: Path) -> None:
    named, given = Texts(paths=(str(folder),)), Texts(paths=(folder,))
    assert named.read() == given.read()
    assert from_json(to_json(given)) == named
    documents = given.load()
    assert documents.texts == tuple(text.content for text in named.read())
    assert documents.material.sha256 == named.load().material.sha256
    (folder / "a.txt").write_text("edited")
    assert documents.material.sha256 != named.load().material.sha256


def test_what_holds_no_text_is_named(folder: Path) -> None:
    (folder / "empty").mkdir()
    (folder / "pictures").mkdir()
    (folder / "z.png").rename(folder / "pictures" / "z.png")
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    (folder / "broken.jsonl").write_text('{"text": "x"}\n{"text": \n')
    for paths, words in (
        (("nowhere",), "nowhere does not exist"),
        ((folder / "empty",), r"empty holds no text .*, but no file at all"),
        ((folder / "pictures",), r"pictures holds no text .*, but 1 \.png"),
        ((), "no paths are given"),
        ((folder / "latin.txt",), "latin.txt is not UTF-8 text"),
        ((folder / "broken.jsonl",), r"broken\.jsonl:2 is not JSON"),
    ):
        with pytest.raises(ValueError, match=words):
            Texts(paths=paths).read()
    with pytest.raises(ValueError, match="no text in field 'content'; it has text, body"):
        Texts(paths=(folder / "c.jsonl",), field="content").read()
    with pytest.raises(ValueError, match="is one path; give a tuple"):
        Texts(paths=str(folder))  # type: ignore[arg-type]
