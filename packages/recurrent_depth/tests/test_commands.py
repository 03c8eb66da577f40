"""The command line trains on a text and leaves what transformers reads; mistakes get a sentence."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fourfold_parallel.common.records import read_record
from fourfold_parallel.reproduce import cli
from fourfold_parallel.run.optimizer import AdamW
from fourfold_parallel.run.recipe import Run
from fourfold_recurrent_depth import RecurrentDepthForCausalLM, commands


def call(*words: str) -> None:
    cli.main("recurrent_depth", {"train": commands.train}, words)


def test_a_text_becomes_a_model_that_generates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps on a text, with fields set; the folder holds weights, configuration and tokenizer."""
    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path / "cache"))
    text, out = tmp_path / "mine.txt", tmp_path / "model"
    text.write_text("to think is to iterate. " * 2000)
    marks = ["seed=5", "optimizer.beta1=0.8"]
    words = ["--text", str(text), "--steps", "2", "--set", *marks, "--out", str(out)]
    call("train", "tiny", *words)
    record = read_record(out / "record.jsonl")
    assert record.events[0].values["overrides"] == marks
    assert isinstance(record.run, Run)
    assert isinstance(record.run.optimizer, AdamW)
    assert (record.run.seed, record.run.optimizer.beta1) == (5, 0.8)
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    assert isinstance(model, RecurrentDepthForCausalLM)
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    prompt = tokenizer("to think", return_tensors="pt").input_ids
    made = model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.is_tensor(made)
    assert made.shape == (1, prompt.shape[1] + 4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--text", "nowhere.txt"), "no such files"),
        (("--text", "nowhere.txt", "--steps", "0"), "--steps 0"),
        (("--text", __file__, "--set", "optimizer.speed=1"), "AdamW has no field 'speed'"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        call("train", "tiny", *words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
