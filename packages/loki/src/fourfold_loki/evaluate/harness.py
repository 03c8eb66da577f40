"""lm-evaluation-harness under a selection, and a task of ours that needs no hub.

    import fourfold_loki.evaluate.harness, lm_eval
    lm_eval.simple_evaluate(
        "loki", model_args="pretrained=DIR,basis=basis.safetensors,share=0.25", tasks=[...]
    )

Scored requests are one dense block without a cache, so every query is masked, as in the published
evaluations; generated answers decode from a prompt that was masked likewise.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from jaxtyping import Float, Int
from lm_eval import simple_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fourfold_loki.basis import Basis
from fourfold_loki.budget import Budget, Share
from fourfold_loki.huggingface.session import attending
from fourfold_loki.attention_mode import Sparse
from fourfold_loki.selectors import Loki
from fourfold_loki.evaluate.traffic import Reads


@register_model("loki")
class LokiLM(HFLM):
    """A model of transformers that reads a share of its keys.

    Args:
        basis: a file that `Basis.save` wrote.
        share: of the visible keys.
        page: keys are read in runs of this many.
        divisor: head width over the coordinates that rank.
        kwargs: as for lm-eval's own `hf` model.
    """

    def __init__(
        self, *, basis: str, share: float = 0.25, page: int = 1, divisor: int = 4, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        held = Basis.load(Path(basis)).to(self._held().model.device)
        selector = Loki(basis=held, widths=(held.head_width // int(divisor),) * held.layers)
        budget = Budget(amount=Share(of_visible=float(share)), page=int(page))
        self._plan = Sparse(selector=selector, budget=budget, reach="every query")
        self.reads = Reads.of(self._held().model.config.get_text_config(), selector)
        """Of all requests so far."""

    def _model_call(
        self,
        inps: Int[Tensor, "batch token"],
        attn_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Float[Tensor, "batch token vocabulary"]:
        del attn_mask, labels
        with self._attending(), torch.no_grad():
            return self._held().model(inps, use_cache=False).logits

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> Tensor:
        above: Any = super()
        with self._attending():
            return above._model_generate(  # noqa: SLF001 - overridden
                context, max_length, stop, **generation_kwargs
            )

    @contextmanager
    def _attending(self) -> Iterator[None]:
        with attending(self._held().model, self._plan) as session:
            yield
        self.reads = self.reads + session.reads

    def _held(self) -> Any:
        """Itself, with the attributes that lm-eval sets where no type checker sees them."""
        return self


def continuations(
    tokenizer: PreTrainedTokenizerBase,
    windows: Int[Tensor, "window context"],
    *,
    answer: int,
    choices: int = 4,
) -> dict[str, Any]:
    """A task for lm-eval: which of several passages goes on a text?

    Args:
        tokenizer: of the model; texts are decoded, since lm-eval encodes them again.
        windows: text as ids; the last tokens of a window are its true continuation, those of the windows
            after it are the false ones.
        answer: tokens of a continuation.
        choices: how many to choose from.

    Raises:
        ValueError: where there are fewer windows than choices.
    """
    if len(windows) < choices or not 0 < answer < windows.shape[1]:
        raise ValueError(
            f"{len(windows)} windows of {windows.shape[1]} tokens for {choices} choices of {answer}; use "
            "at least as many windows as choices, and shorter answers"
        )
    ends = [str(tokenizer.decode(window[-answer:])) for window in windows]
    documents = []
    for place, window in enumerate(windows):
        right = place % choices
        passages = [ends[(place + step - right) % len(ends)] for step in range(choices)]
        context = str(tokenizer.decode(window[:-answer]))
        documents.append({"context": context, "choices": passages, "right": right})
    return {
        "task": "continuations",
        "custom_dataset": lambda **_: {"test": Dataset.from_list(documents)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "right",
        "target_delimiter": "",
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
        ],
    }


def asked(lm: HFLM, task: dict[str, Any]) -> Any:
    """lm-eval's results on one task of ours, without reading the hundreds that it ships with."""
    evaluate: Any = simple_evaluate  # their decorator hides the signature from type checkers
    tasks = TaskManager(include_defaults=False)
    return evaluate(lm, tasks=[task], task_manager=tasks, bootstrap_iters=0)
