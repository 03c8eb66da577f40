"""Answers from a model: transformers in batches, or a served model, in ParEval's file format, resumable."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fourfold_hpc_coder.pareval.bodies import body_of
from fourfold_hpc_coder.pareval.files import Fields
from fourfold_parallel.common.files import write_text
from fourfold_parallel.common.progress import Progress


class Backend(Protocol):
    """Something that completes prompts."""

    def complete_many(self, prompts: Sequence[str], *, first: int = 0) -> list[str]:
        """One completion per prompt, in order, without the prompt.

        Args:
            prompts: equal ones are answered anew each.
            first: how many samples of them were drawn before, which these must not repeat.
        """
        ...


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
        """All prompts as one batch, padded on the left; each row stops at its end token."""
        rows = [self._encode(prompt) for prompt in prompts]
        width = max(map(len, rows))
        end = self.tokenizer.eos_token_id
        assert isinstance(end, int)
        tokens = torch.tensor([[end] * (width - len(row)) + row for row in rows])
        seen = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        written = self._continue(tokens, seen, end, self.seed + first)[:, width:]
        return [self._text(row.tolist(), end) for row in written]

    def _encode(self, prompt: str) -> list[int]:
        prompt = f"{self.before}{prompt}{self.after}"
        if not self.chat:
            return self.tokenizer.encode(prompt, add_special_tokens=False)
        words = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        return self.tokenizer.encode(str(words), add_special_tokens=False)

    def _continue(
        self,
        tokens: Int[Tensor, "batch prompt"],
        seen: Int[Tensor, "batch prompt"],
        end: int,
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
                pad_token_id=end,
                eos_token_id=end,
                **sampling,
            )
        assert isinstance(written, Tensor)
        return written.cpu()

    def _text(self, tokens: list[int], end: int) -> str:
        stop = tokens.index(end) if end in tokens else len(tokens)
        return str(self.tokenizer.decode(tokens[:stop]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a file of outputs is generated; kept in ParEval's fields, and the model beside them."""

    model: str = ""
    chat: bool = False
    samples: int
    temperature: float
    top_p: float
    max_new_tokens: int
    batch: int

    def __post_init__(self) -> None:
        if self.samples < 1 or self.batch < 1 or self.max_new_tokens < 1 or self.temperature < 0:
            raise ValueError(
                f"samples={self.samples}, batch={self.batch}, max_new_tokens={self.max_new_tokens}, "
                f"temperature={self.temperature}: use 1 or more, and a temperature of 0 or more"
            )


def generate_file(
    prompts: Sequence[Fields],
    backend: Backend,
    sampling: Sampling,
    out: Path,
    progress: Progress,
) -> Path:
    """Complete every prompt and write ParEval's outputs file; what the file has is kept.

    Args:
        prompts: ParEval's prompt records: problem_type, language, name, parallelism_model, prompt.
        backend: completes prompts.
        sampling: how many, how hot, how long.
        out: the JSON file, written whole after each prompt.
        progress: told after each prompt.

    Raises:
        ValueError: where the file at `out` holds something else, or outputs of another model or sampling.
    """
    entries = _done(out, sampling)
    for index, record in enumerate(prompts):
        key = (record["name"], record["parallelism_model"], record["prompt"])
        if key not in entries:
            wanted = [record["prompt"]] * sampling.samples
            raw: list[str] = []
            for first in range(0, len(wanted), sampling.batch):
                raw += backend.complete_many(wanted[first : first + sampling.batch], first=first)
            entries[key] = {
                **record,
                **_fields(sampling),
                "outputs": [body_of(text, record["prompt"]) for text in raw],
                "raw_outputs": raw,
            }
            write_text(out, json.dumps([*entries.values()], indent=1) + "\n")
        progress(index + 1, len(prompts), record["name"])
    return out


def _fields(sampling: Sampling) -> Fields:
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "do_sample": sampling.temperature > 0,
        "max_new_tokens": sampling.max_new_tokens,
        "prompted": True,
        "generator": sampling.model,
        "chat": sampling.chat,
    }


def _done(out: Path, sampling: Sampling) -> dict[tuple[str, str, str], Fields]:
    if not out.exists():
        return {}
    try:
        entries = json.loads(out.read_text(encoding="utf-8"))
        held = {(one["name"], one["parallelism_model"], one["prompt"]): one for one in entries}
        differ = [
            f"{key} {one.get(key)!r}"
            for one in entries
            for key, value in _fields(sampling).items()
            if one.get(key) != value
        ]
        differ += [
            f"{n} samples" for one in entries if (n := len(one["outputs"])) != sampling.samples
        ]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{out} holds no outputs of ours; name another file with --out") from None
    if differ:
        raise ValueError(
            f"{out} holds outputs of other options ({differ[0]}); name another file with --out"
        )
    return held
