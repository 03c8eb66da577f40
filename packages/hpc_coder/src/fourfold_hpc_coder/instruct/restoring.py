"""Samples from real functions: directives taken out, to be put back; kept if the function compiles alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fourfold_hpc_coder.instruct.decontaminate import Screen
from fourfold_hpc_coder.instruct.pipeline import benchmark_prompts
from fourfold_hpc_coder.instruct.samples import read_samples, write_samples
from fourfold_hpc_coder.instruct.seeds import compiled, harvest, restoration
from fourfold_hpc_coder.instruct.sources import Tree, parallel_files
from fourfold_hpc_coder.sandbox.process import find_sandbox
from fourfold_hpc_coder.sandbox.scratch import scratch_folder
from fourfold_parallel.common.progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class RestorationCounts:
    """Numbers of real functions of some trees, by what became of them."""

    path: Path
    """JSONL of the samples that were kept."""
    functions: int
    """That use OpenMP, near-duplicates counted once."""
    unread: int
    """Beside them, left out since the parser finds an error in them."""
    resembling: int
    """Of them, like a benchmark's prompt."""
    tried: int
    kept: int

    def __str__(self) -> str:
        """As a sentence."""
        return (
            f"{self.functions} real functions use OpenMP, near-duplicates counted once, and {self.unread} "
            f"more that the parser cannot read; {self.resembling} resemble a benchmark's prompt; of "
            f"{self.tried} that were tried {self.kept} compile alone: {self.path}"
        )


def restore(
    trees: Sequence[Tree],
    folder: Path,
    most: int,
    progress: Progress,
    against: Mapping[str, str] | None = None,
) -> RestorationCounts:
    """Make samples of the trees' functions that use OpenMP; goes on where it was stopped.

    Args:
        trees: real source.
        folder: receives `restored.jsonl` and `restored-refused.jsonl`.
        most: samples to keep.
        progress: told after each function.
        against: further texts, by name, that no function may resemble.
    """
    screen = Screen.of({**benchmark_prompts(), **(against or {})})
    sources = [file for file in parallel_files(trees) if "openmp" in file.constructs]
    harvested = harvest(sources)
    functions = [seed for seed in harvested.seeds if "openmp" in seed.constructs]
    samples = [restoration(seed) for seed in functions if not screen.hit(seed.text)]
    files = (folder / "restored.jsonl", folder / "restored-refused.jsonl")
    kept, refused = (
        [*read_samples(file, is_being_made=True)] if file.exists() else [] for file in files
    )
    known = {sample.provenance.task for sample in (*kept, *refused)}
    sandbox = find_sandbox(allow_none=False)
    try:
        with scratch_folder() as scratch:
            for done, sample in enumerate(samples):
                if len(kept) == most:
                    break
                if sample.provenance.task not in known:
                    [judged] = compiled([sample], sandbox, scratch / str(done))
                    (kept if judged.verdict == "compiles" else refused).append(judged)
                progress(done + 1, len(samples), f"{len(kept)} kept")
    finally:
        write_samples(files[0], kept)
        write_samples(files[1], refused)
    return RestorationCounts(
        path=files[0],
        functions=len(functions),
        unread=harvested.unread.get("openmp", 0),
        resembling=len(functions) - len(samples),
        tried=len(kept) + len(refused),
        kept=len(kept),
    )
