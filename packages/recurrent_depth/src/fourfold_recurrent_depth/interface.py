"""What transformers asks of a model and the paper does not: arguments, masks, positions, fresh weights."""

from __future__ import annotations

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
from fourfold_recurrent_depth.lean import LeanBlock
from fourfold_recurrent_depth.native import CompiledBlocks

Steps = int | tuple[int, int] | Tensor
"""Recurrences: r without gradient; (n, k) of which the last k carry gradient; or one (n + k) per row,
of which the last `mean_backprop_depth` carry gradient in training."""


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
        if isinstance(steps, Tensor) and steps.ndim == 1 and steps.shape[0] == batch > 1:
            lowest, total = int(steps.min()), int(steps.max())
            k = min(config.mean_backprop_depth, total) if self.training else 0
            per_row: Tensor | None = steps
        else:
            n, k = (int(steps), 0) if isinstance(steps, int | Tensor) else cast(Any, steps)
            lowest, total, per_row = min(n, k), n + k, None
        if total < 1 or lowest < 0 or (per_row is not None and lowest < 1):
            raise ValueError(
                f"num_steps={steps} asks for fewer than 1 recurrence; use 1 or more for every row, or a "
                "pair (without gradient, with gradient) of numbers from 0 that sum to 1 or more"
            )
        return total - k, k, per_row

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
        if mask is not None:
            empty = (~mask[:, -tokens:].bool().any(1)).nonzero().flatten().tolist()
            if empty:
                raise ValueError(
                    f"rows {empty} of the batch hold padding alone, which no exit criterion can judge; "
                    "leave them out"
                )

    def _positions(
        self, mask: Tensor | None, position_ids: Tensor | None, cache: Cache | None, tokens: int
    ) -> Int[Tensor, "#batch token"]:
        """Place of each token in its own text: padding does not count."""
        start = 0 if cache is None else int(cache.get_seq_length())
        if position_ids is None:
            position_ids = torch.arange(start, start + tokens, device=self.device)[None]
            is_padded = mask is not None and mask.ndim == 2 and not bool(mask.all())
            if is_padded and not self.config.reference_semantics:
                assert mask is not None
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
        positions = self._positions(mask, position_ids, cache, embedded.shape[1])
        if self.config.reference_semantics:
            mask = None
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
                past_key_values=cache,
                position_ids=positions if position_ids is not None else None,
            ),
            cache=cache,
            options={k: v for k, v in options.items() if k not in _NOT_FOR_ATTENTION},
        )
        return where, positions

    def loss_of(self, logits: Tensor, labels: Tensor, options: dict[str, Any]) -> Tensor:
        """Cross-entropy; labels are the inputs, as in transformers, or shifted, as in the reference."""
        extra = {"shift_labels": labels} if self.config.reference_semantics else {}
        extra |= {k: v for k, v in options.items() if k == "num_items_in_batch"}
        return self.loss_function(
            logits=logits, labels=labels, vocab_size=logits.shape[-1], **extra
        )

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


def rotary_table(config: RecurrentDepthConfig) -> Float[Tensor, "1 position 1 half 2"]:
    """(cos, sin) of every position and pair of features, float32, as published (`freqs_cis`)."""
    exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    angles = torch.outer(torch.arange(config.block_size).float(), 1.0 / config.rope_base**exponents)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)[None, :, None]
