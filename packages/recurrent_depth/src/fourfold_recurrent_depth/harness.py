"""The adapter for lm-evaluation-harness: recurrences and exits as model arguments.

    import fourfold_recurrent_depth.harness, lm_eval
    lm_eval.simple_evaluate("recurrent_depth", model_args="pretrained=DIR,num_steps=32,exit=kl", tasks=[...])

GSM8K as the paper reports it ("with system prompt") needs `apply_chat_template=True`,
`fewshot_as_multiturn=True` and `system_instruction=SYSTEM`; a tokenizer of one's own needs
`chat_template=CHAT_TEMPLATE`, and what it gives is encoded with `add_special_tokens=False`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from fourfold_recurrent_depth.causal_lm import RecurrentDepthForCausalLM
from fourfold_recurrent_depth.exits import Criterion, criterion_named

CHAT_TEMPLATE = (
    "<|begin_text|>{% for message in messages %}"
    "<|begin_header|>{{ 'Huginn' if message['role'] == 'assistant' else message['role'] }}<|end_header|>"
    "\n\n{{ message['content'] | trim }}<|end_turn|>{% endfor %}"
    "{% if add_generation_prompt %}<|begin_header|>Huginn<|end_header|>\n\n"
    "{% else %}<|end_text|>{% endif %}"
)
"""Huginn's chat format, in Jinja."""

SYSTEM = "You are a helpful assistant that can assist users with mathematical reasoning."
"""System message of the reported GSM8K numbers."""


@register_model("recurrent_depth")
class RecurrentDepthLM(HFLM):
    """A recurrent-depth model at a fixed or an adaptive depth; counts the recurrences it took.

    Args:
        num_steps: recurrences, at most where tokens may stop; by default the configuration's.
        exit: a criterion or its name; empty for none. Scored tokens stop one by one.
        kwargs: as for lm-eval's own `hf` model.
    """

    def __init__(
        self,
        *,
        num_steps: int | None = None,
        exit: str | Criterion = "",  # noqa: A002 - the word of the model's own argument
        **kwargs: Any,
    ) -> None:
        self._options: dict[str, Any] = {}
        if exit:
            self._options["exit"] = replace(criterion_named(exit), scope="token")
        if num_steps is not None and int(num_steps) < 1:
            raise ValueError(
                f"num_steps={num_steps} asks for fewer than 1 recurrence; use 1 or more"
            )
        super().__init__(**kwargs)
        model = self._held().model
        if not isinstance(model, RecurrentDepthForCausalLM):
            raise ValueError(
                f"{type(model).__name__} has no recurrences; use lm-eval's model `hf` for it"
            )
        steps = model.config.mean_recurrence if num_steps is None else int(num_steps)
        self._options["num_steps"] = steps
        self.steps_taken = torch.zeros(steps + 1, dtype=torch.long)
        """Counts of the scored tokens that took each number of recurrences."""

    def _model_call(
        self,
        inps: Int[Tensor, "batch token"],
        attn_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Float[Tensor, "batch token vocabulary"]:
        del attn_mask, labels
        with torch.no_grad():
            out: Any = self._held().model(inps, use_cache=False, **self._options)
        steps = out.exit_steps
        if steps is None:
            self.steps_taken[self._options["num_steps"]] += inps.numel()
        else:
            self.steps_taken += torch.bincount(
                steps.flatten().cpu(), minlength=len(self.steps_taken)
            )
        return out.logits

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> Tensor:
        above: Any = super()
        options = {**self._options, **generation_kwargs}
        return above._model_generate(context, max_length, stop, **options)  # noqa: SLF001 - overridden

    def _held(self) -> Any:
        """Itself, with the attributes that lm-eval sets where no type checker sees them."""
        return self
