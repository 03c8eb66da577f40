"""From grid to grid through a saved folder: every parameter arrives bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from fourfold_parallel.certify.compare import (
    GridOutcome,
    batch_of,
    failed,
    forward_and_backward,
    precise,
    quiet,
    stepped,
    subject_of,
)
from fourfold_parallel.grid.huggingface import parallelize
from fourfold_parallel.testing.grids import Sizes, mesh_of


def resharded(
    config: PretrainedConfig,
    source: Sizes,
    target: Sizes,
    dtype: torch.dtype,
    how: Mapping[str, Any],
    rows: int,
    folder: str,
) -> GridOutcome:
    """Train a step on one grid, save, load on another grid and in one process; on every rank.

    Args:
        config: Of a toy.
        source: The grid that saves.
        target: The grid that loads, over other values.
        dtype: Of the parameters.
        how: Further arguments of `parallelize`.
        rows: Of the batch.
        folder: Where; of this pair alone.
    """
    quiet()
    try:
        with precise(dtype):
            subject = subject_of(config, dtype, rows)
            trained = parallelize(copy.deepcopy(subject.model), mesh_of(source), **how)
            share = rows // trained.mesh.batch_size()
            first = trained.mesh.batch_rank() * share
            forward_and_backward(
                trained.model, batch_of(rows=rows).rows(slice(first, first + share))
            )
            stepped(trained.model)
            trained.save(folder)
            loaded = parallelize(copy.deepcopy(subject.model), mesh_of(target), **how)
            loaded.load(folder)
            kept = {name: tensor.clone() for name, tensor in trained.published()}
            differing = [
                name for name, tensor in loaded.published() if not tensor.equal(kept[name])
            ]
            moved = any(
                not p.equal(kept[n]) for n, p in subject.model.named_parameters() if n in kept
            )
            plain = AutoModelForCausalLM.from_pretrained(Path(folder), dtype=dtype)
            differing += [
                n for n, p in plain.named_parameters() if n in kept and not p.equal(kept[n])
            ]
    except Exception as error:  # noqa: BLE001 - whatever a model raises is its outcome
        return failed(error)
    if differing or not moved:
        message = f"{len(differing)} parameters differ" if differing else "the step moved nothing"
        return GridOutcome(result="wrong", where="".join(differing[:1]), message=message)
    return GridOutcome(result="equal")
