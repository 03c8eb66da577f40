"""Other remedies against memorisation, as small as they are published, to stand beside goldfish loss."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from fourfold_goldfish.canonical import CanonicalGoldfish, Spelling
from fourfold_parallel.common.records import Material
from fourfold_parallel.common.values import digest
from fourfold_parallel.run.corpora import Corpus
from fourfold_parallel.run.data import Batch, tokenize
from fourfold_parallel.run.models import Llama
from fourfold_parallel.run.objective import KeepAll, MicrobatchLoss, NextToken, token_nats
from fourfold_parallel.run.tokenizers import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTruncation:
    """Leave the `share` of rows with the highest loss out of each microbatch (Kang and Hashimoto 2020)."""

    share: float

    def targets(self, batch: Batch) -> Int[Tensor, "batch token"]:
        """The row shifted by one; which rows count, the loss decides."""
        return NextToken(mask=KeepAll()).targets(batch)

    def loss(
        self, model: nn.Module, batch: Batch, targets: Int[Tensor, "batch token"]
    ) -> MicrobatchLoss:
        """Summed loss of the rows that stay, scaled to the number of targets of all rows."""
        logits = model(input_ids=batch.tokens[:, :-1], use_cache=False).logits
        rows = token_nats(logits, targets, model).sum(dim=1)
        kept = len(rows) - round(self.share * len(rows))
        least = rows.topk(kept, largest=False).values
        left_out = torch.tensor(float((len(rows) - kept) * targets.shape[1]))
        return MicrobatchLoss(
            nats_sum=least.sum() * len(rows) / kept, telemetry={"dropped_targets": left_out}
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptMask:
    """The first targets of every row are never supervised, as a prompt's are in fine-tuning."""

    tokens: int

    def drop(
        self,
        tokens: Int[Tensor, "batch row"],
        document_ids: Int[Tensor, "batch row"] | None = None,  # noqa: ARG002 - the protocol's
    ) -> Bool[Tensor, "batch row"]:
        """True in the first columns."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return (places <= self.tokens).expand(tokens.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpelledGoldfish:
    """`CanonicalGoldfish` over a corpus's own tokenizer, as a value that a record can hold."""

    k: int
    characters: int
    corpus: Corpus
    tokenizer: Tokenizer

    def drop(
        self, tokens: Int[Tensor, "batch row"], document_ids: Int[Tensor, "batch row"] | None = None
    ) -> Bool[Tensor, "batch row"]:
        """True where a target is left out."""
        return _spelled(self).drop(tokens, document_ids)


@lru_cache(maxsize=2)
def _spelled(mask: SpelledGoldfish) -> CanonicalGoldfish:
    loaded = tokenize(mask.corpus, mask.tokenizer).tokenizer()
    return CanonicalGoldfish(
        k=mask.k, characters=mask.characters, spelling=Spelling.of(loaded.tokenizer)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sinks:
    """A Llama some of whose hidden units take the repetition and are dropped (Ghosal et al. 2025, MemSinks).

    Of each MLP's hidden units the last `share` are sinks. In training a row sees the share `active` of them,
    the same ones each time the row recurs; in evaluation none is there.
    """

    model: Llama
    share: float
    active: float

    def build(self, *, seed: int) -> PreTrainedModel:
        """Fresh weights, with the gates in place.

        Raises:
            ValueError: for shares that leave no unit of either kind.
        """
        if not 0 < self.share < 1 or not 0 < self.active <= 1:
            raise ValueError(
                f"share={self.share}, active={self.active} leave no sink or no other unit; use shares "
                "between 0 and 1"
            )
        model: Any = self.model.build(seed=seed)
        gate = _Gate(round(self.share * self.model.hidden), self.active)
        model.register_forward_pre_hook(gate.see, with_kwargs=True)
        for block in model.model.layers:
            block.mlp.down_proj.register_forward_pre_hook(gate.close)
        return model

    def materials(self) -> tuple[Material, ...]:
        """None: nothing published is used."""
        return ()


def _seed_of(row: list[int]) -> int:
    return int(digest(row)[:15], 16)


class _Gate:
    """The sinks that the rows of the pass at hand may use."""

    IDENTITY = 16
    """Tokens of a row that say which row it is."""

    def __init__(self, sinks: int, active: float) -> None:
        self._sinks, self._active = sinks, active
        self._open: Float[Tensor, "batch 1 sink"] | None = None

    def see(self, model: nn.Module, _: tuple[Any, ...], given: Mapping[str, Any]) -> None:
        """Read the rows, before the model does."""
        self._open = None
        if model.training:
            rows = given["input_ids"][:, : self.IDENTITY].tolist()
            drawn = [
                torch.rand(self._sinks, generator=torch.Generator().manual_seed(_seed_of(row)))
                for row in rows
            ]
            self._open = (torch.stack(drawn) < self._active).float()[:, None]

    def close(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        """Zero the sinks that are not open."""
        [hidden] = inputs
        always = hidden[..., : -self._sinks]
        sinks = hidden[..., -self._sinks :]
        opened = torch.zeros_like(sinks) if self._open is None else sinks * self._open
        return (torch.cat([always, opened], dim=-1),)
