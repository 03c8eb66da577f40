"""The pipeline as a value: tasks and seeds in, verified and deduplicated samples out, resumable.

Every stage is a function of the recipe alone, so that two runs, with any number of jobs, give the same bytes.
Samples that were refused are kept beside the others with their verdict: the acceptance rate is a result.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourfold_hpc_coder.instruct.grammar import SHAPES, SHORT, Shape, Task
from fourfold_hpc_coder.instruct.samples import (
    Category,
    InstructionSample,
    read_samples,
    write_samples,
)
from fourfold_hpc_coder.instruct.teachers import Teacher, Templates, shuffled_tasks, split
from fourfold_hpc_coder.instruct.verify import open_bench, verify
from fourfold_hpc_coder.problems.library import own_problems
from fourfold_hpc_coder.score.cache import sources_sha256
from fourfold_hpc_coder.vocabulary import Model
from fourfold_parallel.common.files import cache_folder, write_text
from fourfold_parallel.common.progress import Progress, silent
from fourfold_parallel.common.values import digest, to_json

if TYPE_CHECKING:
    from fourfold_hpc_coder.instruct.decontaminate import Screen
    from fourfold_hpc_coder.instruct.dedup import TextMemory

HELD_OUT_EVERY = 6
"""One task in six is never taught."""
BATCH = 16
"""Samples taught between two savings."""
DUPLICATE = "duplicate"
"""Verdict on a sample that is too much like an earlier one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Instructions:
    """A recipe of samples."""

    samples: int
    """The number to keep."""
    models: tuple[Model, ...]
    """Parallel models of the answers, taken in turn."""
    categories: tuple[Category, ...]
    """Kinds of instruction, taken in turn."""
    teacher: Teacher
    verified: bool
    """Whether an answer must compile, run and be right; otherwise all are kept, with no verdict."""
    seed: int
    """Order of the tasks."""
    shapes: tuple[Shape, ...] = SHAPES
    """Kinds of kernels that are asked for."""

    def __post_init__(self) -> None:
        if self.samples < 1 or not self.models or not self.categories:
            raise ValueError(
                f"samples={self.samples}, models={self.models}, categories={self.categories}: "
                "ask for at least one of each"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The most that a teacher is asked for, over all runs of a recipe; what is made by then is kept."""

    taught: float = math.inf
    """Answers."""
    tokens: float = math.inf
    """Of an endpoint's requests and answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """The samples that a recipe gave."""

    samples: tuple[InstructionSample, ...]
    refused: tuple[InstructionSample, ...]
    """Judged and not right, duplicates and contaminated ones, with the reason as their verdict."""

    @property
    def accepted_share(self) -> float:
        """Kept over taught."""
        return len(self.samples) / max(1, len(self.samples) + len(self.refused))

    def reasons(self) -> dict[str, int]:
        """Number of refused samples by reason."""
        return dict(sorted(Counter(sample.verdict for sample in self.refused).items()))


def make_samples(
    recipe: Instructions,
    *,
    progress: Progress = silent,
    folder: str | PathLike[str] | None = None,
    budget: Budget = Budget(),
    against: Mapping[str, str] | None = None,
) -> Dataset:
    """The samples of a recipe, from the cache where it was made before; goes on where it was stopped.

    Args:
        recipe: what to make.
        progress: told after each batch.
        folder: where the JSONL files are kept; the package's cache by default.
        budget: ends the teaching before the recipe is full.
        against: further texts, by name, that no sample may resemble, such as another benchmark's prompts.

    Raises:
        ValueError: where the grammar has too few tasks for the recipe, nothing on this machine can verify, or
            the folder holds the samples of another recipe.
    """
    screened = digest(tuple(sorted(against.items()))) if against else ""
    key = hashlib.sha256(f"{makers()} {digest(recipe)}{screened}".encode()).hexdigest()[:24]
    folder = Path(folder) if folder else cache_folder() / "hpc_coder" / "data" / key
    _claim(folder, replace(recipe, samples=1), screened)
    files = (folder / "samples.jsonl", folder / "refused.jsonl", folder / "saved.json")
    kept, refused = _saved(files)
    if len(kept) < recipe.samples:
        texts = {**benchmark_prompts(), **(against or {})}
        _extend(recipe, kept, refused, progress, files, budget, texts)
    return Dataset(samples=tuple(kept), refused=tuple(refused))


def _saved(
    files: tuple[Path, Path, Path],
) -> tuple[list[InstructionSample], list[InstructionSample]]:
    """The samples that a run kept and refused, as far as both are there.

    A kill may come after one file was written and before the other. Their numbers are written last; what is
    beyond them is made again, since the place in the plan is the number of all.

    Raises:
        ValueError: where a file lacks what was saved.
    """
    held = [
        [*read_samples(file, is_being_made=True)] if file.exists() else [] for file in files[:2]
    ]
    if files[2].exists():
        counts = json.loads(files[2].read_text(encoding="utf-8"))
        for file, samples, count in zip(files, held, counts, strict=False):
            if len(samples) < count:
                raise ValueError(
                    f"{file} holds {len(samples)} of {count} samples; put it back, or remove the folder"
                )
            del samples[count:]
    return held[0], held[1]


def _claim(folder: Path, recipe: Instructions, screened: str) -> None:
    """Mark a folder as a recipe's, of whatever number of samples; refuse another's."""
    mark = folder / "recipe.json"
    text = json.dumps(to_json(recipe), indent=1) + "\n"
    text += f"screened against {screened}\n" if screened else ""
    if mark.exists() and mark.read_text(encoding="utf-8") != text:
        raise ValueError(
            f"{folder} holds the samples of other options (see {mark.name} in it); "
            "name another folder, or repeat its options"
        )
    write_text(mark, text)


def makers() -> str:
    """Digest of the sources that decide a sample's text."""
    return sources_sha256(("instruct", "problems"))


def _extend(
    recipe: Instructions,
    kept: list[InstructionSample],
    refused: list[InstructionSample],
    progress: Progress,
    files: tuple[Path, Path, Path],
    budget: Budget,
    against: Mapping[str, str],
) -> None:
    """Teach, screen, verify; both lists grow, and both files with them, also when something fails."""
    # Here, since training on a file of samples needs neither of their libraries (the extra `data`).
    from fourfold_hpc_coder.instruct.decontaminate import Screen
    from fourfold_hpc_coder.instruct.dedup import TextMemory

    # A duplicate has no text of its own to remember: what it repeats is among the others.
    judged = [sample for sample in refused if sample.verdict != DUPLICATE]
    seen = TextMemory.of([sample.instruction + sample.answer for sample in (*kept, *judged)])
    screen = Screen.of(against)
    plan = _plan(recipe)
    taught, tokens = (
        len(kept) + len(refused),
        sum(sample.provenance.tokens for sample in (*kept, *refused)),
    )

    def save() -> None:
        write_samples(files[1], refused)
        write_samples(files[0], kept)
        write_text(files[2], json.dumps([len(kept), len(refused)]))

    with open_bench() as bench:
        try:
            while (
                len(kept) < recipe.samples
                and taught < min(len(plan), budget.taught)
                and tokens < budget.tokens
            ):
                # The number of samples taught is the place in the plan: a run that was stopped goes on there.
                task, model, category = plan[taught]
                sample = recipe.teacher.teach(task, model, category)
                reason = _refusal(sample, seen, screen)
                # Only what is new and clean is worth a compilation.
                if not reason and recipe.verified:
                    prompt = f"{task.problem().declaration(model)} {{"
                    [judgement] = verify(bench, task, model, prompt, [sample.answer])
                    sample = replace(sample, verdict=judgement.verdict)
                    reason = "" if judgement.verdict == "correct" else judgement.verdict
                if reason:
                    refused.append(replace(sample, verdict=reason))
                else:
                    kept.append(sample)
                taught += 1
                tokens += sample.provenance.tokens
                if taught % BATCH == 0:
                    save()
                bought = f", {tokens} tokens" if tokens else ""
                progress(len(kept), recipe.samples, f"{len(refused)} refused{bought}")
        finally:
            save()
    if len(kept) < recipe.samples and taught == len(plan):
        raise ValueError(
            f"the grammar gave {len(kept)} samples where {recipe.samples} were asked for; "
            "ask for fewer, or for more models or categories"
        )


def _plan(recipe: Instructions) -> list[tuple[Task, Model, Category]]:
    """The lessons in order: every task once per pass, models and categories in turn."""
    tasks = split(shuffled_tasks(recipe.seed, recipe.shapes), "train", every=HELD_OUT_EVERY)
    ways: list[tuple[Model, Category]] = [
        (model, category) for model in recipe.models for category in recipe.categories
    ]
    return [
        (task, ways[(index + turn) % len(ways)][0], ways[(index + turn) % len(ways)][1])
        for turn in range(len(ways))
        for index, task in enumerate(tasks)
    ]


def _refusal(sample: InstructionSample, seen: "TextMemory", screen: "Screen") -> str:
    if not seen.add(sample.instruction + sample.answer):
        return DUPLICATE
    hit = screen.hit(sample.instruction)
    return f"contaminated: {hit}" if hit else ""


def benchmark_prompts() -> dict[str, str]:
    """Texts that no training sample may resemble: our problems' prompts."""
    return {
        f"{name} {model}": problem.prompt(model)
        for name, problem in own_problems().items()
        for model in problem.models
    }


def prompts_of(path: Path) -> dict[str, str]:
    """The prompts of a benchmark's file, by name: a JSON list or JSON lines of objects with a `prompt`.

    Raises:
        ValueError: where it is something else.
    """
    text = path.read_text(encoding="utf-8")
    try:
        entries = json.loads(text) if text.lstrip().startswith("[") else list(_lines(text))
        return {
            f"{path.stem} {entry.get('name') or entry.get('task_id') or place}": str(
                entry["prompt"]
            )
            for place, entry in enumerate(entries)
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{path} is no list of prompts; each entry needs the text `prompt`, as in ParEval's file"
        ) from None


def _lines(text: str) -> Iterator[Any]:
    return (json.loads(line) for line in text.split("\n") if line.strip())


def held_out(count: int, *, seed: int, shapes: Sequence[Shape] = SHORT) -> tuple[Task, ...]:
    """Tasks that no recipe teaches."""
    tasks = split(shuffled_tasks(seed, shapes), "held-out", every=HELD_OUT_EVERY)
    if count > len(tasks):
        raise ValueError(f"{count} held-out tasks were asked for; there are {len(tasks)}")
    return tasks[:count]


def templates(
    samples: int,
    *,
    models: Sequence[Model] = ("omp",),
    corrupted: float = 0.0,
    verified: bool = True,
    seed: int = 0,
) -> Instructions:
    """Programming instructions of the deterministic teacher, of the short shapes."""
    return Instructions(
        samples=samples,
        models=tuple(models),
        categories=("programming",),
        teacher=Templates(corrupted=corrupted),
        verified=verified,
        seed=seed,
        shapes=SHORT,
    )
