"""Keys and values of all recurrences of a token as one vector of a few numbers, for each layer of the core.

A token's keys at recurrences 1, 2, ... come from one block and from states that settle, so they lie close
together. x, the keys and values of one layer at every recurrence, with the rotation of the token's place
undone, is kept as z:

    z = U' (x - m),   keys and values ~ m + U z,

where m and the orthonormal columns of U are the mean and the principal directions over the tokens of a text.
Nothing is trained. A recurrence that reads its slot pays for a product with U, so this saves memory and costs
time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Complex, Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fourfold_recurrent_depth.cache import RecurrentCache
from fourfold_recurrent_depth.causal_lm import RecurrentDepthForCausalLM
from fourfold_recurrent_depth.configuration import RecurrentDepthConfig
from fourfold_recurrent_depth.model import rotate, rotate_halves

Turn = Callable[[Tensor, Tensor], Tensor]
_SMALL = 1 << 24
"""Numbers of a covariance; where there are more features, that of the tokens is taken apart instead."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LatentBasis:
    """The directions in which a model's keys and values lie: m and U of each layer of its core."""

    mean: Float[Tensor, "layer feature"]
    directions: Float[Tensor, "layer feature rank"]
    steps: int
    """Recurrences of a pass."""
    shares: Float[Tensor, "layer rank"]
    """The share of the variance over the text that lies in each direction, the largest first."""

    @property
    def rank(self) -> int:
        """Numbers kept for a token and a layer of the core."""
        return self.directions.shape[-1]

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        model: RecurrentDepthForCausalLM,
        tokens: Int[Tensor, "batch token"],
        *,
        steps: int,
        rank: int,
    ) -> LatentBasis:
        """The principal directions over tokens of a text, read at `steps` recurrences.

        Raises:
            ValueError: the rank is larger than the tokens or the features allow.
        """
        config = model.config
        cache = RecurrentCache(config, steps=steps, capacity=tokens.shape[1])
        model(tokens, past_key_values=cache, use_cache=True, num_steps=steps, logits_to_keep=1)
        rotary = model.begin(tokens, None)[1].rotary
        x = rearrange(
            _unrotated(cache, rotary, config), "layer batch token f -> layer (batch token) f"
        )
        count, features = x.shape[1:]
        if not 1 <= rank <= min(features, count - 1):
            raise ValueError(
                f"rank={rank} of {features} features over {count} tokens; use 1 to "
                f"{min(features, count - 1)}, or more tokens"
            )
        x = x.double()
        mean = x.mean(dim=1, keepdim=True)
        # The smaller of the two covariances has the same spectrum.
        if features * features <= _SMALL:
            variances, vectors = torch.linalg.eigh((x - mean).mT @ (x - mean))
        else:
            variances, vectors = torch.linalg.eigh((x - mean) @ (x - mean).mT)
            vectors = (x - mean).mT @ vectors / variances.clamp(min=1e-300).sqrt().unsqueeze(1)
        shares = variances[:, -rank:].flip(1) / variances.sum(1, keepdim=True)
        dtype = model.dtype
        return cls(
            mean=mean.squeeze(1).to(dtype),
            directions=vectors[..., -rank:].flip(-1).to(dtype).contiguous(),
            steps=steps,
            shares=shares.to(torch.float32),
        )

    def first(self, rank: int) -> LatentBasis:
        """The same with fewer directions, those of the largest variance.

        Raises:
            ValueError: there are not so many.
        """
        if not 1 <= rank <= self.rank:
            raise ValueError(f"rank={rank} of a basis of {self.rank}; use 1 to {self.rank}")
        return replace(self, directions=self.directions[..., :rank], shares=self.shares[:, :rank])

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        parts = {"mean": self.mean, "directions": self.directions, "shares": self.shares}
        contiguous = {name: part.contiguous() for name, part in parts.items()}
        save_file(contiguous, path, metadata={"steps": str(self.steps)})

    @classmethod
    def load(cls, path: Path) -> LatentBasis:
        """Read what `save` wrote.

        Raises:
            ValueError: the file holds something else.
        """
        with safe_open(path, framework="pt") as file:
            told, names = file.metadata() or {}, {*file.keys()}
            if "steps" not in told or names != {"mean", "directions", "shares"}:
                raise ValueError(
                    f"{path} holds {', '.join(sorted(names))} and no basis of a latent cache; "
                    "give a file that LatentBasis.save wrote"
                )
            parts = {name: file.get_tensor(name) for name in names}
        return cls(**parts, steps=int(told["steps"]))


class LatentCache(RecurrentCache):
    """A cache of `LatentBasis` vectors for `RecurrentDepthForCausalLM`, given as `past_key_values`.

    Tokens of a pass see each other's keys as they are; those cached are seen as their vectors give them back.
    Prelude and coda, and each token's place, are kept as they are; the rotation of a place follows from it.
    Passes take as many recurrences as the basis was made for, or fewer, and tokens may exit on the way.

    Args:
        config: the model's shape.
        basis: of the same model.
    """

    in_place = False

    def __init__(self, config: RecurrentDepthConfig, basis: LatentBasis) -> None:
        super().__init__(config, steps=basis.steps)
        self.config, self.basis = config, basis
        self._latents: Tensor | None = None
        self._outer: Tensor | None = None
        self._rotary: Tensor | None = None
        self._turned: Tensor | None = None
        self._now = RecurrentCache(config, steps=basis.steps, capacity=1)

    def open(self, batch: int, tokens: int, *, steps: int) -> None:
        """See `RecurrentCache.open`.

        Raises:
            ValueError: the batch is not the one that the cache holds, or the basis has no such recurrences.
        """
        if steps > self.steps:
            raise ValueError(
                f"{steps} recurrences for a basis of {self.steps}; fit one with steps={steps}, or take fewer"
            )
        self._refuse_batch(batch)
        self._now = RecurrentCache(self.config, steps=self.steps, capacity=tokens)
        self._now.open(batch, tokens, steps=steps)
        self._turned = None

    def update(
        self,
        key_states: Float[Tensor, "row head token width"],
        value_states: Float[Tensor, "row head token width"],
        layer_idx: int,
        rotary: Complex[Tensor, "#row token 1 half"] | None = None,
        *_: object,
        **__: object,
    ) -> tuple[Float[Tensor, "row head context width"], Float[Tensor, "row head context width"]]:
        """See `RecurrentCache.update`; the rotation of the tokens says how to undo it.

        Raises:
            ValueError: the model does not say it.
        """
        if rotary is None:
            raise ValueError(
                "a LatentCache undoes rotations, and this model does not say them; use it with a "
                "RecurrentDepthForCausalLM"
            )
        if self._turned is None:
            self._turned = rotary
        own = self._now.update(key_states, value_states, layer_idx)
        if not self.length:
            return own
        cached = self.read(layer_idx)
        keys, values = (torch.cat(pair, dim=2) for pair in zip(cached, own, strict=True))
        return keys, values

    def read(
        self, slot: int
    ) -> tuple[Float[Tensor, "row head cached width"], Float[Tensor, "row head cached width"]]:
        """A slot of the cached tokens, for the rows of `select`."""
        assert self._latents is not None
        assert self._outer is not None
        assert self._rotary is not None
        rows = self._now.rows
        if slot < self.around:
            keys, values = self._outer[:, slot] if rows is None else self._outer[:, slot, rows]
            return keys, values
        step, layer = divmod(slot - self.around, self.per_step)
        latents, rotary = self._latents[layer], self._rotary
        if rows is not None:
            latents = latents[rows]
            rotary = rotary[rows] if len(rotary) > 1 else rotary
        heads, width = self.config.num_key_value_heads, self.config.head_dim
        size = self.basis.mean.shape[1] // (2 * self.steps)
        parts = []
        for first in (step * size, (self.steps + step) * size):
            part = slice(first, first + size)
            flat = latents @ self.basis.directions[layer, part].T + self.basis.mean[layer, part]
            parts.append(flat.unflatten(-1, (heads, width)))
        keys = _turn(self.config)(parts[0], rotary)
        return keys.transpose(1, 2), parts[1].transpose(1, 2)

    def write(
        self,
        slot: int,
        rows: Int[Tensor, " row"],
        key_states: Float[Tensor, "row head width"],
        value_states: Float[Tensor, "row head width"],
    ) -> None:
        """Keys and values of the one new token of some rows."""
        self._now.write(slot, rows, key_states, value_states)

    def select(self, rows: Any, running: Any) -> None:
        """See `RecurrentCache.select`."""
        self._now.select(rows, running)

    def stop(
        self, row: Int[Tensor, " stopped"], token: Int[Tensor, " stopped"], *, depth: int
    ) -> None:
        """See `RecurrentCache.stop`."""
        self._now.stop(row, token, depth=depth)

    def views(self, *_: object, **__: object) -> Any:
        """Not here.

        Raises:
            ValueError: always.
        """
        raise ValueError("a LatentCache has no memory of slots to read in place; use `update`")

    def close(
        self,
        *,
        state: Float[Tensor, "batch token width"],
        steps: Int[Tensor, "batch token"] | None,
    ) -> None:
        """The pass ends: its tokens are cached as vectors now."""
        now, rotary = self._now, self._turned
        assert rotary is not None
        now.close(state=state, steps=steps)
        x = _unrotated(now, rotary, self.config)
        latents = (x - self.basis.mean[:, None, None]) @ self.basis.directions.unsqueeze(1)
        outer = torch.stack(now.slots(slice(0, self.around)))
        batch = state.shape[0]
        if self._rotary is not None and len(self._rotary) != len(rotary):
            self._rotary = self._rotary.expand(batch, -1, -1, -1)
            rotary = rotary.expand(batch, -1, -1, -1)
        self._latents = _behind(self._latents, latents, dim=2)
        self._outer = _behind(self._outer, outer, dim=4)
        self._rotary = _behind(self._rotary, rotary, dim=1)
        assert now.exit_steps is not None
        self.exit_steps = _behind(self.exit_steps, now.exit_steps, dim=1)
        self.last_state = now.last_state
        self.length += state.shape[1]
        self._now = RecurrentCache(self.config, steps=self.steps, capacity=1)

    def nbytes(self) -> int:
        """Bytes of the vectors, and of keys and values of prelude and coda."""
        return sum(
            kept.numel() * kept.element_size()
            for kept in (self._latents, self._outer)
            if kept is not None
        )

    @property
    def is_initialized(self) -> bool:
        """True where anything is cached."""
        return self._latents is not None

    @property
    def batch_size(self) -> int:
        """Rows, or -1 where nothing is cached yet."""
        return -1 if self._latents is None else self._latents.shape[1]

    def crop(self, tokens_to_remove: int) -> None:
        """See `RecurrentCache.crop`."""
        super().crop(tokens_to_remove)
        if self._latents is not None and self._outer is not None and self._rotary is not None:
            self._latents = self._latents[:, :, : self.length]
            self._outer = self._outer[..., : self.length, :]
            self._rotary = self._rotary[:, : self.length]

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._latents, self._outer, self._rotary = None, None, None

    def _over_rows(self, change: Callable[[Tensor, int], Tensor]) -> None:
        if self._latents is None or self._outer is None or self._rotary is None:
            return
        self._latents, self._outer = change(self._latents, 1), change(self._outer, 2)
        if len(self._rotary) > 1:
            self._rotary = change(self._rotary, 0)
        self._over_ends(change)


def _turn(config: RecurrentDepthConfig) -> Turn:
    return rotate if config.form.rotates == "pairs" else rotate_halves


def _unrotated(
    cache: RecurrentCache,
    rotary: Complex[Tensor, "#batch token 1 half"],
    config: RecurrentDepthConfig,
) -> Float[Tensor, "layer batch token feature"]:
    """Keys at every recurrence, as if each token stood at the first place, and values."""
    keys, values = cache.slots(slice(cache.around, None))
    keys = _turn(config)(keys.transpose(2, 3), rotary.conj().resolve_conj())
    both = torch.stack([keys, values.transpose(2, 3)])
    return rearrange(
        both.unflatten(1, (cache.steps, cache.per_step)),
        "kind step layer batch token head width -> layer batch token (kind step head width)",
    )


def _behind(known: Tensor | None, new: Tensor, *, dim: int) -> Tensor:
    return new if known is None else torch.cat([known, new], dim=dim)
