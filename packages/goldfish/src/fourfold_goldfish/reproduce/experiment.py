"""The reproduction of Hans et al. 2024 and of AxoNN's memorisation study: train, attack, judge."""

import textwrap
from collections.abc import Sequence

from fourfold_goldfish.canonical import CanonicalGoldfish, Spelling
from fourfold_goldfish.corpus_audit import audit
from fourfold_goldfish.memorization import membership
from fourfold_goldfish.memorization.extraction import Beam, Extraction, diverged_on_dropped, extract
from fourfold_goldfish.reproduce import causal_claims, claims
from fourfold_goldfish.reproduce.causal import (
    CAUSAL_SEEDS,
    REMEDIES,
    Causal,
    causal,
    insert_and_compare,
)
from fourfold_goldfish.reproduce.measures import headline
from fourfold_goldfish.reproduce.paper import launches
from fourfold_goldfish.reproduce.recipes import (
    ARMS,
    AUTHORS,
    ONE_PASS,
    ONE_PASS_SEEDS,
    SEEDS,
    SIZES,
    Arm,
    Attack,
    NearDuplicates,
    Supervision,
    bucket_study,
    finetuned,
    mask,
    near_duplicates,
    single_pass,
    verbatim,
)
from fourfold_parallel.common.progress import Progress
from fourfold_parallel.launch import is_main_rank
from fourfold_parallel.reproduce.claims import claims_of
from fourfold_parallel.reproduce.experiment import Drawing, Experiment, Stage, Workplace
from fourfold_parallel.reproduce.scale import Scale
from fourfold_parallel.run.objective import TargetMask
from fourfold_parallel.run.train import train, trained_model


def train_and_attack(left_out: TargetMask, attack: Attack, workplace: Workplace) -> None:
    """Train, prompt the model with every passage, and record what it recites.

    Events: "passage" for each passage, "extraction" for each bucket, "beam" for the trained passages where
    the recipe searches.
    """
    run = attack.run
    last = train(
        run,
        study=attack,
        record=workplace.record,
        checkpoints=workplace.scratch / "checkpoints",
        progress=workplace.progress,
        sinks=workplace.sinks,
        overrides=workplace.overrides,
    )
    if not is_main_rank():
        return
    model = trained_model(run, last)
    progress = _from(workplace.progress, run.steps)
    buckets, suffix = attack.buckets, attack.suffix
    texts = buckets.texts(sequence=run.sequence)
    contents = buckets.contents(sequence=run.sequence)
    with workplace.concluding() as records:
        for repetitions, passages, written in zip(
            buckets.repetitions, contents, texts, strict=True
        ):
            bucket = "trained" if repetitions else "control"
            # Greedy continuations and scores of membership, a line a passage.
            recitals = extract(model, passages, suffix=suffix, batch=64, progress=progress)
            statistics = membership.token_statistics(model, passages, batch=16)
            scores = {
                "loss_score": membership.loss_score(statistics),
                "zlib_score": membership.zlib_score(statistics, written),
                "min_k_score": membership.min_k_score(statistics),
                "min_k_plus_score": membership.min_k_plus_score(statistics),
            }
            dropped = left_out.drop(passages)[:, -suffix:]
            on_dropped, diverged = diverged_on_dropped(recitals, dropped)
            for index, recital in enumerate(recitals):
                records.write(
                    "passage",
                    bucket=bucket,
                    repetitions=repetitions,
                    passage=index,
                    exact=recital.exact,
                    rouge_l=round(recital.rouge_l, 6),
                    matched_tokens=recital.matched,
                    longest_run_tokens=recital.longest_run,
                    edit_similarity=round(recital.edit_similarity, 6),
                    **{name: round(float(score[index]), 6) for name, score in scores.items()},
                )
            # The bucket as a whole, which the claims are judged by.
            records.write(
                "extraction",
                bucket=bucket,
                repetitions=repetitions,
                passages=len(recitals),
                exact=sum(recital.exact for recital in recitals),
                mean_rouge_l=_mean_rouge_l(recitals),
                diverged=diverged,
                diverged_on_dropped=on_dropped,
            )
            if attack.beams > 1 and repetitions:
                searched = extract(
                    model,
                    passages,
                    suffix=suffix,
                    batch=8,
                    progress=progress,
                    decoding=Beam(beams=attack.beams),
                )
                records.write(
                    "beam",
                    beams=attack.beams,
                    passages=len(searched),
                    exact=sum(recital.exact for recital in searched),
                    mean_rouge_l=_mean_rouge_l(searched),
                )


def _mean_rouge_l(recitals: Sequence[Extraction]) -> float:
    return round(sum(recital.rouge_l for recital in recitals) / len(recitals), 6)


def train_once(supervision: Supervision, workplace: Workplace) -> None:
    """Train in one pass; the record's last validation is the result."""
    train(
        supervision.run,
        study=supervision,
        record=workplace.record,
        checkpoints=workplace.scratch / "checkpoints",
        progress=workplace.progress,
        sinks=workplace.sinks,
        overrides=workplace.overrides,
    )
    if is_main_rank():
        with workplace.concluding():
            pass


def audit_near_duplicates(study: NearDuplicates, workplace: Workplace) -> None:
    """Measure what an altered copy teaches of what each mask hides.

    Events: "leak" for each mask and alteration.
    """
    documents = study.corpus.load()
    loaded = study.tokenizer.load(documents)
    long = [text[: study.length] for text in documents.texts if len(text) >= study.length]
    texts = [textwrap.fill(text, study.columns) for text in long[: study.pieces]]
    masks = {
        "published": AUTHORS,
        "canonical": CanonicalGoldfish(
            k=AUTHORS.k,
            characters=study.characters,
            spelling=Spelling.of(loaded.tokenizer),
        ),
    }
    materials = (documents.material, loaded.material)
    with workplace.recording(study, seed=0, materials=materials) as records:
        for index, (name, left_out) in enumerate(masks.items()):
            workplace.progress(index, len(masks), name)
            audited = audit(texts, loaded.tokenizer, left_out)
            for leak in audited.leaks:
                records.write(
                    "leak",
                    mask=name,
                    perturbation=leak.perturbation,
                    leaked=round(leak.leaked, 6),
                    never_supervised=round(leak.never, 6),
                    rate=round(audited.rate, 6),
                )


def _from(progress: Progress, steps: int) -> Progress:
    """The attack's progress, told at the end of the training's bar."""

    def report(done: int, total: int, note: str) -> None:
        progress(steps, steps, f"{note} {done}/{total}")

    return report


def _attacking(arm: Arm, attack: Attack) -> Stage:
    return Stage(
        name=attack.run.name,
        run=attack,
        perform=lambda workplace: train_and_attack(mask(arm), attack, workplace),
    )


def _inserting(study: Causal) -> Stage:
    return Stage(
        name=study.run.name,
        run=study,
        perform=lambda workplace: insert_and_compare(study, workplace),
    )


def _supervising(supervision: Supervision) -> Stage:
    return Stage(
        name=supervision.run.name,
        run=supervision,
        perform=lambda workplace: train_once(supervision, workplace),
    )


def _stages(scale: Scale) -> list[Stage]:
    """One stage per seed and loss; at laptop scale also sizes, one-pass runs and a pretrained model."""
    stages: list[Stage] = []
    for seed in SEEDS:
        stages += [_attacking(arm, verbatim(arm, seed, scale)) for arm in ARMS.get(scale, ())]
        if scale == "laptop":
            stages += [_attacking("plain", bucket_study(size, "plain", seed)) for size in SIZES]
            stages.append(_attacking("k2", bucket_study(SIZES[-1], "k2", seed)))
            tuned: tuple[Arm, ...] = ("plain", "k4")
            stages += [_attacking(arm, finetuned(arm, seed)) for arm in tuned]
    if scale == "laptop":
        stages += [
            _supervising(single_pass(arm, batch, seed))
            for seed in ONE_PASS_SEEDS
            for arm, batch in ONE_PASS
        ]
        stages += [_inserting(causal(remedy, seed)) for seed in CAUSAL_SEEDS for remedy in REMEDIES]
        study = near_duplicates()
        stages.append(
            Stage(
                name="near-duplicates",
                run=study,
                perform=lambda workplace: audit_near_duplicates(study, workplace),
            )
        )
    return stages


def _drawings(scale: Scale) -> Sequence[Drawing]:
    from fourfold_goldfish.reproduce import figures  # needs matplotlib, and nothing else does

    return figures.drawings(scale)


EXPERIMENT = Experiment(
    package="goldfish",
    title="Goldfish loss",
    paper="Hans, Kirchenbauer, Wen, Jain, Kazemi, Singhania, Singh, Somepalli, Geiping, Bhatele, Goldstein: "
    "Be like a Goldfish, Don't Memorize! Mitigating Memorization in Generative LLMs. NeurIPS 2024",
    idea="Leave one target in k out of the loss, the same ones each time a passage recurs, and the model "
    "cannot recite its training text.",
    headline=headline,
    picture="pretrained",
    claims=claims_of(claims, causal_claims),
    stages=_stages,
    drawings=_drawings,
    launches=launches,
)
