"""The mask that a checkpoint was trained under: written beside it, verified when it is resumed.

A model that goes on under another mask is supervised on what the first left out, and the protection is
gone without a sign.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from fourfold_goldfish.canonical import CanonicalGoldfish
from fourfold_goldfish.loss import Goldfish
from fourfold_parallel.common.files import write_text

FILE = "goldfish.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskDigest:
    """The identity of a mask, without its key."""

    k: int
    context: int
    hash: str
    window: str
    boundary: str
    exempt_sha256: str
    key_sha256: str
    """Digest of the key. A short key can be found by trying; use 64 random bits."""
    tokenizer_sha256: str
    """Digest of the vocabulary: equal ids mean equal text only under one tokenizer."""
    probe_sha256: str
    """Digest of the mask itself on fixed ids, which tells two versions of a hash apart."""


def mask_digest(goldfish: Goldfish | CanonicalGoldfish, tokenizer: Any) -> MaskDigest:
    """Identify a mask over a tokenizer's ids.

    Args:
        goldfish: the mask.
        tokenizer: one of transformers', or None where it is not known.
    """
    vocabulary = sorted(tokenizer.get_vocab().items()) if tokenizer is not None else "unknown"
    match goldfish:
        case Goldfish():
            hashed, context, ids = goldfish.hash, goldfish.context, 50_021
            window, boundary, exempt = goldfish.window, goldfish.boundary, goldfish.exempt
        case CanonicalGoldfish():
            hashed, context, ids = "canonical", goldfish.characters, len(goldfish.spelling)
            window, boundary, exempt = "exclusive", "prefix", ()
    probe = torch.arange(1, 16 * (context + 256) + 1).view(16, -1)
    dropped = goldfish.drop((probe * 2_654_435_761) % ids)
    return MaskDigest(
        k=goldfish.k,
        context=context,
        hash=hashed,
        window=window,
        boundary=boundary,
        exempt_sha256=_sha256(sorted(exempt)),
        key_sha256=_sha256(goldfish.key),
        tokenizer_sha256=_sha256(vocabulary),
        probe_sha256=hashlib.sha256(dropped.numpy().tobytes()).hexdigest(),
    )


def write_mask_digest(folder: str | os.PathLike[str], digest: MaskDigest) -> None:
    """Write `goldfish.json` into a checkpoint's folder."""
    write_text(Path(folder) / FILE, json.dumps(asdict(digest), indent=1) + "\n")


def check_mask_digest(folder: str | os.PathLike[str], digest: MaskDigest) -> None:
    """Compare a checkpoint's mask with the one that training would go on with.

    Raises:
        ValueError: where the checkpoint names none, or another, with every field that differs.
    """
    path = Path(folder) / FILE
    saved = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    _check(saved, digest, str(folder))


def _check(saved: Mapping[str, object] | None, digest: MaskDigest, where: str) -> None:
    if saved is None:
        raise ValueError(
            f"{where} names no mask, so it was trained without goldfish, or without `add_goldfish`; "
            "start from its weights as a new run, or resume without goldfish"
        )
    current = asdict(digest)
    differing = [name for name in current if saved.get(name) != current[name]]
    if differing:
        pairs = ", ".join(
            f"{name}={saved.get(name)} there, {current[name]} now" for name in differing
        )
        raise ValueError(
            f"{where} was trained under another mask ({pairs}); resume with the mask it was trained "
            "under, or start from its weights as a new run"
        )


class MaskCheck(TrainerCallback, ExportableState):
    """Writes the digest into every checkpoint of a Trainer, and checks it on resuming from any.

    It stands in the Trainer's own state, which a resuming Trainer has read before training begins,
    and beside it as `goldfish.json` for everybody else.
    """

    def __init__(self, **digest: Any) -> None:
        self.digest = MaskDigest(**digest)

    def state(self) -> dict[str, Any]:
        """The part of this callback that the Trainer keeps."""
        return {"args": asdict(self.digest), "attributes": {}}

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002 - the callback's signature
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Write beside what the Trainer has just saved."""
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            write_mask_digest(folder, self.digest)

    def on_train_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002 - the callback's signature
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Refuse to go on from a checkpoint of another mask."""
        if state.global_step:
            callbacks: Any = state.stateful_callbacks
            saved = callbacks.get(type(self).__name__, {}).get("args")
            _check(saved, self.digest, f"the checkpoint of step {state.global_step}")


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
