"""The commands on a small model and a text of one's own."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from fourfold_loki import Basis
from fourfold_loki.commands import main
from fourfold_parallel.run.corpora import TextFiles
from fourfold_parallel.run.tokenizers import BytePairs

TEXT = "keys of attention span few dimensions and a few of them tell which tokens matter"
WORDS = tuple(TEXT.split())


@pytest.fixture(scope="module")
def place(
    make_llama: Callable[..., PreTrainedModel], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with a model, its tokenizer and two texts."""
    folder = tmp_path_factory.mktemp("model")
    texts = []
    for number in range(2):
        words = [WORDS[(i * i + 3 * i * number) % len(WORDS)] for i in range(1500)]
        texts.append(folder / f"text-{number}.txt")
        texts[-1].write_text(" ".join(words))
    corpus = TextFiles(paths=tuple(str(text) for text in texts), licence="made here")
    tokenizer = BytePairs(vocabulary=280).load(corpus.load()).tokenizer
    model = make_llama()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def call(place: Path, command: str, *more: str, tokens: int = 256, context: int = 64) -> None:
    texts = [str(text) for text in sorted(place.glob("text-*.txt"))]
    sizes = ["--tokens", str(tokens), "--context", str(context)]
    main([command, str(place), "--text", *texts, *sizes, *more])


def test_from_calibration_to_a_setting(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """calibrate, rank, doctor, ppl, passkey, autotune: each prints what the next one needs."""
    file = place / "basis.safetensors"
    call(place, "calibrate", "--out", str(file))
    assert Basis.load(file).layers == 2
    call(place, "rank")
    assert "before" in capsys.readouterr().err
    basis = ("--basis", str(file), "--page", "4")
    call(place, "doctor", *basis)
    assert "least attention mass" in capsys.readouterr().err
    call(place, "ppl", *basis, "--share", "0.5")
    assert "128 tokens after prompts of 32" in capsys.readouterr().err
    call(
        place,
        "passkey",
        *basis,
        "--share",
        "1.0",
        "--passkeys",
        "12",
        "34",
        tokens=2048,
        context=192,
    )
    rows = [line.split() for line in capsys.readouterr().err.splitlines()]
    full, ours = (
        next(row[1:] for row in rows if row and row[0] == arm) for arm in ("full", "loki")
    )
    assert full == ours  # everything is read
    call(place, "autotune", *basis, "--max-loss", "400")
    assert "use Share(of_visible=0.0625)" in capsys.readouterr().err


def test_the_bench_prints_what_bytes_say(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Dense reads 2 D numbers a key, Loki d and a share of them: 32 to 4 + 8."""
    main(["bench", str(place), "--lengths", "64", "--page", "4"])
    told = capsys.readouterr().err
    [row] = [line for line in told.splitlines() if line.startswith("64 ")]
    assert row.split()[-1] == "2.67"
    assert "H100" in told


def test_what_is_wrong_is_said_in_one_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        call(place, "calibrate", "--out", str(place / "b"), tokens=10**6)
    assert stopped.value.code == 2
    assert "give more text or fewer tokens" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["rank", str(place / "no-such-model"), "--text", str(place / "text-0.txt")])
    assert stopped.value.code == 2
    assert "no-such-model" in capsys.readouterr().err
