"""The metrics exactly as ParEval's scripts compute them, errors included, for comparison with its tables.

Every function follows `analysis/metrics.py` and `metrics-scaling.py` of ParEval at 4c9877f. Where they
differ from the definitions of `evaluation.py`, the difference is named here:

- `build@k` counts *runs*, not samples, so a sample that builds weighs as many times as it was launched;
- both estimators give 1 for k > N, even where nothing succeeds;
- speed-ups are summed from the fastest sample to the slowest (an expected *worst*), with C(n, r) = 1 for
  n < r, over valid runs only: failures do not lower it, and k > valid gives a plain sum;
- `efficiency@k` of OpenMP divides by 8 what was measured on 32 threads; `efficiency_max@k` sorts the times
  but not the processor counts that belong to them;
- Kokkos runs on 64 threads are left out; whether the parallel model was used is never asked.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from fourfold_hpc_coder.evaluation import CLOCK_S
from fourfold_hpc_coder.vocabulary import Execution, Model, Processors, Prompt, Sample

MEASURED_ON: dict[Model, Processors] = {
    "omp": Processors(threads=32),
    "kokkos": Processors(threads=32),
    "mpi": Processors(ranks=512),
    "mpi+omp": Processors(ranks=4, threads=64),
}
"""The one launch whose runs `speedup@k` reads; of the other models it reads all."""

_DIVIDED_BY: dict[Model, int] = {"serial": 1, "omp": 8, "kokkos": 32, "mpi": 512, "mpi+omp": 256}

PROBLEM_SIZE = 1 << 18
"""Default number of "processors" of a GPU kernel: ParEval divides by the problem's size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """One line of ParEval's data frame."""

    run: Execution
    best_sequential_s: float

    @property
    def valid(self) -> bool:
        return self.run.ran and self.run.valid


def metrics(
    prompts: Sequence[Prompt], ks: Sequence[int], *, sizes: Mapping[tuple[str, Model], int]
) -> list[dict[str, object]]:
    """A row per execution model and problem type, in ParEval's order and columns.

    Args:
        prompts: with results.
        ks: the k of every metric.
        sizes: problem size by (name, model), for efficiency on GPUs; `PROBLEM_SIZE` where absent.
    """
    rows = []
    for model, problem_type in sorted({(p.model, p.problem_type) for p in prompts}):
        group = [
            _without_kokkos_64(p)
            for p in prompts
            if (p.model, p.problem_type) == (model, problem_type)
        ]
        row: dict[str, object] = {"execution model": model, "problem type": problem_type}
        for k in ks:
            row[f"build@{k}"] = build_at_k(group, k)
            row[f"pass@{k}"] = pass_at_k(group, k)
            row[f"speedup@{k}"] = _zero(speedup_at_k(group, k))
            row[f"speedup_max@{k}"] = _zero(speedup_max_at_k(group, k))
            row[f"efficiency@{k}"] = _zero(efficiency_at_k(group, k, sizes))
            row[f"efficiency_max@{k}"] = _zero(efficiency_max_at_k(group, k, sizes))
        rows.append(row)
    return rows


def scaling(
    prompts: Sequence[Prompt], k: int, processors: Sequence[int]
) -> list[dict[str, object]]:
    """speedup_n@k and efficiency_n@k at chosen n, a row per execution model and problem type.

    ParEval's script stops with an error where no sample is valid at some n; here the cell is NaN.
    """
    rows = []
    for model, problem_type in sorted({(p.model, p.problem_type) for p in prompts}):
        group = [p for p in prompts if (p.model, p.problem_type) == (model, problem_type)]
        row: dict[str, object] = {"execution model": model, "problem type": problem_type}
        for n in processors:

            def at(row: _Row, n: int = n) -> bool:
                return row.valid and row.run.processors.count == n

            speedup = _over_prompts(group, lambda p: _weighted(_rows(p, at), k))
            row[f"speedup_{n}@{k}"] = speedup
            row[f"efficiency_{n}@{k}"] = speedup / n
        rows.append(row)
    return rows


def build_at_k(prompts: Sequence[Prompt], k: int) -> float:
    """As coded: over run rows, of which an unbuilt sample has one."""
    values = []
    for prompt in prompts:
        total = sum(max(1, len(s.runs)) for s in prompt.samples)
        built = sum(max(1, len(s.runs)) for s in prompt.samples if s.built)
        values.append(_estimate(total, built, k))
    return math.fsum(values) / len(values)


def pass_at_k(prompts: Sequence[Prompt], k: int) -> float:
    """As coded: over samples, right in all their runs; 1 for k > N."""
    values = [_estimate(len(p.samples), sum(s.right for s in p.samples), k) for p in prompts]
    return math.fsum(values) / len(values)


def speedup_at_k(prompts: Sequence[Prompt], k: int) -> float:
    """As coded: valid runs on the one launch, weighted from the fastest to the slowest."""
    return _over_prompts(prompts, lambda p: _weighted(_measured(p), k))


def efficiency_at_k(
    prompts: Sequence[Prompt], k: int, sizes: Mapping[tuple[str, Model], int]
) -> float:
    """As coded: speedup@k over a processor count that need not be the launch's."""
    return _over_prompts(prompts, lambda p: _weighted(_measured(p), k) / _divisor(p, sizes))


def speedup_max_at_k(prompts: Sequence[Prompt], k: int) -> float:
    """As coded: each sample's fastest valid run, if its first run is valid."""
    return _over_prompts(
        prompts, lambda p: _weighted(_one_per_sample(p, lambda row: row.run.runtime_s), k)
    )


def efficiency_max_at_k(
    prompts: Sequence[Prompt], k: int, sizes: Mapping[tuple[str, Model], int]
) -> float:
    """As coded: each sample's cheapest run (time times processors); the times are then sorted alone."""

    def processors(prompt: Prompt, row: _Row) -> int:
        if prompt.model in ("cuda", "hip"):
            return _divisor(prompt, sizes)
        return row.run.processors.count

    def of(prompt: Prompt) -> float:
        chosen = _one_per_sample(prompt, lambda row: row.run.runtime_s * processors(prompt, row))
        return _weighted(chosen, k, [processors(prompt, row) for row in chosen])

    return _over_prompts(prompts, of)


def _divisor(prompt: Prompt, sizes: Mapping[tuple[str, Model], int]) -> int:
    size = sizes.get((prompt.name, prompt.model), PROBLEM_SIZE)
    return _DIVIDED_BY.get(prompt.model, size)


def _measured(prompt: Prompt) -> list[_Row]:
    processors = MEASURED_ON.get(prompt.model)
    return _rows(
        prompt, lambda row: row.valid and (processors is None or row.run.processors == processors)
    )


def _rows(prompt: Prompt, keep: Callable[[_Row], bool]) -> list[_Row]:
    return [row for rows in _by_sample(prompt) for row in rows if keep(row)]


def _by_sample(prompt: Prompt) -> list[list[_Row]]:
    return [
        [_Row(run=run, best_sequential_s=sample.best_sequential_s) for run in sample.runs]
        for sample in prompt.samples
    ]


def _one_per_sample(prompt: Prompt, cost: Callable[[_Row], float]) -> list[_Row]:
    return [
        min((row for row in rows if row.valid), key=cost)
        for rows in _by_sample(prompt)
        if rows and rows[0].valid
    ]


def _weighted(rows: Sequence[_Row], k: int, processors: Sequence[int] = ()) -> float:
    """Sum over the rows by ascending time of nCr(j-1, k-1) / nCr(n, k) * T*/(t_j n_j); NaN for no row."""
    if not rows:
        return math.nan
    best_s = min(row.best_sequential_s for row in rows)
    times = sorted(max(row.run.runtime_s, CLOCK_S) for row in rows)
    shares = processors or [1] * len(times)
    return math.fsum(
        _choose(j, k - 1) / _choose(len(times), k) * best_s / (time_s * share)
        for j, (time_s, share) in enumerate(zip(times, shares, strict=True))
    )


def _over_prompts(prompts: Sequence[Prompt], of: Callable[[Prompt], float]) -> float:
    values = [value for value in map(of, prompts) if not math.isnan(value)]
    return math.fsum(values) / len(values) if values else math.nan


def _estimate(total: int, successes: int, k: int) -> float:
    if total - successes < k:
        return 1.0
    return 1 - math.prod(1 - k / i for i in range(total - successes + 1, total + 1))


def _choose(n: int, r: int) -> int:
    return 1 if n < r else math.comb(n, r)


def _zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value


def _without_kokkos_64(prompt: Prompt) -> Prompt:
    if prompt.model != "kokkos":
        return prompt
    return replace(prompt, samples=tuple(_only_below_64(sample) for sample in prompt.samples))


def _only_below_64(sample: Sample) -> Sample:
    return replace(sample, runs=tuple(run for run in sample.runs if run.processors.threads != 64))
