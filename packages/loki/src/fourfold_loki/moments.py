"""Second moments of queries and keys: all that calibration keeps of a corpus.

A matrix a key/value head, however long the corpus. Moments add up, so corpora and ranks of a distributed
run are merged with `+`.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from fourfold_parallel.common.files import whole_file
from fourfold_parallel.common.values import formerly, from_json, to_json
from fourfold_parallel.grid.mesh import Mesh

RotaryStage = Literal["before rotary", "after rotary"]
"""Keys as projected, or as cached: after the rotary embedding has turned them by their position."""


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Count, sum and sum of outer products of vectors, for every layer and key/value head, in float64."""

    count: Float[Tensor, "layers kv_heads"]
    total: Float[Tensor, "layers kv_heads head_width"]
    outer: Float[Tensor, "layers kv_heads head_width head_width"]

    @classmethod
    def empty(cls, layers: int, kv_heads: int, head_width: int) -> "Moments":
        """Of no vectors."""
        return cls(
            torch.zeros(layers, kv_heads, dtype=torch.float64),
            torch.zeros(layers, kv_heads, head_width, dtype=torch.float64),
            torch.zeros(layers, kv_heads, head_width, head_width, dtype=torch.float64),
        )

    def add_(self, layer: int, vectors: Float[Tensor, "batch kv_heads token head_width"]) -> None:
        """Take in the vectors of one layer, in place."""
        flat = vectors.detach().float().transpose(0, 1).flatten(1, 2)
        self.count[layer] += flat.shape[1]
        self.total[layer] += flat.double().sum(1).cpu()
        self.outer[layer] += (flat.transpose(1, 2) @ flat).double().cpu()

    def __add__(self, other: "Moments") -> "Moments":
        if self.outer.shape != other.outer.shape:
            raise ValueError(
                f"moments of shape {tuple(self.outer.shape)} and {tuple(other.outer.shape)} are of "
                "different models; merge statistics of one model"
            )
        return Moments(self.count + other.count, self.total + other.total, self.outer + other.outer)

    def over(self, mesh: Mesh) -> "Moments":
        """Summed over the ranks that share a batch; every one of them must ask."""
        return Moments(
            mesh.sum_over_batch(self.count),
            mesh.sum_over_batch(self.total),
            mesh.sum_over_batch(self.outer),
        )

    def covariance(
        self, *, centred: bool
    ) -> Float[Tensor, "layers kv_heads head_width head_width"]:
        """Covariance, or the second moment about zero."""
        second = self.outer / self.count[..., None, None]
        if not centred:
            return second
        mean = self.total / self.count[..., None]
        return second - mean[..., :, None] * mean[..., None, :]

    def spectrum(self, *, centred: bool) -> Float[Tensor, "layers kv_heads head_width"]:
        """Variances along the principal directions, largest first."""
        return torch.linalg.eigvalsh(self.covariance(centred=centred)).flip(-1).clamp(min=0)

    def rank(
        self, share: float, *, centred: bool = True, reference_index: bool = False
    ) -> Int[Tensor, "layers kv_heads"]:
        """Principal directions that together hold `share` of the variance.

        Args:
            share: above 0, at most 1.
            centred: variance about the mean, as in the paper.
            reference_index: give what the published plots show, the index (from zero) of the direction
                that exceeds the share: one less.

        Raises:
            ValueError: for a share outside of (0, 1].
        """
        if not 0 < share <= 1:
            raise ValueError(f"share={share} of the variance; use more than 0 and at most 1")
        return rank_of(self.spectrum(centred=centred), share) - int(reference_index)


def rank_of(spectrum: Float[Tensor, "*heads width"], share: float) -> Int[Tensor, "*heads"]:
    """The number of leading entries that hold a share of the sum."""
    share_of_leading = spectrum.cumsum(-1) / spectrum.sum(-1, keepdim=True)
    # The last partial sum may round below 1; all directions hold everything.
    return ((share_of_leading < share).sum(-1) + 1).clamp(max=spectrum.shape[-1])


@formerly("loki/Calibrated")
@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSource:
    """The model and the text that a basis was calibrated with."""

    model: str
    """`fingerprint` of the model."""
    corpora: tuple[str, ...]
    """sha256 of each corpus's token ids, sorted."""
    tokens: int

    def __add__(self, other: "CalibrationSource") -> "CalibrationSource":
        if self.model != other.model:
            raise ValueError(
                f"statistics of model {self.model[:12]} and of model {other.model[:12]} do not add up; "
                "merge statistics of one model"
            )
        return CalibrationSource(
            model=self.model,
            corpora=tuple(sorted({*self.corpora, *other.corpora})),
            tokens=self.tokens + other.tokens,
        )


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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Statistics:
    """Moments of queries and keys, on both sides of the rotary embedding."""

    keys: Moments
    queries: Moments
    keys_before: Moments
    queries_before: Moments
    source: CalibrationSource

    @property
    def layers(self) -> int:
        """Attention layers that were seen."""
        return self.keys.outer.shape[0]

    def of(self, stage: RotaryStage) -> tuple[Moments, Moments]:
        """Keys' and queries' moments at a stage.

        Raises:
            ValueError: for vectors before the rotary embedding that calibration could not tell.
        """
        if stage == "after rotary":
            return self.keys, self.queries
        if not bool(self.keys_before.count.all()):
            raise ValueError(
                "keys before the rotary embedding are not known of this model: it does not tell its "
                "angles, turns other pairs of coordinates than halves, or has layers that do not turn; "
                "use those after rotary"
            )
        return self.keys_before, self.queries_before

    def __add__(self, other: "Statistics") -> "Statistics":
        return Statistics(
            keys=self.keys + other.keys,
            queries=self.queries + other.queries,
            keys_before=self.keys_before + other.keys_before,
            queries_before=self.queries_before + other.queries_before,
            source=self.source + other.source,
        )

    def over(self, mesh: Mesh) -> "Statistics":
        """Of all ranks that share a batch, each of which calibrated on windows of its own.

        Raises:
            ValueError: where this rank's statistics are of several corpora.
        """
        if len(self.source.corpora) != 1:
            raise ValueError(
                f"statistics of {len(self.source.corpora)} corpora on one rank; merge over the ranks first, "
                "then over corpora"
            )
        # Hashes are gathered as a sum in which every rank fills its own row.
        rows = torch.zeros(mesh.batch_size(), 33, dtype=torch.int64)
        digest = bytes.fromhex(self.source.corpora[0])
        rows[mesh.batch_rank()] = torch.tensor([*digest, self.source.tokens])
        rows = mesh.sum_over_batch(rows)
        return Statistics(
            keys=self.keys.over(mesh),
            queries=self.queries.over(mesh),
            keys_before=self.keys_before.over(mesh),
            queries_before=self.queries_before.over(mesh),
            source=replace(
                self.source,
                corpora=tuple(sorted({bytes(row[:-1].tolist()).hex() for row in rows})),
                tokens=int(rows[:, -1].sum()),
            ),
        )

    def save(self, path: str | PathLike[str]) -> None:
        """Write one safetensors file with its provenance, whole."""
        tensors = {
            f"{name}.{part}": getattr(getattr(self, name), part)
            for name in ("keys", "queries", "keys_before", "queries_before")
            for part in ("count", "total", "outer")
        }
        with whole_file(Path(path)) as partial:
            save_file(
                tensors, partial, metadata={"loki_statistics": json.dumps(to_json(self.source))}
            )

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Statistics":
        """Read what `save` wrote.

        Raises:
            ValueError: for a file that holds something else.
        """
        source = stated(path, "loki_statistics", "Statistics.save")
        assert isinstance(source, CalibrationSource)
        with safe_open(path, "pt") as file:

            def moments(name: str) -> Moments:
                return Moments(
                    *(file.get_tensor(f"{name}.{part}") for part in ("count", "total", "outer"))
                )

            return cls(
                keys=moments("keys"),
                queries=moments("queries"),
                keys_before=moments("keys_before"),
                queries_before=moments("queries_before"),
                source=source,
            )


def stated(path: str | PathLike[str], key: str, writer: str) -> object:
    """The value in a file's metadata, or a refusal."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
    except SafetensorError:
        metadata = None
    if not metadata or key not in metadata:
        raise ValueError(f"{path} was not written by {writer}; name a file that was")
    return from_json(json.loads(metadata[key]))
