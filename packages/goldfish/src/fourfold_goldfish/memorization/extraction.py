"""Extraction: let a model continue a passage and compare with how the passage really goes on.

As in Hans et al. 2024, section 4: the model is given all but the last tokens of a training passage, and
its continuation is compared with those tokens on token ids. Greedy decoding is the paper's main attack, 30
beams its adaptive one; sampling and a search at uncertain tokens are further ones.
"""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from rapidfuzz.distance import LCSseq, Levenshtein
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fourfold_parallel.common.progress import Progress, silent


@dataclass(frozen=True, slots=True, kw_only=True)
class Greedy:
    """The likeliest token at each step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Beam:
    """The likeliest of `beams` continuations kept side by side."""

    beams: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookahead:
    """Fill in what the loss left out: where the model is unsure, try several tokens and look ahead.

    A left-out token is hard to guess, but after the right one the model is sure again. So each of the
    `candidates` likeliest tokens is followed by `steps` greedy ones, and the one that leads to the
    likeliest of those is kept.
    """

    candidates: int
    steps: int
    unsure_below: float
    """Search only where the likeliest token has less than this probability."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Draws from the `top_k` likeliest tokens of the smallest set that holds `top_p` of the probability."""

    temperature: float = 1.0
    top_k: int = 1 << 30
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"temperature={self.temperature} draws nothing; use above 0, or Greedy"
            )
        if self.top_k < 1 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_k={self.top_k}, top_p={self.top_p} leave no token; "
                "use 1 or more, and above 0 to 1"
            )

    def log_probabilities(
        self, logits: Float[Tensor, "*batch vocabulary"]
    ) -> Float[Tensor, "*batch vocabulary"]:
        """Log probabilities under which tokens are drawn; -inf for those that never are.

        From the same warpers of transformers as `generate` draws by.
        """
        warpers = LogitsProcessorList(
            [
                TemperatureLogitsWarper(float(self.temperature)),
                TopKLogitsWarper(self.top_k),
                TopPLogitsWarper(self.top_p),
            ]
        )
        rows = logits.float().reshape(-1, logits.shape[-1])
        no_prompt: Any = rows.new_empty((len(rows), 0), dtype=torch.long)
        return warpers(no_prompt, rows).log_softmax(-1).view(logits.shape)

    def log_chances(
        self,
        logits: Float[Tensor, "*batch vocabulary"],
        own: Float[Tensor, "*batch 1"],
    ) -> Float[Tensor, "*batch 1"]:
        """`log_probabilities` of single tokens with logits `own`, without those of all others.

        Raises:
            ValueError: with a `top_p`, for which all others must be sorted.
        """
        if self.top_p < 1:
            raise ValueError(
                f"top_p={self.top_p} needs every token's chance; use log_probabilities"
            )
        if self.top_k >= logits.shape[-1]:
            partition = (logits / self.temperature).logsumexp(-1, keepdim=True)
            return own / self.temperature - partition
        likeliest = logits.topk(self.top_k, dim=-1, sorted=False).values
        partition = (likeliest / self.temperature).logsumexp(-1, keepdim=True)
        is_drawn = own >= likeliest.amin(-1, keepdim=True)
        return (own / self.temperature - partition).masked_fill(~is_drawn, -torch.inf)


Decoding = Greedy | Beam | Lookahead


@dataclass(frozen=True, slots=True, kw_only=True)
class Extraction:
    """A continuation beside the passage's own."""

    exact: bool
    """True where the whole continuation is verbatim."""
    rouge_l: float
    """ROUGE-L F1 of the continuation, in [0, 1]."""
    matched: int
    """Verbatim tokens before the first that differs."""
    longest_run: int
    """Tokens of the longest passage that the continuation shares with the true one."""
    edit_similarity: float
    """One minus the normalised edit distance, in [0, 1]."""


def extract(
    model: PreTrainedModel,
    passages: Int[Tensor, "passage row"],
    *,
    suffix: int,
    batch: int,
    progress: Progress = silent,
    decoding: Decoding = Greedy(),
) -> tuple[Extraction, ...]:
    """Attack every passage: prompt with all but its last `suffix` tokens and let the model go on.

    A continuation that ends early is a miss, as in the published attack.

    Args:
        model: in evaluation mode.
        passages: token ids, all of one length.
        suffix: tokens to be recited.
        batch: passages at a time.
        progress: told after each batch.
        decoding: how the continuation is chosen.

    Raises:
        ValueError: where no token is left to prompt with.
    """
    length = passages.shape[1]
    if not 0 < suffix < length:
        raise ValueError(
            f"suffix={suffix} of passages of {length} tokens leaves no prompt; use 1 to {length - 1}"
        )
    extractions: list[Extraction] = []
    for first in range(0, len(passages), batch):
        rows = passages[first : first + batch].to(model.device)
        written = continuation(model, rows[:, :-suffix], suffix, decoding)
        extractions.extend(compare(written.cpu(), rows[:, -suffix:].cpu()))
        progress(len(extractions), len(passages), "extraction")
    return tuple(extractions)


@torch.no_grad()
def continuation(
    model: PreTrainedModel, prompt: Int[Tensor, "passage prompt"], tokens: int, decoding: Decoding
) -> Int[Tensor, "passage suffix"]:
    """The next `tokens` ids of each prompt, padded with -1 after an early end."""
    match decoding:
        case Greedy():
            written = _generate(model, prompt, max_new_tokens=tokens)
        case Beam(beams=beams):
            written = _generate(model, prompt, max_new_tokens=tokens, num_beams=beams)
        case Lookahead():
            return torch.cat([_fill(model, row[None], tokens, decoding) for row in prompt])
    short = tokens - written.shape[1]
    return torch.nn.functional.pad(written, (0, short), value=-1)


def _generate(
    model: PreTrainedModel, prompt: Int[Tensor, "passage prompt"], **options: Any
) -> Int[Tensor, "passage new"]:
    # A model's own generation settings may punish repetition, which is what an attack looks for.
    end = model.config.eos_token_id  # a chat model has several
    settings = {"do_sample": False, "use_cache": True, "repetition_penalty": 1.0, **options}
    written = model.generate(  # pyright: ignore[reportCallIssue]
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        no_repeat_ngram_size=0,
        pad_token_id=end[0] if isinstance(end, list) else end,
        **settings,
    )
    assert isinstance(written, Tensor)
    return written[:, prompt.shape[1] :]


def _fill(
    model: PreTrainedModel, prompt: Int[Tensor, "1 prompt"], tokens: int, search: Lookahead
) -> Int[Tensor, "1 suffix"]:
    """Greedy, but with a search at each token that the model is unsure of."""
    row = prompt
    for _ in range(tokens):
        # The greedy token, unless the model is unsure of it.
        likely = next_log_probabilities(model, row)[:, -1]
        best = likely.topk(search.candidates, dim=-1)
        chosen = best.indices[:, :1]
        if best.values[0, 0].exp() < search.unsure_below:
            # Each candidate goes on greedily; the one whose future is the surest is taken.
            tried = torch.cat([row.expand(search.candidates, -1), best.indices[0, :, None]], dim=1)
            sureness = torch.zeros(search.candidates, device=row.device)
            for _ in range(search.steps):
                ahead = next_log_probabilities(model, tried)[:, -1].max(dim=-1)
                sureness += ahead.values
                tried = torch.cat([tried, ahead.indices[:, None]], dim=1)
            chosen = best.indices[:, sureness.argmax()][:, None]
        row = torch.cat([row, chosen], dim=1)
    return row[:, prompt.shape[1] :]


@torch.no_grad()
def next_log_probabilities(
    model: PreTrainedModel, tokens: Int[Tensor, "passage row"]
) -> Float[Tensor, "passage row vocabulary"]:
    """Log probabilities of the token after each one, in float32."""
    logits = model(input_ids=tokens, use_cache=False).logits
    return logits.float().log_softmax(-1)


@torch.no_grad()
def recital_probabilities(
    model: PreTrainedModel,
    passages: Int[Tensor, "passage row"],
    *,
    suffix: int,
    sampling: Sampling,
) -> Float[Tensor, " passage"]:
    """Chance that one sampled continuation is verbatim: the product of its tokens' chances, exactly.

    Among `n` samples at least one is with chance 1 - (1 - p)^n (`chance_of_any`).
    """
    logits = model(input_ids=passages[:, :-1], use_cache=False).logits[:, -suffix:]
    drawn = sampling.log_probabilities(logits)
    return drawn.gather(-1, passages[:, -suffix:, None]).squeeze(-1).sum(-1).exp()


def chance_of_any(
    probability: Float[Tensor, " passage"], samples: int
) -> Float[Tensor, " passage"]:
    """Chance that at least one of independent `samples` succeeds."""
    return -torch.expm1(samples * torch.log1p(-probability.double()))


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompt: Int[Tensor, "passage prompt"],
    tokens: int,
    *,
    sampling: Sampling,
    seed: int,
) -> Int[Tensor, "passage suffix"]:
    """One sampled continuation of each prompt, past any end of text; equal seeds give equal ones."""
    devices = [prompt.device] if prompt.is_cuda else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        return _generate(
            model,
            prompt,
            max_new_tokens=tokens,
            eos_token_id=None,
            do_sample=True,
            temperature=float(sampling.temperature),
            top_k=sampling.top_k,
            top_p=sampling.top_p,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TableCell:
    """Mean recall of one prompt length at one place in the passages."""

    offset: int
    """Tokens left out at the beginning of each passage."""
    prompt: int
    exact: float
    rouge_l: float


def grid(
    model: PreTrainedModel,
    passages: Int[Tensor, "passage row"],
    *,
    offsets: Sequence[int],
    prompts: Sequence[int],
    suffix: int,
    batch: int,
    progress: Progress = silent,
) -> Iterator[TableCell]:
    """Recall over prompt lengths and offsets: recital fades for prompts from inside a passage.

    Raises:
        ValueError: where a cell reaches beyond the passages.
    """
    longest = max(offsets) + max(prompts) + suffix
    if longest > passages.shape[1]:
        raise ValueError(
            f"offset {max(offsets)} + prompt {max(prompts)} + suffix {suffix} = {longest} tokens, the "
            f"passages have {passages.shape[1]}; use smaller ones"
        )
    for offset in offsets:
        for prompt in prompts:
            rows = passages[:, offset : offset + prompt + suffix]
            extractions = extract(model, rows, suffix=suffix, batch=batch, progress=progress)
            yield TableCell(
                offset=offset,
                prompt=prompt,
                exact=sum(extraction.exact for extraction in extractions) / len(extractions),
                rouge_l=sum(extraction.rouge_l for extraction in extractions) / len(extractions),
            )


def compare(
    written: Int[Tensor, "passage suffix"], true: Int[Tensor, "passage suffix"]
) -> Iterator[Extraction]:
    """Compare continuations with the passages' own, one by one."""
    for ours, theirs in zip(written.tolist(), true.tolist(), strict=True):
        matched = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(theirs)
        )
        yield Extraction(
            exact=matched == len(theirs),
            rouge_l=rouge_l(ours, theirs),
            matched=matched,
            longest_run=longest_common_substring(ours, theirs),
            edit_similarity=Levenshtein.normalized_similarity(ours, theirs),
        )


def rouge_l(ours: Sequence[int], theirs: Sequence[int]) -> float:
    """ROUGE-L F1 (Lin 2004): twice the longest common subsequence over the sum of the lengths."""
    if not ours or not theirs:
        return 0.0
    return 2 * LCSseq.similarity(ours, theirs) / (len(ours) + len(theirs))


def longest_common_substring(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Length of the longest run of tokens that stands in both."""
    return difflib.SequenceMatcher(None, ours, theirs, autojunk=False).find_longest_match().size


def diverged_on_dropped(
    extractions: Sequence[Extraction], dropped: Bool[Tensor, "passage suffix"]
) -> tuple[int, int]:
    """Count the continuations that leave their passage at a token the loss left out.

    Args:
        extractions: one per passage.
        dropped: the loss's mask on the passages' suffixes.

    Returns:
        (first divergences on a dropped target, first divergences).
    """
    diverged = [
        bool(dropped[index, extraction.matched])
        for index, extraction in enumerate(extractions)
        if not extraction.exact
    ]
    return sum(diverged), len(diverged)
