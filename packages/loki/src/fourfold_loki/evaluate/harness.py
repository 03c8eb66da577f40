"""lm-evaluation-harness under a selection, and a task of ours that needs no hub.

    import fourfold_loki.evaluate.harness, lm_eval
    lm_eval.simple_evaluate(
        "loki", model_args="pretrained=DIR,basis=basis.safetensors,share=0.25", tasks=[...]
    )

WindowScore requests are one dense block without a cache, so every query is masked, as in the published
evaluations; generated answers decode from a prompt that was masked likewise.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
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
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fourfold_loki.attention_mode import Sparse
from fourfold_loki.basis import Basis
from fourfold_loki.budget import Budget, Share
from fourfold_loki.huggingface.reads import Reads
from fourfold_loki.huggingface.session import attending
from fourfold_loki.selectors import Loki


@register_model("loki")
class LokiLM(HFLM):
    """A model of transformers that reads a share of its keys.

    Args:
        basis: a file that `Basis.save` wrote.
        share: of the visible keys.
        divisor: head width over the coordinates that rank.
        page: keys are read in runs of this many.
        sinks: first tokens that are always read.
        kwargs: as for lm-eval's own `hf` model.
    """

    def __init__(
        self,
        *,
        basis: str | PathLike[str],
        share: float = 0.25,
        divisor: int = 4,
        page: int = 1,
        sinks: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        model = self._untyped().model
        fitted = Basis.load(basis).to(model.device)
        width = max(1, fitted.head_width // int(divisor))
        selector = Loki(basis=fitted, widths=(width,) * fitted.layers)
        budget = Budget(amount=Share(of_visible=float(share)), page=int(page), sinks=int(sinks))
        self._mode = Sparse(selector=selector, budget=budget, reach="every query")
        self.reads = Reads.of(model.config.get_text_config(), selector, budget.amount)
        """Of all requests so far."""

    def _model_call(
        self,
        inps: Int[Tensor, "batch token"],
        attn_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Float[Tensor, "batch token vocabulary"]:
        del attn_mask, labels
        with self._attending(), torch.no_grad():
            return self._untyped().model(inps, use_cache=False).logits

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
        with attending(self._untyped().model, self._mode) as session:
            yield
        self.reads = self.reads + session.reads

    def _untyped(self) -> Any:
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
    # lm-eval begins the text anew.
    texts = [
        str(tokenizer.decode(window[:-answer], skip_special_tokens=True)) for window in windows
    ]
    ends = [str(tokenizer.decode(window[-answer:])) for window in windows]
    documents = []
    for place, context in enumerate(texts):
        right = place % choices
        passages = [ends[(place + step - right) % len(ends)] for step in range(choices)]
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


def task_manager(names: Sequence[str], include: Sequence[Path]) -> TaskManager:
    """lm-eval's index of tasks, which takes seconds to read where tasks are asked for by name.

    Args:
        names: tasks that must be in it.
        include: folders with task files besides its own.

    Raises:
        ValueError: for a name that it does not hold.
    """
    if not names:
        return TaskManager(include_defaults=False)
    manager = TaskManager(include_path=[str(folder) for folder in include])
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise ValueError(
            f"task {unknown[0]!r} is none of lm-eval's {len(manager.all_tasks)} tasks; `lm-eval ls tasks` "
            "lists them, --include names a folder with task files of yours"
        )
    return manager


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScore:
    """One metric of one task, under full attention and under Loki."""

    task: str
    metric: str
    full: float
    loki: float
    questions: int


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str | dict[str, Any]],
    manager: TaskManager,
    *,
    questions: int,
    **reading: Any,
) -> tuple[tuple[TaskScore, ...], Reads]:
    """Full attention and Loki on the same questions, and what Loki read.

    Args:
        model: a model of transformers.
        tokenizer: its tokenizer.
        tasks: names that the manager holds, or tasks as `continuations` gives them.
        manager: of `task_manager`.
        questions: of each task, at most.
        reading: as `LokiLM` takes it.
    """
    shared = {"pretrained": model, "tokenizer": tokenizer, "batch_size": 4}
    selective: Any = LokiLM  # lm-eval's decorator hides the signature from type checkers
    ours = selective(**shared, **reading)
    full, loki = (asked(lm, tasks, manager, questions=questions) for lm in (HFLM(**shared), ours))
    rows = [
        TaskScore(
            task=task,
            metric=metric.partition(",")[0],
            full=float(value),
            loki=float(loki["results"][task][metric]),
            questions=int(full["n-samples"].get(task, {}).get("effective", 0)),
        )
        for task, metrics in full["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, int | float) and "," in metric and "_stderr" not in metric
    ]
    return tuple(rows), ours.reads


def asked(
    lm: HFLM,
    tasks: Sequence[str | dict[str, Any]],
    manager: TaskManager,
    *,
    questions: int,
) -> Any:
    """lm-eval's results of a model on some tasks."""
    evaluate: Any = simple_evaluate  # their decorator hides the signature from type checkers
    return evaluate(lm, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, limit=questions)
