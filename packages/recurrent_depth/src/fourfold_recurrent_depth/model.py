"""A language model that iterates one block in latent space (Geiping et al. 2025, section 3).

    e   = P(tokens)                       the prelude reads, once
    s_0 ~ N(0, 2/5)                       a random state for every token
    s_i = R(e, s_{i-1}),  i = 1 .. r      the core thinks, as often as one likes
    p   = C(s_r)                          the coda speaks, once

R has one set of weights and sees the embedding e again in every recurrence, so that its fixed point
depends on the tokens and not on s_0. Training draws r at random and lets gradients through the last k
recurrences only; a trained model may be run at any r, and at a different r for every token.

This file is the model: its blocks, and P, R and C as methods. `states.py` draws s_0. `causal_lm.py` is the
same model as transformers knows it, with masks, caches, exits and a loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fourfold_recurrent_depth.configuration import RecurrentDepthConfig
from fourfold_recurrent_depth.fast.elementwise import eager_attention, gated_silu, rms_norm
from fourfold_recurrent_depth.stages import Pass, Stage

Stream = Float[Tensor, "batch token width"]
"""The residual stream: embeddings, states and what the blocks make of them."""
STAGES = ("prelude", "core_block", "coda")


class RMSNorm(nn.Module):
    """x / rms(x), times a learned gain; the mean is taken in float32 and rounded before the gain."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Normalise the last dim."""
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Causal attention with rotary positions and a learned bias on queries and keys."""

    is_causal = True
    num_key_value_groups = 1

    def __init__(self, config: RecurrentDepthConfig) -> None:
        super().__init__()
        self.config = config
        self.head_width = config.head_dim
        self.Wqkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.qk_bias = nn.Parameter(torch.zeros(2, 1, config.n_heads, config.head_dim))
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Stream, this_pass: Pass, slot: int) -> Stream:
        """Attend to this pass's tokens, and to those that the cache holds in `slot`."""
        # Split, not indexed: the backward of two indexings fills and adds two tensors of zeros.
        qk, v = self.Wqkv(x).unflatten(-1, (3, -1, self.head_width)).split((2, 1), dim=2)
        qk = rotate(qk + self.qk_bias.squeeze(1), this_pass.rotary.unsqueeze(2))
        q, k = qk.transpose(1, 3).unbind(2)  # (batch head token width) each
        v = v.squeeze(2).transpose(1, 2)
        if this_pass.cache is not None:
            k, v = this_pass.cache.update(k, v, slot)
        implementation = self.config._attn_implementation or "sdpa"  # noqa: SLF001 - transformers' own way
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            implementation, eager_attention
        )
        scaling = self.head_width**-0.5
        out, _ = attend(
            self, q, k, v, this_pass.mask, scaling=scaling, dropout=0.0, **this_pass.options
        )
        return self.proj(out.flatten(-2))


class GatedMLP(nn.Module):
    """silu(gate) * up, and down again; gate and up are the halves of one product."""

    def __init__(self, config: RecurrentDepthConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 2 * config.intermediate_size, bias=False)
        self.proj = nn.Linear(config.intermediate_size, config.n_embd, bias=False)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Apply to every token alike."""
        return self.proj(gated_silu(self.fc(x)))


class SandwichBlock(nn.Module):
    """A transformer block that also normalises after each sum, so that iterating it cannot blow up."""

    def __init__(self, config: RecurrentDepthConfig) -> None:
        super().__init__()
        self.norm_1 = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = Attention(config)
        self.norm_2 = RMSNorm(config.n_embd, config.norm_eps)
        self.norm_3 = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = GatedMLP(config)
        self.norm_4 = RMSNorm(config.n_embd, config.norm_eps)

    def forward(self, x: Stream, this_pass: Pass, slot: int) -> Stream:
        """Equation of section 3.2."""
        x = self.norm_2(self.attn(self.norm_1(x), this_pass, slot) + x)
        return self.norm_4(self.mlp(self.norm_3(x)) + x)


class Adapter(nn.Linear):
    """[state, embedding] -> width, without a bias: how each recurrence sees the tokens again.

    The embedding's half does not change from one recurrence to the next, so it is multiplied once per
    pass, and a recurrence multiplies the state's half alone. The sum is the whole product, rounded
    in another order.
    """

    def __init__(self, width: int) -> None:
        super().__init__(2 * width, width, bias=False)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        state: Float[Tensor, "*batch width_or_both"],
        embedded: Float[Tensor, "*batch width"] | None = None,
        *,
        half: Literal["embedding", "state"] | None = None,
    ) -> Float[Tensor, "*batch width"]:
        """The embedding's share alone; the state's plus that share; or the product with both together.

        A product with both takes them apart or, as a plain linear map does, concatenated.
        """
        width = self.out_features
        if half == "embedding":
            return F.linear(state, self.weight[:, width:])
        if half == "state":
            assert embedded is not None
            return F.linear(state, self.weight[:, :width]) + embedded
        both = state if embedded is None else torch.cat([state, embedded], dim=-1)
        return F.linear(both, self.weight)

    def piece(self, whole: Stream) -> Stream:
        """The features of a whole state that this rank holds: all, unless a grid cuts the stream."""
        return whole


class RecurrentDepthModel(PreTrainedModel):
    """Prelude, core iterated in latent space, coda: what the paper is about, and nothing else."""

    config: RecurrentDepthConfig
    config_class = RecurrentDepthConfig
    base_model_prefix = ""

    def __init__(self, config: RecurrentDepthConfig) -> None:
        super().__init__(config)
        blocks = lambda number: nn.ModuleList(SandwichBlock(config) for _ in range(number))  # noqa: E731
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.padded_vocab_size, config.n_embd),
                "prelude": blocks(config.n_layers_in_prelude),
                "adapter": Adapter(config.n_embd),
                "core_block": blocks(config.n_layers_in_recurrent_block),
                "coda": blocks(config.n_layers_in_coda),
                "ln_f": RMSNorm(config.n_embd, config.norm_eps),
            }
        )
        self.lm_head: nn.Module = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.register_buffer("freqs_cis", rotary_table(config))
        self.gradient_checkpointing = False
        self.post_init()

    def stages(self) -> dict[str, Stage]:
        """The blocks as modules: what a pass goes through unless it is given a faster form."""
        return {name: partial(self.through, name) for name in STAGES}

    def through(
        self,
        stage: str,
        x: Stream,
        this_pass: Pass,
        slots: Sequence[int],
        injected: Stream | None = None,
    ) -> Stream:
        """One stage as modules; see `Stage`."""
        adapter, is_exact = self.transformer["adapter"], self.config.reference_semantics
        for slot in slots:
            if injected is not None and self.takes_halves():
                x = adapter(x, injected, half=None if is_exact else "state")
            elif injected is not None:
                x = adapter(torch.cat([x, injected], dim=-1))
            for layer, block in enumerate(cast(nn.ModuleList, self.transformer[stage])):
                x = block(x, this_pass, slot + layer)
        return x

    def takes_halves(self) -> bool:
        """True where the adapter takes its halves apart; what wraps it (peft) sees them together."""
        return hasattr(self.transformer["adapter"], "piece")

    def read(self, embedded: Stream, this_pass: Pass) -> Stream:
        """The prelude: e = P(tokens)."""
        return this_pass.stages["prelude"](embedded, this_pass, (0,))

    def iterate(
        self,
        e: Stream,
        s: Stream,
        this_pass: Pass,
        without: int,
        with_gradient: int,
        *,
        first: int = 0,
        per_row: Int[Tensor, " batch"] | None = None,
        history: list[Tensor] | None = None,
    ) -> Stream:
        """s_{first + n + k} from s_first: n recurrences without gradient, then k with it.

        Only the last k recurrences keep anything for backward, however large n is (section 3.3). A row
        that takes fewer recurrences than the others (`per_row`) begins later and ends with them.
        """
        total, injected, done = without + with_gradient, e, 0
        if without > 0 and per_row is None and history is None:
            with torch.no_grad():
                s, done = self.recur(s, self.inject(e), this_pass, first, without), without
        for step in range(done, total):
            with torch.set_grad_enabled(torch.is_grad_enabled() and step >= without):
                if step in (0, without):
                    injected = self.inject(e)
                if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                    new = self._gradient_checkpointing_func(
                        self.recur, s, injected, this_pass, first + step
                    )
                else:
                    new = self.recur(s, injected, this_pass, first + step)
                if per_row is not None:
                    begun = rearrange(per_row >= total - step, "batch -> batch 1 1")
                    new = torch.where(begun, new, s)
            s = new
            if history is not None:
                history.append(s)
        return s

    def inject(self, e: Stream) -> Stream:
        """The part of a recurrence that the state does not change, computed once per pass."""
        if self.config.reference_semantics or not self.takes_halves():
            return e
        return self.transformer["adapter"](e, half="embedding")

    def recur(
        self, s: Stream, injected: Stream, this_pass: Pass, step: int, count: int = 1
    ) -> Stream:
        """R(e, s), `count` times; `step` counts from 0 and says which slots of a cache are used."""
        kept: Any = range(step, step + count)
        if this_pass.cache is not None:
            kept = map(cast(Any, this_pass.cache).kept, kept)
        prelude, core, coda = (len(cast(Any, self.transformer[name])) for name in STAGES)
        slots = [prelude + coda + core * number for number in kept]
        return this_pass.stages["core_block"](s, this_pass, slots, injected)

    def predict(
        self, s: Stream, this_pass: Pass, logits_to_keep: int | Tensor = 0
    ) -> Float[Tensor, "batch kept vocabulary"]:
        """C(s): see `speak`."""
        return self.speak(self.transformer["ln_f"](s), this_pass, logits_to_keep)

    def speak(
        self, latents: Stream, this_pass: Pass, logits_to_keep: int | Tensor = 0
    ) -> Float[Tensor, "batch kept vocabulary"]:
        """Coda, the norm that made the latents of a state, head; float32 or wider.

        Of the last so many tokens, those of some places, or of each row's own: (batch, kept).
        """
        x = this_pass.stages["coda"](latents, this_pass, (self.config.n_layers_in_prelude,))
        if isinstance(logits_to_keep, Tensor) and logits_to_keep.ndim == 2:
            x = torch.take_along_dim(x, logits_to_keep.unsqueeze(-1), dim=1)
        else:
            is_count = isinstance(logits_to_keep, int)
            x = x[:, slice(-logits_to_keep, None) if is_count else logits_to_keep]
        logits = self.lm_head(self.transformer["ln_f"](x))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def rotary_table(config: RecurrentDepthConfig) -> Float[Tensor, "1 position 1 half 2"]:
    """(cos, sin) of every position and pair of features, float32, as published (`freqs_cis`)."""
    exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    angles = torch.outer(torch.arange(config.block_size).float(), 1.0 / config.rope_base**exponents)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)[None, :, None]


def rotate(
    x: Float[Tensor, "*batch head width"], rotary: Complex[Tensor, "*#batch 1 half"]
) -> Float[Tensor, "*batch head width"]:
    """Turn each pair (x[2i], x[2i + 1]) by its position's angle, in the table's precision."""
    pairs = torch.view_as_complex(x.to(rotary.real.dtype).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotary).flatten(-2).to(x.dtype)
