"""The odds that a model recites a text, for every stretch of it, from one pass a window and no generation.

The chance that sampling continues a text verbatim is the product of its tokens' chances, each given the true
text before it; and greedy decoding recites a stretch exactly where each of its tokens is the model's first
choice. Both are read off the logits of the text itself (Hayes et al. 2025, (n, p)-discoverable extraction).
"""

import hashlib
import inspect
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import ndimage, stats
from torch import Tensor
from transformers import PreTrainedModel

from fourfold_goldfish.memorization.extraction import Sampling
from fourfold_parallel.common.progress import Progress, silent
from fourfold_parallel.reproduce.claims import Interval

FLOATS = 1 << 26
"""Logits held at a time: 256 MB in float32."""
TOP_40 = Sampling(top_k=40)
TRIES = tuple(10**power for power in range(7))
"""Samples that a reader may draw, 1 to a million."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attacker:
    """A reader who gives the model a text up to some place and draws its continuation."""

    prompt: int = 50
    """Tokens of text before a stretch, at least."""
    suffix: int = 50
    """Tokens of a stretch."""
    window: int = 512
    """Tokens that the model sees at a time; a stretch late in a window has more text before it."""
    sampling: Sampling = TOP_40
    """The draws; the 40 likeliest tokens at temperature 1, as in the study of open models (2025)."""

    def __post_init__(self) -> None:
        if self.prompt < 1 or self.suffix < 1:
            raise ValueError(
                f"prompt={self.prompt}, suffix={self.suffix}: a prompt and a stretch have 1 token or more"
            )
        if self.window < self.needs:
            raise ValueError(
                f"window={self.window} holds no prompt of {self.prompt} and stretch of {self.suffix} "
                f"tokens; use {self.needs} or more"
            )

    @property
    def needs(self) -> int:
        """Tokens of the shortest text with a stretch."""
        return self.prompt + self.suffix


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A model's view of one text: of each token after the first `prompt`, its odds given the text before."""

    name: str
    log_chance: Float[np.ndarray, " scored"]
    """Of drawing the true token, in nats; -inf where it is never drawn."""
    is_first: Bool[np.ndarray, " scored"]
    """True where the true token is the model's first choice."""

    def stretches(self, suffix: int) -> Float[np.ndarray, " start"]:
        """Log chance of drawing the `suffix` tokens from each place verbatim, in nats; -inf for never."""
        never = np.isneginf(self.log_chance)
        sums = np.cumsum(np.append(0.0, np.where(never, 0.0, self.log_chance)))
        nevers = np.cumsum(np.append(0, never))
        total = sums[suffix:] - sums[:-suffix]
        return np.where(nevers[suffix:] > nevers[:-suffix], -np.inf, total)

    def heat(self, suffix: int) -> Float[np.ndarray, " scored"]:
        """For each token, the log chance of the likeliest stretch that it is part of."""
        spread = np.full(len(self.log_chance), -np.inf)
        spread[: len(self.log_chance) - suffix + 1] = self.stretches(suffix)
        # The starts whose stretch holds a token are the token's own place and the suffix - 1 before it.
        return ndimage.maximum_filter1d(
            spread, suffix, mode="constant", cval=-np.inf, origin=(suffix - 1) // 2
        )

    def longest(self) -> tuple[int, int]:
        """(first token after the prompt, tokens) of the longest stretch that greedy decoding recites."""
        edges = np.diff(np.concatenate([[False], self.is_first, [False]]).astype(int))
        begins, ends = (edges == 1).nonzero()[0], (edges == -1).nonzero()[0]
        if not len(begins):
            return 0, 0
        longest = int((ends - begins).argmax())
        return int(begins[longest]), int((ends - begins)[longest])

    def covered(self, suffix: int, *, share: float) -> Bool[np.ndarray, " scored"]:
        """Tokens inside some stretch of `suffix` of which the model has at least `share` as its first choice.

        The true text is given all the way: it is what a reader gets who mends each wrong word.
        """
        hits = np.cumsum(np.append(0, self.is_first))
        near = hits[suffix:] - hits[:-suffix] >= math.ceil(share * suffix - 1e-9)
        marks = np.zeros(len(self.is_first) + 1, dtype=int)
        starts = near.nonzero()[0]
        np.add.at(marks, starts, 1)
        np.add.at(marks, starts + suffix, -1)
        return marks.cumsum()[:-1] > 0


def identity(ids: Sequence[int]) -> str:
    """Digest of a text's ids, by which a record knows that a text was not edited."""
    return hashlib.sha256(np.asarray(ids, dtype=np.int64).tobytes()).hexdigest()[:16]


def read(
    model: PreTrainedModel,
    texts: Mapping[str, Sequence[int]],
    attacker: Attacker,
    *,
    progress: Progress = silent,
) -> Iterator[Reading]:
    """Read texts one by one; each window is one pass, and the windows of short texts share passes.

    Args:
        model: in evaluation mode.
        texts: ids by name, each of `attacker.needs` or more.
        attacker: what is asked for.
        progress: told after each pass, in tokens.

    Raises:
        ValueError: for a text that is too short.
    """
    short = [name for name, ids in texts.items() if len(ids) < attacker.needs]
    if short:
        raise ValueError(
            f"{short[0]} has {len(texts[short[0]])} tokens, fewer than prompt + suffix = {attacker.needs}; "
            "leave it out, or use a shorter prompt or suffix"
        )
    rows = max(1, FLOATS // (attacker.window * model.config.get_text_config().vocab_size))
    total = sum(len(ids) for ids in texts.values())
    done, at = 0, 0
    named = [*texts.items()]
    while at < len(named):
        # As many texts as fill a pass, or one text of any length.
        group, windows = [], 0
        while at < len(named) and (not group or windows + _count(named[at][1], attacker) <= rows):
            group.append(named[at])
            windows += _count(named[at][1], attacker)
            at += 1
        pieces = [window for _, ids in group for window in _windows(ids, attacker)]
        parts: list[tuple[Tensor, Tensor]] = []
        for first in range(0, len(pieces), rows):
            some = pieces[first : first + rows]
            parts += _score(model, some, attacker)
            done += sum(len(piece) for piece in some)
            progress(min(done, total), total, "tokens read")
        for name, ids in group:
            mine = [parts.pop(0) for _ in range(_count(ids, attacker))]
            yield Reading(
                name=name,
                log_chance=torch.cat([chance for chance, _ in mine]).numpy().astype(np.float64),
                is_first=torch.cat([first for _, first in mine]).numpy(),
            )


def _count(ids: Sequence[int], attacker: Attacker) -> int:
    return -(-(len(ids) - attacker.prompt) // (attacker.window - attacker.prompt))


def _windows(ids: Sequence[int], attacker: Attacker) -> Iterator[Sequence[int]]:
    """Windows that overlap by a prompt: each token after the first prompt is scored in one of them."""
    for index in range(_count(ids, attacker)):
        first = index * (attacker.window - attacker.prompt)
        yield ids[first : first + attacker.window]


@torch.no_grad()
def _score(
    model: PreTrainedModel, windows: Sequence[Sequence[int]], attacker: Attacker
) -> list[tuple[Float[Tensor, " scored"], Bool[Tensor, " scored"]]]:
    """For each window, log chances of its tokens after the prompt, and whether each is the first choice."""
    # Padding stands behind, where no token that counts can see it.
    longest = max(len(window) for window in windows)
    rows = torch.tensor([[*window, *[0] * (longest - len(window))] for window in windows])
    rows = rows.to(model.device)
    keep = longest - attacker.prompt
    options: dict[str, Any] = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = keep
    logits = model(input_ids=rows[:, :-1], use_cache=False, **options).logits[:, -keep:].float()
    true = rows[:, attacker.prompt :, None]
    own = logits.gather(-1, true)
    # A tie is broken as greedy decoding breaks it: the lowest id wins.
    first = logits.argmax(-1, keepdim=True) == true
    chance = attacker.sampling.log_chances(logits, own)
    scored = [len(window) - attacker.prompt for window in windows]
    return [
        (chance[index, :count, 0].cpu(), first[index, :count, 0].cpu())
        for index, count in enumerate(scored)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """The share of stretches that come out verbatim at least once, with chance `p`, by the samples drawn."""

    p: float
    shares: tuple[Interval, ...]
    """One for each of `TRIES`."""


def curve(readings: Sequence[Reading], suffix: int, *, p: float) -> Curve:
    """(n, p) extraction over the stretches of all texts end to end, which overlap nowhere.

    A stretch of chance q counts at n samples where 1 - (1 - q)^n is at least p. The interval is Wilson's,
    for as many independent stretches as the spread between texts says that there are (Rao and Scott 1992).
    """
    needed = [_tries(reading.stretches(suffix)[::suffix], p) for reading in readings]
    shares = [
        clustered([int((tries <= n).sum()) for tries in needed], [len(tries) for tries in needed])
        for n in TRIES
    ]
    return Curve(p=p, shares=tuple(shares))


def _tries(log_chances: Float[np.ndarray, " stretch"], p: float) -> Float[np.ndarray, " stretch"]:
    """Samples after which a stretch has come out with chance `p`; inf for never."""
    chances = np.exp(log_chances)
    with np.errstate(divide="ignore"):
        return np.where(chances >= p, 1.0, math.log1p(-p) / np.log1p(-np.minimum(chances, p)))


def clustered(successes: Sequence[int], trials: Sequence[int]) -> Interval:
    """A share of trials that come in clusters, with its 95 % interval.

    Trials of one cluster are alike, so they count for fewer: for the number that would have the variance
    seen between clusters. Where nothing or everything succeeds no spread is seen, and a cluster counts once.
    """
    hits, sizes = np.asarray(successes, dtype=float), np.asarray(trials, dtype=float)
    clusters, total = int((sizes > 0).sum()), sizes.sum()
    if not clusters:
        raise ValueError("no trial in any cluster; give texts with a stretch")
    share = hits.sum() / total
    effective = float(clusters)
    if 0 < share < 1 and clusters > 1:
        spread = ((hits - share * sizes) ** 2).sum() / total**2 * clusters / (clusters - 1)
        effective = min(total, max(1.0, share * (1 - share) / max(spread, 1e-12)))
    z = float(stats.norm.ppf(0.975))
    # Wilson's interval, for a number of trials that need not be whole.
    centre = (share + z * z / (2 * effective)) / (1 + z * z / effective)
    reach = (
        z / (1 + z * z / effective)
        * math.sqrt(share * (1 - share) / effective + z * z / (4 * effective**2))
    )  # fmt: skip
    return Interval(
        value=float(share),
        low=float(max(0.0, centre - reach)) if share > 0 else 0.0,
        high=float(min(1.0, centre + reach)) if share < 1 else 1.0,
        seeds=clusters,
    )


def reordered(texts: Sequence[str], *, seed: int) -> tuple[str, ...]:
    """The same sentences in an order that nobody wrote: text of the same kind that no model can have seen.

    Sentences of all texts are shuffled together and dealt out to texts that are a tenth longer, until there
    are none left. A sentence that is known by heart is still a sentence, so this control claims too much
    rather than too little for text that was never seen.
    """
    pool = [sentence for text in texts for sentence in _sentences(text)]
    order = np.random.default_rng(seed).permutation(len(pool))
    made: list[str] = []
    used = 0
    for text in texts:
        first, length = used, 0
        while used < len(pool) and length < 1.1 * len(text):
            length += len(pool[order[used]])
            used += 1
        if used > first:
            made.append("".join(pool[index] for index in order[first:used]))
    return tuple(made)


def _sentences(text: str) -> list[str]:
    """Sentences, with the blanks after them; a text without any is cut into clauses of ten words."""
    sentences = re.findall(r".+?(?:[.!?]+[\"')\]]*\s+|\n+|$)", text, re.DOTALL)
    if len(sentences) > 1:
        return sentences
    return re.findall(r"(?:\S+\s*){1,10}", text)
