"""Forgetting, measured: train a model on with new text, replay some of the old, and see what each part loses.

Aurora-M (Nakamura et al. 2024) takes a finished model, goes on with other languages, keeps a share of the old
text in the mix, and ends on cleaner text with a falling rate. Its curriculum is two values, `replayed` and
`annealed`. What it does to the model is read on held-out rows of every part p, the same before and after:

    forgot_p = L_p(after) - L_p(before)          gained_p = -forgot_p
    due to the shift = L_p(arm) - L_p(only old)

An arm that goes on with the old text alone (`only old`) warms up and trains on just as the others do, so the
second line leaves out what a new schedule does by itself. Replayed rows take the place of new ones: arms are
compared at equal tokens in all, and at equal new tokens (`steps_for_equal_new`), never one for the other.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from fourfold_parallel.run.data import TokenSource
from fourfold_parallel.run.mixtures import Mixed, MixturePart, MixtureStage, Staged


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutLoss:
    """The losses of a model on the held-out rows of one part."""

    nats: Float[np.ndarray, " row"]
    """Sum over the targets of each row."""
    targets: int
    """In each row."""
    text_bytes: int
    """UTF-8 bytes of the text of all targets: parts tokenise differently, bytes are the same to all."""

    @property
    def loss_nats(self) -> float:
        """Mean over targets."""
        return float(self.nats.mean()) / self.targets

    @property
    def bits_per_byte(self) -> float:
        """Bits that a byte of the text costs."""
        return float(self.nats.sum()) / self.text_bytes / math.log(2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """The difference between two models on the same held-out rows; what is positive has got worse."""

    nats: float
    """A target."""
    error_nats: float
    """Standard error of `nats` over rows, paired: what is hard for both models cancels."""
    bits_per_byte: float


def forgot(before: HeldOutLoss, after: HeldOutLoss) -> Change:
    """The loss that was added between two models on a part; negative where it was gained.

    Raises:
        ValueError: The two were read on other rows.
    """
    if (before.nats.shape, before.targets, before.text_bytes) != (
        after.nats.shape,
        after.targets,
        after.text_bytes,
    ):
        raise ValueError(
            f"{len(before.nats)} rows of {before.targets} targets ({before.text_bytes} bytes) before, "
            f"{len(after.nats)} of {after.targets} ({after.text_bytes}) after; read both models on the "
            "same held-out rows"
        )
    rows = (after.nats - before.nats) / before.targets
    spread = float(rows.std(ddof=1)) if len(rows) > 1 else math.inf
    return Change(
        nats=float(rows.mean()),
        error_nats=spread / math.sqrt(len(rows)),
        bits_per_byte=after.bits_per_byte - before.bits_per_byte,
    )


def gained(before: HeldOutLoss, after: HeldOutLoss) -> Change:
    """`forgot` with the other sign: positive where the model has got better."""
    lost = forgot(before, after)
    return Change(nats=-lost.nats, error_nats=lost.error_nats, bits_per_byte=-lost.bits_per_byte)


def due_to_shift(arm: HeldOutLoss, only_old: HeldOutLoss) -> Change:
    """The loss on the old part that the new text adds to going on with the old text alone."""
    return forgot(only_old, arm)


def replayed(old: TokenSource, new: TokenSource, *, replay: float, first_old_row: int = 0) -> Mixed:
    """The new text with a share of the old.

    Args:
        old: what the model was trained on.
        new: what it is to learn.
        replay: share of the rows that are old; 0 validates on the old text all the same, 1 is `only old`.
        first_old_row: rows of the old text that were read before, behind which it goes on.
    """
    return Mixed(
        parts=(
            MixturePart(name="old", source=old, weight=replay, first_row=first_old_row),
            MixturePart(name="new", source=new, weight=round(1 - replay, 6)),
        )
    )


def annealed(first: Mixed, clean: TokenSource, *, share: float, steps: tuple[int, int]) -> Staged:
    """Two stages: a mixture, then the same with a share of cleaner text in the place of the new.

    Args:
        first: as `replayed` gives it; the old text keeps its share in the second stage.
        clean: the cleaner text.
        share: of the second stage's rows.
        steps: of the first stage and of the second.
    """
    old, new = first.parts
    second = Mixed(
        parts=(
            old,
            MixturePart(
                name="new",
                source=new.source,
                weight=round(new.weight - share, 6),
                first_row=new.first_row,
            ),
            MixturePart(name="clean", source=clean, weight=share),
        )
    )
    return Staged(
        stages=(
            MixtureStage(mixture=first, steps=steps[0]),
            MixtureStage(mixture=second, steps=steps[1]),
        )
    )


def steps_for_equal_new(steps: int, *, replay: float) -> int:
    """Steps with replay that hold as many rows of new text as so many steps without.

    Raises:
        ValueError: A mixture of old text alone never does.
    """
    if not 0 <= replay < 1:
        raise ValueError(f"replay={replay} leaves no new text; use 0 or more and less than 1")
    return math.ceil(round(steps / (1 - replay), 9))
