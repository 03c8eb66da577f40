"""Started by torchrun in test_trainer.py: stock training loops on a grid."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from fourfold_parallel.grid.huggingface import Parallel, parallelize
from fourfold_parallel.grid.mesh import Mesh
from fourfold_parallel.grid.trainer import GridTrainer, share_loader

ROWS, STEPS, ACCUMULATED = 8, 3, 2
CONFIG = LlamaConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=36, vocab_size=61, max_position_embeddings=32, use_cache=False,
)  # fmt: skip


def rows() -> list[dict[str, torch.Tensor]]:
    tokens = torch.randint(0, 61, (ROWS * STEPS, 9), generator=torch.Generator().manual_seed(2))
    return [{"input_ids": row, "labels": row, "source": n} for n, row in enumerate(tokens)]


def build() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG)


def with_trainer(model: Any, folder: Path) -> list[float]:
    """The losses of transformers' own loop."""
    shares = model.mesh.batch_size() if isinstance(model, Parallel) else 1
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=ROWS // shares // ACCUMULATED,
        gradient_accumulation_steps=ACCUMULATED, max_steps=STEPS, learning_rate=0.5,
        lr_scheduler_type="constant", max_grad_norm=0.5, logging_steps=1, save_strategy="no",
        report_to=[], use_cpu=True, disable_tqdm=True, optim="sgd",
        train_sampling_strategy="sequential", dataloader_pin_memory=False,
    )  # fmt: skip
    if isinstance(model, Parallel):
        trainer = GridTrainer(model, args=arguments, train_dataset=rows())
    else:
        trainer = Trainer(model=model, args=arguments, train_dataset=rows())
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def collate(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Without the column that the model does not take, which Trainer leaves out by itself."""
    return default_data_collator([{**row, "source": None} for row in features])


def scored(model: Any, folder: Path) -> dict[str, Any]:
    """Evaluations of fewer rows than ranks, of rows that do not divide, and predictions, row by row."""
    shares = model.mesh.batch_size() if isinstance(model, Parallel) else 1
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_eval_batch_size=4 // shares, save_strategy="no", report_to=[],
        use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, dataloader_num_workers=1,
    )  # fmt: skip
    seen: list[Any] = []

    def metrics(given: Any) -> dict[str, float]:
        seen.append((torch.tensor(given.predictions), torch.tensor(given.label_ids)))
        return {"rows": float(len(given.label_ids))}

    common: Any = {"args": arguments, "compute_metrics": metrics}
    if isinstance(model, Parallel):
        trainer = GridTrainer(model, **common)
    else:
        trainer = Trainer(model=model, **common)
    results = {}
    for count in (1, 8, 11):
        found = trainer.evaluate(rows()[:count])
        logits, labels = seen.pop()
        results[str(count)] = {
            "loss": found["eval_loss"], "rows": found["eval_rows"], "labels": labels.tolist(),
            "logits": logits.double().sum((1, 2)).tolist(),
        }  # fmt: skip
    results["predicted"] = trainer.predict(rows()[:7]).predictions.sum((1, 2)).tolist()
    return results


def with_accelerate(model: Any) -> list[float]:
    """The losses of the loop that accelerate's documentation shows."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED)
    if isinstance(model, Parallel):
        batch = ROWS // model.mesh.batch_size() // ACCUMULATED
        loader: Any = share_loader(
            rows(), model.mesh, batch=batch, collate_fn=collate, shuffle=False, seed=0
        )
        model = model.model
    else:
        loader = DataLoader(rows(), batch_size=ROWS // ACCUMULATED, collate_fn=collate)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


def main() -> None:
    """Write the losses of every loop and what it trained."""
    folder, sizes = Path(sys.argv[1]), [int(size) for size in sys.argv[2].split(",")]
    dist.init_process_group("gloo")
    mesh = Mesh(data=sizes[0], depth=sizes[1], row=sizes[2], col=sizes[3])
    losses: dict[str, Any] = {"scored": scored(parallelize(build(), mesh), folder / "scored")}
    for loop in ("trainer", "accelerate"):
        parallel = parallelize(build(), mesh)
        if loop == "trainer":
            losses[loop] = with_trainer(parallel, folder / "trainer_out")
        else:
            losses[loop] = with_accelerate(parallel)
        parallel.save(folder / loop)
    if dist.get_rank() == 0:
        (folder / "losses.json").write_text(json.dumps(losses))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
