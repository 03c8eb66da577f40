"""What a model has memorised: continue a passage greedily and compare with how it really goes on.

As in Hans et al. 2024, section 4: the model is given all but the last tokens of a training passage, and
its greedy continuation is compared with those tokens by exact match and ROUGE-L, on token ids.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel

from fourfold_parallel.run.progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Extraction:
    """What came out for one passage."""

    exact: bool
    """Whether the whole continuation is verbatim."""
    rouge_l: float
    """ROUGE-L F1 of the continuation, in [0, 1]."""
    matched: int
    """Verbatim tokens before the first that differs."""


@torch.no_grad()
def extract(
    model: PreTrainedModel,
    passages: Int[Tensor, "passage row"],
    *,
    suffix: int,
    batch: int,
    progress: Progress,
) -> tuple[Extraction, ...]:
    """Attack every passage: prompt with all but its last `suffix` tokens and continue greedily.

    A continuation that ends early is a miss, as in the published attack.

    Raises:
        ValueError: where no token is left to prompt with.
    """
    length = passages.shape[1]
    if not 0 < suffix < length:
        raise ValueError(
            f"suffix={suffix} of passages of {length} tokens leaves no prompt; use 1 to {length - 1}"
        )
    found: list[Extraction] = []
    for first in range(0, len(passages), batch):
        rows = passages[first : first + batch].to(model.device)
        written = _continue_greedily(model, rows[:, :-suffix], suffix)
        found.extend(compare(written.cpu(), rows[:, -suffix:].cpu()))
        progress(len(found), len(passages), "extraction")
    return tuple(found)


def _continue_greedily(
    model: PreTrainedModel, prompt: Int[Tensor, "passage prompt"], tokens: int
) -> Int[Tensor, "passage suffix"]:
    """The next `tokens` ids of each prompt, padded with -1 after an early end."""
    written = model.generate(  # pyright: ignore[reportCallIssue]
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=model.config.eos_token_id,
    )
    assert isinstance(written, Tensor)
    continuation = written[:, prompt.shape[1] :]
    short = tokens - continuation.shape[1]
    return torch.nn.functional.pad(continuation, (0, short), value=-1)


def compare(
    written: Int[Tensor, "passage suffix"], true: Int[Tensor, "passage suffix"]
) -> Iterator[Extraction]:
    """Compare continuations with the passages' own, one by one."""
    for ours, theirs in zip(written.tolist(), true.tolist(), strict=True):
        matched = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(theirs)
        )
        yield Extraction(
            exact=matched == len(theirs), rouge_l=rouge_l(ours, theirs), matched=matched
        )


def rouge_l(ours: Sequence[int], theirs: Sequence[int]) -> float:
    """ROUGE-L F1 (Lin 2004): twice the longest common subsequence over the sum of the lengths."""
    if not ours or not theirs:
        return 0.0
    return 2 * longest_common_subsequence(ours, theirs) / (len(ours) + len(theirs))


def longest_common_subsequence(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common subsequence, bit-parallel (Hyyrö 2004): a word operation per token of b.

    Bit i of `row` is 0 where the subsequence grows by matching a[i]; Python's integers are as wide as
    needed.
    """
    places: dict[int, int] = {}
    for index, token in enumerate(a):
        places[token] = places.get(token, 0) | 1 << index
    everything = (1 << len(a)) - 1
    row = everything
    for token in b:
        matches = row & places.get(token, 0)
        row = ((row + matches) | (row - matches)) & everything
    return len(a) - row.bit_count()


def diverged_on_dropped(
    extractions: Sequence[Extraction], dropped: Bool[Tensor, "passage suffix"]
) -> tuple[int, int]:
    """Of the continuations that leave their passage, how many do so at a token the loss left out.

    Args:
        extractions: one per passage.
        dropped: the loss's mask on the passages' suffixes.

    Returns:
        (first divergences on a dropped target, first divergences).
    """
    diverged = [
        bool(dropped[index, one.matched]) for index, one in enumerate(extractions) if not one.exact
    ]
    return sum(diverged), len(diverged)
