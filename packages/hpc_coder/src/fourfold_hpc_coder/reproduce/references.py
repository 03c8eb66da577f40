"""The scorer applied to itself: every problem's own right answers, judged and timed in every model."""

from dataclasses import dataclass

from fourfold_hpc_coder.judge import toolchain
from fourfold_hpc_coder.judge.bench import Bench, JudgeSettings
from fourfold_hpc_coder.judge.judge import judge
from fourfold_hpc_coder.judge.reference import reference
from fourfold_hpc_coder.problems.library import own_problems
from fourfold_hpc_coder.sandbox.process import find_sandbox
from fourfold_hpc_coder.sandbox.scratch import scratch_folder
from fourfold_hpc_coder.vocabulary import Model, Processors
from fourfold_parallel.reproduce.experiment import Workplace


@dataclass(frozen=True, slots=True, kw_only=True)
class References:
    """The right answers that are judged, and the judge's settings."""

    models: tuple[Model, ...]
    settings: JudgeSettings


def on_a_laptop() -> References:
    """Serial, OpenMP and MPI on no more processors than a laptop has."""
    launches: tuple[tuple[Model, tuple[Processors, ...]], ...] = (
        ("serial", (Processors(),)),
        ("omp", (Processors(), Processors(threads=2))),
        ("mpi", (Processors(), Processors(ranks=2))),
    )
    return References(
        models=("serial", "omp", "mpi"), settings=JudgeSettings(races=False, launches=launches)
    )


def judge_references(study: References, workplace: Workplace) -> None:
    """Judge the right answer to every problem; a model that is not on this machine is named and left out.

    Events: "reference" per problem and model, "absent" per model that is not here.
    """
    sandbox = find_sandbox(allow_none=False)
    problems = own_problems()
    with workplace.recording(study, seed=0) as records, scratch_folder() as scratch:
        bench = Bench(sandbox=sandbox, scratch=scratch, settings=study.settings, secret=0)
        absent = {model: toolchain.barred(model, sandbox) for model in study.models}
        for model, reason in absent.items():
            if reason:
                records.write("absent", model=model, because=reason)
        for done, (name, problem) in enumerate(problems.items()):
            right = reference(bench, problem)
            for model in study.models:
                if model in problem.models and not absent[model]:
                    judgement = judge(
                        bench, right, model, problem.prompt(model), problem.answer(model)
                    )
                    records.write(
                        "reference",
                        problem=name,
                        problem_type=problem.problem_type,
                        model=model,
                        verdict=judgement.verdict,
                        because=judgement.because,
                        best_sequential_s=right.best_s,
                        processors=[run.processors.count for run in judgement.sample.runs],
                        runtimes_s=[run.runtime_s for run in judgement.sample.runs],
                    )
            workplace.progress(done + 1, len(problems), name)
