"""A task of Inspect (`inspect-ai`): the built-in prompts, and a scorer that is the judge.

    inspect eval fourfold_hpc_coder/parallel_code --model openai/MODEL -T models=omp,mpi

Needs the extra `inspect`. Programs run in this package's sandbox, not in one of Inspect's: no Docker.
"""

import asyncio
from collections.abc import Sequence

from inspect_ai import Task, task  # pyright: ignore[reportMissingImports]
from inspect_ai.dataset import MemoryDataset, Sample  # pyright: ignore[reportMissingImports]
from inspect_ai.scorer import (  # pyright: ignore[reportMissingImports]
    CORRECT,
    INCORRECT,
    NOANSWER,
    Score,
    Scorer,
    Target,
    accuracy,
    scorer,
    stderr,
)
from inspect_ai.solver import TaskState, generate  # pyright: ignore[reportMissingImports]

from fourfold_hpc_coder.doors.prompting import asks
from fourfold_hpc_coder.doors.shared import shared_judge
from fourfold_hpc_coder.judge.bench import JudgeSettings
from fourfold_hpc_coder.vocabulary import chosen_models


@scorer(metrics=[accuracy(), stderr()])
def judged(settings: JudgeSettings | None = None, jobs: int = 2) -> Scorer:
    """Correct where the answer counts; the verdict, its reason and the speed-up are in the score.

    Args:
        settings: limits and launches; the command line's for none.
        jobs: answers built and checked at once.
    """

    async def score(state: TaskState, target: Target) -> Score:  # noqa: ARG001 - Inspect's signature
        judge = shared_judge(settings, jobs=jobs)
        asked = state.metadata
        reply = state.output.completion
        # From another thread: where many answers wait already, handing one over takes time.
        future = await asyncio.to_thread(
            judge.submit,
            asked["problem"],
            reply,
            model=asked["model"],
            prompt=asked["prompt"],
            extracts_body=True,
        )
        judgement = await asyncio.wrap_future(future)
        wrong = NOANSWER if judgement.verdict == "no answer" else INCORRECT
        return Score(
            value=CORRECT if judgement.sample.counts else wrong,
            answer=reply,
            explanation=f"{judgement.verdict}: {judgement.because}",
            metadata={
                "verdict": judgement.verdict,
                "proof": judgement.proof,
                "built": judgement.sample.built,
                "speedup": judge.speedup(judgement, asked["model"]),
            },
        )

    return score


@task
def parallel_code(
    models: str | Sequence[str] = "omp",
    only: str = "",
    settings: JudgeSettings | None = None,
    jobs: int = 2,
) -> Task:
    """The built-in prompts in some parallel models.

    Args:
        models: parallel models, separated by commas.
        only: a part of the problems' names; empty for all.
        settings: limits and launches; the command line's for none.
        jobs: answers built and checked at once.
    """
    chosen = chosen_models(models if isinstance(models, str) else ",".join(models))
    samples = [
        Sample(
            input=ask.request,
            id=f"{ask.problem} ({ask.model})",
            metadata={"problem": ask.problem, "model": ask.model, "prompt": ask.prompt},
        )
        for ask in asks(chosen, only)
    ]
    return Task(
        dataset=MemoryDataset(samples, name="fourfold_hpc_coder"),
        solver=generate(),
        scorer=judged(settings, jobs),
    )
