"""An environment of OpenEnv (`openenv`): a prompt, an answer, the judge's reward. Needs the extra `openenv`.

    uvicorn --factory fourfold_hpc_coder.doors.openenv_environment:app --host 127.0.0.1

The reward is computed in the server's process, from the judge's own measurements. It is read from no file and
from no output of the program, so that nothing a program writes changes it.
"""

import random
from typing import Any
from uuid import uuid4

from fastapi import FastAPI  # pyright: ignore[reportMissingImports]
from openenv.core.env_server import Environment, create_app  # pyright: ignore[reportMissingImports]
from openenv.core.env_server.types import Action, Observation, State  # pyright: ignore[reportMissingImports]
from pydantic import Field

from fourfold_hpc_coder.doors.prompting import Ask, asks
from fourfold_hpc_coder.doors.rewards import Reward
from fourfold_hpc_coder.doors.shared import shared_judge
from fourfold_hpc_coder.judge.bench import JudgeSettings
from fourfold_hpc_coder.vocabulary import Model

ENVIRONMENTS = 16
"""Sessions at once."""


class AnswerAction(Action):
    """An answer: a function's body, or a chat's reply with it."""

    code: str = Field(description="the function's body, or a reply with the function in a block")


class JudgedObservation(Observation):
    """A prompt, and the judgement on the last answer to it."""

    problem: str = Field(description="name of the built-in problem")
    model: str = Field(description="parallel model that is asked for")
    prompt: str = Field(description="C++ up to the brace that opens the function")
    verdict: str = Field(default="", description="the judge's word; empty before an answer")
    because: str = Field(default="", description="one sentence")


class ParallelCodeEnvironment(Environment[AnswerAction, JudgedObservation, State]):
    """An episode is a prompt and as many answers as there are rounds; an answer that counts ends it.

    Args:
        models: parallel models to ask for.
        only: a part of the problems' names; empty for all.
        rounds: answers to a prompt; the judge's sentence on one may help the next.
        reward: worth of a judgement.
        settings: limits and launches; the command line's for none.
        jobs: answers built and checked at once, over all sessions.
    """

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(
        self,
        models: tuple[Model, ...] = ("omp",),
        only: str = "",
        rounds: int = 1,
        reward: Reward | None = None,
        settings: JudgeSettings | None = None,
        jobs: int = 2,
    ) -> None:
        super().__init__()
        self._asks = [*asks(models, only)]
        self._rounds = rounds
        self._reward = reward or Reward()
        self._settings, self._jobs = settings, jobs
        self._asked: Ask = self._asks[0]
        self._state = State(episode_id=str(uuid4()), step_count=0)
        self._is_over = True

    def reset(
        self, seed: int | None = None, episode_id: str | None = None, **_: Any
    ) -> JudgedObservation:
        """Draw a prompt, by the seed where there is one."""
        self._asked = random.Random(seed).choice(self._asks)  # noqa: S311 - no secret
        self._state = State(episode_id=episode_id or str(uuid4()), step_count=0)
        self._is_over = False
        return self._shown()

    def step(
        self,
        action: AnswerAction,
        timeout_s: float | None = None,  # noqa: ARG002 - the judge has limits of its own
        **_: Any,
    ) -> JudgedObservation:
        """Judge an answer.

        Raises:
            ValueError: where the episode is over, or has not begun.
        """
        if self._is_over:
            raise ValueError("this episode is over; reset() begins another")
        judge = shared_judge(self._settings, jobs=self._jobs)
        asked = self._asked
        judgement = judge.judge(
            asked.problem, action.code, model=asked.model, prompt=asked.prompt, extracts_body=True
        )
        self._state.step_count += 1
        self._is_over = judgement.sample.counts or self._state.step_count >= self._rounds
        return self._shown(
            verdict=judgement.verdict,
            because=judgement.because,
            reward=self._reward.of(judge, judgement, asked.model),
            done=self._is_over,
        )

    @property
    def state(self) -> State:
        """Episode and answers so far."""
        return self._state

    def _shown(self, **fields: Any) -> JudgedObservation:
        asked = self._asked
        return JudgedObservation(
            problem=asked.problem, model=asked.model, prompt=asked.prompt, **fields
        )


def app() -> FastAPI:
    """The server of environments, for uvicorn."""
    return create_app(
        ParallelCodeEnvironment,
        AnswerAction,
        JudgedObservation,
        env_name="parallel_code",
        max_concurrent_envs=ENVIRONMENTS,
    )
