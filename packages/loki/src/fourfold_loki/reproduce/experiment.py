"""The reproduction of Singhania et al. 2024: calibrate, rank, score, diagnose; claims and figures."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import assert_never

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from fourfold_loki.attention_mode import Sparse
from fourfold_loki.basis import Basis, Kind, fit
from fourfold_loki.calibration import calibrate_tokens, learn_signatures
from fourfold_loki.evaluate.bench import contenders, timed
from fourfold_loki.evaluate.certify import certify
from fourfold_loki.evaluate.doctor import diagnose
from fourfold_loki.evaluate.passkey import hide, retrieve
from fourfold_loki.evaluate.perplexity import score
from fourfold_loki.evaluate.table import choose, compete
from fourfold_loki.evaluate.table import contenders as entering
from fourfold_loki.evaluate.traffic import Shape
from fourfold_loki.moments import RotaryStage, Statistics
from fourfold_loki.reproduce import recipes
from fourfold_loki.reproduce.claims import CLAIMS
from fourfold_loki.reproduce.measures import headline
from fourfold_loki.reproduce.recipes import (
    Arm,
    ByApproximateScores,
    ByBasis,
    ByCodes,
    ByLabelChannels,
    Calibration,
    Certificates,
    Decoding,
    Diagnoses,
    FairTable,
    Passkeys,
    Perplexity,
    Ranks,
    Sample,
)
from fourfold_loki.reproduce.tables import TABLES
from fourfold_loki.reproduce.text import tokenized, windows_of
from fourfold_loki.selectors import DoubleSparsity, Loki, PcaAttention, Selector
from fourfold_parallel.common.files import cache_folder, write_text
from fourfold_parallel.common.progress import Progress, silent
from fourfold_parallel.common.records import Material, RecordWriter, read_record
from fourfold_parallel.common.values import digest
from fourfold_parallel.reproduce.experiment import Drawing, Experiment, Stage, Workplace
from fourfold_parallel.reproduce.scale import Scale
from fourfold_parallel.run.corpora import Corpus
from fourfold_parallel.run.models import Packaged


def built(model: Packaged) -> PreTrainedModel:
    """A model, ready to be read from."""
    return model.build(seed=0).eval()


def statistics_of(
    recipe: Calibration, model: PreTrainedModel, progress: Progress = silent
) -> Statistics:
    """A calibration's statistics: from the cache, or measured and cached."""
    path = cache_folder() / "loki" / f"{digest(recipe)[:32]}.safetensors"
    if not path.exists():
        count = recipe.tokens // recipe.context
        ids = windows_of(recipe.corpus, recipe.model, count=count, context=recipe.context)
        calibrate_tokens(model, ids, progress=progress).save(path)
    return Statistics.load(path)


def modes_of(
    arms: Sequence[Arm], model: PreTrainedModel, progress: Progress = silent
) -> dict[str, Sparse]:
    """Arms ready to run; a basis that several share is fitted once."""
    bases: dict[str, Basis] = {}

    def fitted_basis(kind: Kind, stage: RotaryStage, fitted: Calibration) -> Basis:
        key = f"{kind} {stage} {digest(fitted)}"
        if key not in bases:
            bases[key] = fit(statistics_of(fitted, model, progress), kind, stage)
        return bases[key]

    def selector(arm: Arm) -> Selector:
        match arm.ranking:
            case ByBasis(kind=kind, stage=stage, calibration=fitted, width=width):
                basis = fitted_basis(kind, stage, fitted)
                return Loki(basis=basis, widths=(width,) * basis.layers)
            case ByCodes(basis=ranked, bits=bits):
                basis = fitted_basis(ranked.kind, ranked.stage, ranked.calibration)
                return Loki(basis=basis, widths=(ranked.width,) * basis.layers, bits=bits)
            case ByLabelChannels(channels=channels, calibration=fitted):
                return DoubleSparsity.from_statistics(
                    statistics_of(fitted, model, progress), channels=channels
                )
            case ByApproximateScores(calibration=fitted, width=width):
                basis = fitted_basis("pca", "after rotary", fitted)
                return PcaAttention(basis=basis, widths=(width,) * basis.layers)
            case Selector():
                return arm.ranking
            case _:
                assert_never(arm.ranking)

    return {arm.name: Sparse(selector=selector(arm), budget=arm.budget) for arm in arms}


def measure_ranks(run: Ranks, workplace: Workplace) -> None:
    """Events "rank" by corpus, layer, head and stage; "transfer" by pair of corpora and width."""
    model = built(run.calibrations[0].model)
    by_corpus = {
        tokenized(fitted.corpus, fitted.model).materials[0].name: statistics_of(
            fitted, model, workplace.progress
        )
        for fitted in run.calibrations
    }
    corpora = [fitted.corpus for fitted in run.calibrations]
    materials = _materials(run.calibrations[0].model, *corpora)
    with workplace.recording(run, seed=0, materials=materials) as records:
        for corpus, statistics in by_corpus.items():
            for stage in ("before rotary", "after rotary"):
                keys, _ = statistics.of(stage)
                rank = keys.rank(run.share)
                spectrum = keys.spectrum(centred=True)
                mean = (keys.total / keys.count[..., None]).square().sum(-1)
                channels = keys.outer.diagonal(dim1=-2, dim2=-1) / keys.count[..., None]
                for layer in range(statistics.layers):
                    records.write(
                        "rank",
                        corpus=corpus,
                        stage=stage,
                        layer=layer,
                        rank=[int(value) for value in rank[layer]],
                        head_width=int(spectrum.shape[-1]),
                        mean_share=_rounded((mean / channels.sum(-1))[layer]),
                        largest_channel=_rounded((channels.amax(-1) / channels.mean(-1))[layer]),
                        held_by_width={
                            str(width): _rounded(
                                spectrum[layer, :, :width].sum(-1) / spectrum[layer].sum(-1)
                            )
                            for width in run.widths
                        },
                    )
        _write_score_errors(run, by_corpus, records)
        _write_transfer(run, by_corpus, records)


def _write_score_errors(
    run: Ranks, by_corpus: dict[str, Statistics], records: RecordWriter
) -> None:
    """Expected squared error of scores, relative, by basis: tr(Cq R Ck R^T) / tr(Cq Ck)."""
    for corpus, statistics in by_corpus.items():
        queries = statistics.queries.covariance(centred=False)
        keys = statistics.keys.covariance(centred=True)
        whole = (queries * keys).sum((-2, -1))
        for kind in ("pca", "pca_uncentred", "balanced"):
            basis = fit(statistics, kind)
            for width in run.widths:
                seen = basis.query_maps[..., :width].double() @ (
                    basis.key_maps[..., :width].double().mT
                )
                # What the leading coordinates leave of a score: q (I - A B^T) k^T.
                rest = torch.eye(seen.shape[-1], dtype=seen.dtype) - seen
                lost = (queries * (rest @ keys @ rest.mT)).sum((-2, -1))
                records.write(
                    "score_error",
                    corpus=corpus,
                    basis=kind,
                    width=width,
                    by_layer=_rounded((lost / whole).mean(-1)),
                )


def _write_transfer(run: Ranks, by_corpus: dict[str, Statistics], records: RecordWriter) -> None:
    for fitted_on, source in by_corpus.items():
        for stage in ("before rotary", "after rotary"):
            basis = fit(source, "pca", stage)
            for corpus, statistics in by_corpus.items():
                covariance = statistics.of(stage)[0].covariance(centred=True)
                total = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
                for width in run.widths:
                    lead = basis.key_maps[..., :width].double()
                    caught = torch.einsum("lhid,lhij,lhjd->lh", lead, covariance, lead) / total
                    records.write(
                        "transfer",
                        stage=stage,
                        fitted_on=fitted_on,
                        corpus=corpus,
                        width=width,
                        held_by_layer=_rounded(caught.mean(-1)),
                    )


def measure_perplexity(run: Perplexity, workplace: Workplace) -> None:
    """Events "scored": one a window and arm, full attention first. Goes on after the last whole window."""
    model = built(run.model)
    modes = modes_of(run.arms, model, workplace.progress)
    ids = _windows(run, run.windows)
    lines_each = len(modes) + 1
    done = _whole_batches(workplace.record, lines_each * run.batch) * run.batch
    materials = _materials(run.model, run.corpus)
    with (
        workplace.concluding() if done else workplace.recording(run, seed=0, materials=materials)
    ) as records:
        scores = score(
            model, ids[done:], modes, prompt=run.prompt, protocol=run.protocol, batch=run.batch
        )
        for count, each in enumerate(scores, start=done * lines_each + 1):
            records.write(
                "scored",
                arm=each.arm,
                window=each.window + done,
                tokens=len(each.nats),
                loss_nats=float(each.nats.double().mean()),
                kept_share=round(each.kept_share, 6),
                read_share=round(each.read_share, 6),
            )
            workplace.progress(count, run.windows * lines_each, each.arm)


def _whole_batches(path: Path, lines_each: int) -> int:
    """Batches of windows of which an interrupted record holds every arm; what is beyond them is cut off."""
    if not path.exists():
        return 0
    whole = len(read_record(path).of("scored")) // lines_each
    lines = path.read_text(encoding="utf-8").split("\n")
    write_text(path, "".join(f"{line}\n" for line in lines[: 1 + whole * lines_each]))
    return whole


def measure_diagnoses(run: Diagnoses, workplace: Workplace) -> None:
    """Events "diagnosis": one a layer and arm."""
    model = built(run.model)
    modes = modes_of(run.arms, model, workplace.progress)
    [window] = _windows(run, 1)
    materials = _materials(run.model, run.corpus)
    with workplace.recording(run, seed=0, materials=materials) as records:
        for layer in diagnose(model, window, modes, queries=run.queries):
            records.write(
                "diagnosis",
                arm=layer.arm,
                layer=layer.layer,
                recall=round(layer.recall, 5),
                mass_recall=round(layer.mass_recall, 5),
                sink_kept=round(layer.sink_kept, 5),
                sink_mass=round(layer.sink_mass, 5),
                kept_share=round(layer.kept_share, 5),
            )


def measure_passkeys(run: Passkeys, workplace: Workplace) -> None:
    """Events "passkey": one a window and arm, full attention first."""
    model = built(run.model)
    modes = modes_of(run.arms, model, workplace.progress)
    many = len(run.depths) * len(run.keys)
    filling = windows_of(
        run.corpus, run.model, skip_tokens=run.skip_tokens, count=many, context=run.context
    )
    hidden = hide(
        tokenized(run.corpus, run.model).tokenizer().tokenizer,
        filling.flatten(),
        context=run.context,
        depths=run.depths,
        keys=run.keys,
    )
    materials = _materials(run.model, run.corpus)
    with workplace.recording(run, seed=0, materials=materials) as records:
        for count, answer in enumerate(retrieve(model, hidden, modes), start=1):
            records.write(
                "passkey",
                arm=answer.arm,
                depth=answer.depth,
                is_found=answer.is_found,
                read_share=round(answer.read_share, 6),
            )
            workplace.progress(count, many * (len(modes) + 1), answer.arm)


def measure_decoding(run: Decoding, workplace: Workplace) -> None:
    """Events "decoding": times of a context's contenders, round by round, and the bytes they read.

    On one thread, as the claim says, whatever the machine would use.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _time_contexts(run, workplace)
    finally:
        torch.set_num_threads(before)


def _time_contexts(run: Decoding, workplace: Workplace) -> None:
    shape = Shape(
        layers=1,
        heads=run.heads,
        kv_heads=run.kv_heads,
        head_width=run.head_width,
        weights=0,
        bytes_each=4,
    )
    with workplace.recording(run, seed=0) as records:
        for length in run.lengths:
            run_by = contenders(
                run.heads,
                run.kv_heads,
                run.head_width,
                tokens=length,
                dtype=torch.float32,
                share=run.share,
                page=run.page,
                divisor=run.divisor,
            )
            records.write(
                "decoding",
                tokens=length,
                threads=torch.get_num_threads(),
                dense_bytes=shape.cache_bytes(length),
                loki_bytes=shape.cache_bytes(
                    length, share=run.share, width=run.head_width // run.divisor
                ),
                **{
                    f"{name.replace(' ', '_')}_ms": [round(time, 4) for time in times]
                    for name, times in timed(run_by, seconds=run.seconds).items()
                },
            )


def measure_certificates(run: Certificates, workplace: Workplace) -> None:
    """Events "certified": one a window and arm, with a number a layer."""
    model = built(run.model)
    modes = modes_of(run.arms, model, workplace.progress)
    materials = _materials(run.model, run.corpus)
    with workplace.recording(run, seed=0, materials=materials) as records:
        for sample in run.samples:
            windows = windows_of(
                run.corpus,
                run.model,
                skip_tokens=run.skip_tokens,
                count=sample.windows,
                context=sample.context,
            )
            for place, window in enumerate(windows):
                certified = certify(
                    model,
                    window[None],
                    modes,
                    queries=sample.queries,
                    progress=workplace.progress,
                )
                for arm, each in certified.items():
                    records.write(
                        "certified",
                        context=sample.context,
                        window=place,
                        queries=sample.queries,
                        arm=arm,
                        read_share=round(each.read_share, 5),
                        kept_share=[round(value, 5) for value in each.kept_share],
                        bound=[float(f"{value:.6g}") for value in each.bound],
                        error=[float(f"{value:.6g}") for value in each.error],
                        unread_bound=[float(f"{value:.6g}") for value in each.unread_bound],
                        unread=[float(f"{value:.6g}") for value in each.unread],
                    )


def measure_fair_table(run: FairTable, workplace: Workplace) -> None:
    """Events "entry": one a length, share and method; "fair": one a window besides, full attention first."""
    fitted = run.calibration
    model = built(fitted.model)
    statistics = statistics_of(fitted, model, workplace.progress)
    count = fitted.tokens // fitted.context
    ids = windows_of(fitted.corpus, fitted.model, count=count, context=fitted.context)
    signatures = learn_signatures(model, ids, steps=run.lessons, progress=workplace.progress)
    shape = Shape.of(model.config.get_text_config(), weights=0, bytes_each=2)

    def texts(sample: Sample, skip_tokens: int) -> Int[Tensor, "window context"]:
        return windows_of(
            fitted.corpus,
            fitted.model,
            skip_tokens=skip_tokens,
            count=sample.windows,
            context=sample.context,
        )

    chosen = run.chosen_at
    places = choose(
        model,
        statistics,
        signatures,
        texts(chosen, run.probe_tokens),
        shares=run.shares,
        prompt=chosen.context - chosen.queries,
        progress=workplace.progress,
    )
    materials = _materials(fitted.model, fitted.corpus)
    with workplace.recording(run, seed=0, materials=materials) as records:
        for sample in run.samples:
            prompt = sample.context - sample.queries
            entered = entering(
                model,
                statistics,
                signatures,
                texts(replace(sample, windows=1), run.probe_tokens),
                places=places,
                shares=run.shares,
                prompt=prompt,
            )
            seen = (prompt + sample.context - 1) / 2
            for (name, share), entry in entered.items():
                records.write(
                    "entry",
                    context=sample.context,
                    share=share,
                    arm=name,
                    setting=entry.setting,
                    is_fixed=entry.is_fixed,
                    predicted=round(entry.predicted, 6),
                    dense_bytes=shape.cache_bytes(1) * seen,
                )
            windows = texts(sample, run.skip_tokens)
            total = len(windows) * (len(entered) + 1)
            scores = compete(model, entered, windows, prompt=prompt)
            for done, score in enumerate(scores, start=1):
                records.write(
                    "fair",
                    context=sample.context,
                    share=score.share,
                    arm=score.name,
                    window=score.window,
                    tokens=score.tokens,
                    loss_nats=round(score.nats, 6),
                    divergence_nats=round(score.divergence, 6),
                    read_share=round(score.read, 6),
                )
                workplace.progress(done, total, f"{sample.context} tokens, {score.name}")


def _windows(run: Perplexity | Diagnoses, count: int) -> Int[Tensor, "window context"]:
    return windows_of(
        run.corpus, run.model, skip_tokens=run.skip_tokens, count=count, context=run.context
    )


def _materials(model: Packaged, *corpora: Corpus) -> tuple[Material, ...]:
    of_corpora = dict.fromkeys(
        part for corpus in corpora for part in tokenized(corpus, model).materials
    )
    return (*model.materials(), *of_corpora)


def _rounded(values: Tensor) -> list[float]:
    return [round(float(value), 5) for value in values]


def _stages(scale: Scale) -> Sequence[Stage]:
    match scale:
        case "smoke":
            makers = [recipes.ranks, recipes.perplexity, recipes.diagnoses]
        case "laptop":
            makers = [
                recipes.ranks,
                recipes.perplexity,
                recipes.more_perplexity,
                recipes.long_context,
                recipes.budgets,
                recipes.published_protocol,
                recipes.diagnoses,
                recipes.passkeys,
                recipes.decoding,
                recipes.certificates,
                recipes.fair_table,
                recipes.second_family,
            ]
        case "paper":
            return ()
    return tuple(_stage(maker(scale)) for maker in makers)


def _stage(
    run: Ranks | Perplexity | Diagnoses | Passkeys | Decoding | Certificates | FairTable,
) -> Stage:
    match run:
        case Ranks():
            perform = partial(measure_ranks, run)
        case Perplexity():
            perform = partial(measure_perplexity, run)
        case Diagnoses():
            perform = partial(measure_diagnoses, run)
        case Passkeys():
            perform = partial(measure_passkeys, run)
        case Decoding():
            perform = partial(measure_decoding, run)
        case Certificates():
            perform = partial(measure_certificates, run)
        case FairTable():
            perform = partial(measure_fair_table, run)
        case _:
            assert_never(run)
    return Stage(name=run.name, run=run, perform=perform)


def _drawings(scale: Scale) -> Sequence[Drawing]:
    from fourfold_loki.reproduce import figures  # matplotlib is an extra

    return figures.drawings(scale)


EXPERIMENT = Experiment(
    package="loki",
    title="Loki: low-rank keys for efficient sparse attention",
    paper="Singhania, Singh, He, Feizi, Bhatele: Loki: Low-rank Keys for Efficient Sparse Attention. "
    "NeurIPS 2024",
    idea="Keys span few dimensions: a few principal components of them are enough to choose the tokens worth "
    "attending to.",
    headline=headline,
    picture="figure-quality",
    claims=CLAIMS,
    stages=_stages,
    drawings=_drawings,
    launches=lambda: (),
    tables=TABLES,
)
