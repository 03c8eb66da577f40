"""The model as transformers knows it: arguments, masks, positions, caches, exits, loss, generation."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache, GenerationMixin
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils.generic import can_return_tuple

from fourfold_recurrent_depth.cache import CACHE, Assisted, RecurrentCache
from fourfold_recurrent_depth.configuration import FAMILIES, HUGINN, RecurrentDepthConfig
from fourfold_recurrent_depth.exits.criteria import Criterion, criterion_named
from fourfold_recurrent_depth.exits.stopping import goes_by_columns, iterate_until_exit
from fourfold_recurrent_depth.fast.compiled import CompiledStage, compiled_stages
from fourfold_recurrent_depth.fast.row_caches import RowCache, RowCaches
from fourfold_recurrent_depth.model import (
    MLP,
    Adapter,
    Attention,
    Block,
    Decay,
    RecurrentDepthModel,
    RMSNorm,
    rotary_table,
)
from fourfold_recurrent_depth.stages import (
    FOR_ATTENTION,
    FOR_THE_LOSS,
    Pass,
    Stage,
    either,
    refuse_lengths_alone,
    refuse_unknown,
)
from fourfold_recurrent_depth.states import (
    FreshNoise,
    InitialState,
    StateTable,
    TokenStates,
    draw_state,
)

Steps = int | tuple[int, int] | Tensor | tuple[Tensor, int]
"""Recurrences: r without gradient; (n, k) of which the last k carry gradient; or one (n + k) per row,
of which the last `mean_backprop_depth` carry gradient in training, or as many as stand beside them."""

_WRITTEN = {part: part.forward for part in (Block, Attention, MLP, RMSNorm, Adapter, nn.Linear)}
"""The parts that compiled stages stand for, with their forward passes as they were written."""


@dataclass
class RecurrentDepthOutput(CausalLMOutputWithPast):
    """The result of a pass: that of any causal language model of transformers, and states and exits."""

    final_state: Tensor | None = None
    """s_r, raw: (batch, token, width)."""
    latent_states: Tensor | None = None
    """ln_f(s_r), which the coda reads."""
    exit_steps: Tensor | None = None
    """Recurrences of each token: (batch, token)."""
    logits_by_depth: tuple[Tensor, ...] | None = None
    """After each of the `depths` that were asked for: (batch, token, vocabulary) each."""
    gates_by_depth: tuple[Tensor, ...] | None = None
    """Logits of the learned gate after these, where the family has one: (batch, token) each."""


class RecurrentDepthForCausalLM(Assisted, RecurrentDepthModel, GenerationMixin):
    """Prelude, core iterated in latent space, coda: the model of every `Family`."""

    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012 - transformers' own declarations
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    text_options = {"depths": (1,)}  # noqa: RUF012 - a class's own declaration
    """Arguments with which a pass over text goes through every part; the grid looks for streams in one."""

    freqs_cis: Tensor

    @can_return_tuple
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
        initial_state: InitialState | None = None,
        input_states: Float[Tensor, "#batch #token width"] | None = None,
        init_scale: float = 1.0,
        warm_start: bool = False,
        kv_budget: int | None = None,
        depths: Sequence[int] | None = None,
        output_hidden_states: bool | None = None,
        cache: Cache | None = None,
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
            initial_state: s_0 of every token. By default, in evaluation a function of each token and its
                position (`TokenStates`), so that equal calls give equal results; in training drawn anew
                (`FreshNoise`, which the published code does in evaluation too).
            input_states: the published name of `initial_state`.
            init_scale: multiplies the drawn state's standard deviation; 0 gives zeros.
            warm_start: begin from the last token's final state, which the cache keeps.
            kv_budget: recurrences whose keys and values the cache keeps; by default all.
            depths: recurrences after which to predict as well (`logits_by_depth`), from the same pass.
            output_hidden_states: also give the states s_0 .. s_r (`hidden_states`).
            cache: what transformers calls `past_key_values` from 5.24 on.
            options: of transformers' losses and attention functions; any other is refused.

        Raises:
            TypeError: an argument is unknown.
            ValueError: before any compute, where an argument cannot be honoured.
        """
        if cache is not None and not isinstance(cache, Cache):
            # A page table of `generate_batch`'s, with what attention functions need of it among the options.
            x = self.think(
                input_ids, inputs_embeds, position_ids, attention_mask, {**options, "cache": cache}
            )
            return RecurrentDepthOutput(logits=cast(Any, self.say(x, logits_to_keep)))
        refuse_unknown(options, PARAMETERS)
        refuse_lengths_alone(options, position_ids, str(self.config._attn_implementation))  # noqa: SLF001
        initial_state = either(initial_state, input_states, ("initial_state", "input_states"))
        embedded = self.embed(input_ids, inputs_embeds)
        batch, tokens = embedded.shape[:2]
        without, with_gradient, per_row = self.recurrences(num_steps, batch)
        steps = without + with_gradient
        criterion = None if exit is None else criterion_named(exit).of(self)
        keeps_states = bool(output_hidden_states) or depths is not None
        if criterion is not None:
            self.refuse_exit(attention_mask, tokens, per_row, keeps_states)
        _refuse_depths(depths, steps, per_row)
        given = either(past_key_values, cache, ("past_key_values", "cache"))
        if given is None and use_cache:
            given = RecurrentCache(self.config, steps=steps, budget=kv_budget)
        self.refuse_cache(given, per_row, kv_budget, warm_start=warm_start)
        cache = cast(RecurrentCache | None, given)
        if cache is None and criterion is not None:
            # Tokens that have stopped keep their last keys: one slot per layer remembers enough.
            # Those that go one after another read each other at every recurrence.
            kept = None if goes_by_columns(criterion, tokens) else 1
            cache = RecurrentCache(self.config, steps=steps, budget=kept, capacity=tokens)
        this_pass, positions = self.locate(
            embedded, attention_mask, position_ids, cache, options, tokens=input_ids
        )
        if cache is not None:
            cache.open(batch, tokens, steps=steps)

        e = self.read(embedded, this_pass)
        if warm_start and cache is not None and cache.last_state is not None:
            s = cache.last_state.unsqueeze(1).expand_as(e)
        else:
            s = self.start(e, input_ids, positions, initial_state, scale=init_scale)
        logits, exit_steps, history = None, None, [s] if keeps_states else None
        if criterion is None:
            s = self.iterate(
                e, s, this_pass, without, with_gradient, per_row=per_row, history=history
            )
        else:
            assert cache is not None
            padding = None if attention_mask is None or attention_mask.ndim == 4 else attention_mask
            real = None if padding is None else padding[:, -tokens:].bool()
            result = iterate_until_exit(
                self, e, s, this_pass, cache, criterion, steps=steps, real=real
            )
            s, exit_steps = result.state, result.steps
            if result.logits is not None and (tokens == 1 or logits_to_keep == 1):
                logits = result.logits
        latents = self.cross(s)
        read = None if depths is None or history is None else [history[depth] for depth in depths]
        spoken = None if read is None else self.predict_each(read, this_pass, logits_to_keep)
        gates = None if read is None else self.gates(read)
        if spoken is not None and depths is not None and steps in depths:
            logits = spoken[[*depths].index(steps)]
        if logits is None:
            logits = self.speak(latents, this_pass, logits_to_keep)
        if cache is not None:
            cache.close(state=s, steps=exit_steps)
        return RecurrentDepthOutput(
            loss=None if labels is None else self.loss_of(logits, labels, options),
            logits=cast(Any, logits),
            hidden_states=cast(Any, tuple(history or ()) if output_hidden_states else None),
            final_state=s,
            latent_states=latents,
            exit_steps=exit_steps,
            logits_by_depth=spoken,
            gates_by_depth=gates,
            **{CACHE: cast(Any, cache if use_cache else None)},
        )

    def predict_each(
        self,
        states: Sequence[Float[Tensor, "batch token width"]],
        this_pass: Pass,
        logits_to_keep: int | Tensor,
    ) -> tuple[Float[Tensor, "batch kept vocabulary"], ...]:
        """Predictions from the states after some recurrences of a pass."""
        return tuple(self.predict(state, this_pass, logits_to_keep) for state in states)

    def gates(
        self, states: Sequence[Float[Tensor, "batch token width"]]
    ) -> tuple[Float[Tensor, "batch token"], ...] | None:
        """Logits of the learned gate for each state, where the family has one."""
        if not self.config.form.has_gate:
            return None
        return tuple(self.part("gate")(state).squeeze(-1) for state in states)

    def think(
        self,
        input_ids: Int[Tensor, "1 token"] | None,
        inputs_embeds: Float[Tensor, "1 token width"] | None,
        position_ids: Int[Tensor, "1 token"] | None,
        mask: Any,
        options: dict[str, Any],
    ) -> Float[Tensor, "1 token width"]:
        """The head's input, of tokens of many requests in one row whose keys a server keeps.

        All take `mean_recurrence`; each (recurrence, layer) calls the attention function with a `layer_idx`
        of its own, and nothing here writes a cache. See `serve_slots`.

        Raises:
            ValueError: positions are missing, or what is asked for needs a cache of ours.
        """
        if position_ids is None or self.config.reference_semantics or self.training:
            raise ValueError(
                "a served pass needs position_ids, evaluation, and a model that heeds masks; give the "
                "positions, call eval(), and leave reference_semantics out"
            )
        embedded = self.embed(input_ids, inputs_embeds)
        this_pass = Pass(
            rotary=self.rotations(position_ids, embedded.dtype).unsqueeze(2), mask=mask, cache=None,
            options=options, stages=self.stages(), takes_any_mask=False, tokens=input_ids, is_served=True,
        )  # fmt: skip
        e = self.read(embedded, this_pass)
        s = self.start(e, input_ids, position_ids, None, scale=1.0)
        s = self.iterate(e, s, this_pass, self.config.mean_recurrence, 0)
        return self.decode(self.cross(s), this_pass)

    def init_continuous_batching(self, *given: Any, **options: Any) -> Any:
        """As in transformers, at `config.mean_recurrence`: called by `generate_batch`.

        Raises:
            ValueError: attention masks are ignored.
        """
        if self.config.reference_semantics:
            raise ValueError(
                "reference_semantics ignores masks, and requests share a row; leave it out"
            )
        self.serve_slots()
        return super().init_continuous_batching(*given, **options)

    def begin(
        self, tokens: Int[Tensor, "batch token"], cache: RecurrentCache | None
    ) -> tuple[Float[Tensor, "batch token width"], Pass, Int[Tensor, "#batch token"]]:
        """Embeddings, pass and positions of tokens without padding: where a decoder of its own starts."""
        embedded = self.embed(tokens, None)
        this_pass, positions = self.locate(embedded, None, None, cache, {}, tokens=tokens)
        return embedded, this_pass, positions

    def embed(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None = None
    ) -> Float[Tensor, "batch token width"]:
        """Rows of the embedding, scaled.

        Raises:
            ValueError: neither is given, or both.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                "exactly one of input_ids and inputs_embeds must be given; leave the other out"
            )
        embedded = self.part("wte")(input_ids) if inputs_embeds is None else inputs_embeds
        scales = self.config.form.scales_embedding
        return embedded * math.sqrt(self.config.n_embd) if scales else embedded

    def locate(
        self,
        embedded: Tensor,
        mask: Tensor | None,
        position_ids: Tensor | None,
        cache: RecurrentCache | None,
        options: dict[str, Any],
        *,
        tokens: Int[Tensor, "batch token"] | None,
    ) -> tuple[Pass, Int[Tensor, "#batch token"]]:
        """The pass: rotations, the mask in the backend's form, stages in C++ where they can be; positions."""
        batch, count = embedded.shape[:2]
        cached = 0 if cache is None else int(cache.get_seq_length())
        if self.config.reference_semantics:
            mask = None
        _refuse_places(mask, position_ids, batch=batch, tokens=count, cached=cached)
        positions = self._positions(mask, position_ids, cached, count)
        this_pass = Pass(
            rotary=self.rotations(positions, embedded.dtype).unsqueeze(2),
            mask=create_causal_mask(
                self.config,
                embedded,
                mask,
                # Beside a cache transformers does not look for packed texts in the positions.
                cache if cached else None,
                positions if position_ids is not None else None,
            ),
            cache=cache,
            options={name: options[name] for name in FOR_ATTENTION if name in options},
            stages=self.stages(),
            takes_any_mask=self.config._attn_implementation in ("sdpa", "eager"),  # noqa: SLF001
            tokens=tokens,
        )
        made = cache.stages if isinstance(cache, RowCache) else None
        this_pass.stages = made or compiled_stages(self, embedded, this_pass, _WRITTEN)
        return this_pass, positions

    def rotations(
        self, positions: Int[Tensor, "*place"], dtype: torch.dtype
    ) -> Complex[Tensor, "*place half"]:
        """Rotation of some positions, as complex numbers of length one, in float32 or wider."""
        if self.config.form.rotates == "halves":
            width = self.config.head_dim
            steps = torch.arange(0, width, 2, dtype=torch.int64, device=positions.device).float()
            angles = positions.float().unsqueeze(-1) * (
                1.0 / self.config.rope_base ** (steps / width)
            )
            turned = torch.complex(angles.cos(), angles.sin())
            return turned.to(torch.complex128) if dtype == torch.float64 else turned
        table = self.freqs_cis
        if table.dtype not in (torch.float32, torch.float64):
            # A model cast as a whole has cast its angles too: they are computed anew, in float32.
            table = rotary_table(self.config).to(self.device)
        return torch.view_as_complex(table)[0, :, 0][positions]

    def locate_rows(
        self,
        embedded: Float[Tensor, "row 1 width"],
        rotary: Complex[Tensor, "row 1 1 half"],
        caches: RowCaches,
        stages: Mapping[str, Stage],
        tokens: Int[Tensor, "row 1"] | None = None,
    ) -> Pass:
        """The pass of one token of each row, each at a place of its own; `stages` are an earlier pass's."""
        mask = None
        if not all(isinstance(stage, CompiledStage) for stage in stages.values()):
            seen = caches.seen().to(embedded.device)
            mask = create_causal_mask(self.config, embedded, seen, caches, None)
        return Pass(
            rotary=rotary, mask=mask, cache=caches, options={}, stages=stages, takes_any_mask=False,
            tokens=tokens,
        )  # fmt: skip

    def start(
        self,
        e: Float[Tensor, "batch token width"],
        tokens: Int[Tensor, "batch token"] | None,
        positions: Int[Tensor, "#batch token"],
        initial: InitialState | None,
        *,
        scale: float,
    ) -> Float[Tensor, "batch token width"]:
        """s_0: given, or drawn; see `draw_state`."""
        form = self.config.form
        if form.begins == "embedding":
            if initial is not None or scale != 1.0:
                raise ValueError(
                    f"{self.config.family} begins with the embedding, which is all that it sees of a token; "
                    "leave initial_state and init_scale out"
                )
            return e
        if initial is None:
            initial = FreshNoise() if self.training else TokenStates()
        width = self.config.n_embd
        whole = draw_state(e, tokens, positions, initial, width=width, scale=scale)
        if not form.scales_embedding and not isinstance(initial, Tensor | StateTable):
            whole = whole / math.sqrt(width)
        return cast(Adapter, self.part("adapter")).piece(whole) if self.takes_halves() else whole

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> bool:
        """Called by `generate`: a cache of ours, allocated once for the whole length, if none came."""
        del generation_mode, batch_size
        is_given = model_kwargs.get(CACHE) is not None
        if is_given or generation_config.use_cache is False:
            return False
        steps = self.recurrences(model_kwargs.get("num_steps"), 1)
        model_kwargs[CACHE] = RecurrentCache(
            self.config,
            steps=steps[0] + steps[1],
            budget=model_kwargs.get("kv_budget"),
            capacity=max_cache_length,
        )
        return True

    def recurrences(self, steps: Steps | None, batch: int) -> tuple[int, int, Tensor | None]:
        """(n, k, recurrences of each row or None)."""
        config = self.config
        if steps is None:
            mean = config.mean_recurrence
            steps = (mean - config.mean_backprop_depth, config.mean_backprop_depth)
            steps = (max(0, steps[0]), min(mean, steps[1])) if self.training else mean
        each, last = steps, config.mean_backprop_depth * self.training
        if isinstance(steps, tuple) and len(steps) == 2:
            each, last = steps
        if (
            isinstance(each, Tensor)
            and each.shape == (batch,)
            and batch > 1
            and not each.is_floating_point()
        ):
            lowest, total = int(each.min()), int(each.max())
            k, per_row = min(int(last), total), each
        else:
            pair: Any = (steps, 0) if hasattr(steps, "__index__") else steps
            try:
                n, k = map(operator.index, pair)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"num_steps={steps} is neither a number of recurrences, nor a pair (without gradient, "
                    f"with gradient), nor a tensor of one number for each of {batch} rows; use one of these"
                ) from error
            lowest, total, per_row = min(n, k), n + k, None
        if total < 1 or min(lowest, k) < 0 or (per_row is not None and lowest < 1):
            raise ValueError(
                f"num_steps={steps} asks for fewer than 1 recurrence; use 1 or more for every row, or a "
                "pair (without gradient, with gradient) of numbers from 0 that sum to 1 or more"
            )
        return total - k, k, per_row

    def refuse_cache(
        self,
        cache: Cache | None,
        per_row: Tensor | None,
        budget: int | None,
        *,
        warm_start: bool,
    ) -> None:
        """Raise where a cache cannot hold what is asked of it, or there is none."""
        if warm_start and self.config.form.begins == "embedding":
            raise ValueError(
                f"warm_start begins with another token's state, and {self.config.family} sees a token in its "
                "beginning alone; leave it out"
            )
        if cache is None:
            if budget is not None or warm_start:
                raise ValueError(
                    f"kv_budget={budget}, warm_start={warm_start} are about a cache, and this pass has none; "
                    "use use_cache=True"
                )
            return
        if not isinstance(cache, RecurrentCache):
            raise ValueError(
                f"a {type(cache).__name__} does not know at which depth a token ended; leave "
                "past_key_values out, or pass a RecurrentCache"
            )
        if budget is not None and cache.budget != budget:
            raise ValueError(
                f"kv_budget={budget} for a cache whose budget is {cache.budget}; leave one of them out"
            )
        if per_row is not None:
            raise ValueError(
                "num_steps of each row by itself leaves a cache's slots without a common depth; use "
                "use_cache=False, or one number for all rows"
            )

    def refuse_exit(
        self, mask: Tensor | None, tokens: int, per_row: Tensor | None, history: bool | None
    ) -> None:
        """Raise where an exit criterion cannot judge what it is asked to."""
        if per_row is not None or history:
            raise ValueError(
                "exit decides recurrences itself and keeps no history; leave out output_hidden_states and "
                "depths, and give one num_steps for all rows"
            )
        if self.config._attn_implementation == "flex_attention":  # noqa: SLF001 - transformers' own name
            raise ValueError(
                "exit goes on with some rows of a mask, which flex_attention's masks cannot; "
                "use attn_implementation='sdpa'"
            )
        if mask is not None and mask.ndim == 2:
            empty = (~mask[:, -tokens:].bool().any(1)).nonzero().flatten().tolist()
            if empty:
                raise ValueError(
                    f"rows {empty} of the batch hold padding alone, which no exit criterion can judge; "
                    "leave them out"
                )

    def _positions(
        self, mask: Tensor | None, position_ids: Tensor | None, cached: int, tokens: int
    ) -> Int[Tensor, "#batch token"]:
        """Place of each token in its own text: padding does not count."""
        if position_ids is None:
            position_ids = torch.arange(cached, cached + tokens, device=self.device)[None]
            if mask is not None and mask.ndim == 2 and not bool(mask.all()):
                position_ids = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens:]
        last = int(position_ids.max())
        if last >= self.config.block_size:
            raise ValueError(
                f"position {last} lies beyond the rotary table of block_size={self.config.block_size}; "
                "use a shorter text, or a model with a larger block_size"
            )
        return position_ids

    def loss_of(self, logits: Tensor, labels: Tensor, options: dict[str, Any]) -> Tensor:
        """Cross-entropy; labels are the inputs, as in transformers, or shifted, as in the reference."""
        extra = {"shift_labels": labels} if self.config.reference_semantics else {}
        extra |= {k: options[k] for k in FOR_THE_LOSS if options.get(k) is not None}
        return self.loss_function(
            logits=logits, labels=labels, vocab_size=logits.shape[-1], **extra
        )

    def resize_token_embeddings(self, *given: Any, **options: Any) -> Any:
        """As in transformers; the new size is exact, so that what is saved can be read again."""
        resized: Any = super().resize_token_embeddings(*given, **options)
        if self.config.padded_vocab_size != resized.num_embeddings:
            self.config.padding_multiple = 1
        return resized

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """Angles of a model that was cast as a whole are rounded: the exact ones are saved, as published."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        is_table = self.config.form.rotates == "pairs"
        if is_table and self.freqs_cis.dtype not in (torch.float32, torch.float64):
            exact = rotary_table(self.config).to(self.freqs_cis.device)
            destination[prefix + "freqs_cis"] = exact

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Takase et al. 2023, cut at three standard deviations (section 4.1), for every family."""
        values = self.config.init_values
        std, small = values["std"], values["out_proj"]
        if isinstance(module, RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, Attention | MLP):
            self._init_products(module, std, small)
        elif isinstance(module, Decay):
            # A state keeps a fifth of its variance, as published; the embedding enters as it is.
            init.zeros_(module.A_log)
            init.constant_(module.dt_bias, math.log(math.expm1(0.5 * math.log(5))))
            init.eye_(module.B)
        elif isinstance(module, nn.Embedding | Adapter) or module is self.lm_head:
            init.trunc_normal_(cast(Tensor, module.weight), std=std, a=-3 * std, b=3 * std)
        elif module is self and self.config.form.rotates == "pairs":
            init.copy_(cast(Tensor, self.freqs_cis), rotary_table(self.config))
        elif module is self._of_role("bridge"):
            init.eye_(cast(Tensor, module.weight))
        elif module is self._of_role("gate"):
            init.zeros_(cast(Tensor, module.weight))
            init.zeros_(cast(Tensor, module.bias))

    def _of_role(self, role: str) -> nn.Module | None:
        """A part, or None where the family has none of that role."""
        name = self.config.form.parts.get(role, role)
        return dict(self.parts().items()).get(name)

    def _init_products(self, module: Attention | MLP, std: float, small: float) -> None:
        """Products into attention or MLP, and the smaller one out of it."""
        if isinstance(module, Attention) and module.form.fused:
            init.zeros_(module.qk_bias)
        sizes = dict.fromkeys(module.into, std) | {module.out: small}
        if getattr(module, "ve_gate", None) is not None:
            sizes["ve_gate"] = std
        for name, size in sizes.items():
            weight = cast(nn.Linear, getattr(module, name)).weight
            pieces = [(weight, size)]
            if isinstance(module, MLP) and module.kind == "halves" and name != module.out:
                gate, up = weight.chunk(2)
                # The model was trained with both halves at std; the published inference file, which no
                # run has used for training, draws the up half small.
                pieces = [(gate, std), (up, small if self.config.reference_semantics else std)]
                if getattr(weight, "_is_hf_initialized", False):
                    continue
            for piece, deviation in pieces:
                init.trunc_normal_(piece, std=deviation, a=-3 * deviation, b=3 * deviation)

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.part("wte")

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.parts()[self.config.form.parts.get("wte", "wte")] = value

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head."""
        self.lm_head = new_embeddings


def _refuse_depths(depths: Sequence[int] | None, steps: int, per_row: Tensor | None) -> None:
    """Raise where a pass has no such recurrences, or its rows take different numbers of them."""
    if depths is None:
        return
    if per_row is not None or not all(1 <= depth <= steps for depth in depths):
        raise ValueError(
            f"depths={[*depths]} of {steps} recurrences for every row; use depths from 1 to {steps}, and "
            "one num_steps for all rows"
        )


def _refuse_places(
    mask: Any, position_ids: Tensor | None, *, batch: int, tokens: int, cached: int
) -> None:
    """Raise where mask or positions are not those of this pass."""
    if tokens == 0:
        raise ValueError("input_ids of no tokens leave nothing to predict from; give one or more")
    if isinstance(mask, Tensor) and mask.ndim != 4 and mask.shape != (batch, cached + tokens):
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)} for {batch} rows of {cached} cached and {tokens} "
            f"new tokens; give ({batch}, {cached + tokens}), or four dimensions as transformers' masks have"
        )
    if position_ids is None:
        return
    is_shaped = position_ids.ndim == 2 and position_ids.shape[0] in (1, batch)
    if not is_shaped or position_ids.shape[1] != tokens or int(position_ids.min()) < 0:
        raise ValueError(
            f"position_ids of shape {tuple(position_ids.shape)} from {int(position_ids.min())} for {batch} "
            f"rows of {tokens} tokens; give one row or {batch}, with a place from 0 on for each token"
        )


PARAMETERS = tuple(inspect.signature(RecurrentDepthForCausalLM.forward).parameters)[1:-1]
"""Arguments of the forward pass by name."""

for _name in FAMILIES:
    # A type that transformers knows itself stays transformers': `RecurrentDepthForCausalLM` reads it here.
    if _name == HUGINN.model_type or _name not in CONFIG_MAPPING:
        CONFIG_MAPPING.register(_name, RecurrentDepthConfig, exist_ok=True)
AutoModelForCausalLM.register(RecurrentDepthConfig, RecurrentDepthForCausalLM, exist_ok=True)
