"""Passkeys: a number hidden somewhere in a long text and asked for at its end.

A number counts as retrieved where greedy decoding would say it: every token of the answer is the likeliest
one, given those before.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fourfold_loki.attention_mode import Sparse
from fourfold_loki.evaluate.perplexity import each_arm
from fourfold_parallel.run.tokenizers import beginning, encoded

TASK = "A pass key is hidden in the text below. Remember it.\n\n"
NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\n\nWhat is the pass key? The pass key is"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PasskeyWindows:
    """Windows with a passkey each."""

    ids: Int[Tensor, "window context"]
    depths: tuple[float, ...]
    """Of each window's key: 0 before the filling text, 1 behind it."""
    prompt: int
    """Tokens before the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrieval:
    """One arm on one window."""

    arm: str
    depth: float
    is_found: bool
    read_share: float


def hide(
    tokenizer: PreTrainedTokenizerBase,
    filling: Int[Tensor, " token"],
    *,
    context: int,
    depths: Sequence[float],
    keys: Sequence[int],
) -> PasskeyWindows:
    """A window for every key at every depth, of `context` tokens with its answer.

    Args:
        tokenizer: of the model.
        filling: text to hide in; every window takes another part.
        context: tokens of a window.
        depths: from 0 to 1.
        keys: numbers of as many tokens each.

    Raises:
        ValueError: for numbers of unequal length, or too little text.
    """
    task = [*beginning(tokenizer), *encoded(tokenizer, TASK)]
    question = encoded(tokenizer, QUESTION)
    answers = [encoded(tokenizer, f" {key}") for key in keys]
    if len({len(answer) for answer in answers}) != 1:
        raise ValueError(
            f"keys={tuple(keys)} differ in length as tokens; use as many digits in each"
        )
    windows, places = [], []
    for depth in depths:
        for key, answer in zip(keys, answers, strict=True):
            needle = encoded(tokenizer, NEEDLE.format(key=key))
            room = context - len(task + needle + question + answer)
            # Every window takes its own stretch of the filling text.
            first = len(windows) * max(room, 0)
            text = filling[first : first + max(room, 0)].tolist()
            if room < 1 or len(text) < room:
                raise ValueError(
                    f"context={context} leaves {room} tokens to fill and {len(filling)} were given for "
                    f"{len(depths) * len(keys)} windows; use a longer context, or more text"
                )
            cut = round(depth * room)
            body = text[:cut] + needle + text[cut:]
            windows.append(task + body + question + answer)
            places.append(depth)
    return PasskeyWindows(
        ids=torch.tensor(windows), depths=tuple(places), prompt=context - len(answers[0])
    )


def retrieve(
    model: PreTrainedModel, hidden: PasskeyWindows, arms: Mapping[str, Sparse], *, batch: int = 2
) -> Iterator[Retrieval]:
    """Full attention and every arm on every window; the prompt is dense, the answer is read sparsely."""
    for first in range(0, len(hidden.ids), batch):
        ids = hidden.ids[first : first + batch].to(model.device)
        answers = ids[:, hidden.prompt :]
        for name, reads, logits in each_arm(model, ids, arms, prompt=hidden.prompt):
            told = (logits.argmax(-1) == answers).all(-1).tolist()
            for depth, is_found in zip(hidden.depths[first:], told, strict=False):
                yield Retrieval(
                    arm=name,
                    depth=depth,
                    is_found=is_found,
                    read_share=1.0 if reads is None else reads.read_share,
                )
