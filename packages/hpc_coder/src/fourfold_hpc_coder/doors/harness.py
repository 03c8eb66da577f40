"""A task of lm-evaluation-harness: the built-in prompts, judged; needs the extra `evaluation`.

    import lm_eval
    from fourfold_hpc_coder.doors.harness import parallel_code
    lm_eval.simple_evaluate(MODEL, tasks=[parallel_code(["omp"])])

All answers are judged at once, in a filter, before any is scored: a task that scored them one by one would
leave the machine idle. Programs run in this package's sandbox, so the task asks for no leave to run them.
"""

import json
from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from fourfold_hpc_coder.doors.prompting import asks
from fourfold_hpc_coder.doors.server import shown
from fourfold_hpc_coder.doors.shared import shared_judge
from fourfold_hpc_coder.judge.bench import JudgeSettings
from fourfold_hpc_coder.vocabulary import Model


def parallel_code(
    models: Sequence[Model],
    only: str = "",
    *,
    chat: bool = False,
    most_tokens: int = 512,
    settings: JudgeSettings | None = None,
    jobs: int = 2,
) -> dict[str, Any]:
    """A task for `simple_evaluate`: `counts` is pass@1, beside `builds` and `speedup`.

    Args:
        models: parallel models to ask for.
        only: a part of the problems' names; empty for all.
        chat: whether to ask in words, for a model that chats.
        most_tokens: longest answer.
        settings: limits and launches; the command line's for none.
        jobs: answers built and checked at once.
    """
    documents = [
        {
            "problem": ask.problem,
            "model": ask.model,
            "prompt": ask.prompt,
            "asked": ask.request if chat else ask.prompt,
        }
        for ask in asks(models, only)
    ]

    def judged(
        responses: Sequence[Sequence[str]], asked: Sequence[dict[str, Any]]
    ) -> list[list[str]]:
        judge = shared_judge(settings, jobs=jobs)
        futures = [
            [
                judge.submit(
                    document["problem"],
                    answer,
                    model=document["model"],
                    prompt=document["prompt"],
                    extracts_body=True,
                )
                for answer in answers
            ]
            for answers, document in zip(responses, asked, strict=True)
        ]
        return [
            [json.dumps(shown(judge, future.result(), document["model"])) for future in of_one]
            for of_one, document in zip(futures, asked, strict=True)
        ]

    means = [
        {"metric": name, "aggregation": "mean", "higher_is_better": True}
        for name in ("counts", "builds", "speedup")
    ]
    return {
        "task": "parallel_code",
        "custom_dataset": lambda **_: {"test": Dataset.from_list(documents)},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{asked}}",
        "doc_to_target": "",
        "target_delimiter": "",
        "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": most_tokens},
        "filter_list": [
            {"name": "judged", "filter": [{"function": "custom", "filter_fn": judged}]}
        ],
        "process_results": scores,
        "metric_list": means,
    }


def scores(document: dict[str, Any], results: Sequence[Any]) -> dict[str, float]:  # noqa: ARG001 - lm-eval's signature
    """The metrics of a prompt's first answer, from its judgement."""
    first = results[0]
    judged = json.loads(first if isinstance(first, str) else first[0])
    return {
        "counts": float(judged["counts"]),
        "builds": float(judged["built"]),
        "speedup": float(judged["speedup"]),
    }
