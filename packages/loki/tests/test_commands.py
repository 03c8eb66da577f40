"""The commands on a small model and a text of one's own."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from fourfold_loki import Basis
from fourfold_loki.__main__ import COMMANDS
from fourfold_parallel.reproduce import cli
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


def run(*words: str) -> None:
    cli.main("loki", COMMANDS, words)


def call(place: Path, command: str, *more: str, tokens: int = 256, context: int = 64) -> None:
    texts = [str(text) for text in sorted(place.glob("text-*.txt"))]
    sizes = ["--tokens", str(tokens), "--context", str(context)]
    run(command, str(place), "--text", *texts, *sizes, *more)


@pytest.fixture(scope="module")
def basis(place: Path) -> str:
    file = place / "basis.safetensors"
    call(place, "calibrate", "--out", str(file))
    return str(file)


def test_a_calibration_is_a_file_and_its_rank_a_table(
    place: Path, basis: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Basis.load(basis).layers == 2
    call(place, "rank")
    told = capsys.readouterr()
    assert "before rotary" in told.out
    assert "calibrating" in told.err


def test_the_doctor_says_what_it_sees_and_what_to_do(
    place: Path, basis: str, capsys: pytest.CaptureFixture[str]
) -> None:
    call(place, "doctor", "--basis", basis, "--page", "4", "--share", "0.1")
    told = capsys.readouterr().out
    assert "of the attention mass, mean over layers; exact ranking" in told
    assert "larger --share" in told
    assert f"Measure it: python -m fourfold_loki ppl {place} --basis {basis} --share 0.1" in told


def test_a_budget_of_everything_costs_nothing(
    place: Path, basis: str, capsys: pytest.CaptureFixture[str]
) -> None:
    call(place, "ppl", "--basis", basis, "--share", "1.0")
    told = capsys.readouterr().out
    assert "128 tokens after prompts of 32" in told
    [row] = [line.split() for line in told.splitlines() if line.startswith("loki")]
    assert float(row[2].rstrip("%")) == 0
    call(
        place,
        *("passkey", "--basis", basis, "--share", "1.0", "--passkeys", "12", "34"),
        tokens=2048,
        context=192,
    )
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    full, ours = (
        next(row[1:] for row in rows if row and row[0] == arm) for arm in ("full", "loki")
    )
    assert full == ours


def test_what_autotune_says_the_other_commands_take(
    place: Path, basis: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its standard output is their options, word for word."""
    call(place, "autotune", "--basis", basis, "--page", "4", "--max-loss", "400")
    told = capsys.readouterr()
    assert told.out.split() == ["--share", "0.0625", "--divisor", "8", "--page", "4"]
    assert "reads" in told.err
    call(place, "ppl", "--basis", basis, *told.out.split())
    assert "loki" in capsys.readouterr().out


QUESTIONS = """\
task: words
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["keys", "tokens"]
doc_to_target: 0
metric_list: [{metric: acc}]
"""


def test_a_task_of_local_text_and_one_by_name(
    place: Path, basis: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both arms, on lm-evaluation-harness's own terms; of a budget of everything, alike."""
    pytest.importorskip("lm_eval", reason="needs lm-eval, the extra [evaluation] of this package")
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "few of them tell which"}\n' * 3)
    (tmp_path / "words.yaml").write_text(QUESTIONS.replace("QUESTIONS", str(questions)))
    call(
        place,
        *("tasks", "--basis", basis, "--share", "1.0", "--task", "continuations", "words"),
        *("--include", str(tmp_path), "--questions", "2"),
    )
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    for task in ("continuations", "words"):
        [row] = [row for row in rows if row[:2] == [task, "acc"]]
        assert row[2] == row[3]
        assert row[4] == "2"
    with pytest.raises(SystemExit):
        call(place, "tasks", "--basis", basis, "--task", "no-such-task")
    assert "'no-such-task' is none of lm-eval's" in capsys.readouterr().err


def test_the_bench_prints_what_bytes_say(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Dense reads 2 D numbers a key, Loki d and a share of them: 32 to 4 + 8."""
    run("bench", str(place), "--lengths", "64", "--page", "4", "--seconds", "0.1")
    told = capsys.readouterr().out
    [row] = [line for line in told.splitlines() if line.startswith("64 ")]
    assert row.split()[-1] == "2.67"
    assert "H100" in told


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["calibrate", "/nowhere"], "/nowhere is no folder"),
        (["ppl", "m", "--basis", "gone.st"], "calibrate m --out gone.st"),
        (["ppl", "m", "--share", "0"], "--share 0.0 of the keys"),
        (["ppl", "m", "--text", "gone.txt"], "--text gone.txt is no file"),
        (["ppl", "m", "--tokens", "8"], "--context 1024 of --tokens 8"),
        (["calibrate", "m", "--out", "/"], "--out / is a folder"),
        (["bench", "m", "--lengths", "16"], "less than a page of 16"),
        (["autotune", "m", "--max-loss", "0"], "--max-loss 0.0 allows no loss"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_what_is_wrong_is_said_before_anything_heavy_is_imported(
    words: list[str], answer: str
) -> None:
    """In one line, with status 2; a process of its own shows what it imported."""
    script = (
        "import sys, fourfold_loki.__main__ as app\n"
        "try: app.main()\n"
        "finally: print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert answer in " ".join(done.stderr.split())
    assert done.stdout.split() == ["False"]


def test_a_text_that_is_too_short_is_said(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        call(place, "calibrate", "--out", str(place / "b"), tokens=10**6)
    assert stopped.value.code == 2
    assert "give more text or fewer tokens" in capsys.readouterr().err


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 0
    listed = capsys.readouterr().out
    assert all(f"• {name} " in listed for name in COMMANDS)


def test_the_fair_table_is_printed_and_drawn(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every method in a row, within a percent of its bytes where its amount is fixed."""
    chart = tmp_path / "chart.svg"
    options = ("--windows", "2", "--scored", "16", "--chart", str(chart))
    call(place, "table", "--lengths", "128", "--shares", "0.4", *options)
    told = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in told.splitlines() if "0.4000" in line}
    assert {"oracle", "loki", "pqcache", "hash-attention", "streaming", "h2o"} <= set(rows)
    for name in ("oracle", "loki", "streaming", "double-sparsity"):
        assert float(rows[name][1]) == pytest.approx(0.4, rel=0.01)
    assert "</svg>" in chart.read_text()
    with pytest.raises(SystemExit):
        call(place, "table", "--lengths", "16", "--scored", "16")
