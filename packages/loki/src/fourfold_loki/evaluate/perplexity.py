"""The cost of sparse attention: perplexity by two protocols, each arm beside full attention on the same text.

`decode`: a dense prompt, then every scored token is predicted by a query that reads sparsely, as when
generating with the text as given (one block of queries; causal, so it equals one at a time).
`every query`: the whole window is masked, as in the published code, where a query early in the window sees
fewer keys than the budget: the share of pairs kept is 2 k_f - k_f², not k_f. Both shares are recorded.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from fourfold_loki.attention_mode import Sparse
from fourfold_loki.huggingface.reads import Reads
from fourfold_loki.huggingface.session import Session, attending
from fourfold_loki.huggingface.sites import cache_name

FULL = "full"
"""Name of the arm that reads everything."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WindowScore:
    """One arm on one window."""

    arm: str
    window: int
    nats: Float[Tensor, " scored"]
    """Negative log-likelihood of each scored token."""
    kept_share: float
    """Visible keys that were read in full; mean over the windows that were scored together."""
    read_share: float
    """Elements read over those of dense attention; mean likewise."""


@torch.no_grad()
def score(
    model: PreTrainedModel,
    windows: Int[Tensor, "window context"],
    arms: Mapping[str, Sparse],
    *,
    prompt: int,
    protocol: Literal["decode", "every query"] = "decode",
    batch: int = 4,
) -> Iterator[WindowScore]:
    """Full attention and every arm on every window.

    A prompt is computed once for all arms. Windows are independent: a batch of them is one larger matrix
    for the model's weights, and changes no number beyond rounding.

    Args:
        model: the model.
        windows: token ids.
        arms: how each arm reads.
        prompt: tokens before the first scored one; those of a window after it are scored.
        protocol: which queries read sparsely.
        batch: windows that are scored together; their results come arm by arm.

    Raises:
        ValueError: where the prompt leaves nothing to score.
    """
    context = windows.shape[1]
    if not 2 <= prompt < context:
        raise ValueError(
            f"prompt={prompt} of windows of {context} tokens; use 2 to {context - 1}, "
            "so that something is read and something is scored"
        )
    for first in range(0, len(windows), batch):
        ids = windows[first : first + batch].to(model.device)
        targets = ids[:, prompt:]
        for name, reads, logits in each_arm(model, ids, arms, prompt=prompt, protocol=protocol):
            kept, read = (1.0, 1.0) if reads is None else (reads.share, reads.read_share)
            for place, own in enumerate(logits):
                nats = F.cross_entropy(own.float(), targets[place], reduction="none").cpu()
                yield WindowScore(
                    arm=name, window=first + place, nats=nats, kept_share=kept, read_share=read
                )


@torch.no_grad()
def each_arm(
    model: PreTrainedModel,
    ids: Int[Tensor, "window context"],
    arms: Mapping[str, Sparse],
    *,
    prompt: int,
    protocol: Literal["decode", "every query"] = "decode",
) -> Iterator[tuple[str, Reads | None, Float[Tensor, "window scored vocabulary"]]]:
    """Name, reads and logits of the tokens after the prompt, for full attention and then every arm."""
    if protocol == "every query":
        for name, mode in {FULL: None, **arms}.items():
            with _attending(model, mode, {}) as reads:
                logits = model(ids[:, :-1], use_cache=False).logits[:, prompt - 1 :]
            yield name, reads, logits
        return
    # The last token of the prompt predicts the first scored one, so it is part of the block.
    cache = DynamicCache(config=model.config)
    cached = {cache_name(model): cache, "use_cache": True}
    mass: dict[int, Tensor] = {}
    counting = [mode for mode in arms.values() if mode.selector.keeps_count]
    if counting:
        with attending(model, replace(counting[0], reach="decode")) as session:
            model.base_model(ids[:, : prompt - 1], **cached)
            mass = session.mass
    else:
        model.base_model(ids[:, : prompt - 1], **cached)
    block = ids[:, prompt - 1 : -1]
    for name, mode in {FULL: None, **arms}.items():
        with _attending(model, mode, mass) as reads:
            logits = model(block, **cached).logits
        cache.crop(-block.shape[1])
        yield name, reads, logits


@contextmanager
def _attending(
    model: PreTrainedModel, mode: Sparse | None, mass: Mapping[int, Tensor]
) -> Iterator[Reads | None]:
    """An arm's session, with the mass that a prompt gave to its keys; none for full attention."""
    if mode is None:
        yield None
        return
    with attending(model, replace(mode, reach="every query")) as session:
        session.mass.update(mass)
        yield session.reads


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """The loss that a selection adds on one text."""

    nats: float
    """Added to the loss of a token, in the mean."""
    standard_error: float
    """Of that mean, over tokens."""
    tokens: int

    def __str__(self) -> str:
        """As printed after `generate`."""
        low, high = (self.nats + way * 1.96 * self.standard_error for way in (-1, 1))
        return (
            f"{math.expm1(self.nats):+.2%} perplexity ({math.expm1(low):+.2%} to "
            f"{math.expm1(high):+.2%}) on {self.tokens} tokens"
        )


def cost(session: Session, ids: Int[Tensor, "one token"], *, prompt: int) -> Cost:
    """The cost of a session's selection on a text: its loss beside full attention's, token by token.

    Args:
        session: of `loki` or `attending`, after its block.
        ids: the text.
        prompt: tokens at its beginning that are read densely and not scored.

    Raises:
        ValueError: where the prompt leaves nothing to score.
    """
    if not isinstance(session.mode, Sparse):
        raise ValueError("an observed model reads everything; pass the session of a selection")
    full, ours = score(session.model, ids, {"selection": session.mode}, prompt=prompt)
    added = (ours.nats - full.nats).double()
    return Cost(
        nats=float(added.mean()),
        standard_error=float(added.std() / math.sqrt(len(added))),
        tokens=len(added),
    )
