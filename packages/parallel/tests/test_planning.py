"""`fourfold plan`: the table, the page, the trace, the launch lines, and the engine of a plan."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from fourfold_parallel import Fourfold
from fourfold_parallel.__main__ import main
from fourfold_parallel.plan.job import Layout
from fourfold_parallel.planning.jobs import layout_of
from fourfold_parallel.testing.ranks import run_on_ranks

CONFIG = {
    "model_type": "llama", "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4,
    "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 32000,
}  # fmt: skip


def plan(monkeypatch: pytest.MonkeyPatch, folder: Path, *words: str) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    common = [
        "--model", str(folder / "config.json"), "--batch", "64", "--sequence", "2048",
        "--page", str(folder / "plan.html"), "--trace", str(folder / "plan.trace.json"),
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["fourfold", "plan", *common, *words])
    main()


def test_a_plan_is_a_table_a_page_and_a_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the reasons asked for, and the lines that start the winner."""
    plan(
        monkeypatch, tmp_path, "--machine", "dgx-h100", "--gpus", "16", "--launch",
        "--why-not", "col=16", "row=16",
    )  # fmt: skip
    shown = capsys.readouterr().out
    assert "tokens a second" in shown
    assert "waiting for col" in shown
    assert "key and value heads" in shown or "s a step more" in shown
    assert "torchrun --nnodes 2" in shown
    assert "engine=Fourfold(" in shown
    page = (tmp_path / "plan.html").read_text()
    assert "How firm is this?" in page
    assert not re.search(r"""(src|href)="https?:""", page)  # one file, nothing fetched
    trace = json.loads((tmp_path / "plan.trace.json").read_text())["traceEvents"]
    spans = [event for event in trace if event["ph"] == "X"]
    assert {"compute"} < {e["args"]["name"] for e in trace if e["ph"] == "M"}
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in spans)


def test_mistakes_are_answered_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An unknown machine, a grid that is none, a configuration without its kind."""
    for words, text in (
        (("--machine", "laptop", "--gpus", "8"), "known are perlmutter"),
        (("--machine", "dgx-h100", "--gpus", "8", "--why-not", "rows=2"), "'rows=2' is no axis"),
    ):
        with pytest.raises(SystemExit) as ended:
            plan(monkeypatch, tmp_path, *words)
        assert ended.value.code == 2
        assert text in " ".join(capsys.readouterr().err.split())


def test_a_grid_is_written_as_words() -> None:
    """Missing axes are of size one."""
    assert layout_of("row=4,data=2") == Layout(data=2, row=4)


def gradients(recomputes: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64,
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(config).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = Fourfold.planned(Layout(depth=2, row=2, recomputes=recomputes, cuts_tokens=True))
    tokens = torch.arange(32).reshape(2, 16) % 64
    with engine.open(model, optimizer, precision="fp32", batch=2, microbatch=2) as session:
        for _ in range(2):
            mine = tokens[session.rank : session.rank + 1]
            with session.microbatch(is_last=True):
                session.backward(session.model(input_ids=mine, labels=mine).loss)
            session.update(1.0)
        return {name: p.full_tensor().detach() for name, p in model.named_parameters()}


def test_the_engine_of_a_plan_recomputes_without_another_result() -> None:
    """Two steps on depth 2 and row 2, in the sequence form."""
    kept, again = (run_on_ranks(4, gradients, recomputes=r)[0] for r in (False, True))
    for name, value in kept.items():
        torch.testing.assert_close(again[name], value, rtol=1e-12, atol=1e-12)
