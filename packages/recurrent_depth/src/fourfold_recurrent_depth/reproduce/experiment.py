"""The reproduction of Geiping et al. 2025: train, measure, judge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fourfold_parallel.common.progress import silent
from fourfold_parallel.common.records import Material, read_record
from fourfold_parallel.common.workers import each
from fourfold_parallel.reproduce.experiment import Drawing, Experiment, Stage, Workplace
from fourfold_parallel.reproduce.launches import Launch
from fourfold_parallel.reproduce.scale import Scale
from fourfold_parallel.run import checkpoint
from fourfold_parallel.run.data import tokenize
from fourfold_parallel.run.models import Model
from fourfold_parallel.run.recipe import Run
from fourfold_parallel.run.train import train, trained_model
from fourfold_recurrent_depth.analysis.flops import costs, materialised_parameters
from fourfold_recurrent_depth.causal_lm import RecurrentDepthForCausalLM
from fourfold_recurrent_depth.configuration import RecurrentDepthConfig
from fourfold_recurrent_depth.decoding.diffusion import Diffusion, diffuse
from fourfold_recurrent_depth.decoding.speculate import Speculation, speculate
from fourfold_recurrent_depth.reproduce import measurements, recipes
from fourfold_recurrent_depth.reproduce.claims import CLAIMS
from fourfold_recurrent_depth.reproduce.measurements import Event
from fourfold_recurrent_depth.reproduce.measures import (
    ADDITION,
    AUTOMATON,
    DRAWS,
    EXACT,
    LANGUAGE,
    RETROFIT,
    WORTH,
    headline,
)
from fourfold_recurrent_depth.reproduce.tables import TABLES
from fourfold_recurrent_depth.training.every_exit import EveryExit
from fourfold_recurrent_depth.training.models import RecurrentDepth
from fourfold_recurrent_depth.training.random_depth import RandomDepth

PARTS = ("prelude", "core_block", "adapter", "coda")
"""Of a model's weights, those that the law of recurrences counts."""
WORKERS = 2
"""Processes of a stage; each trains and measures on one thread."""


def _trained(
    run: Run, folder: Path, *, keep_every: int | None = None
) -> tuple[RecurrentDepthForCausalLM, Event]:
    """The run's model, from its last checkpoint on where there is one."""
    keep = checkpoint.Keep(every=keep_every)
    torch.set_num_threads(1)
    record = folder / run.name / "record.jsonl"
    place = folder / run.name / "checkpoints"
    last = train(run, record=record, checkpoints=place, progress=silent, keep=keep)
    model = trained_model(run, last)
    assert isinstance(model, RecurrentDepthForCausalLM)
    steps = read_record(record).of("step")
    tail = [event.number("loss_nats") for event in steps[-20:]]
    elapsed_s = sum(event.number("elapsed_s") for event in steps)
    thinned = steps[:: max(1, len(steps) // 60)]
    price = costs(model.config, context=run.sequence)
    objective = cast(RandomDepth | EveryExit, run.objective)
    flops = sum(objective.flops(price, number) for number in range(run.steps))
    flops *= run.tokens_per_step
    return model, (
        "trained",
        {
            "steps": run.steps,
            "final_loss_nats": round(sum(tail) / len(tail), 5),
            "tokens_per_s": round(run.steps * run.tokens_per_step / elapsed_s, 1),
            "training_flops": flops,
            "flops_per_s": round(flops / elapsed_s, 1),
            "curve_steps": [int(event.number("step")) for event in thinned],
            "curve_loss_nats": [round(event.number("loss_nats"), 4) for event in thinned],
        },
    )


def examine_cells(
    member: tuple[recipes.Arm, Run], exam: measurements.Exam, folder: Path
) -> tuple[Event, ...]:
    """Train one automaton model and sit the exam; the law's models sit it on the way too."""
    arm, run = member
    keep_every = run.checkpoint_every if arm == "law" else None
    model, trained = _trained(run, folder, keep_every=keep_every)
    events = [trained, *measurements.accuracy_by_depth(model, exam)]
    if arm == "law":
        events += _on_the_way(run, exam, folder / run.name / "checkpoints")
        events += measurements.exits(
            model, exam, measurements.CRITERIA, steps=2 * recipes.CELLS_MEAN
        )
        events += measurements.latent_paths(model, exam)
        # Half of the rows are asked, behind their first cell; the other half is the text of the directions.
        rows, targets = exam.of(exam.hardest)
        half = len(rows) // 2
        events += measurements.cache_policies(
            model, rows[:half], targets[:half], rows[half:], steps=2 * recipes.CELLS_MEAN, prompt=1
        )
    return tuple((kind, {"arm": arm, "seed": run.seed, **fields}) for kind, fields in events)


def _on_the_way(run: Run, exam: measurements.Exam, folder: Path) -> list[Event]:
    """The accuracy at one recurrence and at the mean, at each checkpoint before the last."""
    return [
        ("on_the_way", {"step": place.step, **fields})
        for place in checkpoint.checkpoints(folder)
        if place.step < run.steps and place.step % run.checkpoint_every == 0
        for _, fields in measurements.accuracy_by_depth(
            cast(RecurrentDepthForCausalLM, trained_model(run, place)),
            exam,
            (1, recipes.CELLS_MEAN),
        )
    ]


def examine_draws(
    member: tuple[recipes.DrawArm, Run], exam: measurements.Exam, folder: Path
) -> tuple[Event, ...]:
    """Train one model, and examine it at the mean recurrence."""
    arm, run = member
    model, trained = _trained(run, folder)
    events = (trained, measurements.held_out(model, exam, steps=recipes.MEAN))
    return tuple((kind, {"arm": arm, "seed": run.seed, **fields}) for kind, fields in events)


def examine_additions(
    member: tuple[recipes.DepthArm, Run], rows: int, folder: Path
) -> tuple[Event, ...]:
    """Train one model, and examine it at every depth."""
    arm, run = member
    model, trained = _trained(run, folder)
    events = [trained, *measurements.addition_by_depth(model, operands=run.sequence, rows=rows)]
    return tuple((kind, {"arm": arm, "seed": run.seed, **fields}) for kind, fields in events)


def examine_retrofits(
    member: tuple[recipes.RetrofitArm, Run], rows: int, folder: Path
) -> tuple[Event, ...]:
    """Train a dense or retrofitted model on, and measure held-out rows at every depth that it has."""
    arm, run = member
    torch.set_num_threads(1)
    place = folder / run.name
    last = train(
        run, record=place / "record.jsonl", checkpoints=place / "checkpoints", progress=silent
    )
    model = trained_model(run, last)
    batch = run.data.validation(sequence=run.sequence).batch(0, batch=rows)
    depths = () if arm == "dense" else (1, recipes.MEAN // 2, recipes.MEAN, 2 * recipes.MEAN)
    losses = measurements.loss_by_depth(model, batch.tokens, depths)
    trained: Event = ("trained", {"steps": run.steps, "training_flops": recipes.flops_of(arm, run)})
    return tuple(
        (kind, {"arm": arm, "seed": run.seed, **fields}) for kind, fields in (trained, *losses)
    )


def examine_worth(
    member: tuple[recipes.WorthArm, Run], study: recipes.Worth, folder: Path
) -> tuple[Event, ...]:
    """Train one model of the suite, and measure held-out rows at every depth."""
    arm, run = member
    model, (kind, trained) = _trained(run, folder)
    shape = cast(RecurrentDepth, run.model)
    sizes = Counter[str]()
    for name, parameter in model.named_parameters():
        sizes[next((part for part in PARTS if f".{part}." in name), "")] += parameter.numel()
    trained = {
        "arm": arm,
        "run": run.name,
        "width": shape.width,
        "loops": shape.mean_recurrence,
        "unrolled": shape.core // 2,
        "tokens": run.steps * run.tokens_per_step,
        "once_parameters": sizes["prelude"] + sizes["coda"],
        "looped_parameters": sizes["core_block"] + sizes["adapter"],
        **{key: trained[key] for key in ("steps", "final_loss_nats", "training_flops")},
    }
    batch = run.data.validation(sequence=run.sequence).batch(0, batch=study.rows)
    depths = (1,) if arm == "untied" else study.depths
    losses = measurements.loss_by_depth(model, batch.tokens, depths)
    return (
        (kind, trained),
        *((name, {"arm": arm, "run": run.name, **fields}) for name, fields in losses),
    )


def examine_bytes(
    member: tuple[recipes.DepthArm, Run], study: recipes.Bytes, folder: Path
) -> tuple[Event, ...]:
    """Train one language model and read it at every depth; decode with one of random depth in every way."""
    arm, run = member
    model, trained = _trained(run, folder)
    held_out = run.data.validation(sequence=run.sequence).batch(0, batch=study.read).tokens
    events: list[Event] = [trained]
    events += measurements.loss_by_depth(model, held_out, measurements.DEPTHS)
    if arm == "law":
        length, steps = study.prompt + study.generated, 4 * recipes.MEAN
        rows = run.data.validation(sequence=length).batch(0, batch=study.rows).tokens[:, :-1]
        text = run.data.open(sequence=length, seed=run.seed).batch(0, batch=study.read // 4).tokens
        prompt = rows[:, : study.prompt]
        asked = torch.cat([rows[:, 1:], torch.full_like(rows[:, :1], -100)], dim=1)
        events += measurements.cache_policies(
            model, rows, asked, text[:, :-1], steps=steps, prompt=study.prompt
        )
        events += measurements.warm_start(model, rows, steps=steps, prompt=study.prompt)
        events += speculation(model, prompt, steps=steps, new=study.generated)
        events += diffusion(model, prompt, steps=steps, new=study.generated)
    return tuple((kind, {"arm": arm, "seed": run.seed, **fields}) for kind, fields in events)


def _greedy(model: RecurrentDepthForCausalLM, prompt: Tensor, steps: int, new: int) -> Tensor:
    options: Any = {
        "max_new_tokens": new, "do_sample": False, "num_steps": steps, "init_scale": 0.0,
        "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    made: Any = cast(Any, model).generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    return made[:, prompt.shape[1] :]


def speculation(
    model: RecurrentDepthForCausalLM, prompt: Tensor, *, steps: int, new: int
) -> Iterable[Event]:
    """Drafts of several depths against greedy decoding."""
    greedy = _greedy(model, prompt, steps, new)
    for draft in (1, 2, 4):
        decoded = speculate(
            model,
            prompt,
            speculation=Speculation(draft_steps=draft, lookahead=4),
            max_new_tokens=new,
            num_steps=steps,
            init_scale=0.0,
        )
        yield (
            "speculation",
            {
                "draft_steps": draft,
                "lookahead": 4,
                "full_recurrences": steps,
                "equals_greedy": bool(torch.equal(decoded.tokens, greedy)),
                "accepted_share": round(decoded.accepted / decoded.drafted, 5),
                "core_passes": decoded.recurrences,
                "greedy_core_passes": steps * new,
            },
        )


def diffusion(
    model: RecurrentDepthForCausalLM, prompt: Tensor, *, steps: int, new: int
) -> Iterable[Event]:
    """The diffusion-style sampler against greedy decoding."""
    greedy = _greedy(model, prompt, steps, new)
    decoded = diffuse(
        model, prompt, diffusion=Diffusion(), max_new_tokens=new, num_steps=steps, init_scale=0.0
    )
    yield (
        "diffusion",
        {
            "agreement": round(float((decoded.tokens == greedy).double().mean()), 5),
            "core_passes": decoded.core_passes,
            "pass_ratio": round(steps * new / decoded.core_passes, 4),
            "positions_recurred": decoded.positions_recurred,
            "outer_steps": decoded.outer_steps,
        },
    )


def check_exact(study: recipes.Exact) -> Iterable[Event]:
    """Counted FLOPs against torch's counter, Huginn's totals, and speculation on random weights."""
    shape = RecurrentDepth(
        width=48, heads=4, prelude=1, core=2, coda=1, hidden=80, vocabulary=96, context=64,
        mean_recurrence=8, mean_backprop=4,
    )  # fmt: skip
    model = shape.build(seed=study.seed)
    assert isinstance(model, RecurrentDepthForCausalLM)
    model.set_attn_implementation("eager")
    tokens = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(study.seed))
    price = costs(model.config, context=tokens.shape[1])
    pairs = [(r, 0) for r in (1, 4, 32)] + [(0, 4), (3, 2), (7, 4)]
    for without, with_gradient in pairs:
        with FlopCounterMode(display=False) as counter:
            if with_gradient:
                out = model.train()(tokens, labels=tokens, num_steps=(without, with_gradient))
                out.loss.backward()
                expected = price.training(without, with_gradient)
            else:
                with torch.no_grad():
                    model.eval()(tokens, num_steps=without)
                expected = price.forward(without)
        counted = counter.get_total_flops()
        ours = expected * tokens.numel()
        yield (
            "flops",
            {
                "without_gradient": without,
                "with_gradient": with_gradient,
                "formula": ours,
                "counted": counted,
                "relative_error": round(abs(ours / counted - 1), 6),
            },
        )
    huginn = RecurrentDepthConfig()
    # As the paper counts: products with weights alone, the adapter's whole in every recurrence.
    bare = costs(huginn, context=0, splits_adapter=False)
    yield (
        "huginn",
        {
            "materialised_parameters": materialised_parameters(huginn, 32),
            "training_flops": bare.training(25, 8),
            "forward_flops_at_32": bare.forward(32),
        },
    )
    model.set_attn_implementation("sdpa")
    yield from speculation(model.eval(), tokens[:, :8], steps=recipes.MEAN * 2, new=study.generated)


def _record(
    study: Any,
    jobs: Sequence[Callable[[], Sequence[Event]]],
    workplace: Workplace,
    materials: Sequence[Material] = (),
) -> None:
    """Do the jobs, two at a time, and write their events in order."""
    with workplace.recording(study, seed=study.seed, materials=materials) as records:
        for done, events in enumerate(each(_call, jobs, processes=WORKERS), start=1):
            for kind, fields in events:
                records.write(kind, **fields)
            workplace.progress(done, len(jobs), f"{done} of {len(jobs)} models")


def _call(job: Callable[[], Sequence[Event]]) -> Sequence[Event]:
    return job()


def perform_cells(study: recipes.Cells, workplace: Workplace) -> None:
    """Train and examine every automaton model."""
    _record(
        study,
        [partial(examine_cells, arm, study.exam, workplace.scratch) for arm in study.members],
        workplace,
    )


def perform_draws(study: recipes.Draws, workplace: Workplace) -> None:
    """Train and examine every model."""
    _record(
        study,
        [partial(examine_draws, arm, study.exam, workplace.scratch) for arm in study.members],
        workplace,
    )


def perform_additions(study: recipes.Additions, workplace: Workplace) -> None:
    """Train and examine every addition model."""
    _record(
        study,
        [partial(examine_additions, arm, study.rows, workplace.scratch) for arm in study.members],
        workplace,
    )


def perform_retrofits(study: recipes.Retrofits, workplace: Workplace) -> None:
    """Train the dense models, go on from each in every way, and examine."""
    dense = {run.seed: run.model for arm, run in study.members if arm == "dense"}
    for _ in each(_pretrain, tuple(dense.values()), processes=WORKERS):
        pass
    _record(
        study,
        [partial(examine_retrofits, arm, study.rows, workplace.scratch) for arm in study.members],
        workplace,
        _materials(study.members[0][1]),
    )


def _pretrain(model: Model) -> None:
    torch.set_num_threads(1)
    model.build(seed=0)


def _materials(run: Run) -> Sequence[Material]:
    data: Any = run.data
    return tokenize(data.corpus, data.tokenizer).materials


def perform_bytes(study: recipes.Bytes, workplace: Workplace) -> None:
    """Train and examine every language model."""
    _record(
        study,
        [partial(examine_bytes, arm, study, workplace.scratch) for arm in study.members],
        workplace,
        _materials(study.members[0][1]),
    )


def perform_worth(study: recipes.Worth, workplace: Workplace) -> None:
    """Train and examine the suite."""
    _record(
        study,
        [partial(examine_worth, member, study, workplace.scratch) for member in study.members],
        workplace,
        _materials(study.members[0][1]),
    )


def perform_exact(study: recipes.Exact, workplace: Workplace) -> None:
    """Write the counts and equalities."""
    with workplace.recording(study, seed=study.seed) as records:
        for kind, fields in check_exact(study):
            records.write(kind, **fields)


def _stages(scale: Scale) -> Sequence[Stage]:
    match scale:
        case "smoke" | "laptop":
            exact, cells = recipes.exact(scale), recipes.cells(scale)
        case "paper":
            return ()
    stages = [
        Stage(name=EXACT, run=exact, perform=partial(perform_exact, exact)),
        Stage(name=AUTOMATON, run=cells, perform=partial(perform_cells, cells)),
    ]
    if scale == "laptop":
        draws, additions = recipes.draws(scale), recipes.additions(scale)
        stages += [
            Stage(name=DRAWS, run=draws, perform=partial(perform_draws, draws)),
            Stage(name=ADDITION, run=additions, perform=partial(perform_additions, additions)),
        ]
        retrofits = recipes.retrofits(scale)
        stages.append(
            Stage(name=RETROFIT, run=retrofits, perform=partial(perform_retrofits, retrofits))
        )
        worth = recipes.worth(scale)
        stages.append(Stage(name=WORTH, run=worth, perform=partial(perform_worth, worth)))
        language = recipes.language(scale)
        stages.append(Stage(name=LANGUAGE, run=language, perform=partial(perform_bytes, language)))
    return tuple(stages)


def _drawings(scale: Scale) -> Sequence[Drawing]:
    from fourfold_recurrent_depth.reproduce import figures

    return figures.drawings(scale)


def _launches() -> Sequence[Launch]:
    run = recipes.table_1("paper")
    return (
        Launch(
            name=run.name,
            title=f"{run.name}, {run.steps} steps of {run.tokens_per_step / 1e6:.1f} M tokens",
            needs="4,096 GPUs of 64 GB, and the published data mix as text files in texts/",
            command="-m fourfold_recurrent_depth train huginn --text texts/*.txt --out huginn-0125",
            nodes=512,
            gpus=8,
            hours=24,
        ),
    )


EXPERIMENT = Experiment(
    package="recurrent_depth",
    title="Recurrent depth: test-time compute in latent space",
    paper="Geiping, McLeish, Jain, Kirchenbauer, Singh, Bartoldson, Kailkhura, Bhatele, Goldstein: Scaling "
    "up Test-Time Compute with Latent Reasoning: A Recurrent Depth Approach, 2025 (arXiv 2502.05171)",
    idea="A model that iterates one block in latent space spends more compute on harder tokens at test time, "
    "without more parameters and without more text.",
    headline=headline,
    picture="accuracy-by-recurrences",
    claims=CLAIMS,
    stages=_stages,
    drawings=_drawings,
    launches=_launches,
    tables=TABLES,
)
"""Announced as the entry point `recurrent_depth`."""
