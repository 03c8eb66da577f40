"""What transformers asks of a model and the paper does not: arguments, masks, positions, fresh weights."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from fourfold_recurrent_depth.cache import RecurrentCache
from fourfold_recurrent_depth.configuration import RecurrentDepthConfig
from fourfold_recurrent_depth.fast.compiled import CompiledBlocks
from fourfold_recurrent_depth.lean import LeanBlock

Steps = int | tuple[int, int] | Tensor | tuple[Tensor, int]
"""Recurrences: r without gradient; (n, k) of which the last k carry gradient; or one (n + k) per row,
of which the last `mean_backprop_depth` carry gradient in training, or as many as stand beside them."""


_NOT_FOR_ATTENTION = ("return_dict", "num_items_in_batch", "output_attentions", "shift_labels")


@dataclass(slots=True, kw_only=True)
class Pass:
    """What all blocks of one forward pass share."""

    rotary: Complex[Tensor, "#batch token 1 half"]
    """Rotation of each position, as complex numbers of length one."""
    mask: Any
    """In the form that the attention backend takes; None is plain causal attention."""
    cache: Cache | None
    options: dict[str, Any]
    """Further keyword arguments of transformers' attention functions."""
    lean: dict[str, list[LeanBlock]] | None = None
    """The blocks of each stage for passes without gradient, where all of them have a lean form."""
    compiled: dict[str, CompiledBlocks] | None = None
    """The same in C++, where all of them have such a form."""

    def of_rows(self, rows: Int[Tensor, " row"]) -> Pass:
        """The same pass for some rows of the batch."""
        mask, rotary = self.mask, self.rotary
        if isinstance(mask, Tensor) and mask.shape[0] > 1:
            mask = mask[rows]
        if rotary.shape[0] > 1:
            rotary = rotary[rows]
        return replace(self, rotary=rotary, mask=mask)

    def versions(self, count: int, cache: Cache) -> Pass:
        """The pass in which `count` versions of one token see what is cached and themselves alone."""
        mask = self.mask
        if count > 1:
            own = torch.eye(count, dtype=torch.bool, device=self.rotary.device)[None, None]
            if mask is None:
                cached = own.new_ones(1, 1, count, cast(Any, self.cache).get_seq_length())
            else:
                cached = mask[..., :-1].expand(-1, -1, count, -1)
                own = own.expand(len(mask), -1, -1, -1)
                if mask.dtype != torch.bool:
                    own = torch.zeros_like(own, dtype=mask.dtype).masked_fill(
                        ~own, torch.finfo(mask.dtype).min
                    )
            mask = torch.cat([cached, own], dim=-1)
        return replace(self, mask=mask, cache=cache)


@dataclass
class RecurrentDepthOutput(CausalLMOutputWithPast):
    """What a pass gives, beside what any causal language model of transformers gives."""

    final_state: Tensor | None = None
    """s_r, raw: (batch, token, width)."""
    latent_states: Tensor | None = None
    """ln_f(s_r), which the coda reads."""
    exit_steps: Tensor | None = None
    """Recurrences of each token: (batch, token)."""


class RecurrentDepthPreTrainedModel(PreTrainedModel):
    """The interface with transformers."""

    config: RecurrentDepthConfig
    config_class = RecurrentDepthConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _no_split_modules = ["SandwichBlock"]  # noqa: RUF012 - transformers' own declarations
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    transformer: nn.ModuleDict
    lm_head: nn.Module
    freqs_cis: Tensor

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> bool:
        """What `generate` calls: a cache of ours, allocated once for the whole length, if none came."""
        del generation_mode, batch_size
        is_given = model_kwargs.get("past_key_values") is not None
        if is_given or generation_config.use_cache is False:
            return False
        steps = self.recurrences(model_kwargs.get("num_steps"), 1)
        model_kwargs["past_key_values"] = RecurrentCache(
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
                "exit decides recurrences itself and keeps no history; leave out output_hidden_states, and "
                "give one num_steps for all rows"
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
        self, mask: Tensor | None, position_ids: Tensor | None, held: int, tokens: int
    ) -> Int[Tensor, "#batch token"]:
        """Place of each token in its own text: padding does not count."""
        if position_ids is None:
            position_ids = torch.arange(held, held + tokens, device=self.device)[None]
            if mask is not None and mask.ndim == 2 and not bool(mask.all()):
                position_ids = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens:]
        last = int(position_ids.max())
        if last >= self.config.block_size:
            raise ValueError(
                f"position {last} lies beyond the rotary table of block_size={self.config.block_size}; "
                "use a shorter text, or a model with a larger block_size"
            )
        return position_ids

    def locate(
        self,
        embedded: Tensor,
        mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        options: dict[str, Any],
    ) -> tuple[Pass, Int[Tensor, "#batch token"]]:
        """Rotations and the mask in the backend's form; and the positions."""
        batch, tokens = embedded.shape[:2]
        held = 0 if cache is None else int(cache.get_seq_length())
        if self.config.reference_semantics:
            mask = None
        _refuse_places(mask, position_ids, batch=batch, tokens=tokens, held=held)
        positions = self._positions(mask, position_ids, held, tokens)
        table = self.freqs_cis
        if table.dtype not in (torch.float32, torch.float64):
            # A model cast as a whole has cast its angles too: they are computed anew, in float32.
            table = rotary_table(self.config).to(embedded.device)
        table = torch.view_as_complex(table)[0, :, 0]
        where = Pass(
            rotary=table[positions].unsqueeze(2),
            mask=create_causal_mask(
                config=self.config,
                inputs_embeds=embedded,
                attention_mask=mask,
                # Beside a cache transformers does not look for packed texts in the positions.
                past_key_values=cache if held else None,
                position_ids=positions if position_ids is not None else None,
            ),
            cache=cache,
            options={k: v for k, v in options.items() if k not in _NOT_FOR_ATTENTION},
        )
        return where, positions

    def loss_of(self, logits: Tensor, labels: Tensor, options: dict[str, Any]) -> Tensor:
        """Cross-entropy; labels are the inputs, as in transformers, or shifted, as in the reference."""
        extra = {"shift_labels": labels} if self.config.reference_semantics else {}
        given = ("num_items_in_batch", "shift_labels")
        extra |= {k: options[k] for k in given if options.get(k) is not None}
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
        if self.freqs_cis.dtype not in (torch.float32, torch.float64):
            exact = rotary_table(self.config).to(self.freqs_cis.device)
            destination[prefix + "freqs_cis"] = exact

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.transformer["wte"]

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.transformer["wte"] = value

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head."""
        self.lm_head = new_embeddings


def _refuse_places(
    mask: Any, position_ids: Tensor | None, *, batch: int, tokens: int, held: int
) -> None:
    """Raise where mask or positions are not those of this pass."""
    if tokens == 0:
        raise ValueError("input_ids of no tokens leave nothing to predict from; give one or more")
    if isinstance(mask, Tensor) and mask.ndim != 4 and mask.shape != (batch, held + tokens):
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)} for {batch} rows of {held} cached and {tokens} new "
            f"tokens; give ({batch}, {held + tokens}), or four dimensions as transformers' masks have"
        )
    if position_ids is None:
        return
    is_shaped = position_ids.ndim == 2 and position_ids.shape[0] in (1, batch)
    if not is_shaped or position_ids.shape[1] != tokens or int(position_ids.min()) < 0:
        raise ValueError(
            f"position_ids of shape {tuple(position_ids.shape)} from {int(position_ids.min())} for {batch} "
            f"rows of {tokens} tokens; give one row or {batch}, with a place from 0 on for each token"
        )


def rotary_table(config: RecurrentDepthConfig) -> Float[Tensor, "1 position 1 half 2"]:
    """(cos, sin) of every position and pair of features, float32, as published (`freqs_cis`)."""
    exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    angles = torch.outer(torch.arange(config.block_size).float(), 1.0 / config.rope_base**exponents)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)[None, :, None]
