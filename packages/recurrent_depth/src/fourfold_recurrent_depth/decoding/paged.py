"""The model up to its head, as servers with paged caches run it: vLLM's Transformers backend.

vLLM builds `AutoModel.from_config(config)`, replaces its linear layers, and calls it with one row of tokens
of many requests, their positions, `use_cache=False` and `attention_instances`: one for each of
`config.num_hidden_layers` layers. A layer that is called several times needs an instance for each call, so
that number counts each layer once for each recurrence (as Nanbeige's code does, vllm-project/vllm#56071), and
an `AttentionCall` with that `layer_idx` makes the call. The depth is `config.mean_recurrence`; exits and
cache budgets need `serve`.

    import fourfold_recurrent_depth.decoding.paged  # in every process of the server, before it builds
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import can_return_tuple

from fourfold_recurrent_depth.causal_lm import RecurrentDepthForCausalLM
from fourfold_recurrent_depth.configuration import RecurrentDepthConfig

PLAN = {
    **{f"self_attn.{name}_proj": "colwise" for name in "qkv"}, "self_attn.o_proj": "rowwise",
    "mlp.gate_proj": "colwise", "mlp.up_proj": "colwise", "mlp.down_proj": "rowwise",
}  # fmt: skip
"""Tensor-parallel styles of a layer of Ouro or Nanbeige; the other families are replicated."""


class RecurrentDepthDecoder(RecurrentDepthForCausalLM):
    """Prelude, core at `mean_recurrence`, coda and norm; the cache is the server's."""

    has_head = False

    def __init__(self, config: RecurrentDepthConfig) -> None:
        self.base_model_prefix = "model" if config.form.root == "model" else ""
        super().__init__(config)
        self.serve_slots()
        if config.form.root == "model":
            self._tp_plan = {f"layers.*.{name}": style for name, style in PLAN.items()}

    def hold(self, named: dict[str, nn.Module]) -> None:
        """As in transformers, a base model is what its causal model calls `model`."""
        if self.config.form.root != "model":
            return super().hold(named)
        for name, part in named.items():
            self.add_module(name, part)
        return None

    def parts(self) -> Any:
        """See `hold`."""
        return super().parts() if self.config.form.root != "model" else self._modules

    @can_return_tuple
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Int[Tensor, "1 token"] | None = None,
        inputs_embeds: Float[Tensor, "1 token width"] | None = None,
        position_ids: Int[Tensor, "1 token"] | None = None,
        attention_mask: Any = None,
        use_cache: bool | None = False,
        **options: Any,
    ) -> BaseModelOutputWithPast:
        """The head's input.

        Args:
            input_ids: of many requests, one behind another; or `inputs_embeds`.
            inputs_embeds: rows of the embedding, not yet scaled.
            position_ids: of each token in its own request.
            attention_mask: in the form that the attention function takes; vLLM's takes none.
            use_cache: not served: the cache is not the model's.
            options: handed on to the attention function, `attention_instances` among them.

        Raises:
            ValueError: `use_cache`, or no positions.
        """
        if use_cache:
            raise ValueError(
                "use_cache=True asks a decoder for a cache that its server keeps; leave it out, or use "
                "RecurrentDepthForCausalLM"
            )
        state = self.think(input_ids, inputs_embeds, position_ids, attention_mask, options)
        return BaseModelOutputWithPast(last_hidden_state=state)


AutoModel.register(RecurrentDepthConfig, RecurrentDepthDecoder, exist_ok=True)
