"""Fine-tuning on a file of samples, as a run of the runtime: the paper's recipe, with or without LoRA."""

import json
import warnings
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel

from fourfold_hpc_coder.generate.local import RESPONSE_FILE
from fourfold_hpc_coder.instruct.format import FileRows, InstructionLoss
from fourfold_parallel.common.files import sha256_of, write_text
from fourfold_parallel.common.records import Material
from fourfold_parallel.run.engines import Single
from fourfold_parallel.run.models import Model, Published, SmolLM2, model_place
from fourfold_parallel.run.objective import KeepAll, TargetMask, announced_mask
from fourfold_parallel.run.optimizer import AdamW, Cosine
from fourfold_parallel.run.recipe import Run, Steps


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """A model whose weights stay, with trained updates of low rank beside its linear maps (LoRA)."""

    model: Model
    rank: int

    def build(self, *, seed: int) -> PreTrainedModel:
        """The model with fresh updates, which begin at zero."""
        from peft import LoraConfig, get_peft_model

        settings = LoraConfig(
            r=self.rank,
            lora_alpha=2 * self.rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # peft asks transformers for gradient checkpointing by a name that 6.0 will drop.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
            torch.manual_seed(seed)
            return get_peft_model(self.model.build(seed=seed), settings)  # pyright: ignore[reportReturnType]

    def materials(self) -> tuple[Material, ...]:
        """The model's."""
        return self.model.materials()


def finetuning(
    data: str | PathLike[str],
    *,
    model: str = "smollm2",
    licence: str = "unknown",
    masked: bool = True,
    leave_out: str = "",
    leave_out_one_in: int = 4,
    response: str = "<|im_start|>",
    lora_rank: int = 0,
    steps: int = 50,
    batch: int = 8,
    microbatch: int = 2,
    sequence: int = 512,
    learning_rate: float = 1e-5,
    seed: int = 0,
) -> Run:
    """The run that fine-tunes a model on samples, with the paper's optimizer and schedule.

    What `leave_out` leaves out is decided sample by sample. A mask that looks at the tokens before a
    target, as goldfish does, sees the prompt before an answer, and never the neighbour in the row: the first
    targets of a sample, whose window would reach there, are kept. The end of a sample is always learnt.

    Args:
        data: JSONL of samples, as `make-data` writes it.
        model: `smollm2` (from its wheel), or a hub id or folder.
        licence: of the model; stated in the record.
        masked: whether prompts are left out of the loss.
        leave_out: a mask that leaves further targets out, such as `goldfish`; empty for none.
        leave_out_one_in: with `leave_out`: about one target in so many.
        response: special token of the tokenizer that ends prompts.
        lora_rank: of LoRA's updates; 0 trains every weight.
        steps: optimizer steps.
        batch: rows per step.
        microbatch: rows at a time.
        sequence: tokens per row.
        learning_rate: at its highest; the paper's is 1e-5, a LoRA wants ten times as much.
        seed: of the rows' order and of what is drawn.

    Raises:
        ValueError: where the data or the tokenizer do not fit, or no installed package has the mask.
    """
    path = Path(data)
    if not path.is_file():
        raise ValueError(f"--data {path}: no such file; make one with make-data")
    base: Model = Published(name=model, revision="main", licence=licence)
    folder = model_place(model)
    if model == "smollm2":
        base = SmolLM2()
    rows = FileRows(path=str(path), sha256=sha256_of(path), tokenizer=folder, response=response)
    marks = rows.marks()
    also: TargetMask = KeepAll()
    if leave_out:
        also = announced_mask(leave_out, k=leave_out_one_in, exempt=(marks.end,))
    return Run(
        name="tuned",
        model=LowRank(model=base, rank=lora_rank) if lora_rank else base,
        data=rows,
        objective=InstructionLoss(masked=masked, also=also, marks=marks),
        optimizer=AdamW(
            learning_rate=learning_rate, weight_decay=0.0, beta1=0.9, beta2=0.95, epsilon=1e-5
        ),
        schedule=Cosine(warmup_steps=max(1, steps // 60), floor=0.0),
        horizon=Steps(count=steps),
        batch=batch,
        microbatch=microbatch,
        sequence=sequence,
        max_grad_norm=1.0,
        precision="fp32",
        engine=Single(),
        seed=seed,
        validate_every=10_000,
        checkpoint_every=100,
    )


def save_tuned(run: Run, model: PreTrainedModel, folder: Path) -> None:
    """Leave a folder that `from_pretrained` reads: weights, tokenizer, and the token that ended prompts.

    Args:
        run: of `finetuning`.
        model: at its end; low-rank updates are merged.
        folder: is made.
    """
    assert isinstance(run.data, FileRows)
    merged = model.merge_and_unload() if isinstance(run.model, LowRank) else model  # pyright: ignore[reportCallIssue]
    merged.save_pretrained(folder)
    AutoTokenizer.from_pretrained(run.data.tokenizer).save_pretrained(folder)
    write_text(folder / RESPONSE_FILE, json.dumps({"response": run.data.response}) + "\n")
