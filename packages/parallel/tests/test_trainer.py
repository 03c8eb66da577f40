"""transformers' Trainer and accelerate's loop train on a grid what they train alone."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

PROGRAM = Path(__file__).parent / "trainer_on_ranks.py"
ROUNDING = 2e-5
"""float32 sums over ranks in another order, over three SGD steps."""


def program() -> ModuleType:
    spec = util.spec_from_file_location("trainer_on_ranks", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.timeout(900)
@pytest.mark.parametrize("sizes", ["2,1,2,1", "1,2,1,2"])
def test_stock_loops_train_on_a_grid_as_they_do_alone(
    tmp_path: Path, sizes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Losses and weights, with accumulation and clipping; saved files are plain transformers'."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launch, "--nproc-per-node", "4", str(PROGRAM), str(tmp_path), sizes],
        capture_output=True, text=True, timeout=800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    on_grid: dict[str, list[float]] = json.loads((tmp_path / "losses.json").read_text())
    loops: Any = program()
    for loop in ("trainer", "accelerate"):
        model = loops.build()
        if loop == "trainer":
            losses = loops.with_trainer(model, tmp_path / "alone")
        else:
            losses = loops.with_accelerate(model)
        assert on_grid[loop] == pytest.approx(losses, abs=ROUNDING)
        read = AutoModelForCausalLM.from_pretrained(tmp_path / loop).state_dict()
        for name, weight in model.state_dict().items():
            assert torch.allclose(read[name], weight, atol=ROUNDING), f"{loop}: {name}"
    capsys.readouterr()  # Trainer prints its log
