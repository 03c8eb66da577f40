"""The command line, as a person calls it."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fourfold_goldfish import Goldfish, write_indexed
from fourfold_goldfish import __main__ as program
from fourfold_goldfish.dropins.indexed import IndexedTokens
from fourfold_parallel.common.records import Material, read_record
from fourfold_parallel.run.corpora import Documents
from fourfold_parallel.run.models import Llama
from fourfold_parallel.run.tokenizers import BytePairs

TEXT = "\n".join(f"line {i} of a text that goes on, {i * i} words and more" for i in range(60))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two texts and a picture, and a tiny model with its tokenizer."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text("a" + TEXT)
    (folder / "texts" / "b.md").write_text("b" + TEXT)
    (folder / "texts" / "c.png").write_bytes(b"\x89PNG")
    material = Material(name="test", kind="corpus", licence="none", sha256="", source="test")
    tokenizer = (
        BytePairs(vocabulary=300).load(Documents(texts=(TEXT,), material=material)).tokenizer
    )
    tokenizer.save_pretrained(folder / "model")
    shape = {"width": 16, "depth": 1, "heads": 2, "kv_heads": 2, "hidden": 16}
    model = Llama(**shape, vocabulary=300, context=64, tied=True).build(seed=0)
    model.save_pretrained(folder / "model")
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> object:
    """The program, called with words."""

    def call(*words: object) -> None:
        monkeypatch.setattr(sys, "argv", ["fourfold-goldfish", *map(str, words)])
        program.main()

    return call


def test_fourfold_hands_a_package_s_name_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fourfold_parallel import __main__ as everything

    monkeypatch.setattr(sys, "argv", ["fourfold", "goldfish", "--version"])
    everything.main()
    assert capsys.readouterr().out.startswith("fourfold-goldfish ")


def test_a_mask_is_written_beside_its_data(  # type: ignore[no-untyped-def]
    run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the command's own mask."""
    tokens = np.random.default_rng(0).integers(0, 999, 200).astype(np.uint16)
    write_indexed(tmp_path / "corpus", [tokens])
    run("mask", tmp_path / "corpus", "--k", "2", "--context", "3")
    [mask] = IndexedTokens.open(tmp_path / "corpus_goldfish").documents()
    expected = Goldfish(k=2, context=3).drop(tokens[None].astype(np.int64))[0]
    np.testing.assert_array_equal(mask, expected)
    assert "corpus_goldfish.idx" in capsys.readouterr().out


def test_an_audit_prints_its_table(place: Path, run, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    words = ["audit", place / "texts", "--tokenizer", place / "model", "--k", "3"]
    run(*words)
    printed = capsys.readouterr()
    assert "documents                          2\n" in printed.out
    assert "lines re-wrapped" in printed.out
    assert re.search(r"capitals +[\d.]+ +[\d.]+ +2$", printed.out, re.MULTILINE)
    assert "2 text files are read; skipped as no text: 1 .png" in printed.err
    run(*words, "--canonical", "24")
    assert capsys.readouterr().out != printed.out


def test_an_attack_goes_on_where_it_stopped(  # type: ignore[no-untyped-def]
    place: Path, run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Texts in the record are not attacked again; another attack is not mixed into it."""
    out = tmp_path / "attack.jsonl"
    words = ["--model", place / "model", "--prompt", "8", "--suffix", "4", "--out", out]
    run("extract", place / "texts" / "a.txt", *words)
    first = read_record(out).of("passage")
    run("extract", place / "texts", *words, "--batch", "3")
    both = read_record(out).of("passage")
    assert [Path(str(event.values["text"])).name for event in both] == ["a.txt", "b.md"]
    assert both[0] == first[0]
    assert "of 2 texts recited verbatim" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        run("extract", place / "texts", *words, "--beams", "2")
    assert stopped.value.code == 2


def test_a_report_is_a_page_beside_its_record(  # type: ignore[no-untyped-def]
    place: Path, run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a control and without; texts are named without the folder that holds them."""
    words = ["--model", place / "model", "--prompt", "8", "--suffix", "4", "--window", "32"]
    run("report", place / "texts", *words, "--out", tmp_path / "made.html", "--canaries", "1")
    assert "in an order that nobody wrote" in capsys.readouterr().out
    run("report", place / "texts" / "a.txt", *words, "--control", place / "texts" / "b.md",
        "--out", tmp_path / "given.html")  # fmt: skip
    assert "of text that it has not seen" in capsys.readouterr().out
    page = (tmp_path / "given.html").read_text()
    assert ">a.txt " in page
    assert len(read_record(tmp_path / "given.jsonl").of("text", side="control")) == 1
    with pytest.raises(SystemExit) as stopped:
        run("report", place / "texts", *words, "--out", tmp_path / "page")
    assert stopped.value.code == 2


def test_an_attack_says_how_many_texts_were_too_short(  # type: ignore[no-untyped-def]
    place: Path, run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside the share that was recited, of which they are no part."""
    (place / "texts" / "short.txt").write_text("a fish", encoding="utf-8")
    out = tmp_path / "attack.jsonl"
    words = ["--model", place / "model", "--prompt", "8", "--suffix", "4", "--out", out]
    run("extract", place / "texts", *words)
    assert "of 2 texts recited verbatim; 1 of 3 left out, of fewer than 12 tokens; record:" in (
        capsys.readouterr().out
    )


def test_a_figure_is_drawn_from_committed_records(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    results = Path(__file__).parents[1] / "results"
    words = ["--scale", "laptop", "--records", results, "--out", tmp_path]
    run("figure", "rouge-l", *words)
    assert (tmp_path / "rouge-l.svg").read_text() == (results / "rouge-l.svg").read_text()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["figure", "rouge", "--records", "."], "no figure 'rouge' at scale 'smoke'"),
        (["figure", "rouge-l", "--records", "."], "lacks 6 records of scale 'smoke'"),
        (["audit", "nothing.txt", "--tokenizer", "MODEL"], "nothing.txt does not exist"),
        (["audit", "MODEL", "--tokenizer", "MODEL"], "holds no text"),
        (["extract", "TEXTS", "--model", "MODEL", "--prompt", "9000"], "prompt + suffix = 9050"),
        (["extract", "TEXTS", "--model", "MODEL", "--out", "."], "directory"),
        (["audit", "TEXTS", "--tokenizer", "MODEL", "--k", "1"], "k=1"),
        (["audit", "TEXTS", "--tokenizer", "MODEL", "--context", "9000"], "the mask needs 9001"),
        (
            ["train", "tinyllama", "--passages", "TEXTS", "--background", "no", "--weights", "x"],
            "no does not exist",
        ),
    ],
)
def test_mistakes_end_with_a_sentence(  # type: ignore[no-untyped-def]
    words: list[str],
    sentence: str,
    place: Path,
    run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    named = {"TEXTS": place / "texts", "MODEL": place / "model"}
    with pytest.raises(SystemExit) as stopped:
        run(*[named.get(word, word) for word in words])
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err.replace("\n", " ")


WITHOUT = """
import sys
from pathlib import Path

sys.modules["matplotlib"] = None
from fourfold_goldfish.reproduce.experiment import EXPERIMENT

assert EXPERIMENT.stages("smoke") and EXPERIMENT.claims and EXPERIMENT.launches()
import fourfold_goldfish

for name in fourfold_goldfish.__all__:
    getattr(fourfold_goldfish, name)
sys.argv = ["fourfold-goldfish", "figure", "rouge-l", "--records", "."]
from fourfold_goldfish.__main__ import main

main()
"""


def test_figures_alone_need_matplotlib() -> None:
    """Without it the rest of the package works, and the command says how to install it."""
    called = subprocess.run(
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False
    )
    assert called.returncode == 2, called.stderr
    assert "this needs matplotlib" in called.stderr
    assert "pip install 'matplotlib>=" in called.stderr


LIGHT = """
import sys

sys.argv = ["fourfold-goldfish", *sys.argv[1:]]
from fourfold_goldfish.__main__ import main

try:
    main()
finally:
    assert "torch" not in sys.modules
"""


def test_help_lists_every_command_without_heavy_libraries() -> None:
    """So that help and bad arguments are answered at once."""

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", LIGHT, *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    listed = call("--help")
    assert listed.returncode == 0, listed.stderr
    for command in ("audit", "extract", "train", "figure", "reproduce"):
        assert command in listed.stdout
    assert "--canonical" in call("audit", "--help").stdout
    mistaken = call("audit", "texts", "--tokenizer", "x", "--k", "four")
    assert mistaken.returncode == 2
    assert "AssertionError" not in mistaken.stderr
    empty = call("extract", "no-such-folder", "--model", "x")
    assert (empty.returncode, "AssertionError" in empty.stderr) == (2, False)
