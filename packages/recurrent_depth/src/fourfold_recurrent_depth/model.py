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
GATE_WIDTH = 32
"""Features of the stream that a gate of token values reads, as published (Parcae)."""


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
    """Causal attention with rotary positions; queries and keys may have a bias, or be normalised."""

    is_causal = True

    def __init__(self, config: RecurrentDepthConfig, *, token_values: bool = False) -> None:
        super().__init__()
        self.config = config
        self.form = form = config.form
        self.head_width = config.head_dim
        self.scaling = self.head_width**-0.5
        self.num_key_value_groups = config.n_heads // config.num_key_value_heads
        queries, keys = (n * self.head_width for n in (config.n_heads, config.num_key_value_heads))
        *self.into, self.out = form.projections
        rows = (queries + 2 * keys,) if form.fused else (queries, keys, keys)
        for name, number in zip(self.into, rows, strict=True):
            setattr(self, name, nn.Linear(config.n_embd, number, bias=False))
        if form.fused:
            self.qk_bias = nn.Parameter(torch.zeros(2, 1, config.n_heads, config.head_dim))
        setattr(self, self.out, nn.Linear(queries, config.n_embd, bias=False))
        self.ve_gate: nn.Linear | None = None
        if token_values:
            self.ve_gate = nn.Linear(GATE_WIDTH, config.num_key_value_heads, bias=False)
        self.calls: nn.ModuleDict | None = None
        """By slot, where a server keeps the cache; see `AttentionCall`."""

    def forward(
        self, x: Stream, this_pass: Pass, slot: int, values: Tensor | None = None
    ) -> Stream:
        """Attend to this pass's tokens, and to those that the cache holds in `slot`.

        `values` are added by a gate to each token's own: (batch token heads*width).
        """
        q, k, v = self.heads(x, this_pass.rotary)
        if values is not None and self.ve_gate is not None:
            gate = 2 * torch.sigmoid(self.ve_gate(x[..., :GATE_WIDTH])).transpose(1, 2)
            v = v + gate.unsqueeze(-1) * values.unflatten(-1, (-1, self.head_width)).transpose(1, 2)
        if this_pass.cache is not None:
            k, v = this_pass.cache.update(k, v, slot, this_pass.rotary)
        if this_pass.is_served and self.calls is not None:
            out = self.calls[str(slot)](q, k, v, this_pass.mask, **this_pass.options)
        else:
            out = attend(self, q, k, v, this_pass)
        return getattr(self, self.out)(out.flatten(-2))

    def heads(self, x: Stream, rotary: Complex[Tensor, "*#batch 1 half"]) -> tuple[Tensor, ...]:
        """Queries, keys, rotated, and values: (batch head token width) each."""
        if self.form.fused:
            # Split, not indexed: the backward of two indexings fills and adds two tensors of zeros.
            both = getattr(self, self.into[0])(x).unflatten(-1, (3, -1, self.head_width))
            qk, v = both.split((2, 1), dim=2)
            qk = rotate(qk + self.qk_bias.squeeze(1), rotary.unsqueeze(2))
            q, k = qk.transpose(1, 3).unbind(2)
            return q, k, v.squeeze(2).transpose(1, 2)
        q, k, v = (
            getattr(self, name)(x).unflatten(-1, (-1, self.head_width)) for name in self.into
        )
        turn = rotate if self.form.rotates == "pairs" else rotate_halves
        q, k = turn(q, rotary), turn(k, rotary)
        if self.form.heads_norm:
            q, k = (F.rms_norm(part, (self.head_width,)) for part in (q, k))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def attend(module: Attention, q: Tensor, k: Tensor, v: Tensor, this_pass: Pass) -> Tensor:
    """By the attention function that the configuration names: (batch token head width)."""
    implementation = module.config._attn_implementation or "sdpa"  # noqa: SLF001 - transformers' own way
    interface: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
        implementation, eager_attention
    )
    scaling = module.scaling
    return interface(
        module, q, k, v, this_pass.mask, scaling=scaling, dropout=0.0, **this_pass.options
    )[0]


class AttentionCall(nn.Module):
    """An attention at one recurrence, without parameters: servers give each its own pages of keys.

    They go by `layer_idx`; vLLM looks for the interface and its call in the source of `forward`.
    """

    is_causal = True

    def __init__(self, attention: Attention, slot: int) -> None:
        super().__init__()
        self.config, self.layer_idx = attention.config, slot
        self.scaling = attention.scaling
        self.num_key_value_groups = attention.num_key_value_groups

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> Tensor:
        """The attention's output: (batch token head width), or flat as vLLM gives it."""
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation or "sdpa",  # noqa: SLF001 - transformers' own way
            eager_attention,
        )
        out, _ = interface(self, query, key, value, attention_mask, scaling=self.scaling, **options)
        return out.reshape(*query.shape[:1], query.shape[2], -1, query.shape[3])


class MLP(nn.Module):
    """silu(gate) * up, or half of relu squared; and down again."""

    def __init__(self, config: RecurrentDepthConfig) -> None:
        super().__init__()
        self.kind = config.form.mlp
        *self.into, self.out = config.form.layers
        hidden = config.intermediate_size
        for name in self.into:
            rows = 2 * hidden if self.kind == "halves" else hidden
            setattr(self, name, nn.Linear(config.n_embd, rows, bias=False))
        setattr(self, self.out, nn.Linear(hidden, config.n_embd, bias=False))

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Apply to every token alike."""
        hidden = getattr(self, self.into[0])(x)
        if self.kind == "halves":
            hidden = gated_silu(hidden)
        elif self.kind == "gate":
            hidden = F.silu(hidden) * getattr(self, self.into[1])(x)
        else:
            hidden = 0.5 * F.relu(hidden).square()
        return getattr(self, self.out)(hidden)


class Block(nn.Module):
    """A transformer block; a norm behind each sum or each branch keeps it from blowing up when iterated."""

    def __init__(self, config: RecurrentDepthConfig, *, token_values: bool = False) -> None:
        super().__init__()
        self.norms = config.form.norms
        names = {role: config.form.block.get(role, role) for role in PARTS}
        self.branches = (
            (names["norm_1"], names["attn"], names["norm_2"]),
            (names["norm_3"], names["mlp"], names["norm_4"]),
        )
        for before, branch, behind in self.branches:
            self.add_module(before, RMSNorm(config.n_embd, config.norm_eps))
            is_mlp = branch == names["mlp"]
            part = MLP(config) if is_mlp else Attention(config, token_values=token_values)
            self.add_module(branch, part)
            if self.norms != "inputs":
                self.add_module(behind, RMSNorm(config.n_embd, config.norm_eps))

    def forward(
        self, x: Stream, this_pass: Pass, slot: int, values: Tensor | None = None
    ) -> Stream:
        """Attention and MLP, each added to the stream (section 3.2)."""
        modules, arguments = self._modules, (this_pass, slot, values)
        for before, branch, behind in self.branches:
            out = modules[before](x)  # pyright: ignore[reportOptionalCall]
            out = modules[branch](out, *arguments)  # pyright: ignore[reportOptionalCall]
            if self.norms == "branches":
                out = modules[behind](out)  # pyright: ignore[reportOptionalCall]
            x = out + x
            if self.norms == "sums":
                x = modules[behind](x)  # pyright: ignore[reportOptionalCall]
            arguments = ()
        return x


PARTS = ("norm_1", "attn", "norm_2", "norm_3", "mlp", "norm_4")
"""Of a block, by role; a family says what it calls them."""


class Decay(nn.Module):
    """s -> exp(-dt a) s + dt B e with dt, a > 0: an injection whose state's half has a norm below one.

    Per feature of the state, after Parcae (arXiv 2604.12946).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.zeros(width))
        self.dt_bias = nn.Parameter(torch.zeros(width))
        self.B = nn.Parameter(torch.eye(width))

    def forward(
        self,
        state: Float[Tensor, "*batch width"],
        embedded: Float[Tensor, "*batch width"] | None = None,
        *,
        half: Literal["embedding", "state"] | None = None,
    ) -> Float[Tensor, "*batch width"]:
        """As an `Adapter`'s: the embedding's share, the state's plus that share, or of both together."""
        if half == "embedding":
            return F.softplus(self.dt_bias) * F.linear(state, self.B)
        assert embedded is not None
        share = embedded if half == "state" else self(embedded, half="embedding")
        return state * self.kept() + share

    def kept(self) -> Float[Tensor, " width"]:
        """The share of each feature of the state that a recurrence keeps; the largest is the norm."""
        return torch.exp(-F.softplus(self.dt_bias) * torch.exp(self.A_log))

    def piece(self, whole: Stream) -> Stream:
        """See `Adapter.piece`."""
        return whole


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
    has_head = True

    def __init__(self, config: RecurrentDepthConfig) -> None:
        super().__init__(config)
        form, width = config.form, config.n_embd
        parts: dict[str, nn.Module | None] = {
            "wte": nn.Embedding(config.padded_vocab_size, width),
            "prelude": stack(config, "prelude", config.n_layers_in_prelude),
            "ln_prelude": RMSNorm(width, config.norm_eps) if config.prelude_norm else None,
            "adapter": INJECTIONS[form.injects](width) if form.injects else None,
            "core_block": stack(config, "core_block", config.n_layers_in_recurrent_block),
            "bridge": nn.Linear(width, width, bias=False) if form.bridge == "product" else None,
            "coda": stack(config, "coda", config.n_layers_in_coda),
            "ln_f": RMSNorm(width, config.norm_eps),
            "gate": nn.Linear(width, 1) if form.has_gate else None,
        }
        named = {
            form.parts.get(role, role): part for role, part in parts.items() if part is not None
        }
        self.hold(named)
        self.lm_head: Any = None
        if self.has_head:
            self.lm_head = nn.Linear(width, config.padded_vocab_size, bias=False)
            table = f"{form.root}.{form.parts.get('wte', 'wte')}.weight"
            self._tied_weights_keys = {"lm_head.weight": table}
        if form.token_values:
            keys = config.num_key_value_heads * config.head_dim
            self.value_embeds = nn.ModuleDict(
                {
                    str(layer): nn.Embedding(config.padded_vocab_size, keys)
                    for layer in range(config.n_layers)
                    if has_values(config, layer)
                }
            )
        if form.rotates == "pairs":
            self.register_buffer("freqs_cis", rotary_table(config))
        self.gradient_checkpointing = False
        self.post_init()

    def serve_slots(self) -> None:
        """Let a server with a paged cache keep the keys: a slot for each layer at each recurrence.

        The configuration's `num_hidden_layers` counts them from now on, at `mean_recurrence`.
        """
        config = self.config
        config.serves_slots = True
        prelude, core, coda = (len(self.blocks(stage)) for stage in STAGES)
        name = config.form.block.get("attn", "attn")
        for stage, first in zip(STAGES, (0, prelude + coda, prelude), strict=True):
            times = config.mean_recurrence if stage == "core_block" else 1
            for layer, block in enumerate(self.blocks(stage)):
                attention = cast(Attention, getattr(block, name))
                slots = [first + layer + core * number for number in range(times)]
                attention.calls = nn.ModuleDict(
                    {str(slot): AttentionCall(attention, slot) for slot in slots}
                )

    def hold(self, named: dict[str, nn.Module]) -> None:
        """Register the parts where the published weights have them."""
        self.add_module(self.config.form.root, nn.ModuleDict(named))

    def part(self, role: str) -> nn.Module:
        """The part of a role, whatever the family calls it."""
        return self.parts()[self.config.form.parts.get(role, role)]

    def parts(self) -> Any:
        """The parts by name."""
        return self._modules[self.config.form.root]

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
        form, blocks = self.config.form, self.blocks(stage)
        is_core, is_exact = stage == "core_block", self.config.reference_semantics
        for slot in slots:
            if form.injects is not None and injected is not None:
                adapter = self.part("adapter")
                if self.takes_halves():
                    x = adapter(x, injected, half=None if is_exact else "state")
                else:
                    x = adapter(torch.cat([x, injected], dim=-1))
            for layer, block in enumerate(blocks):
                values = self.values_of(stage, layer, this_pass) if form.token_values else None
                x = block(x, this_pass, slot + layer, values)
            if is_core and self.config.norm_follows_loop and form.norm_follows_loop:
                x = self.part("ln_f")(x)
        return x

    def blocks(self, stage: str) -> nn.ModuleList:
        """The blocks of a stage."""
        return cast(nn.ModuleList, self.part(stage))

    def values_of(self, stage: str, layer: int, this_pass: Pass) -> Tensor | None:
        """The values that a layer adds to each token's own, by the token alone."""
        place = str(first_layer(self.config, stage) + layer)
        if place not in self.value_embeds:
            return None
        if this_pass.tokens is None:
            raise ValueError(
                "inputs_embeds say no tokens, by which this model looks up values; give input_ids"
            )
        return self.value_embeds[place](this_pass.tokens)

    def takes_halves(self) -> bool:
        """True where the adapter takes its halves apart; what wraps it (peft) sees them together."""
        return hasattr(self.part("adapter"), "piece")

    def read(self, embedded: Stream, this_pass: Pass) -> Stream:
        """The prelude: e = P(tokens)."""
        e = this_pass.stages["prelude"](embedded, this_pass, (0,))
        return self.part("ln_prelude")(e) if self.config.prelude_norm else e

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
        is_whole = self.config.form.injects is None or self.config.reference_semantics
        if is_whole or not self.takes_halves():
            return e
        return self.part("adapter")(e, half="embedding")

    def recur(
        self, s: Stream, injected: Stream, this_pass: Pass, step: int, count: int = 1
    ) -> Stream:
        """R(e, s), `count` times; `step` counts from 0 and says which slots of a cache are used."""
        kept: Any = range(step, step + count)
        if this_pass.cache is not None:
            kept = map(cast(Any, this_pass.cache).kept, kept)
        prelude, core, coda = (len(self.blocks(name)) for name in STAGES)
        slots = [prelude + coda + core * number for number in kept]
        return this_pass.stages["core_block"](s, this_pass, slots, injected)

    def predict(
        self, s: Stream, this_pass: Pass, logits_to_keep: int | Tensor = 0
    ) -> Float[Tensor, "batch kept vocabulary"]:
        """C(s): see `speak`."""
        return self.speak(self.cross(s), this_pass, logits_to_keep)

    def cross(self, s: Stream) -> Stream:
        """The latents of a state, which the coda reads."""
        if self.config.form.bridge is None:
            return s
        return self.part("ln_f" if self.config.form.bridge == "norm" else "bridge")(s)

    def decode(self, latents: Stream, this_pass: Pass) -> Stream:
        """The head's input: the coda's output, normalised if no recurrence has done it."""
        x = this_pass.stages["coda"](latents, this_pass, (self.config.n_layers_in_prelude,))
        is_done = self.config.form.norm_follows_loop and self.config.norm_follows_loop
        return x if is_done else self.part("ln_f")(x)

    def speak(
        self, latents: Stream, this_pass: Pass, logits_to_keep: int | Tensor = 0
    ) -> Float[Tensor, "batch kept vocabulary"]:
        """Coda, norm, head; float32 or wider.

        Of the last so many tokens, those of some places, or of each row's own: (batch, kept).
        """
        return self.say(self.decode(latents, this_pass), logits_to_keep)

    def say(
        self, x: Stream, logits_to_keep: int | Tensor
    ) -> Float[Tensor, "batch kept vocabulary"]:
        """The head, of some tokens."""
        if isinstance(logits_to_keep, Tensor) and logits_to_keep.ndim == 2:
            x = torch.take_along_dim(x, logits_to_keep.unsqueeze(-1), dim=1)
        else:
            is_count = isinstance(logits_to_keep, int)
            x = x[:, slice(-logits_to_keep, None) if is_count else logits_to_keep]
        logits = self.lm_head(x)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


INJECTIONS: dict[str, type[Adapter | Decay]] = {"product": Adapter, "decay": Decay}


def stack(config: RecurrentDepthConfig, stage: str, number: int) -> nn.ModuleList:
    """Blocks of a stage."""
    return nn.ModuleList(
        Block(config, token_values=has_gate(config, stage, layer)) for layer in range(number)
    )


def first_layer(config: RecurrentDepthConfig, stage: str) -> int:
    """Layers before a stage, each counted once."""
    prelude, core = config.n_layers_in_prelude, config.n_layers_in_recurrent_block
    return {"prelude": 0, "core_block": prelude, "coda": prelude + core}[stage]


def has_values(config: RecurrentDepthConfig, layer: int) -> bool:
    """True for every other layer, the last among them: it has a table of values by token."""
    whole = first_layer(config, "coda") + config.n_layers_in_coda
    return layer % 2 == (whole - 1) % 2


def has_gate(config: RecurrentDepthConfig, stage: str, layer: int) -> bool:
    """True where published weights have a gate for token values: by another count of layers than the tables.

    Behind the core it counts a layer for every recurrence; and the last layer is that of the recurrences
    with gradient (Parcae's `layer_id` and `n_layer`).
    """
    if not config.form.token_values:
        return False
    core = config.n_layers_in_recurrent_block
    place = first_layer(config, stage) + layer
    place += core * (config.mean_recurrence - 1) if stage == "coda" else 0
    return place % 2 == (core * config.mean_backprop_depth - 1) % 2


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


def rotate_halves(
    x: Float[Tensor, "*batch head width"], rotary: Complex[Tensor, "*#batch 1 half"]
) -> Float[Tensor, "*batch head width"]:
    """Turn each pair (x[i], x[i + width/2]) by its position's angle, in the table's precision."""
    first, second = x.to(rotary.real.dtype).chunk(2, dim=-1)
    cos, sin = rotary.real, rotary.imag
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
