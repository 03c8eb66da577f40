"""Teachers: who writes the answer. One interface for a template grammar, an endpoint, a local model."""

import http.client
import json
import urllib.request
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from fourfold_hpc_coder.instruct.grammar import Shape, Task, all_tasks
from fourfold_hpc_coder.instruct.samples import Category, InstructionSample, Provenance
from fourfold_hpc_coder.vocabulary import Model

if TYPE_CHECKING:
    from fourfold_hpc_coder.generate import Local


FUNCTION_ONLY = (
    "Complete this C++ function. Reply with one code block that holds the whole function.\n"
)
"""Put before a prompt for models that chat."""


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
    """What the pupil is asked."""
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
class Endpoint:
    """Any OpenAI-compatible server: vLLM, llama.cpp, TGI, or a company's."""

    url: str
    """Up to and including `/v1`."""
    model_name: str
    key_file: str = ""
    """Holds the key that the server wants; empty for none."""
    temperature: float = 0.2
    max_new_tokens: int = 512
    top_p: float = 1.0
    timeout_s: float = 120.0

    @property
    def name(self) -> str:
        """The served model."""
        return self.model_name

    def teach(self, task: Task, model: Model, category: Category) -> InstructionSample:
        """Ask for a function's body."""
        asked = instruction(task, model, category)
        text, tokens = self._request(FUNCTION_ONLY + asked)
        from fourfold_hpc_coder.pareval.bodies import body_of

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

    def complete_many(self, prompts: Sequence[str], *, first: int = 0) -> list[str]:  # noqa: ARG002
        """Completions of functions, one chat of one message each.

        Raises:
            ValueError: where the server cannot be reached, or answers with something else than a completion.
        """
        return [self._request(FUNCTION_ONLY + prompt)[0] for prompt in prompts]

    def _request(self, prompt: str) -> tuple[str, int]:
        """The words, and how many tokens the exchange took."""
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url={self.url!r} is no http address; give one that ends in /v1")
        body: dict[str, Any] = {
            "model": self.model_name,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": self.temperature,
            "max_tokens": self.max_new_tokens,
        }
        if self.temperature and self.top_p < 1:
            body["top_p"] = self.top_p
        key = Path(self.key_file).read_text(encoding="utf-8").strip() if self.key_file else ""
        request = urllib.request.Request(  # noqa: S310 - checked above
            f"{self.url.rstrip('/')}/chat/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as reply:  # noqa: S310
                whole = reply.read()
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(
                f"{self.url} gave no answer ({error}); when it does, the same command goes on from here"
            ) from None
        try:
            answer = json.loads(whole)
            # Where a model declined, or ran out of tokens before its answer, there is no text.
            text = str(answer["choices"][0]["message"]["content"] or "")
            return text, int((answer.get("usage") or {}).get("total_tokens") or 0)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise ValueError(
                f"{self.url} answered {whole[:200].decode(errors='replace')}, which is no completion"
            ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Transformers:
    """A model on this machine, by hub id or folder, asked like an endpoint."""

    model_name: str
    max_new_tokens: int = 512

    @property
    def name(self) -> str:
        """The model."""
        return self.model_name

    def teach(self, task: Task, model: Model, category: Category) -> InstructionSample:
        """Have the function completed, greedily."""
        from fourfold_hpc_coder.pareval.bodies import body_of

        asked = instruction(task, model, category)
        [text] = _local(self.model_name, self.max_new_tokens).complete_many([asked])
        return InstructionSample(
            category=category,
            model=model,
            instruction=asked,
            answer=body_of(text, asked),
            provenance=Provenance(
                teacher=self.name, task=task.name, seed_origin="", licence="see the model's terms"
            ),
            verdict="not judged",
        )


@lru_cache(maxsize=1)
def _local(model_name: str, max_new_tokens: int) -> "Local":
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fourfold_hpc_coder.generate import Local

    return Local(
        model=AutoModelForCausalLM.from_pretrained(model_name).eval(),
        tokenizer=AutoTokenizer.from_pretrained(model_name),
        max_new_tokens=max_new_tokens,
    )


Split = Literal["train", "held-out"]


def split(tasks: Sequence[Task], part: Split, *, every: int) -> tuple[Task, ...]:
    """Tasks to learn from, or every `every`-th by a hash of its name, which no sample may touch."""
    held = {task.name for task in tasks if _number(task.name) % every == 0}
    return tuple(task for task in tasks if (task.name in held) == (part == "held-out"))


def shuffled_tasks(seed: int, shapes: Sequence[Shape]) -> tuple[Task, ...]:
    """The shapes' tasks in a seeded order."""
    tasks = all_tasks(shapes)
    order = np.random.default_rng(seed).permutation(len(tasks))
    return tuple(tasks[int(index)] for index in order)
