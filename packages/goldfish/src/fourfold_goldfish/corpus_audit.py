"""The audit of a mask on a corpus, before anyone trains: its rate, its gaps, its holes and its price."""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from fourfold_goldfish.canonical import CanonicalGoldfish, Spelling, canonical
from fourfold_goldfish.loss import Goldfish
from fourfold_parallel.common.progress import Progress, silent
from fourfold_parallel.run.tokenizers import encoded

Mask = Goldfish | CanonicalGoldfish

Perturbation = Callable[[str], str]


def _typos(share: float) -> Perturbation:
    """Replace that share of the letters by others, the same ones for the same text."""

    def perturb(text: str) -> str:
        source = random.Random(len(text))  # noqa: S311 - typing errors are no secret
        letters = "abcdefghijklmnopqrstuvwxyz"
        return "".join(
            source.choice(letters)
            if character.isascii() and character.isalpha() and source.random() < share
            else character
            for character in text
        )

    return perturb


PERTURBATIONS: dict[str, Perturbation] = {
    "exact copy": lambda text: text,
    "one character before": lambda text: "(" + text,
    "lines re-wrapped": lambda text: text.replace("\n", " "),
    "blanks doubled": lambda text: text.replace(" ", "  "),
    "quotes made curly": lambda text: re.sub(r'"', "”", text.replace("'", "’")),
    "capitals": str.upper,
    "0.2 % of letters mistyped": _typos(0.002),
    "1 % of letters mistyped": _typos(0.01),
    "5 % of letters mistyped": _typos(0.05),
}
"""Ways in which a document is copied almost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leak:
    """The share of one copy's hidden tokens that an altered copy teaches."""

    perturbation: str
    documents: int
    """Compared; left out are those too short for the mask, or whose letters the change does not keep."""
    leaked: float
    """Of the tokens left out in the copy, the share spelled by supervised tokens of the altered copy."""
    never: float
    """Share of all tokens supervised in neither; 1/k where the mask survives the change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """The mask on a corpus."""

    documents: int
    tokens: int
    rate: float
    """Share of targets left out."""
    correlation: float
    """Of neighbouring decisions; 0 for a good hash."""
    longest_run: int
    """Most supervised targets in a row, which can be recited without a guess."""
    never_supervised_ids: float
    """Of the ids that occur as a target 10 times or more, the share that is never supervised."""
    unprotected_documents: float
    """Share of documents without a single gap."""
    supervised_tokens: int
    leaks: tuple[Leak, ...]

    @property
    def cost(self) -> float:
        """Times as many input tokens as plain loss needs for as many supervised ones."""
        return self.tokens / max(1, self.supervised_tokens)


def audit(
    texts: Sequence[str],
    tokenizer: Any,
    mask: Mask,
    *,
    perturbations: Sequence[str] = tuple(PERTURBATIONS),
    progress: Progress = silent,
) -> Audit:
    """Mask every document by itself and see what is left out, and what near-duplicates give away.

    A document too short for the mask counts as unprotected.

    Args:
        texts: documents.
        tokenizer: one of transformers'.
        mask: what the loss would leave out.
        perturbations: names in `PERTURBATIONS`.
        progress: told after each perturbation.

    Raises:
        ValueError: where no document is long enough, or `texts` is a single text.
    """
    if isinstance(texts, str):
        raise ValueError("texts is a single text; give a list of documents: [text]")
    shortest = max(2, mask.shortest)  # a row of one token has no target
    spelling = Spelling.of(tokenizer)
    rows = [_encode(tokenizer, text) for text in texts]
    pairs = [(row, mask.drop(row[None])[0]) for row in rows if len(row) >= shortest]
    if not pairs:
        longest = max((len(row) for row in rows), default=0)
        raise ValueError(
            f"the longest of {len(rows)} documents has {longest} tokens, the mask needs {shortest}; "
            "use a shorter context, or boundary prefix"
        )
    targets = torch.cat([row[1:] for row, _ in pairs])
    dropped = torch.cat([drop[1:] for _, drop in pairs])
    tokens = sum(max(0, len(row) - 1) for row in rows)
    leaks: list[Leak] = []
    for name in perturbations:
        progress(len(leaks), len(perturbations), name)
        leaks.append(_leak(name, texts, tokenizer, spelling, mask, shortest))
    return Audit(
        documents=len(rows),
        tokens=tokens,
        rate=int(dropped.sum()) / tokens,
        correlation=_correlation(dropped),
        longest_run=max(_longest_run(drop[1:]) for _, drop in pairs),
        never_supervised_ids=_never_supervised(targets, dropped),
        unprotected_documents=1 - sum(bool(drop.any()) for _, drop in pairs) / len(rows),
        supervised_tokens=tokens - int(dropped.sum()),
        leaks=tuple(leaks),
    )


def _encode(tokenizer: Any, text: str) -> Int[Tensor, " token"]:
    return torch.tensor(encoded(tokenizer, text), dtype=torch.long)


def _leak(
    name: str,
    texts: Sequence[str],
    tokenizer: Any,
    spelling: Spelling,
    mask: Mask,
    shortest: int,
) -> Leak:
    """Compare copies on canonical characters, which every perturbation here keeps in number and place."""
    left_out = leaked = never = total = compared = 0
    for text in texts:
        altered = PERTURBATIONS[name](text)
        if len(canonical(altered)) != len(canonical(text)):
            continue  # a letter whose case changes its length, such as a sharp s
        ours, theirs = _encode(tokenizer, text), _encode(tokenizer, altered)
        if min(len(ours), len(theirs)) < shortest:
            continue
        # Where each copy is masked, and how many canonical characters each of its tokens spells.
        hidden = mask.drop(ours[None])[0]
        other = mask.drop(theirs[None])[0]
        _, lengths = spelling.characters(ours)
        _, other_lengths = spelling.characters(theirs)
        # Per character: is its token in the altered copy left out?
        hidden_there = other.repeat_interleave(other_lengths)
        ends = lengths.cumsum(0)
        if int(ends[-1]) != len(hidden_there):
            continue  # characters that are cut into bytes are counted by their tokens
        # A token of ours is safe there if one of its characters is in a token that is left out.
        counted = torch.nn.functional.pad(hidden_there.long().cumsum(0), (1, 0))
        any_hidden = counted[ends] > counted[ends - lengths]
        # Tokens of blanks and punctuation spell nothing, so nothing can be said of them.
        spelled = lengths > 0
        compared += 1
        left_out += int((hidden & spelled).sum())
        leaked += int((hidden & spelled & ~any_hidden).sum())
        never += int((hidden & spelled & any_hidden).sum())
        total += int(spelled.sum())
    return Leak(
        perturbation=name,
        documents=compared,
        leaked=leaked / max(1, left_out),
        never=never / max(1, total),
    )


def _correlation(dropped: Bool[Tensor, " target"]) -> float:
    """Of neighbouring decisions (Pearson)."""
    if bool(dropped.all()) or not bool(dropped.any()):
        return 0.0
    values = dropped.numpy().astype(np.float64)
    return float(np.corrcoef(values[1:], values[:-1])[0, 1])


def _longest_run(dropped: Bool[Tensor, " target"]) -> int:
    """Longest stretch of False."""
    places = torch.nn.functional.pad(dropped.nonzero().squeeze(1), (1, 0), value=-1)
    ends = torch.cat([places[1:], torch.tensor([len(dropped)])])
    return int((ends - places - 1).max())


def _never_supervised(targets: Int[Tensor, " target"], dropped: Bool[Tensor, " target"]) -> float:
    size = int(targets.max()) + 1
    seen = torch.bincount(targets, minlength=size)
    supervised = torch.bincount(targets[~dropped], minlength=size)
    frequent = seen >= 10
    return float((supervised[frequent] == 0).float().mean()) if bool(frequent.any()) else 0.0


def table(audit: Audit) -> str:
    """The audit as lines of text."""
    lines = [
        f"documents                          {audit.documents}",
        f"tokens                             {audit.tokens}",
        f"left out                           {audit.rate:.4f}",
        f"correlation of neighbours          {audit.correlation:+.4f}",
        f"most supervised tokens in a row    {audit.longest_run}",
        f"ids (10 times or more) never taught {audit.never_supervised_ids:.4f}",
        f"documents without a gap            {audit.unprotected_documents:.4f}",
        f"input tokens for equal supervision {audit.cost:.4f} times",
        "",
        "a second copy with                  gives away  hides for good  documents compared",
        *(
            f"{leak.perturbation:<36}{leak.leaked:>8.3f}{leak.never:>14.3f}{leak.documents:>14}"
            for leak in audit.leaks
        ),
    ]
    return "\n".join(lines)
