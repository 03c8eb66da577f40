"""Teachers: who writes the answer. One interface for a template grammar, an endpoint, a local model."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from fourfold_hpc_coder.instruct.grammar import Shape, Task, all_tasks
from fourfold_hpc_coder.instruct.samples import Category, InstructionSample, Provenance
from fourfold_hpc_coder.pareval.bodies import body_of
from fourfold_hpc_coder.vocabulary import Model


class ModelValue(Protocol):
    """A code model as a value: `generate.endpoint.Endpoint` or `generate.local.LocalModel`."""

    @property
    def model_name(self) -> str:
        """For provenance."""
        ...

    def ask(self, prompt: str) -> tuple[str, int]:
        """The model's words for a prompt that opens a function, and how many tokens were bought."""
        ...


class Teacher(Protocol):
    """Gives unverified samples for tasks."""

    @property
    def name(self) -> str:
        """For provenance."""
        ...

    def teach(self, task: Task, model: Model, category: Category) -> InstructionSample:
        """A sample for a task; its answer may be wrong."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Templates:
    """The deterministic teacher: answers rendered from the task's kernel. Works without a network."""

    corrupted: float = 0.0
    """Share of answers spoiled on purpose, to study what bad data do."""
    name: str = "templates"

    def teach(self, task: Task, model: Model, category: Category) -> InstructionSample:
        """The answer in the model, asked for in the category's words."""
        problem = task.problem()
        answer = problem.answer(model)
        generator = np.random.default_rng(_number(f"{task.name} {model} {category}"))
        if generator.random() < self.corrupted:
            answer = spoiled(answer, generator)
        return InstructionSample(
            category=category,
            model=model,
            instruction=instruction(task, model, category),
            answer=answer,
            provenance=Provenance(
                teacher=self.name, task=task.name, seed_origin="", licence="Apache-2.0"
            ),
            verdict="not judged",
        )


def instruction(task: Task, model: Model, category: Category) -> str:
    """The question to the pupil."""
    problem = task.problem()
    head = f"{problem.declaration('serial')} {{\n"
    match category:
        case "programming":
            return task.prompt(model)
        case "parallelization":
            serial = f"{head}{problem.answer('serial')}"
            return f"Parallelize:\n{serial}\n{task.prompt(model)}"
        case "translation":
            source: Model = "omp" if model != "omp" else "mpi"
            other = f"{problem.declaration(source)} {{\n{problem.answer(source)}"
            return f"Translate:\n{other}\n{task.prompt(model)}"
        case "optimization":
            return f"Make it fast:\n{head}{_slow(problem.answer('serial'))}\n{task.prompt(model)}"


def _slow(body: str) -> str:
    """The same result the long way: every pass done twice."""
    return body.replace(
        "for (size_t i = 0; i <",
        "for (size_t again = 0; again < 2; ++again) {}\n    for (size_t i = 0; i <",
    )


def spoiled(answer: str, generator: np.random.Generator) -> str:
    """An answer with one typical error: a lost clause, a wrong bound, a wrong start, another operator."""
    changes = [
        (" reduction(+:result)", ""),
        ("size_t i = 0;", "size_t i = 1;"),
        ("i < x.size();", "i <= x.size();"),
        ("+=", "="),
        (" + ", " - "),
        ("* ", "+ "),
        ("y[i] =", "y[0] ="),
        ("x[i] =", "x[0] ="),
        ("x[i]", "x[0]"),
    ]
    fitting = [change for change in changes if change[0] in answer]
    old, new = fitting[generator.integers(len(fitting))]
    return answer.replace(old, new, 1)


def _number(text: str) -> int:
    return zlib.crc32(text.encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelTeacher:
    """A code model that writes the answers: served, or on this machine."""

    model: ModelValue

    @property
    def name(self) -> str:
        """The model's."""
        return self.model.model_name

    def teach(self, task: Task, model: Model, category: Category) -> InstructionSample:
        """The body of the function that the model completes."""
        asked = instruction(task, model, category)
        text, tokens = self.model.ask(asked)
        return InstructionSample(
            category=category,
            model=model,
            instruction=asked,
            answer=body_of(text, asked),
            provenance=Provenance(
                teacher=self.name,
                task=task.name,
                seed_origin="",
                licence="see the model's terms",
                tokens=tokens,
            ),
            verdict="not judged",
        )


Split = Literal["train", "held-out"]


def split(tasks: Sequence[Task], part: Split, *, every: int) -> tuple[Task, ...]:
    """Tasks to learn from, or every `every`-th by a hash of its name, which no sample may touch."""
    held_out = {task.name for task in tasks if _number(task.name) % every == 0}
    return tuple(task for task in tasks if (task.name in held_out) == (part == "held-out"))


def shuffled_tasks(seed: int, shapes: Sequence[Shape]) -> tuple[Task, ...]:
    """The shapes' tasks in a seeded order."""
    tasks = all_tasks(shapes)
    order = np.random.default_rng(seed).permutation(len(tasks))
    return tuple(tasks[int(index)] for index in order)
