"""The pipeline as a value: tasks and seeds in, verified and deduplicated samples out, resumable.

Every stage is a function of the recipe alone, so that two runs, with any number of jobs, give the same bytes.
Samples that were refused are kept beside the others with their verdict: the acceptance rate is a result.
"""

import hashlib
import importlib.resources
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from fourfold_hpc_coder.evaluation import Model
from fourfold_hpc_coder.instruct.decontaminate import Screen
from fourfold_hpc_coder.instruct.dedup import Seen
from fourfold_hpc_coder.instruct.grammar import SHAPES, SHORT, Shape, Task
from fourfold_hpc_coder.instruct.samples import Category, Sample, read_samples, write_samples
from fourfold_hpc_coder.instruct.teachers import Teacher, Templates, shuffled_tasks, split
from fourfold_hpc_coder.instruct.verify import bench, verify
from fourfold_hpc_coder.problems import own_problems
from fourfold_parallel.run.files import cache_folder
from fourfold_parallel.run.progress import Progress, silent
from fourfold_parallel.run.values import digest

HELD_OUT_EVERY = 6
"""One task in six is never taught."""
BATCH = 16
"""Samples judged between two savings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Instructions:
    """Which samples to make."""

    samples: int
    """How many to keep."""
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
class Made:
    """What a recipe gave."""

    samples: tuple[Sample, ...]
    refused: tuple[Sample, ...]
    """Judged and not right, duplicates and contaminated ones, with the reason as their verdict."""

    @property
    def accepted_share(self) -> float:
        """Kept over taught."""
        return len(self.samples) / max(1, len(self.samples) + len(self.refused))

    def reasons(self) -> dict[str, int]:
        """Number of refused samples by reason."""
        return dict(sorted(Counter(one.verdict for one in self.refused).items()))


def make(recipe: Instructions, *, progress: Progress = silent, folder: Path | None = None) -> Made:
    """The samples of a recipe, from the cache where it was made before; goes on where it was stopped.

    Args:
        recipe: what to make.
        progress: told after each batch.
        folder: where the JSONL files are kept; the package's cache by default.

    Raises:
        ValueError: where the grammar has too few tasks for the recipe, or nothing on this machine can verify.
    """
    key = hashlib.sha256(f"{makers()} {digest(recipe)}".encode()).hexdigest()[:24]
    folder = folder or cache_folder() / "hpc_coder" / "data" / key
    kept_file, refused_file = folder / "samples.jsonl", folder / "refused.jsonl"
    kept = [*read_samples(kept_file)] if kept_file.exists() else []
    refused = [*read_samples(refused_file)] if refused_file.exists() else []
    if len(kept) < recipe.samples:
        _extend(recipe, kept, refused, progress, (kept_file, refused_file))
    return Made(samples=tuple(kept), refused=tuple(refused))


@cache
def makers() -> str:
    """Digest of the sources that decide a sample's text."""
    package = importlib.resources.files("fourfold_hpc_coder")
    files = [package / "kernels.py", package / "problems" / "__init__.py"]
    files += [package / "instruct" / name for name in ("grammar.py", "teachers.py", "pipeline.py")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _extend(
    recipe: Instructions,
    kept: list[Sample],
    refused: list[Sample],
    progress: Progress,
    files: tuple[Path, Path],
) -> None:
    """Teach, screen, verify; both lists and both files grow batch by batch."""
    seen = Seen.of([one.instruction + one.answer for one in kept])
    screen = Screen.of(benchmark_prompts())
    plan = _plan(recipe)
    with bench() as workbench:
        for first in range(len(kept) + len(refused), len(plan), BATCH):
            for task, model, category in plan[first : first + BATCH]:
                sample = recipe.teacher.teach(task, model, category)
                reason = _refusal(sample, seen, screen)
                if not reason and recipe.verified:
                    prompt = f"{task.problem().declaration(model)} {{"
                    [judgement] = verify(workbench, task, model, prompt, [sample.answer])
                    sample = replace(sample, verdict=judgement.verdict)
                    reason = "" if judgement.verdict == "correct" else judgement.verdict
                if reason:
                    refused.append(replace(sample, verdict=reason))
                else:
                    kept.append(sample)
                if len(kept) == recipe.samples:
                    break
            write_samples(files[1], refused)
            write_samples(files[0], kept)
            progress(len(kept), recipe.samples, f"{len(refused)} refused")
            if len(kept) == recipe.samples:
                return
    raise ValueError(
        f"the grammar gave {len(kept)} samples where {recipe.samples} were asked for; "
        "ask for fewer, or for more models or categories"
    )


def _plan(recipe: Instructions) -> list[tuple[Task, Model, Category]]:
    """What is taught, in order: every task once per pass, models and categories in turn."""
    tasks = split(shuffled_tasks(recipe.seed, recipe.shapes), "train", every=HELD_OUT_EVERY)
    ways: list[tuple[Model, Category]] = [
        (model, category) for model in recipe.models for category in recipe.categories
    ]
    return [
        (task, ways[(index + turn) % len(ways)][0], ways[(index + turn) % len(ways)][1])
        for turn in range(len(ways))
        for index, task in enumerate(tasks)
    ]


def _refusal(sample: Sample, seen: Seen, screen: Screen) -> str:
    if not seen.add(sample.instruction + sample.answer):
        return "duplicate"
    hit = screen.hit(sample.instruction)
    return f"contaminated: {hit}" if hit else ""


def benchmark_prompts() -> dict[str, str]:
    """Texts that no training sample may resemble: our problems' prompts."""
    return {
        f"{name} {model}": problem.prompt(model)
        for name, problem in own_problems().items()
        for model in problem.models
    }


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
