"""The reproduction of HPC-Coder-V2's study: make data, fine-tune, generate, score, judge the claims."""

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from fourfold_hpc_coder.evaluation import at_least_one
from fourfold_hpc_coder.generate.local import Local
from fourfold_hpc_coder.instruct.format import (
    RESPONSE,
    blind_logits,
    encode,
    is_answer,
    packed,
)
from fourfold_hpc_coder.instruct.pipeline import held_out
from fourfold_hpc_coder.instruct.verify import open_bench, verify
from fourfold_hpc_coder.pareval.bodies import body_of
from fourfold_hpc_coder.reproduce.claims import CLAIMS
from fourfold_hpc_coder.reproduce.measures import headline
from fourfold_hpc_coder.reproduce.recipes import ARMS, SEEDS, TARGET, FinetuneStudy, tuned
from fourfold_hpc_coder.reproduce.references import judge_references, on_a_laptop
from fourfold_parallel.launch import is_main_rank
from fourfold_parallel.reproduce.experiment import Drawing, Experiment, Stage, Workplace
from fourfold_parallel.reproduce.scale import Scale
from fourfold_parallel.run.objective import token_nats
from fourfold_parallel.run.train import train, trained_model


def _stage(study: FinetuneStudy) -> Stage:
    return Stage(
        name=study.run.name,
        run=study,
        perform=lambda workplace: tune_and_ask(study, workplace),
    )


def pupil(model: PreTrainedModel, study: FinetuneStudy) -> Local:
    """The model as it is asked: with the token that ended its prompts in training."""
    return Local(
        model=model,
        tokenizer=study.rows.tokenizer.fast(),
        max_new_tokens=study.max_new_tokens,
        after=RESPONSE,
    )


def tune_and_ask(study: FinetuneStudy, workplace: Workplace) -> None:
    """Fine-tune, measure the loss on held-out answers, have held-out tasks answered, judge the answers.

    Events: "held-out" with the loss of right answers, "answer" per task, "answers" with the counts.
    """
    run = study.run
    last = train(
        run,
        study=study,
        record=workplace.record,
        checkpoints=workplace.scratch / "checkpoints",
        progress=workplace.progress,
        sinks=workplace.sinks,
        overrides=workplace.overrides,
    )
    if not is_main_rank():
        return
    model = trained_model(run, last)
    with workplace.concluding() as records:
        loss_nats, tokens = held_out_nats(model, study)
        records.write("held-out", answer_loss_nats=round(loss_nats, 6), tokens=tokens)
        tasks = held_out(study.asked, seed=0)
        prompts = [task.prompt(TARGET) for task in tasks]
        replies = pupil(model, study).complete_many(prompts)
        built = right = counted = 0
        with open_bench() as bench:
            for done, (task, prompt, reply) in enumerate(zip(tasks, prompts, replies, strict=True)):
                body = body_of(reply, prompt)
                opened = f"{task.problem().declaration(TARGET)} {{"
                [judgement] = verify(bench, task, TARGET, opened, [body])
                built += judgement.sample.built
                right += judgement.sample.right
                counted += judgement.verdict == "correct"
                records.write(
                    "answer", task=task.name, verdict=judgement.verdict, because=judgement.because
                )
                workplace.progress(run.steps, run.steps, f"answers {done + 1}/{len(tasks)}")
        records.write(
            "answers",
            tasks=len(tasks),
            built=built,
            right=right,
            counted=counted,
            pass_at_1=at_least_one(len(tasks), counted, 1),
        )


@torch.no_grad()
def held_out_nats(model: PreTrainedModel, study: FinetuneStudy) -> tuple[float, int]:
    """Mean loss per token of held-out tasks' right answers, prompts given; and the number of tokens."""
    tokenizer = study.rows.tokenizer.fast()
    samples = [encode(tokenizer, sample) for sample in study.rows.held_out_samples()]
    rows = packed(samples, row=study.run.sequence + 1)
    nats: list[float] = []
    tokens = 0
    for row in rows:
        batch = torch.from_numpy(row)[None]
        targets = batch.masked_fill(~is_answer(batch), -100)[:, 1:]
        row_nats = token_nats(blind_logits(model, batch[:, :-1]), targets, model)
        nats.append(float(row_nats.sum()))
        tokens += int((targets != -100).sum())
    return math.fsum(nats) / tokens, tokens


def _stages(scale: Scale) -> Sequence[Stage]:
    """One stage per seed and arm; at laptop scale, first the scorer on its own references."""
    arms = [_stage(tuned(arm, seed, scale)) for seed in SEEDS for arm in ARMS.get(scale, ())]
    if scale != "laptop":
        return arms
    own = on_a_laptop()
    scorer = Stage(
        name="references", run=own, perform=lambda workplace: judge_references(own, workplace)
    )
    return [scorer, *arms]


def _drawings(scale: Scale) -> Sequence[Drawing]:
    from fourfold_hpc_coder.reproduce import figures  # which need the extra of that name

    return figures.drawings(scale)


EXPERIMENT = Experiment(
    package="hpc_coder",
    title="HPC-Coder-V2",
    paper="Chaturvedi, Nichols, Singh, Bhatele: HPC-Coder-V2: Studying Code LLMs Across Low-Resource "
    "Parallel Languages. 2024",
    idea="Fine-tuned on instruction data made for parallel code, a code model writes correct parallel code "
    "as often as much larger ones.",
    headline=headline,
    picture="held-out-loss",
    claims=CLAIMS,
    stages=_stages,
    drawings=_drawings,
    launches=lambda: (),
)
