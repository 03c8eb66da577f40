"""A language model that iterates one block in latent space (Geiping et al. 2025, section 3).

    e   = P(tokens)                       the prelude reads, once
    s_0 ~ N(0, 2/5)                       a random state for every token
    s_i = R(e, s_{i-1}),  i = 1 .. r      the core thinks, as often as one likes
    p   = C(s_r)                          the coda speaks, once

R has one set of weights and sees the embedding e again in every recurrence, so that its fixed point
depends on the tokens and not on s_0. Training draws r at random and lets gradients through the last k
recurrences only; a trained model may be run at any r, and at a different r for every token (`exit`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers import AutoConfig, AutoModelForCausalLM, Cache, GenerationMixin
from transformers import initialization as init
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fourfold_recurrent_depth.cache import RecurrentCache
from fourfold_recurrent_depth.configuration import RecurrentDepthConfig
from fourfold_recurrent_depth.exits import Criterion, criterion_named
from fourfold_recurrent_depth.exits.stopping import iterate_until_exit
from fourfold_recurrent_depth.fast.compiled import CompiledBlocks
from fourfold_recurrent_depth.fast.elementwise import eager_attention, gated_silu, rms_norm
from fourfold_recurrent_depth.lean import LeanBlock, is_plain
from fourfold_recurrent_depth.states import RowStates, StateTable, draw_state
from fourfold_recurrent_depth.transformers_base import (
    Pass,
    RecurrentDepthOutput,
    RecurrentDepthPreTrainedModel,
    Steps,
    rotary_table,
)


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

    def forward(
        self, x: Float[Tensor, "batch token width"], where: Pass, slot: int
    ) -> Float[Tensor, "batch token width"]:
        """Attend to this pass's tokens, and to those that the cache holds in `slot`."""
        # Split, not indexed: the backward of two indexings fills and adds two tensors of zeros.
        qk, v = self.Wqkv(x).unflatten(-1, (3, -1, self.head_width)).split((2, 1), dim=2)
        qk = rotate(qk + self.qk_bias.squeeze(1), where.rotary.unsqueeze(2))
        q, k = qk.transpose(1, 3).unbind(2)  # (batch head token width) each
        v = v.squeeze(2).transpose(1, 2)
        if where.cache is not None:
            k, v = where.cache.update(k, v, slot)
        implementation = self.config._attn_implementation or "sdpa"  # noqa: SLF001 - transformers' own way
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            implementation, eager_attention
        )
        out, _ = attend(
            self, q, k, v, where.mask, scaling=self.head_width**-0.5, dropout=0.0, **where.options
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

    def forward(
        self, x: Float[Tensor, "batch token width"], where: Pass, slot: int
    ) -> Float[Tensor, "batch token width"]:
        """Equation of section 3.2."""
        x = self.norm_2(self.attn(self.norm_1(x), where, slot) + x)
        return self.norm_4(self.mlp(self.norm_3(x)) + x)


_PLAIN = {part: part.forward for part in (SandwichBlock, Attention, GatedMLP, RMSNorm, nn.Linear)}
"""Parts of a block that its lean form stands for, with their forward passes as they were written."""


class Adapter(nn.Linear):
    """[state, embedding] -> width, without a bias: how each recurrence sees the tokens again.

    The embedding's half does not change from one recurrence to the next: `injection` computes it once
    per pass, and a recurrence multiplies the state's half alone. In exact arithmetic that is one
    product with the concatenation, which `exact` computes.
    """

    def __init__(self, width: int) -> None:
        super().__init__(2 * width, width, bias=False)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        state: Float[Tensor, "*batch width_or_both"],
        embedded: Float[Tensor, "*batch width"] | None = None,
        *,
        injection: bool = False,
        exact: bool = False,
    ) -> Float[Tensor, "*batch width"]:
        """The embedding's share (`injection`); the state's share plus it; or the concatenation's product.

        Without `embedded` the state is the concatenation already.
        """
        width = self.out_features
        if embedded is None:
            return F.linear(state, self.weight)
        if injection:
            return F.linear(embedded, self.weight[:, width:])
        if exact:
            return F.linear(torch.cat([state, embedded], dim=-1), self.weight)
        return F.linear(state, self.weight[:, :width]) + embedded

    def piece(
        self, whole: Float[Tensor, "batch token width"]
    ) -> Float[Tensor, "batch token width"]:
        """The features of a whole state that this rank holds: all, unless a grid cuts the stream."""
        return whole


_PLAIN_ADAPTER = {Adapter: Adapter.forward}


class RecurrentDepthForCausalLM(RecurrentDepthPreTrainedModel, GenerationMixin):
    """Prelude, core iterated in latent space, coda. Registered under `huginn_raven`."""

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
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.register_buffer("freqs_cis", rotary_table(config))
        self.gradient_checkpointing = False
        # A configuration's attributes are slow to read, and every recurrence needs these.
        self._around = config.n_layers_in_prelude + config.n_layers_in_coda
        self._per_step = config.n_layers_in_recurrent_block
        self.post_init()

    def forward(
        self,
        input_ids: Int[Tensor, "batch token"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "#batch token"] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "batch token width"] | None = None,
        labels: Int[Tensor, "batch token"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_steps: Steps | None = None,
        exit: Criterion | str | Callable[..., Tensor] | None = None,  # noqa: A002 - the word for it
        initial_state: Float[Tensor, "batch token width"] | StateTable | RowStates | None = None,
        init_scale: float = 1.0,
        warm_start: bool = False,
        kv_budget: int | None = None,
        output_hidden_states: bool | None = None,
        **options: Any,
    ) -> RecurrentDepthOutput:
        """Think `num_steps` times about every token, or until `exit` says that it is enough.

        Args:
            input_ids: tokens; or `inputs_embeds`.
            attention_mask: 0 for padding, on either side.
            position_ids: by default counted from each row's first real token.
            past_key_values: a `RecurrentCache`; made where `use_cache` asks for one.
            inputs_embeds: rows of the embedding, not yet scaled.
            labels: the inputs, as everywhere in transformers; -100 is ignored.
            use_cache: give a cache back.
            logits_to_keep: last positions to predict at; 0 for all.
            num_steps: see `Steps`; by default `config.mean_recurrence`, without gradient in evaluation
                and with gradient through the last `config.mean_backprop_depth` in training.
            exit: a criterion of `fourfold_recurrent_depth.exits`, its name, or a callable. Rows wait for the
                slowest of the batch; whether checks save time is said there.
            initial_state: s_0 of every token; by default it is drawn anew from N(0, 2/5).
            init_scale: multiplies the drawn state's standard deviation; 0 gives zeros.
            warm_start: begin from the last token's final state, which the cache keeps.
            kv_budget: recurrences whose keys and values the cache keeps; by default all.
            output_hidden_states: also give the states s_0 .. s_r (`hidden_states`).
            options: passed on to transformers' attention function.

        Raises:
            ValueError: before any compute, where an argument cannot be honoured.
        """
        embedded = self._embed(input_ids, inputs_embeds)
        batch, tokens = embedded.shape[:2]
        without, with_gradient, per_row = self.recurrences(num_steps, batch)
        steps = without + with_gradient
        criterion = None if exit is None else criterion_named(exit)
        if criterion is not None:
            self.refuse_exit(attention_mask, tokens, per_row, output_hidden_states)
        if past_key_values is None and use_cache:
            past_key_values = RecurrentCache(self.config, steps=steps, budget=kv_budget)
        self.refuse_cache(past_key_values, per_row, kv_budget, warm_start=warm_start)
        cache = cast(RecurrentCache | None, past_key_values)
        if cache is None and criterion is not None:
            # Tokens that have stopped keep their last keys: one slot per layer remembers enough.
            cache = RecurrentCache(self.config, steps=steps, budget=1, capacity=tokens)
        where, positions = self.locate(embedded, attention_mask, position_ids, cache, options)
        self._compile_blocks(embedded, where)
        if cache is not None:
            cache.open(batch, tokens, steps=steps)

        e = self.read(embedded, where)
        if warm_start and cache is not None and cache.last_state is not None:
            s = cache.last_state.unsqueeze(1).expand_as(e)
        else:
            s = self.start(e, positions, initial_state, scale=init_scale)
        logits, exit_steps, history = None, None, [s] if output_hidden_states else None
        if criterion is None:
            s = self.iterate(e, s, where, without, with_gradient, per_row=per_row, history=history)
        else:
            assert cache is not None
            padding = None if attention_mask is None or attention_mask.ndim == 4 else attention_mask
            real = None if padding is None else padding[:, -tokens:].bool()
            found = iterate_until_exit(self, e, s, where, cache, criterion, steps=steps, real=real)
            s, exit_steps = found.state, found.steps
            if found.logits is not None and (tokens == 1 or logits_to_keep == 1):
                logits = found.logits
        latents = self.transformer["ln_f"](s)
        if logits is None:
            logits = self.predict(latents, where, logits_to_keep)
        if cache is not None:
            cache.close(state=s, steps=exit_steps)
        return RecurrentDepthOutput(
            loss=None if labels is None else self.loss_of(logits, labels, options),
            logits=cast(Any, logits),
            past_key_values=past_key_values if use_cache else None,
            hidden_states=cast(Any, None if history is None else tuple(history)),
            final_state=s,
            latent_states=latents,
            exit_steps=exit_steps,
        )

    def begin(
        self, tokens: Int[Tensor, "batch token"], cache: Cache | None
    ) -> tuple[Float[Tensor, "batch token width"], Pass, Int[Tensor, "#batch token"]]:
        """Embeddings, pass and positions of tokens without padding: where a decoder of its own starts."""
        embedded = self._embed(tokens, None)
        where, positions = self.locate(embedded, None, None, cache, {})
        self._compile_blocks(embedded, where)
        return embedded, where, positions

    def read(
        self, embedded: Float[Tensor, "batch token width"], where: Pass
    ) -> Float[Tensor, "batch token width"]:
        """The prelude: e = P(tokens)."""
        return self._through("prelude", embedded, where, 0)

    def start(
        self,
        e: Float[Tensor, "batch token width"],
        positions: Int[Tensor, "#batch token"],
        initial: Float[Tensor, "#batch #token whole"] | StateTable | RowStates | None,
        *,
        scale: float,
    ) -> Float[Tensor, "batch token width"]:
        """s_0: given, or drawn; see `draw_state`."""
        width = self.config.n_embd
        whole = draw_state(e, positions, initial, width=width, scale=scale)
        return cast(Adapter, self.transformer["adapter"]).piece(whole) if self._splits() else whole

    def iterate(
        self,
        e: Float[Tensor, "batch token width"],
        s: Float[Tensor, "batch token width"],
        where: Pass,
        without: int,
        with_gradient: int,
        *,
        first: int = 0,
        per_row: Int[Tensor, " batch"] | None = None,
        history: list[Tensor] | None = None,
    ) -> Float[Tensor, "batch token width"]:
        """s_{first + n + k} from s_first: n recurrences without gradient, then k with it.

        Only the last k recurrences keep anything for backward, however large n is (section 3.3). A row
        that takes fewer recurrences than the others (`per_row`) begins later and ends with them.
        """
        total, injected, done = without + with_gradient, e, 0
        if without > 0 and per_row is None and history is None:
            with torch.no_grad():
                s, done = self.recur(s, self.inject(e), where, first, without), without
        for step in range(done, total):
            with torch.set_grad_enabled(torch.is_grad_enabled() and step >= without):
                if step in (0, without):
                    injected = self.inject(e)
                if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                    new = self._gradient_checkpointing_func(
                        self.recur, s, injected, where, first + step
                    )
                else:
                    new = self.recur(s, injected, where, first + step)
                if per_row is not None:
                    begun = rearrange(per_row >= total - step, "batch -> batch 1 1")
                    new = torch.where(begun, new, s)
            s = new
            if history is not None:
                history.append(s)
        return s

    def inject(self, e: Float[Tensor, "batch token width"]) -> Float[Tensor, "batch token width"]:
        """The part of a recurrence that the state does not change, computed once per pass."""
        if self.config.reference_semantics or not self._splits():
            return e
        return self.transformer["adapter"](e, e, injection=True)

    def _splits(self) -> bool:
        """Whether the adapter takes its halves apart; what wraps it (peft) sees them together."""
        return hasattr(self.transformer["adapter"], "piece")

    def recur(
        self,
        s: Float[Tensor, "batch token width"],
        injected: Float[Tensor, "batch token width"],
        where: Pass,
        step: int,
        count: int = 1,
    ) -> Float[Tensor, "batch token width"]:
        """R(e, s), `count` times; `step` counts from 0 and says which slots of a cache are used."""
        adapter = cast(Adapter, self.transformer["adapter"])
        is_exact, splits = self.config.reference_semantics, self._splits()
        slots = [self._slot_of_step(where.cache, step + i) for i in range(count)]
        compiled = None if is_exact else self._compiled("core_block", s, where)
        if compiled is not None:
            return compiled(s, where, slots, adapter=adapter.weight, injected=injected)
        for slot in slots:
            if splits:
                s = adapter(s, injected, exact=is_exact)
            else:
                s = adapter(torch.cat([s, injected], dim=-1))
            s = self._through("core_block", s, where, slot)
        return s

    def predict(
        self,
        latents: Float[Tensor, "batch token width"],
        where: Pass,
        logits_to_keep: int | Tensor = 0,
    ) -> Float[Tensor, "batch kept vocabulary"]:
        """C(ln_f(s)): coda, the same norm again, head; float32 or wider.

        Of the last so many tokens, those of some places, or of each row's own: (batch, kept).
        """
        x = self._through("coda", latents, where, self.config.n_layers_in_prelude)
        if isinstance(logits_to_keep, Tensor) and logits_to_keep.ndim == 2:
            x = torch.take_along_dim(x, logits_to_keep.unsqueeze(-1), dim=1)
        else:
            is_count = isinstance(logits_to_keep, int)
            x = x[:, slice(-logits_to_keep, None) if is_count else logits_to_keep]
        logits = self.lm_head(self.transformer["ln_f"](x))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _through(self, stage: str, x: Tensor, where: Pass, slot: int) -> Tensor:
        """The blocks of a stage, in the leanest form that this pass allows; `slot` is the first one's."""
        compiled = self._compiled(stage, x, where)
        if compiled is not None:
            return compiled(x, where, [slot])
        is_lean = where.lean is not None and not torch.is_grad_enabled()
        blocks = cast(Any, where.lean if is_lean else self.transformer)[stage]
        for layer, block in enumerate(blocks):
            x = block(x, where, slot + layer)
        return x

    def _compiled(self, stage: str, x: Tensor, where: Pass) -> CompiledBlocks | None:
        if where.compiled is None or torch.is_grad_enabled():
            return None
        return where.compiled[stage] if where.compiled[stage].takes(x, where) else None

    def _compile_blocks(self, embedded: Tensor, where: Pass) -> None:
        """Give the pass its blocks by stage in their lean and compiled forms, where all have one."""
        where.lean = self._lean_blocks(embedded, where)
        adapter = cast(Adapter, self.transformer["adapter"])
        weight = adapter.weight
        is_same = type(weight) is nn.Parameter and weight.dtype == embedded.dtype
        is_same = is_same and weight.is_contiguous() and is_plain(adapter, _PLAIN_ADAPTER)
        if where.lean is None or not is_same:
            return
        compiled = {stage: CompiledBlocks.of(blocks) for stage, blocks in where.lean.items()}
        where.compiled = None if None in compiled.values() else cast(Any, compiled)

    def _lean_blocks(self, embedded: Tensor, where: Pass) -> dict[str, list[LeanBlock]] | None:
        """The blocks by stage in their lean form, or None where one of them has none."""
        is_other = self.config._attn_implementation != "sdpa" or where.options  # noqa: SLF001
        is_mixed = where.rotary.real.dtype != embedded.dtype
        is_mixed = is_mixed or torch.is_autocast_enabled(embedded.device.type)
        is_other = is_other or _has_any_global_hook()
        if is_other or is_mixed or torch.compiler.is_compiling():
            return None
        found: dict[str, list[LeanBlock]] = {}
        for stage in ("prelude", "core_block", "coda"):
            blocks = cast(nn.ModuleList, self.transformer[stage])
            lean = [LeanBlock.of(block, _PLAIN) for block in blocks]
            found[stage] = [block for block in lean if block is not None]
            if len(found[stage]) < len(lean):
                return None
        return found

    def _slot_of_step(self, cache: Cache | None, step: int) -> int:
        """First slot of a recurrence's layers, behind those of prelude and coda."""
        kept = cache.kept(step) if isinstance(cache, RecurrentCache) else step
        return self._around + kept * self._per_step

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                "exactly one of input_ids and inputs_embeds must be given; leave the other out"
            )
        embedded = self.transformer["wte"](input_ids) if inputs_embeds is None else inputs_embeds
        return embedded * math.sqrt(self.config.n_embd)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Takase et al. 2023, cut at three standard deviations (section 4.1)."""
        values = self.config.init_values
        std, small = values["std"], values["out_proj"]
        if isinstance(module, RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, Attention):
            init.zeros_(module.qk_bias)
            for parameter, size in ((module.Wqkv.weight, std), (module.proj.weight, small)):
                init.trunc_normal_(parameter, std=size, a=-3 * size, b=3 * size)
        elif isinstance(module, GatedMLP):
            gate, up = module.fc.weight.chunk(2)
            # The model was trained with both halves at std; the published inference file, which no
            # run has used for training, draws the up half small.
            halves = ((gate, std), (up, small if self.config.reference_semantics else std))
            if not getattr(module.fc.weight, "_is_hf_initialized", False):
                for parameter, size in halves:
                    init.trunc_normal_(parameter, std=size, a=-3 * size, b=3 * size)
            init.trunc_normal_(module.proj.weight, std=small, a=-3 * small, b=3 * small)
        elif isinstance(module, nn.Embedding | Adapter) or module is self.lm_head:
            init.trunc_normal_(cast(Tensor, module.weight), std=std, a=-3 * std, b=3 * std)
        elif module is self:
            init.copy_(cast(Tensor, self.freqs_cis), rotary_table(self.config))


def rotate(
    x: Float[Tensor, "*batch head width"], rotary: Complex[Tensor, "*#batch 1 half"]
) -> Float[Tensor, "*batch head width"]:
    """Turn each pair (x[2i], x[2i + 1]) by its position's angle, in the table's precision."""
    pairs = torch.view_as_complex(x.to(rotary.real.dtype).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotary).flatten(-2).to(x.dtype)


AutoConfig.register("huginn_raven", RecurrentDepthConfig, exist_ok=True)
AutoModelForCausalLM.register(RecurrentDepthConfig, RecurrentDepthForCausalLM, exist_ok=True)
