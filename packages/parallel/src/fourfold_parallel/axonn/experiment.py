"""The reproduction of AxoNN: the planner beside the paper's measured runs, and beside ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from fourfold_parallel.axonn import claims, recipes
from fourfold_parallel.axonn.measures import headline
from fourfold_parallel.axonn.paper import counted_flops, gpt
from fourfold_parallel.axonn.recipes import Overlap, Rankings, StrongScaling, WeakScaling
from fourfold_parallel.karma import claims as karma_claims
from fourfold_parallel.karma import experiment as karma
from fourfold_parallel.karma.measures import table as outofcore_table
from fourfold_parallel.plan import authors
from fourfold_parallel.plan.job import Job, Layout, grids
from fourfold_parallel.plan.machine import Machine
from fourfold_parallel.plan.machines import machine_of
from fourfold_parallel.plan.memory import fits, memory_of
from fourfold_parallel.plan.search import Plan, grid_of, plan_of, rank
from fourfold_parallel.plan.simulate import scout
from fourfold_parallel.reproduce.claims import claims_of
from fourfold_parallel.reproduce.experiment import Drawing, Experiment, Stage, Workplace
from fourfold_parallel.reproduce.launches import Launch
from fourfold_parallel.reproduce.scale import Scale
from fourfold_parallel.storm.findings import table
from fourfold_parallel.storm.study import Storm

LINKS = {"perlmutter": authors.PERLMUTTER, "frontier": authors.FRONTIER}
MICROBATCHES = (1, 2, 4, 8, 16)
SIMULATED = 20
"""Layouts simulated whole, the best by a rough guess."""


def recomputed(job: Job, machine: Machine, devices: int) -> Plan:
    """The fastest grid where every activation is recomputed, as in all of the paper's runs."""
    scouted = sorted(
        ((scout(job, layout, machine), layout) for layout in _fitting(job, machine, devices)),
        key=lambda entry: entry[0],
    )
    return min(plan_of(job, layout, machine) for _, layout in scouted[:SIMULATED])


def _fitting(job: Job, machine: Machine, devices: int) -> Iterator[Layout]:
    for grid in grids(devices):
        if job.model.heads % grid.row:
            continue
        for microbatch in MICROBATCHES:
            if microbatch * grid.shares > job.batch:  # 6,144 devices do not divide the batch
                break
            whole = replace(grid, microbatch=microbatch, recomputes=True)
            for layout in (whole, replace(whole, shards_optimizer=True)):
                if fits(memory_of(job, layout), machine):
                    yield layout
                    break


def job_of(size: str, batch: int, sequence: int) -> Job:
    """A model of the paper, with the fused kernels of Megatron-LM and LitGPT."""
    return Job(model=gpt(size), batch=batch, sequence=sequence, fused=True)


def _described(plan: Plan) -> dict[str, object]:
    step = plan.step
    return {
        "grid": list(grid_of(plan.layout)),
        "microbatch": plan.layout.microbatch,
        "shards_optimizer": plan.layout.shards_optimizer,
        "step_s": _rounded(plan.seconds),
        "compute_s": _rounded(step.compute_s),
        "exposed_s": {axis: _rounded(seconds) for axis, seconds in step.exposed_s.items()},
        "mfu": round(plan.mfu, 5),
        "peak_bytes": round(plan.memory.peak),
    }


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.6g}")


def plan_weak_scaling(study: WeakScaling, workplace: Workplace) -> None:
    """Plan every point; events "point"."""
    with workplace.recording(study, seed=0) as records:
        for index, point in enumerate(study.points):
            workplace.progress(index, len(study.points), f"{point.machine} {point.devices}")
            machine = machine_of(point.machine)
            plan = recomputed(
                job_of(point.model, study.batch, study.sequence), machine, point.devices
            )
            rate = counted_flops(point.model, recomputes=True) / plan.seconds / 1e15
            records.write(
                "point", machine=point.machine, devices=point.devices, model=point.model,
                paper_pflops_per_s=point.pflops_per_s, pflops_per_s=round(rate, 3), **_described(plan),
            )  # fmt: skip


def plan_overlap(study: Overlap, workplace: Workplace) -> None:
    """Plan one point as it is, and with nothing hidden; events "schedule"."""
    machine, point = machine_of(study.point.machine), study.point
    job = job_of(point.model, study.batch, study.sequence)
    with workplace.recording(study, seed=0) as records:
        for hides, on in ((True, machine), (False, replace(machine, steals=1.0))):
            workplace.progress(int(not hides), 2, "hidden" if hides else "in the open")
            records.write("schedule", hides=hides, **_described(recomputed(job, on, point.devices)))


def plan_strong_scaling(study: StrongScaling, workplace: Workplace) -> None:
    """Plan one model on ever more devices; events "size"."""
    machine = machine_of(study.machine)
    job = job_of(study.model, study.batch, study.sequence)
    with workplace.recording(study, seed=0) as records:
        for index, devices in enumerate(study.devices):
            workplace.progress(index, len(study.devices), f"{devices} devices")
            records.write("size", devices=devices, **_described(recomputed(job, machine, devices)))


def compare_rankings(study: Rankings, workplace: Workplace) -> None:
    """The authors' ranking and ours, of the same grids; events "ranked"."""
    with workplace.recording(study, seed=0) as records:
        for index, case in enumerate(study.cases):
            workplace.progress(index, len(study.cases), case.machine)
            model = gpt(case.model)
            theirs = authors.ranking(
                LINKS[case.machine], ranks=case.devices, layers=model.layers, width=model.width,
                batch=case.batch, sequence=case.sequence, least_tensor=case.least_tensor,
            )  # fmt: skip
            job = job_of(case.model, case.batch, case.sequence)
            ours = rank(job, machine_of(case.machine), case.devices, grid=[g for g, _ in theirs])
            records.write(
                "ranked", machine=case.machine, model=case.model, devices=case.devices,
                theirs=[[*grid_of(grid), round(seconds, 6)] for grid, seconds in theirs],
                ours=[[*grid_of(plan.layout), _rounded(plan.seconds)] for plan in ours.grids],
            )  # fmt: skip


def rage(study: Storm, workplace: Workplace) -> None:
    """Kill ranks of trainings, and compare their ends; needs `fourfold-parallel[testing]`."""
    from fourfold_parallel.storm.storm import storm

    with workplace.recording(study, seed=study.seed) as records:
        toll = storm(study, workplace.scratch, records, workplace.progress)
        if toll.faults:
            raise ValueError("; ".join(toll.faults))


def _stage(name: str, run: object, perform: Callable[..., None]) -> Stage:
    return Stage(name=name, run=run, perform=partial(perform, run))


def _stages(scale: Scale) -> Sequence[Stage]:
    if scale == "paper":
        return ()
    stages = (
        *karma.stages(scale),
        _stage("weak-scaling", recipes.weak_scaling(), plan_weak_scaling),
        _stage("strong-scaling", recipes.strong_scaling(), plan_strong_scaling),
        _stage("overlap", recipes.overlap(), plan_overlap),
        _stage("rankings", recipes.rankings(), compare_rankings),
    )
    if scale == "smoke":
        return stages
    return (
        *stages,
        _stage("storm", recipes.storm(), rage),
        _stage("grid-pairs", recipes.grid_pairs(), rage),
    )


def _drawings(scale: Scale) -> Sequence[Drawing]:
    from fourfold_parallel.axonn import figures  # needs matplotlib, and nothing else does
    from fourfold_parallel.karma import figures as karma_figures

    return (*figures.drawings(scale), *karma_figures.drawings(scale))


def _launches() -> Sequence[Launch]:
    return ()


EXPERIMENT = Experiment(
    package="parallel",
    title="AxoNN: four-dimensional training and its performance model",
    paper="Singh, Singhania, Ranjan, Kirchenbauer, Geiping, Wen, Jain, Hans, Shu, Tomar, Goldstein, Bhatele: "
    "Democratizing AI: Open-source Scalable LLM Training on GPU-based Supercomputers. SC 2024",
    idea="Split every matrix product in three dimensions and the batch in a fourth, hide the "
    "communication, and let a model of the machine choose the grid.",
    headline=headline,
    picture="figure-6",
    claims=claims_of(claims, karma_claims),
    stages=_stages,
    drawings=_drawings,
    launches=_launches,
    tables={"storm": table, "outofcore": outofcore_table},
)
