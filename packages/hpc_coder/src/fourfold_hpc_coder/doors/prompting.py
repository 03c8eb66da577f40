"""The built-in prompts as other libraries ask them: what to say to a model that answers in chat style."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fourfold_hpc_coder.problems.library import own_problems
from fourfold_hpc_coder.vocabulary import Model

REQUEST = (
    "Complete the C++ function below. Answer with the whole function in one ```cpp block "
    "and nothing else.\n\n```cpp\n{prompt}\n```"
)
"""Put around a prompt for a model that chats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A prompt to answer."""

    problem: str
    """Name of a built-in problem."""
    model: Model
    prompt: str
    """C++, up to the brace that opens the function."""

    @property
    def request(self) -> str:
        """The prompt in words, for a model that chats."""
        return REQUEST.format(prompt=self.prompt)


def asks(models: Sequence[Model], only: str = "") -> Iterator[Ask]:
    """Every built-in prompt in some parallel models.

    Args:
        models: parallel models to ask for.
        only: a part of the problems' names; empty for all.

    Raises:
        ValueError: where there is none.
    """
    chosen = [
        Ask(problem=problem.name, model=model, prompt=problem.prompt(model))
        for problem in own_problems().values()
        for model in models
        if only in problem.name and model in problem.models
    ]
    if not chosen:
        raise ValueError(f"there is no prompt in {', '.join(models)} named like {only!r}")
    yield from chosen
