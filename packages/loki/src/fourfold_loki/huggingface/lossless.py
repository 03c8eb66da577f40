"""Lossless: Loki drafts a few tokens, attention to all keys verifies them in one block.

A draft reads few keys, so its tokens are cheap and mostly right; a verification reads the weights and the
cache once for all of them. What comes out is what attention to all keys generates: with greedy decoding the
same tokens, with sampling the same distribution, by the rule of speculative sampling (Leviathan et al. 2023,
algorithm 1): a token x that was drawn from the draft's q stays with probability min(1, p(x) / q(x)) under
the p of all keys; the first that does not stay is drawn anew from what p has more than q. What drafts wrote
into the cache is forgotten before the block is verified, so that nothing of a draft stays in it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from fourfold_loki.cache import LokiCache
from fourfold_loki.huggingface.session import Session
from fourfold_loki.huggingface.sites import cache_name


@dataclass(slots=True, kw_only=True)
class Lossless:
    """For `model.generate(ids, custom_generate=Lossless(session=session), **session.cached())`.

    Any processor of logits and stopping rule of `generate` applies; transformers hands no streamer on to a
    function of one's own. Tokens are those of attention to all keys as far as its rounding goes: where two
    tokens tie within it, a block may choose the other one than a single step would.
    """

    session: Session
    """Of `loki`, which drafts by its budget."""
    lookahead: int = 8
    """Tokens drafted before a verification, at most."""
    surety: float = 0.3
    """Drafting ends behind a token to which the draft itself gives less probability."""
    drafted: int = 0
    """Tokens so far."""
    accepted: int = 0
    """Of these, how many attention to all keys confirmed."""
    verified: int = 0
    """Blocks so far."""

    def __post_init__(self) -> None:
        if self.lookahead < 1:
            raise ValueError(f"lookahead={self.lookahead} drafts nothing; use 1 or more")

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that were confirmed."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @torch.no_grad()
    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Int[Tensor, "one token"],
        *,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **options: Any,
    ) -> Int[Tensor, "one longer"]:
        """Serve what `generate` hands on.

        Raises:
            ValueError: for several sequences, padding, beams, and a cache that is none of the session's.
        """
        cache = self._checked(model, input_ids, generation_config, options)
        tokens, sampled = input_ids, generation_config.do_sample

        def scores_of(logits: Tensor, before: Tensor) -> Float[Tensor, " vocabulary"]:
            return logits_processor(before, logits.float()[None])[0]

        rest = tokens[:, cache.get_seq_length() : -1]
        if rest.shape[1]:
            with self.session.reading_everything():
                model.base_model(rest, **{cache_name(model): cache}, use_cache=True)
        is_done = False
        while not is_done:
            room = generation_config.max_length - tokens.shape[1]
            window, claims = tokens, []
            for _ in range(min(self.lookahead, room - 1)):
                scores = scores_of(self.logits(model, window[:, -1:], cache)[0], window)
                claims.append(scores.softmax(-1))
                token = chosen(scores, sampled=sampled)
                window = torch.cat([window, token.view(1, 1)], dim=1)
                if float(claims[-1][token]) < self.surety:
                    break
            cache.crop(-len(claims))
            block = window[:, tokens.shape[1] - 1 :]
            with self.session.reading_everything():
                logits = self.logits(model, block, cache)
            self.drafted, self.verified = self.drafted + len(claims), self.verified + 1
            is_right = True
            for place, row in enumerate(logits):
                scores = scores_of(row, tokens)
                if place == len(claims):
                    token = chosen(scores, sampled=sampled)
                elif sampled:
                    draft = block[0, place + 1]
                    token, is_right = confirmed(scores.softmax(-1), claims[place], draft)
                else:
                    token = scores.argmax(-1)
                    is_right = bool(token == block[0, place + 1])
                self.accepted += int(is_right and place < len(claims))
                tokens = torch.cat([tokens, token.view(1, 1)], dim=1)
                is_done = bool(stopping_criteria(tokens, None).all())
                if is_done or not is_right:
                    break
            cache.crop(tokens.shape[1] - 1 - cache.get_seq_length())
        return tokens

    def logits(
        self, model: PreTrainedModel, ids: Int[Tensor, "one token"], cache: LokiCache
    ) -> Float[Tensor, "token vocabulary"]:
        """One pass: a draft's single token, or a block to verify."""
        return model(ids, **{cache_name(model): cache}, use_cache=True).logits[0]

    def _checked(
        self, model: PreTrainedModel, ids: Tensor, config: Any, options: dict[str, Any]
    ) -> LokiCache:
        mask = options.get("attention_mask")
        if len(ids) > 1 or config.num_beams > 1 or (mask is not None and not bool(mask.all())):
            raise ValueError(
                f"a batch of {len(ids)} with num_beams={config.num_beams}, padded or not: sequences accept "
                "tokens at different places; generate one sequence at a time, without padding and beams"
            )
        if config.return_dict_in_generate:
            raise ValueError(
                "return_dict_in_generate asks for scores of single steps, which a block has not; leave it "
                "out"
            )
        cache = options.get(cache_name(model))
        if model is not self.session.model or cache not in self.session.caches:
            raise ValueError(
                "Lossless drafts in its session's basis; call generate on the session's model, with "
                "**session.cached()"
            )
        assert isinstance(cache, LokiCache)
        return cache


def chosen(scores: Float[Tensor, " vocabulary"], *, sampled: bool) -> Int[Tensor, ""]:
    """The next token: the likeliest, or a draw."""
    if not sampled:
        return scores.argmax(-1)
    return scores.softmax(-1).multinomial(1)[0]


def confirmed(
    ours: Float[Tensor, " vocabulary"], theirs: Float[Tensor, " vocabulary"], draft: Int[Tensor, ""]
) -> tuple[Int[Tensor, ""], bool]:
    """A token distributed as `ours`, given a draft drawn from `theirs`; true where it is the draft."""
    if float(torch.rand((), dtype=torch.float64)) < float(stays(ours, theirs)[draft]):
        return draft, True
    return anew(ours, theirs).multinomial(1)[0], False


def stays(
    ours: Float[Tensor, " vocabulary"], theirs: Float[Tensor, " vocabulary"]
) -> Float[Tensor, " vocabulary"]:
    """Probability that a draft stays: min(1, p / q)."""
    return (ours / theirs.clamp(min=torch.finfo(theirs.dtype).tiny)).clamp(max=1)


def anew(
    ours: Float[Tensor, " vocabulary"], theirs: Float[Tensor, " vocabulary"]
) -> Float[Tensor, " vocabulary"]:
    """Distribution of the token in place of one that did not stay: what p has more than q."""
    more = (ours - theirs).clamp(min=0)
    total = more.sum()
    # Where both are equal nothing is rejected, but for rounding.
    return more / total if float(total) > 0 else ours
