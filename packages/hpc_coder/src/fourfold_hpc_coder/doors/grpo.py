"""The judge as a reward function of TRL's GRPO trainer. Needs the extra `trl`.

from trl import GRPOConfig, GRPOTrainer
reward = JudgeReward()
GRPOTrainer(MODEL, reward_funcs=reward, train_dataset=rows(["omp"]), args=GRPOConfig()).train()
"""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from fourfold_hpc_coder.doors.prompting import asks
from fourfold_hpc_coder.doors.rewards import Reward
from fourfold_hpc_coder.doors.shared import shared_judge
from fourfold_hpc_coder.judge.bench import JudgeSettings
from fourfold_hpc_coder.vocabulary import Model


def rows(models: Sequence[Model], only: str = "", *, chat: bool = False) -> Dataset:
    """The built-in prompts as a data set of TRL's: `prompt`, and the columns that the reward reads.

    Args:
        models: parallel models to ask for.
        only: a part of the problems' names; empty for all.
        chat: whether prompts are messages, for a model that chats.
    """
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": ask.request}] if chat else ask.prompt,
                "problem": ask.problem,
                "model": ask.model,
            }
            for ask in asks(models, only)
        ]
    )


class JudgeReward:
    """A reward function: verdict and time by the judge, of all completions of a step at once.

    Args:
        reward: worth of a judgement.
        settings: limits and launches; the command line's for none.
        jobs: answers built and checked at once.
    """

    def __init__(
        self,
        reward: Reward | None = None,
        settings: JudgeSettings | None = None,
        jobs: int = 2,
    ) -> None:
        self.reward = reward or Reward()
        self.settings = settings
        self.jobs = jobs
        self.__name__ = "judge"
        """TRL's name of the reward in its logs."""

    def __call__(
        self,
        completions: Sequence[Any],
        problem: Sequence[str],
        model: Sequence[Model],
        **_: Any,
    ) -> list[float]:
        """The rewards of completions, in their order.

        Args:
            completions: texts, or lists of messages of which the last is the answer.
            problem: name of each one's problem.
            model: parallel model that each was asked for.
        """
        judge = shared_judge(self.settings, jobs=self.jobs)
        futures = [
            judge.submit(name, _text(completion), model=asked, extracts_body=True)
            for completion, name, asked in zip(completions, problem, model, strict=True)
        ]
        return [
            self.reward.of(judge, future.result(), asked)
            for future, asked in zip(futures, model, strict=True)
        ]


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])
