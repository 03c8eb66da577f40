"""Where a basis comes from: which model, which text, how many tokens."""

import hashlib
from dataclasses import dataclass

from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """Measured by us."""

    model: str
    """`fingerprint` of the model."""
    corpora: tuple[str, ...]
    """sha256 of each corpus's token ids, sorted."""
    tokens: int

    def __add__(self, other: "Calibrated") -> "Calibrated":
        if self.model != other.model:
            raise ValueError(
                f"statistics of model {self.model[:12]} and of model {other.model[:12]} do not add up; "
                "merge statistics of one model"
            )
        return Calibrated(
            model=self.model,
            corpora=tuple(sorted({*self.corpora, *other.corpora})),
            tokens=self.tokens + other.tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """Read from the published layout, which states neither model nor corpus."""

    folder: str
    """Name of the folder the transform was in: `Llama-2-7b-PCA/wikitext`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Some of the heads of a basis, for a rank that holds these heads of a model."""

    first: int
    last: int
    """Exclusive."""
    kv_heads: int
    """Of the whole basis."""


Source = Calibrated | Imported | Part


def fingerprint(model: PreTrainedModel) -> str:
    """sha256 (hex) over the names, shapes and leading values of a model's parameters.

    A few numbers of each tensor tell models and checkpoints apart without reading gigabytes. They are
    rounded to bfloat16, so that a float32 model and its bfloat16 copy are the same model.
    """
    whole = hashlib.sha256()
    for name, parameter in model.named_parameters():
        head = parameter.detach().flatten()[:16].bfloat16().float().cpu()
        whole.update(f"{name} {tuple(parameter.shape)} {head.tolist()}".encode())
    return whole.hexdigest()
