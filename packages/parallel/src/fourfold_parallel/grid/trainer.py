"""transformers' `Trainer` and accelerate's loop on a grid: `parallelize` is all of ours, the rest is theirs.

Both shard batches over all ranks, and on a grid the ranks of row and col must get equal rows. That is
all that differs here; the model itself tells accelerate to wrap and scale nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, cast

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset
from transformers import Trainer

from fourfold_parallel.grid.huggingface import Parallel
from fourfold_parallel.grid.layers import IGNORED
from fourfold_parallel.grid.mesh import Mesh


def share_loader(
    dataset: Dataset[Any],
    mesh: Mesh,
    *,
    batch: int,
    collate_fn: Any,
    shuffle: bool,
    seed: int,
    keeps_every_row: bool = False,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> DataLoader[Any]:
    """This rank's share of a data set, in batches: equal along row and col, apart along data and depth.

    Give it to the loop as it is, not to `Accelerator.prepare`, which would cut it again.

    Args:
        dataset: Of a known length; every rank passes the same.
        mesh: The grid.
        batch: Rows of one microbatch on one rank.
        collate_fn: From a list of rows to what the model takes.
        shuffle: Draw a new order every epoch, from `seed`; an epoch is one pass over the loader.
        seed: The same on every rank.
        keeps_every_row: Where rows do not divide over data and depth, hand out the first ones once more at
            the end. Otherwise the last ones, of this epoch's order, are left out.
        options: Further options of `DataLoader`.

    Raises:
        ValueError: The data set has no length, or no rows by number.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ValueError(
            f"a {type(dataset).__name__} has no length and no rows by number, by which ranks take their "
            "shares; collect its rows in a list, or in a data set with __len__ and __getitem__"
        )
    sampler = _Shares(
        dataset,
        num_replicas=mesh.batch_size(),
        rank=mesh.batch_rank(),
        shuffle=shuffle,
        seed=seed,
        drop_last=not keeps_every_row,
    )
    return _Loader(dataset, batch_size=batch, sampler=sampler, collate_fn=collate_fn, **options)


class _Shares(DistributedSampler[Any]):
    """Goes on to the next epoch's order by itself."""

    def __iter__(self) -> Iterator[int]:
        drawn = super().__iter__()
        self.epoch += 1
        return drawn


class _Loader(DataLoader[Any]):
    def set_epoch(self, epoch: int) -> None:
        """Called by `Trainer`, which may go on from a later epoch."""
        cast(_Shares, self.sampler).set_epoch(epoch)


REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "label_smoothing_factor": "its loss is not summed over ranks",
        "neftune_noise_alpha": "its noise would differ between ranks that hold one row",
        "use_liger_kernel": "its kernels replace layers of the grid",
        "auto_find_batch_size": "ranks could find different sizes",
        "batch_eval_metrics": "Trainer finds the last batch in a loader of its own only",
        "eval_use_gather_object": "rows are gathered as tensors",
        "deepspeed": "the grid cuts the model itself",
        "fsdp": "the grid cuts the model itself",
        "torch_compile": "torch.compile is applied before parallelize, or not at all",
    }
)
"""Arguments of `TrainingArguments` that a grid cannot honour, and why."""
SHUFFLES = {"random": True, "sequential": False}
"""The orders of `train_sampling_strategy` that a grid draws."""
LOADER = ("num_workers", "pin_memory", "persistent_workers", "prefetch_factor", "in_order")
"""Options of `DataLoader` that `TrainingArguments` has under `dataloader_`."""


class GridTrainer(Trainer):
    """`Trainer` for a model on a grid.

    `per_device_train_batch_size` counts the rows of one rank of data and depth, and the learning
    rate's schedule, accumulation, clipping and callbacks are `Trainer`'s. The loss is the mean over
    the targets of the whole microbatch of all ranks. Every row of an evaluation is scored once. Save with
    `Parallel.save`.

    Args:
        parallel: What `parallelize` gave.
        arguments: As of `Trainer`, by keyword, without `model`.

    Raises:
        ValueError: `save_strategy` is not "no": `Trainer` cannot write parameters that are cut. Or an
            argument asks for what a grid cannot do (`REFUSED`).
    """

    def __init__(self, parallel: Parallel, **arguments: Any) -> None:
        args = arguments.get("args")
        strategy = "steps (the default)" if args is None else str(args.save_strategy.value)
        if strategy != "no":
            raise ValueError(
                f"save_strategy={strategy!r}: Trainer cannot write parameters that "
                "are cut over ranks; use save_strategy='no' and Parallel.save(folder)"
            )
        _refuse(args, arguments)
        self._mesh = parallel.mesh
        self._vocabulary: int = parallel.model.config.get_text_config().vocab_size
        self._rows_before = self._rows_here = self._rows_in_all = 0
        super().__init__(model=parallel.model, **arguments)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """This rank's share of the training set."""
        return self._share(
            self.train_dataset,
            "training",
            self.args.per_device_train_batch_size,
            shuffle=SHUFFLES[str(self.args.train_sampling_strategy)],
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """This rank's share of the evaluation set, or of one of several by its name."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            sets: Any = self.eval_dataset
            dataset = sets[dataset]
        return self._share_to_score(dataset, "evaluation")

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """This rank's share of the rows to predict."""
        return self._share_to_score(test_dataset, "test")

    def _share_to_score(self, dataset: Any, purpose: str) -> DataLoader[Any]:
        rows = self.args.per_device_eval_batch_size
        return self._share(dataset, purpose, rows, keeps_every_row=True)

    def _share(
        self,
        dataset: Any,
        purpose: str,
        batch: int,
        *,
        shuffle: bool = False,
        keeps_every_row: bool = False,
    ) -> DataLoader[Any]:
        if dataset is None:
            raise ValueError(f"Trainer has no {purpose} set; pass train_dataset or eval_dataset")
        collate = self.data_collator
        if hasattr(dataset, "remove_columns"):  # of the datasets library
            dataset = self._remove_unused_columns(dataset, description=purpose)
        else:
            collate = self._get_collator_with_removed_columns(collate, description=purpose)
        return share_loader(
            dataset,
            self._mesh,
            batch=batch,
            collate_fn=collate,
            shuffle=shuffle,
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
            keeps_every_row=keeps_every_row,
            options={name: getattr(self.args, f"dataloader_{name}") for name in LOADER}
            | {"drop_last": self.args.dataloader_drop_last and not keeps_every_row},
        )

    def evaluation_loop(self, dataloader: DataLoader[Any], *given: Any, **options: Any) -> Any:
        """Trainer's, on rows that are gathered from one rank of each share, in the data set's order."""
        self._rows_before = self._rows_here = 0
        self._rows_in_all = len(cast(Any, dataloader.dataset))
        self.gather_function = self._gather_rows
        return super().evaluation_loop(dataloader, *given, **options)

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, Any, Any]:
        """Trainer's; rows that are handed out a second time have no targets."""
        shares, share = self._mesh.batch_size(), self._mesh.batch_rank()
        self._rows_before += self._rows_here
        self._rows_here = shares * len(next(iter(inputs.values())))
        again = (
            self._rows_before + torch.arange(share, self._rows_here, shares) >= self._rows_in_all
        )
        targets = {
            name: inputs[name].masked_fill(again.to(inputs[name].device)[:, None], IGNORED)
            for name in ("labels", "shift_labels")
            if name in inputs
        }
        loss, logits, labels = super().prediction_step(
            model, {**inputs, **targets}, prediction_loss_only, ignore_keys=ignore_keys
        )
        if logits is not None and not isinstance(logits, Tensor):
            raise ValueError(
                "the model gives more than logits to score, of which ranks hold pieces; leave "
                "output_hidden_states and output_attentions out, or use prediction_loss_only=True"
            )
        if logits is not None and logits.shape[-1] != self._vocabulary:
            raise ValueError(
                f"each rank holds {logits.shape[-1]} of {self._vocabulary} logits; parallelize with "
                "logits='whole', or use prediction_loss_only=True"
            )
        return loss, logits, labels

    def _gather_rows(self, mine: Shaped[Tensor, "row ..."]) -> Shaped[Tensor, "all_rows ..."]:
        """Each row of the batch once, as the data set has them: shares take rows in turn."""
        gathered = cast(Tensor, self.accelerator.gather(mine.contiguous()))
        ranks, shares = self._mesh.size, self._mesh.batch_size()
        alike = gathered.unflatten(0, (shares, ranks // shares, len(mine)))
        in_order = alike[:, 0].transpose(0, 1).flatten(0, 1)
        return in_order[: self._rows_in_all - self._rows_before]

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Move a batch to the device; `Trainer` leaves that to the loader, which we replaced."""
        return {
            name: value.to(self.args.device) if isinstance(value, Tensor) else value
            for name, value in super()._prepare_inputs(inputs).items()
        }


def _refuse(args: Any, arguments: Mapping[str, Any]) -> None:
    """Raise for what `Trainer` would do without knowing of the grid."""
    for name, reason in REFUSED.items():
        if getattr(args, name):
            raise ValueError(f"{name}={getattr(args, name)} on a grid: {reason}; leave it out")
    if str(args.train_sampling_strategy) not in SHUFFLES:
        raise ValueError(
            f"train_sampling_strategy={str(args.train_sampling_strategy)!r} on a grid: rows are cut over "
            f"ranks in an order of their own; use one of {', '.join(SHUFFLES)}"
        )
    if arguments.get("compute_loss_func") is not None:
        raise ValueError(
            "compute_loss_func on a grid: its loss is not summed over ranks; set parallel.model.loss_function"
        )
    if arguments.get("model_init") is not None:
        raise ValueError("model_init on a grid: the model is that of parallelize; leave it out")
