"""Make a pretrained dense model recurrent: cut its layers in three and iterate the middle (2511.07384).

The layers stay transformers' own, with their weights. New is the adapter, which begins as

    adapter([s, e]) = alpha s + beta e,

so that with s_0 = 0 and beta = 1 one recurrence is the dense model (without the layers that were left out).
Training continues with `RandomDepth` and its curriculum.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast


class Retrofitted(PreTrainedModel):
    """A decoder of the Llama family (embed_tokens, layers, norm, rotary_emb) with an iterated middle."""

    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(
        self,
        dense: PreTrainedModel,
        *,
        prelude: int,
        core: int,
        coda: int,
        alpha: float,
        beta: float,
    ) -> None:
        super().__init__(dense.config)
        inner: Any = dense.get_decoder()
        layers = list(inner.layers)
        self.embed_tokens = inner.embed_tokens
        self.rotary_emb = inner.rotary_emb
        self.prelude = nn.ModuleList(layers[:prelude])
        self.core = nn.ModuleList(layers[len(layers) - coda - core : len(layers) - coda])
        self.coda = nn.ModuleList(layers[len(layers) - coda :])
        self.norm = inner.norm
        self.lm_head: Any = dense.get_output_embeddings()
        width = dense.config.hidden_size
        self.adapter = nn.Linear(2 * width, width, bias=False, dtype=dense.dtype)
        self.gradient_checkpointing = False
        with torch.no_grad():
            eye = torch.eye(width, dtype=dense.dtype)
            self.adapter.weight.copy_(torch.cat([alpha * eye, beta * eye], dim=1))

    def forward(
        self,
        input_ids: Int[Tensor, "batch token"],
        attention_mask: Tensor | None = None,
        labels: Int[Tensor, "batch token"] | None = None,
        num_steps: int | tuple[int, int] = 1,
        use_cache: bool | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Recur n times without gradient, then k with it; s_0 is zero.

        Args:
            input_ids: tokens.
            attention_mask: 0 for padding.
            labels: the inputs, as everywhere in transformers.
            num_steps: r, all with gradient, or (n, k).
            use_cache: must not be asked for.
            options: passed on to the layers.

        Raises:
            ValueError: fewer than one recurrence, or a cache, which these layers' slots cannot hold.
        """
        without, with_gradient = (0, num_steps) if isinstance(num_steps, int) else num_steps
        if min(without, with_gradient) < 0 or without + with_gradient < 1:
            raise ValueError(
                f"num_steps={num_steps} asks for fewer than 1 recurrence; use 1 or more"
            )
        if use_cache:
            raise ValueError(
                "a retrofitted model keeps no cache, since its layers have one slot each; "
                "pass use_cache=False"
            )
        e = self.embed_tokens(input_ids)
        places = torch.arange(input_ids.shape[1], device=e.device)[None]
        mask = create_causal_mask(
            config=self.config, inputs_embeds=e, attention_mask=attention_mask, past_key_values=None,
            position_ids=places,
        )  # fmt: skip
        shared: dict[str, Any] = {
            "attention_mask": mask, "position_ids": places,
            "position_embeddings": self.rotary_emb(e, position_ids=places), **options,
        }  # fmt: skip
        e = _through(self.prelude, e, shared)
        s = torch.zeros_like(e)
        for step in range(without + with_gradient):
            with torch.set_grad_enabled(torch.is_grad_enabled() and step >= without):
                s = self.recur(s, e, shared)
        logits = self.lm_head(self.norm(_through(self.coda, s, shared)))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def recur(
        self,
        s: Float[Tensor, "batch token width"],
        e: Float[Tensor, "batch token width"],
        shared: dict[str, Any],
    ) -> Float[Tensor, "batch token width"]:
        """One recurrence."""
        return _through(self.core, self.adapter(torch.cat([s, e], dim=-1)), shared)

    def get_input_embeddings(self) -> nn.Module:
        """The dense model's."""
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        """The dense model's."""
        return self.lm_head


def retrofit(
    dense: PreTrainedModel,
    prelude: int,
    core: int,
    coda: int,
    *,
    alpha: float = 0.0,
    beta: float = 1.0,
) -> Retrofitted:
    """A recurrent model from a dense one, whose layers it takes over (they are not copied).

    The first `prelude` layers read, the last `coda` speak, the `core` before those is iterated; layers
    between prelude and core are left out.

    Raises:
        ValueError: the parts do not fit, or the model is not built of such layers.
    """
    inner: Any = dense.get_decoder()
    parts = ("embed_tokens", "layers", "norm", "rotary_emb")
    missing = [name for name in parts if not hasattr(inner, name)]
    if missing:
        raise ValueError(
            f"{type(dense).__name__} has no {missing[0]!r} in its decoder; retrofit takes decoders of the "
            "Llama family"
        )
    count = len(inner.layers)
    if min(prelude, coda) < 0 or core < 1 or prelude + core + coda > count:
        raise ValueError(
            f"prelude={prelude}, core={core}, coda={coda} do not fit into {count} layers; use parts that "
            f"sum to {count} or less, with a core of 1 or more"
        )
    return Retrofitted(dense, prelude=prelude, core=core, coda=coda, alpha=alpha, beta=beta)


def _through(layers: nn.ModuleList, x: Tensor, shared: dict[str, Any]) -> Tensor:
    for layer in layers:
        x = layer(x, **shared)
    return x
