"""Which mask a checkpoint was trained under: written beside it, verified when it is resumed.

A model that goes on under another mask is supervised on what the first left out, and the protection is
gone without a sign.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fourfold_goldfish.loss import Goldfish
from fourfold_parallel.run.files import write_text

FILE = "goldfish.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskDigest:
    """What identifies a mask without giving its key away."""

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


def mask_digest(goldfish: Goldfish, tokenizer: Any) -> MaskDigest:
    """Identify a mask over a tokenizer's ids.

    Args:
        goldfish: the mask.
        tokenizer: one of transformers', or None where it is not known.
    """
    vocabulary = sorted(tokenizer.get_vocab().items()) if tokenizer is not None else "unknown"
    probe = torch.arange(1, 16 * (goldfish.context + 256) + 1).view(16, -1)
    dropped = goldfish.drop((probe * 2_654_435_761) % 50_021)
    return MaskDigest(
        k=goldfish.k,
        context=goldfish.context,
        hash=goldfish.hash,
        window=goldfish.window,
        boundary=goldfish.boundary,
        exempt_sha256=_sha256(sorted(goldfish.exempt)),
        key_sha256=_sha256(goldfish.key),
        tokenizer_sha256=_sha256(vocabulary),
        probe_sha256=hashlib.sha256(dropped.numpy().tobytes()).hexdigest(),
    )


def write_mask_digest(folder: Path, digest: MaskDigest) -> None:
    """Write `goldfish.json` into a checkpoint's folder."""
    write_text(folder / FILE, json.dumps(asdict(digest), indent=1) + "\n")


def check_mask_digest(folder: Path, digest: MaskDigest) -> None:
    """Compare a checkpoint's mask with the one that training would go on with.

    Raises:
        ValueError: where the checkpoint names none, or another, with every field that differs.
    """
    path = folder / FILE
    if not path.exists():
        raise ValueError(
            f"{folder} holds no {FILE}, so it was trained without goldfish, or without `add_goldfish`; "
            "start from its weights as a new run, or resume without goldfish"
        )
    saved = json.loads(path.read_text(encoding="utf-8"))
    current = asdict(digest)
    differing = [name for name in current if saved.get(name) != current[name]]
    if differing:
        pairs = ", ".join(
            f"{name}={saved.get(name)} there, {current[name]} now" for name in differing
        )
        raise ValueError(
            f"{folder} was trained under another mask ({pairs}); resume with the mask it was trained "
            "under, or start from its weights as a new run"
        )


class MaskCheck(TrainerCallback):
    """Writes the digest into every checkpoint of a Trainer, and checks it on resuming from one of them.

    A checkpoint outside the trainer's output folder is not known here; `check_mask_digest` takes any.
    """

    def __init__(self, goldfish: Goldfish, tokenizer: Any) -> None:
        self.digest = mask_digest(goldfish, tokenizer)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002 - the callback's signature
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Write beside what the Trainer has just saved."""
        if state.is_world_process_zero:
            write_mask_digest(_folder(args, state), self.digest)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002 - the callback's signature
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Refuse to go on from a checkpoint of another mask."""
        if state.global_step and _folder(args, state).is_dir():
            check_mask_digest(_folder(args, state), self.digest)


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
