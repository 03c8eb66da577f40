"""The reproduction of Hans et al. 2024: train, attack, judge."""

from fourfold_goldfish import figures
from fourfold_goldfish.claims import CLAIMS
from fourfold_goldfish.memorization import diverged_on_dropped, extract
from fourfold_goldfish.recipes import ARMS, SEEDS, Arm, Attacked, mask, verbatim
from fourfold_parallel.launch import is_main_rank
from fourfold_parallel.run.experiments import Experiment, Stage, Workplace
from fourfold_parallel.run.progress import Progress
from fourfold_parallel.run.recipe import Scale
from fourfold_parallel.run.records import RecordWriter
from fourfold_parallel.run.train import train, trained_model


def _stage(arm: Arm, attacked: Attacked) -> Stage:
    return Stage(
        name=attacked.run.name,
        run=attacked,
        perform=lambda workplace: train_and_attack(arm, attacked, workplace),
    )


def train_and_attack(arm: Arm, attacked: Attacked, workplace: Workplace) -> None:
    """Train, prompt the model with every passage, and record what it recites.

    Events: "passage" for each passage, "extraction" for each bucket (trained and control).
    """
    run = attacked.run
    last = train(
        run,
        study=attacked,
        record=workplace.record,
        checkpoints=workplace.scratch / "checkpoints",
        progress=workplace.progress,
    )
    if not is_main_rank():
        return
    model = trained_model(run, last)
    trained, control = attacked.passages.trained_and_control(sequence=run.sequence)
    with RecordWriter(workplace.record) as records:
        for bucket, passages in (("trained", trained), ("control", control)):
            found = extract(
                model,
                passages,
                suffix=attacked.suffix,
                batch=64,
                progress=_from(workplace.progress, run.steps),
            )
            dropped = mask(arm).drop(passages)[:, -attacked.suffix :]
            on_dropped, diverged = diverged_on_dropped(found, dropped)
            for index, one in enumerate(found):
                records.write(
                    "passage",
                    bucket=bucket,
                    passage=index,
                    exact=one.exact,
                    rouge_l=round(one.rouge_l, 6),
                    matched_tokens=one.matched,
                )
            records.write(
                "extraction",
                bucket=bucket,
                passages=len(found),
                exact=sum(one.exact for one in found),
                mean_rouge_l=round(sum(one.rouge_l for one in found) / len(found), 6),
                diverged=diverged,
                diverged_on_dropped=on_dropped,
            )
        records.write("finished")


def _from(progress: Progress, steps: int) -> Progress:
    """The attack's progress, told at the end of the training's bar."""

    def report(done: int, total: int, note: str) -> None:
        progress(steps, steps, f"{note} {done}/{total}")

    return report


def _stages(scale: Scale) -> list[Stage]:
    """One stage per seed and loss."""
    return [
        _stage(arm, verbatim(arm, seed, scale)) for seed in SEEDS for arm in ARMS.get(scale, ())
    ]


EXPERIMENT = Experiment(
    package="goldfish",
    title="Goldfish loss",
    paper="Hans, Kirchenbauer, Wen, Jain, Kazemi, Singhania, Singh, Somepalli, Geiping, Bhatele, Goldstein: "
    "Be like a Goldfish, Don't Memorize! Mitigating Memorization in Generative LLMs. NeurIPS 2024",
    claims=CLAIMS,
    stages=_stages,
    drawings=figures.drawings,
    launches=lambda: (),
)
