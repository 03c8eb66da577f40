"""A task set of verifiers (`verifiers` 0.4 and later): the built-in prompts, rewarded by the judge.

    eval fourfold_hpc_coder.doors.verifiers_tasks --env.taskset.models omp

Needs the extra `verifiers`. The reward is computed from the reply alone, in this process.
"""

import asyncio
from collections.abc import Iterator

import verifiers.v1 as vf  # pyright: ignore[reportMissingImports]

from fourfold_hpc_coder.doors.prompting import asks
from fourfold_hpc_coder.doors.rewards import Reward
from fourfold_hpc_coder.doors.shared import shared_judge
from fourfold_hpc_coder.judge.judge import Judgement
from fourfold_hpc_coder.vocabulary import Model, chosen_models

__all__ = ["ParallelCodeTaskset"]
"""The names in which verifiers looks for the task set."""


class ParallelCodeData(vf.TaskData):
    """A prompt: the built-in problem, the parallel model, and the function's head."""

    problem: str
    model: Model
    opened: str
    """C++ up to the brace that opens the function."""


class ParallelCodeTask(vf.Task[ParallelCodeData, vf.State, vf.TaskConfig]):
    """One prompt; `parallel_code` is its reward, of which `counts`, `builds` and `speedup` are the parts."""

    @vf.reward
    async def parallel_code(self, trace: vf.Trace) -> float:
        """The worth of the last reply."""
        judge = shared_judge()
        return Reward().of(judge, await self._judged(trace), self.data.model)

    @vf.metric
    async def verdicts(self, trace: vf.Trace) -> dict[str, float]:
        """Whether the last reply counts and builds, and its speed-up."""
        judgement = await self._judged(trace)
        return {
            "counts": float(judgement.sample.counts),
            "builds": float(judgement.sample.built),
            "speedup": shared_judge().speedup(judgement, self.data.model),
        }

    async def _judged(self, trace: vf.Trace) -> Judgement:
        """The judgement on the last reply; one for the metrics and the reward of a trace."""
        data = self.data
        kept = self.__dict__.setdefault("judged", {})
        if trace.id not in kept:
            kept[trace.id] = await asyncio.to_thread(
                shared_judge().submit,
                data.problem,
                trace.last_reply,
                model=data.model,
                prompt=data.opened,
                extracts_body=True,
            )
        return await asyncio.wrap_future(kept[trace.id])


class ParallelCodeConfig(vf.TasksetConfig):
    """The prompts to load."""

    models: str = "omp"
    """Parallel models to ask for, separated by commas."""
    only: str = ""
    """A part of the problems' names; empty for all."""


class ParallelCodeTaskset(vf.Taskset[ParallelCodeTask, ParallelCodeConfig]):
    """The built-in prompts."""

    def load(self) -> Iterator[ParallelCodeTask]:
        """A task for each prompt."""
        for ask in asks(chosen_models(self.config.models), self.config.only):
            yield ParallelCodeTask(
                ParallelCodeData(
                    name=f"{ask.problem} ({ask.model})",
                    prompt=ask.request,
                    problem=ask.problem,
                    model=ask.model,
                    opened=ask.prompt,
                ),
                self.config.task,
            )
