"""transformers' `Trainer` and accelerate's loop on a grid: `parallelize` is all of ours, the rest is theirs.

Both shard batches over all ranks, and on a grid the ranks of row and col must get equal rows. That is
all that differs here; the model itself tells accelerate to wrap and scale nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from transformers import Trainer

from fourfold_parallel.grid.huggingface import Parallel
from fourfold_parallel.grid.mesh import Mesh


def share_loader(
    dataset: Dataset[Any],
    mesh: Mesh,
    *,
    batch: int,
    collate_fn: Any,
    shuffle: bool,
    seed: int,
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

    Rows that do not divide over data and depth are left out: the last ones, of this epoch's order.
    """
    sampler = _Shares(
        dataset,
        num_replicas=mesh.batch_size(),
        rank=mesh.batch_rank(),
        shuffle=shuffle,
        seed=seed,
        drop_last=True,
    )
    return _Loader(dataset, batch_size=batch, sampler=sampler, collate_fn=collate_fn)


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


class GridTrainer(Trainer):
    """`Trainer` for a model on a grid.

    `per_device_train_batch_size` counts the rows of one rank of data and depth, and the learning
    rate's schedule, accumulation, clipping and callbacks are `Trainer`'s. The loss is the mean over
    the targets of the whole microbatch of all ranks. Save with `Parallel.save`.

    Args:
        parallel: What `parallelize` gave.
        shuffle: Draw a new order every epoch.
        arguments: As of `Trainer`, by keyword, without `model`.

    Raises:
        ValueError: `save_strategy` is not "no": `Trainer` cannot write parameters that are cut.
    """

    def __init__(self, parallel: Parallel, *, shuffle: bool = True, **arguments: Any) -> None:
        args = arguments.get("args")
        strategy = "steps (the default)" if args is None else str(args.save_strategy.value)
        if strategy != "no":
            raise ValueError(
                f"save_strategy={strategy!r}: Trainer cannot write parameters that "
                "are cut over ranks; use save_strategy='no' and Parallel.save(folder)"
            )
        self._mesh, self._shuffle = parallel.mesh, shuffle
        super().__init__(model=parallel.model, **arguments)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """This rank's share of the training set."""
        return self._share(self.train_dataset, self.args.per_device_train_batch_size)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """This rank's share of the evaluation set."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        return self._share(dataset, self.args.per_device_eval_batch_size, shuffle=False)

    def _share(self, dataset: Any, batch: int, *, shuffle: bool | None = None) -> DataLoader[Any]:
        if dataset is None:
            raise ValueError("Trainer has no data set for this; pass train_dataset or eval_dataset")
        return share_loader(
            dataset,
            self._mesh,
            batch=batch,
            collate_fn=self.data_collator,
            shuffle=self._shuffle if shuffle is None else shuffle,
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
        )

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Move a batch to the device; `Trainer` leaves that to the loader, which we replaced."""
        return {
            name: value.to(self.args.device) if isinstance(value, torch.Tensor) else value
            for name, value in super()._prepare_inputs(inputs).items()
        }
