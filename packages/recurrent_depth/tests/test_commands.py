"""The command line trains on a text and leaves what transformers reads; mistakes get a sentence."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fourfold_parallel.reproduce import cli
from fourfold_recurrent_depth import RecurrentDepthForCausalLM, commands


def call(*words: str) -> None:
    cli.main("recurrent_depth", {"train": commands.train}, words)


def test_a_text_becomes_a_model_that_generates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps on a text; the folder holds weights, configuration and tokenizer."""
    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path / "cache"))
    text, out = tmp_path / "mine.txt", tmp_path / "model"
    text.write_text("to think is to iterate. " * 2000)
    call("train", "tiny", "--text", str(text), "--steps", "2", "--out", str(out))
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
    ],
)
def test_what_cannot_be_trained_is_refused(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        call("train", "tiny", *words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
