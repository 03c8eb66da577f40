"""The command line, as a person calls it."""

import subprocess
import sys
from pathlib import Path

import pytest

from fourfold_goldfish.commands import run
from fourfold_parallel.common.records import Material, read_record
from fourfold_parallel.run.corpora import Documents
from fourfold_parallel.run.models import Llama
from fourfold_parallel.run.tokenizers import BytePairs

TEXT = "\n".join(f"line {i} of a text that goes on, {i * i} words and more" for i in range(60))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two texts, and a tiny model with its tokenizer."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "texts").mkdir()
    for name in ("a", "b"):
        (folder / "texts" / f"{name}.txt").write_text(name + TEXT)
    material = Material(name="test", kind="corpus", licence="none", sha256="", source="test")
    tokenizer = (
        BytePairs(vocabulary=300).load(Documents(texts=(TEXT,), material=material)).tokenizer
    )
    tokenizer.save_pretrained(folder / "model")
    shape = {"width": 16, "depth": 1, "heads": 2, "kv_heads": 2, "hidden": 16}
    model = Llama(**shape, vocabulary=300, context=64, tied=True).build(seed=0)
    model.save_pretrained(folder / "model")
    return folder


def test_an_audit_prints_its_table(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(place / "texts"), "--tokenizer", str(place / "model"), "--k", "3"]
    run("audit", words)
    tokens = capsys.readouterr().out
    assert "documents                          2\n" in tokens
    assert "lines re-wrapped" in tokens
    run("audit", [*words, "--canonical", "24"])
    assert capsys.readouterr().out != tokens


def test_an_attack_goes_on_where_it_stopped(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Texts in the record are not attacked again; another attack is not mixed into it."""
    out = tmp_path / "attack.jsonl"
    words = ["--model", str(place / "model"), "--prompt", "8", "--suffix", "4", "--out", str(out)]
    run("extract", [str(place / "texts" / "a.txt"), *words])
    first = read_record(out).of("passage")
    run("extract", [str(place / "texts"), *words])
    both = read_record(out).of("passage")
    assert [str(event.values["text"])[-5:] for event in both] == ["a.txt", "b.txt"]
    assert both[0] == first[0]
    assert "of 2 texts recited verbatim" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        run("extract", [str(place / "texts"), *words, "--beams", "2"])
    assert stopped.value.code == 2


def test_a_figure_is_drawn_from_committed_records(tmp_path: Path) -> None:
    results = Path(__file__).parents[1] / "results"
    scale = "laptop" if (results / "k32-seed0.jsonl").exists() else "smoke"
    run("figure", ["rouge-l", "--scale", scale, "--records", str(results), "--out", str(tmp_path)])
    assert (tmp_path / "rouge-l.svg").read_text() == (results / "rouge-l.svg").read_text()


@pytest.mark.parametrize(
    ("command", "words", "sentence"),
    [
        ("figure", ["rouge", "--records", "."], "no figure 'rouge' at scale 'smoke'"),
        ("figure", ["rouge-l", "--records", "."], "lacks 6 records of scale 'smoke'"),
        ("audit", ["nothing.txt", "--tokenizer", "MODEL"], "nothing.txt"),
        ("extract", ["TEXTS", "--model", "MODEL", "--prompt", "9000"], "prompt + suffix = 9050"),
        ("audit", ["TEXTS", "--tokenizer", "MODEL", "--k", "1"], "k=1"),
        ("audit", ["TEXTS", "--tokenizer", "MODEL", "--context", "9000"], "the mask needs 9001"),
    ],
)
def test_mistakes_end_with_a_sentence(
    command: str,
    words: list[str],
    sentence: str,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    named = {"TEXTS": str(place / "texts"), "MODEL": str(place / "model")}
    with pytest.raises(SystemExit) as stopped:
        run(command, [named.get(word, word) for word in words])
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err.replace("\n", " ")


def test_the_module_lists_its_commands() -> None:
    called = subprocess.run(
        [sys.executable, "-m", "fourfold_goldfish", "audit", "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert called.returncode == 0
    assert "--canonical CHARACTERS" in called.stdout
