"""The bases: the paper's principal components, and two whose leading coordinates rank better.

`pca` is the paper's: eigenvectors of the keys' covariance. Centring takes the keys' mean out of the
leading directions, and with it what tells the attention sink from all other keys.
`pca_uncentred`: eigenvectors of the keys' second moment, which keeps the mean's direction.
`balanced`: looks at queries too. With Cq = E q^T q = Sq Sq^T, Ck = Cov k = Sk Sk^T and the
decomposition Sq^T Sk = U Σ V^T,

    W = Sq^-T U Σ^½        W^-1 = Σ^-½ U^T Sq^T        q' = q W,  k' = k W^-T

leaves every score as it is, and the first d coordinates give the best approximation of rank d: the
expected squared error of a score is Σ_{i>d} σ_i², the least possible (Eckart and Young).
"""

import json
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fourfold_loki.attention import Rotation
from fourfold_loki.moments import CalibrationSource, RotaryStage, Statistics, rank_of, stated
from fourfold_parallel.common.files import whole_file
from fourfold_parallel.common.values import formerly, to_json

Kind = Literal["pca", "pca_uncentred", "balanced"]

RIDGE = 1e-6
"""Share of the mean variance that every direction has at least, so that maps can be inverted."""


@formerly("loki/Imported")
@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedSource:
    """The folder of a transform in the published layout, which states neither model nor corpus."""

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


Source = CalibrationSource | PublishedSource | Part


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """The kind of a basis and where it comes from, as its file states."""

    kind: Kind
    stage: RotaryStage
    """The keys that it was fitted to. It is applied after the rotary embedding either way."""
    source: Source


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Basis:
    """A rotation for every layer of a model."""

    query_maps: Float[Tensor, "layers kv_heads head_width head_width"]
    key_maps: Float[Tensor, "layers kv_heads head_width head_width"]
    spectra: Float[Tensor, "layers kv_heads head_width"]
    """The contribution of each coordinate: variance of keys, or of scores (σ_i²) where balanced."""
    label: Label

    @property
    def layers(self) -> int:
        """Attention layers it has a rotation for."""
        return self.query_maps.shape[0]

    @property
    def kv_heads(self) -> int:
        """Key/value heads of a layer."""
        return self.query_maps.shape[1]

    @property
    def head_width(self) -> int:
        """Coordinates of a head."""
        return self.query_maps.shape[-1]

    def rotation(self, layer: int) -> Rotation:
        """The maps of one layer."""
        return Rotation(self.query_maps[layer], self.key_maps[layer])

    def to(self, device: torch.device | str) -> "Basis":
        """The same basis on another device."""
        return Basis(
            query_maps=self.query_maps.to(device),
            key_maps=self.key_maps.to(device),
            spectra=self.spectra.to(device),
            label=self.label,
        )

    def heads(self, first: int, last: int) -> "Basis":
        """Key/value heads `first` to `last` (exclusive), for a rank that holds these of a split model.

        Whether the basis is the model's is checked before it is split: a rank's weights do not tell.

        Raises:
            ValueError: for heads that the basis has not.
        """
        if not 0 <= first < last <= self.kv_heads:
            raise ValueError(
                f"heads {first} to {last} of a basis of {self.kv_heads} key/value heads; "
                f"use a range within 0 to {self.kv_heads}"
            )
        return Basis(
            query_maps=self.query_maps[:, first:last],
            key_maps=self.key_maps[:, first:last],
            spectra=self.spectra[:, first:last],
            label=replace(self.label, source=Part(first=first, last=last, kv_heads=self.kv_heads)),
        )

    def widths_for(self, share: float, *, reference_off_by_one: bool = False) -> tuple[int, ...]:
        """A width a layer: the most that any of its heads needs to hold `share` of its spectrum.

        Args:
            share: of variance (of keys; of scores where balanced).
            reference_off_by_one: one less, as the published code counts for thresholds below 1.
        """
        ranks = rank_of(self.spectra.double(), share).amax(-1) - int(reference_off_by_one)
        return tuple(int(rank) for rank in ranks)

    def lost(self, width: int) -> Float[Tensor, "layers kv_heads"]:
        """Share of the spectrum beyond the first `width` coordinates."""
        return self.spectra[..., width:].sum(-1) / self.spectra.sum(-1)

    def save(self, path: str | PathLike[str]) -> None:
        """Write one safetensors file with its label, whole."""
        tensors = {
            "query_maps": self.query_maps.contiguous(),
            "key_maps": self.key_maps.contiguous(),
            "spectra": self.spectra.contiguous(),
        }
        with whole_file(Path(path)) as partial:
            save_file(tensors, partial, metadata={"loki_basis": json.dumps(to_json(self.label))})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Basis":
        """Read what `save` wrote.

        Raises:
            ValueError: for a file that holds something else.
        """
        label = stated(path, "loki_basis", "Basis.save")
        assert isinstance(label, Label)
        with safe_open(path, "pt") as file:
            names = ("query_maps", "key_maps", "spectra")
            maps = {name: file.get_tensor(name) for name in names}
        return cls(**maps, label=label)


def fit(
    statistics: Statistics, kind: Kind = "balanced", stage: RotaryStage = "after rotary"
) -> Basis:
    """The basis of a kind from calibration statistics.

    Raises:
        ValueError: where fewer vectors were seen than a head has coordinates, or none at that stage.
    """
    keys, queries = statistics.of(stage)
    width = keys.outer.shape[-1]
    if float(keys.count.min()) < width:
        raise ValueError(
            f"{int(keys.count.min())} keys cannot fix {width} directions; calibrate on at least "
            f"{width} tokens, better on {50 * width}"
        )
    label = Label(kind=kind, stage=stage, source=statistics.source)
    if kind == "balanced":
        return _balanced(keys.covariance(centred=True), queries.covariance(centred=False), label)
    covariance = keys.covariance(centred=kind == "pca")
    spectra, directions = torch.linalg.eigh(covariance)
    maps = directions.flip(-1).float()
    return Basis(
        query_maps=maps, key_maps=maps, spectra=spectra.flip(-1).clamp(min=0).float(), label=label
    )


def _balanced(key_covariance: Tensor, query_moment: Tensor, label: Label) -> Basis:
    """The derivation at the head of this file, for all heads at once, in float64."""
    queries, inverse = _factors(query_moment)
    keys, _ = _factors(key_covariance)
    left, sizes, _ = torch.linalg.svd(queries.mT @ keys)
    roots = sizes.sqrt()[..., None, :]
    return Basis(
        query_maps=(inverse.mT @ left * roots).float(),
        # W^-T: the columns of Sq U, each over the root of its singular value.
        key_maps=(queries @ left / roots).float(),
        spectra=sizes.square().float(),
        label=label,
    )


def _factors(moment: Tensor) -> tuple[Tensor, Tensor]:
    """S with S S^T = moment, and its inverse; directions without variance get a little."""
    sizes, directions = torch.linalg.eigh(moment)
    roots = sizes.clamp(min=RIDGE * sizes.mean(-1, keepdim=True)).sqrt()
    return directions * roots[..., None, :], (directions / roots[..., None, :]).mT


def read_published(folder: str | PathLike[str], *, stage: RotaryStage = "after rotary") -> Basis:
    """Import a transform in the published layout, `folder` being `<Model>-PCA/<corpus>`.

    There `postrotary/key/pca_components/pca_components_layer_0.pt` holds rows of directions [heads, D, D]
    and `pca_explained_variance` their shares of the variance.

    Raises:
        ValueError: where the folder holds no such files.
    """
    folder = Path(folder)
    place = folder / ("postrotary" if stage == "after rotary" else "prerotary") / "key"
    layers = len(list(place.glob("pca_components/pca_components_layer_*.pt")))
    if not layers:
        raise ValueError(
            f"{place} holds no pca_components/pca_components_layer_<i>.pt; name the folder of one "
            "corpus, such as Llama-2-7b-PCA/wikitext"
        )

    def stacked(name: str) -> Tensor:
        files = [place / name / f"{name}_layer_{layer}.pt" for layer in range(layers)]
        return torch.stack([torch.load(file, weights_only=True).float() for file in files])

    maps = stacked("pca_components").mT.contiguous()
    return Basis(
        query_maps=maps,
        key_maps=maps,
        spectra=stacked("pca_explained_variance"),
        label=Label(
            kind="pca", stage=stage, source=PublishedSource(folder="/".join(folder.parts[-2:]))
        ),
    )
