"""transformers' Trainer and accelerate's loop train on a grid what they train alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import AutoModelForCausalLM, TrainingArguments

from fourfold_parallel.grid.huggingface import parallelize
from fourfold_parallel.grid.mesh import Mesh
from fourfold_parallel.grid.trainer import GridTrainer
from fourfold_parallel.testing.ranks import run_on_ranks

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


def approximately(expected: Any) -> Any:
    """To rounding: numbers, lists of them, and what holds them."""
    if isinstance(expected, dict):
        return {name: approximately(value) for name, value in expected.items()}
    if isinstance(expected, list) and isinstance(expected[0], list):
        return expected
    return pytest.approx(expected, abs=1e-4)


def refusals(folder: str) -> None:
    """On one rank: the refusals need no second."""
    loops: Any = program()
    parallel = parallelize(loops.build(), Mesh())
    common: Any = {
        "output_dir": folder, "save_strategy": "no", "use_cpu": True, "report_to": [], "max_steps": 3,
    }  # fmt: skip
    for option, word in (
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 on a grid"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0 on a grid"),
        ({"batch_eval_metrics": True}, "batch_eval_metrics=True on a grid"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True on a grid"),
        ({"train_sampling_strategy": "group_by_length"}, "'group_by_length' on a grid"),
        ({"save_strategy": "epoch"}, "save_strategy='epoch'"),
    ):
        with pytest.raises(ValueError, match=word):
            GridTrainer(parallel, args=TrainingArguments(**{**common, **option}))
    args = TrainingArguments(**common)
    with pytest.raises(ValueError, match="compute_loss_func on a grid"):
        GridTrainer(parallel, args=args, compute_loss_func=lambda *_, **__: 0)
    trainer = GridTrainer(parallel, args=args, train_dataset=Stream())
    with pytest.raises(ValueError, match="a Stream has no length and no rows by number"):
        trainer.get_train_dataloader()
    split = GridTrainer(parallelize(loops.build(), Mesh(), logits="split"), args=args)
    assert len(split.predict(loops.rows()[:2]).predictions) == 2  # one rank holds all


class Stream(IterableDataset[Any]):
    """Rows without a number."""

    def __iter__(self) -> Iterator[Any]:
        yield from program().rows()


def test_what_a_grid_cannot_do_is_refused_by_name(tmp_path: Path) -> None:
    run_on_ranks(1, refusals, folder=str(tmp_path))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("sizes", [pytest.param("2,1,2,1", marks=pytest.mark.slow), "1,2,1,2"])
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
    on_grid: dict[str, Any] = json.loads((tmp_path / "losses.json").read_text())
    loops: Any = program()
    alone = loops.scored(loops.build(), tmp_path / "alone")
    for count, expected in alone.items():
        # A loss in float32, and sums of 9 * 61 logits, per row.
        assert on_grid["scored"][count] == approximately(expected), count
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
