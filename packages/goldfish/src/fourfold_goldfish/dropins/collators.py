"""Goldfish in anybody's training script: a collator that masks labels, and one line for a Trainer.

The mask is made where the batch is: from `input_ids`, before the number of supervised targets is counted.
(A mask inside the loss function comes after transformers has counted `num_items_in_batch`, which scales
the loss by (k - 1)/k; a mask made from `labels` hashes the -100 of a masked prompt.)
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from types import MethodType
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer

from fourfold_goldfish.canonical import CanonicalGoldfish
from fourfold_goldfish.dropins.mask_digest import MaskCheck, mask_digest
from fourfold_goldfish.loss import Goldfish
from fourfold_parallel.run.objective import IGNORE, TargetMask

LENGTHS = ("cu_seq_lens_q", "cu_seq_lens", "cu_seqlens_q", "cu_seqlens")
"""Names under which collators give the cumulative lengths of the documents of a flattened batch."""
Collator = Callable[[list[Any]], Any]
"""Features of some examples to a batch, a mapping of tensors; transformers' and TRL's are."""


@dataclass(frozen=True, slots=True)
class GoldfishCollator:
    """Another collator's batches with the labels that goldfish leaves out set to -100."""

    collator: Collator
    goldfish: TargetMask
    separators: tuple[int, ...]

    def __call__(self, features: list[Any]) -> dict[str, Any]:
        """Collate, then mask.

        Raises:
            ValueError: for a batch without `input_ids` and labels of the same shape.
        """
        return mask_labels(self.collator(features), self.goldfish, separators=self.separators)


def goldfish_collator(
    collator: Collator, goldfish: TargetMask, *, separators: tuple[int, ...] = ()
) -> GoldfishCollator:
    """Mask the batches of any collator that gives `input_ids` and `labels`, padded, packed or flattened.

    For training only: an evaluation loss under a mask cannot be compared with anything. Where one collator
    serves a Trainer's training and evaluation, use `add_goldfish`.

    Args:
        collator: transformers', TRL's or your own; prompts that it masks with -100 stay masked.
        goldfish: which targets to leave out: `Goldfish`, or `CanonicalGoldfish` for near-duplicates.
        separators: ids that end a document, for rows packed without `position_ids` or `seq_idx`.
    """
    return GoldfishCollator(collator, goldfish, separators)


def mask_labels(
    batch: Mapping[str, Any], goldfish: TargetMask, *, separators: tuple[int, ...] = ()
) -> dict[str, Any]:
    """The batch with -100 where goldfish leaves a label out; labels that are -100 stay so.

    `labels[b, i]` is the id at i, as transformers has it (the model shifts); `shift_labels[b, i]`, where
    present, is the id at i + 1.

    Raises:
        ValueError: for a batch without `input_ids` and labels of the same shape.
    """
    tokens = batch.get("input_ids")
    names = [name for name in ("labels", "shift_labels") if name in batch]
    if not isinstance(tokens, Tensor) or not names:
        raise ValueError(
            f"a batch with {sorted(batch)} has no tensors input_ids and labels to mask; use a collator "
            "that makes labels, such as DataCollatorForLanguageModeling(tokenizer, mlm=False)"
        )
    dropped = goldfish.drop(tokens, document_ids(batch, separators=separators))
    masked = dict(batch)
    for name in names:
        labels = batch[name]
        if labels.shape != tokens.shape:
            raise ValueError(
                f"{name} of shape {tuple(labels.shape)} do not match input_ids of shape "
                f"{tuple(tokens.shape)}; give one label per id"
            )
        mask = dropped if name == "labels" else dropped.roll(-1, dims=1)
        masked[name] = labels.masked_fill(mask, IGNORE)
    return masked


def document_ids(
    batch: Mapping[str, Any], *, separators: tuple[int, ...] = ()
) -> Int[Tensor, "batch row"]:
    """The document of each id of a batch, counted within its row; padding is a document of its own.

    A document begins where `position_ids` do not go on by one, where `seq_idx` or `attention_mask`
    changes, at the cumulative lengths of `LENGTHS`, and after an id in `separators`.

    Raises:
        ValueError: for positions, indices, masks or lengths that are not those of the tokens.
    """
    tokens: Tensor = batch["input_ids"]
    begins = torch.zeros(tokens.shape, dtype=torch.bool, device=tokens.device)
    for name, step in (("position_ids", 1), ("seq_idx", 0), ("attention_mask", 0)):
        values = batch.get(name)
        if isinstance(values, Tensor):
            values = _per_token(name, values, tokens)
            begins[:, 1:] |= values[:, 1:] != values[:, :-1] + step
    for name in LENGTHS:
        if batch.get(name) is not None:
            begins.view(-1)[_places(name, batch[name], tokens)] = True
    if separators:
        ends = torch.isin(tokens, torch.tensor(separators, device=tokens.device))
        begins[:, 1:] |= ends[:, :-1]
    return begins.cumsum(dim=1)


def _per_token(name: str, values: Tensor, tokens: Tensor) -> Int[Tensor, "batch row"]:
    """Values for each token: one row may stand for all; of positions on several axes the first are taken."""
    if name == "position_ids" and values.ndim == 3:
        values = values[0]
    if values.ndim == 1:
        values = values[None]
    if values.shape not in (tokens.shape, (1, tokens.shape[1])):
        raise ValueError(
            f"{name} of shape {tuple(values.shape)} do not say to which document each of "
            f"{tuple(tokens.shape)} ids belongs; give seq_idx, position_ids that begin anew, or separators"
        )
    return values.expand_as(tokens).long()


def _places(name: str, lengths: Any, tokens: Tensor) -> Int[Tensor, " document"]:
    """The ids, counted through all rows, at which documents begin."""
    ends = torch.as_tensor(lengths, device=tokens.device).long()
    rises = ends.ndim == 1 and len(ends) > 0 and bool((ends.diff() >= 0).all())
    if not rises or int(ends[0]) != 0 or int(ends[-1]) > tokens.numel():
        raise ValueError(
            f"{name}={ends.tolist()} are not the cumulative lengths, from 0, of documents of "
            f"{tokens.numel()} ids; leave them out, or give seq_idx"
        )
    return ends[ends < tokens.numel()]


COMPARING = (
    "DPOTrainer",
    "KTOTrainer",
    "GRPOTrainer",
    "RLOOTrainer",
    "RewardTrainer",
    "DistillationTrainer",
)
"""TRL's trainers whose loss is of whole completions: a target left out would change what is compared."""


def add_goldfish(
    trainer: Trainer, goldfish: Goldfish | CanonicalGoldfish, *, separators: tuple[int, ...] = ()
) -> None:
    """Train with goldfish loss: one line after a `Trainer`, or any subclass such as TRL's, is made.

    Training batches are masked after the trainer's own collator, evaluation batches are not. Every
    checkpoint says under which mask it was made, and one made under another is not resumed.

    Args:
        trainer: before `train()`; it keeps its collator, model and loss.
        goldfish: which targets to leave out.
        separators: ids that end a document, for rows packed without `position_ids` or `seq_idx`.

    Raises:
        ValueError: where the trainer has been given a mask before, or its loss is no cross-entropy of labels.
    """
    refused = [kind.__name__ for kind in type(trainer).__mro__ if kind.__name__ in COMPARING]
    if refused:
        raise ValueError(
            f"{refused[0]} compares whole completions and has no target to leave out; mask the supervised "
            "fine-tuning before it (SFTTrainer)"
        )
    if not isinstance(trainer.get_train_dataloader, MethodType):
        raise ValueError(
            "this trainer's training batches are masked already; call add_goldfish once"
        )
    unmasked = trainer.get_train_dataloader

    def get_train_dataloader() -> DataLoader[Any]:
        plain = trainer.data_collator
        trainer.data_collator = goldfish_collator(plain, goldfish, separators=separators)
        try:
            return unmasked()
        finally:
            trainer.data_collator = plain

    trainer.get_train_dataloader = get_train_dataloader
    digest = mask_digest(goldfish, trainer.processing_class)
    trainer.add_callback(MaskCheck(**asdict(digest)))
