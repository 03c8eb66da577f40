"""The reproduction of Puccetti et al. 2022: geometry, frequency, disabling, and two languages."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from fourfold_outliers import geometry
from fourfold_outliers.disabling import (
    averaged,
    biases_of,
    gains_of,
    matched_sets,
    norms_of,
    random_sets,
    removed,
    silenced,
)
from fourfold_outliers.effects import attending_eagerly, behaviour, delimiters_of
from fourfold_outliers.frequency import Occurrences, counted, frequency, linked
from fourfold_outliers.reproduce import recipes
from fourfold_outliers.reproduce.claims import CLAIMS
from fourfold_outliers.reproduce.measures import headline, outliers_in
from fourfold_outliers.reproduce.recipes import (
    ARMS,
    SEEDS,
    ByLayer,
    Disabling,
    Frequencies,
    Geometry,
    Reading,
    Source,
    Speaking,
    Turning,
)
from fourfold_outliers.reproduce.tables import TABLES
from fourfold_outliers.resampling import halves, interval, reach
from fourfold_outliers.rotation import random_rotation, rotate
from fourfold_outliers.stream import Documents, Sample, layers_of, measure, vocabulary_of, width_of
from fourfold_outliers.telemetry import Outliers
from fourfold_parallel.common.records import Material
from fourfold_parallel.launch import is_main_rank
from fourfold_parallel.reproduce.experiment import Drawing, Experiment, Stage, Workplace
from fourfold_parallel.reproduce.scale import Scale
from fourfold_parallel.run.data import TokenFile, tokenize
from fourfold_parallel.run.models import Packaged
from fourfold_parallel.run.train import train


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Read:
    """A reading, ready: its documents, and the counts of all that it left."""

    documents: Documents
    counts: Float[np.ndarray, " id"]
    """`log(1 + count)` over the other documents of both corpora."""
    materials: tuple[Material, ...]
    delimiters: Bool[Tensor, " id"]


def _chosen(source: Source, file: TokenFile, reading: Reading) -> list[int]:
    long = [
        index
        for index in range(source.skip, len(file.document_starts))
        if len(file.document(index)) >= reading.tokens
    ]
    if len(long) < reading.documents:
        raise ValueError(
            f"{len(long)} documents of {reading.tokens} tokens in {file.materials[0].name}, and "
            f"{reading.documents} were asked for; ask for fewer, or for shorter ones"
        )
    if not source.sampled:
        return long[: reading.documents]
    drawn = np.random.default_rng(reading.seed).choice(len(long), reading.documents, replace=False)
    return [long[index] for index in sorted(drawn)]


def read(reading: Reading, vocabulary: int) -> Read:
    """Documents of every source, and frequencies in the rest."""
    rows: list[np.ndarray] = []
    counts = np.zeros(vocabulary, dtype=np.int64)
    materials: list[Material] = []
    file = None
    for source in reading.sources:
        file = tokenize(source.corpus, reading.tokenizer)
        chosen = _chosen(source, file, reading)
        rows += [np.asarray(file.document(index)[: reading.tokens], np.int64) for index in chosen]
        counts += counted(
            (file.document(i) for i in range(len(file.document_starts)) if i not in set(chosen)),
            vocabulary,
        )
        materials += file.materials
    assert file is not None
    return Read(
        documents=Documents.each_once(torch.from_numpy(np.stack(rows))),
        counts=frequency(counts),
        materials=tuple(dict.fromkeys(materials)),
        delimiters=delimiters_of(file.tokenizer().tokenizer, vocabulary),
    )


@lru_cache(maxsize=1)
def built_once(model: Packaged) -> PreTrainedModel:
    """A model, shared by the stages of a process: each leaves it as it was."""
    return model.build(seed=0).eval()


def opened(model: Packaged, reading: Reading) -> tuple[PreTrainedModel, Read, tuple[Material, ...]]:
    """A model with what it reads, and what both are made of."""
    built = built_once(model)
    ready = read(reading, vocabulary_of(built))
    return built, ready, (*model.materials(), *ready.materials)


def _rounded(values: Tensor | np.ndarray | Sequence[float], digits: int = 5) -> list[float]:
    return [float(f"{float(value):.{digits}g}") for value in values]


def measure_geometry(run: Geometry, workplace: Workplace) -> None:
    """Events "found", "layer" by layer, "anisotropy"."""
    model, ready, materials = opened(run.model, run.reading)
    count = ready.documents.count
    sums = measure(model, ready.documents, progress=workplace.progress).sums
    shares, variable = geometry.by_share(sums), geometry.by_variance(sums)
    outliers = geometry.lasting(shares[1:-1])
    views = (sums.centred(), sums.standardised(), sums.without(outliers))
    sample = Sample(len(layers_of(model)) + 1)
    again = measure(
        model, ready.documents, views=views, also=(sample.take,), progress=workplace.progress
    )
    first, parts = again.first(), sums.pooled().contributions()[0]
    norms = norms_of(model)
    biases = biases_of(norms)
    gains = geometry.parameter_shares(gains_of(norms))
    with workplace.recording(run, seed=run.seed, materials=materials) as records:
        records.write(
            "found",
            coordinates=list(outliers),
            by_parameter=torch.nonzero(geometry.by_parameter(gains_of(norms))).flatten().tolist(),
            by_bias=torch.nonzero(geometry.by_parameter(biases)).flatten().tolist()
            if len(biases)
            else [],
            parameter_shares={
                str(d): round(float(gains[d]), 4)
                for d in dict.fromkeys([*outliers, *gains.topk(5).indices.tolist()])
            },
            norms=len(norms),
            documents=count,
            tokens=int(sums.tokens[:, 0].sum()),
            width=width_of(model),
        )
        pooled = sums.pooled()
        ever = sorted({*torch.nonzero(shares.any(0)).flatten().tolist(), *outliers})
        for layer in range(shares.shape[0]):
            largest = parts[layer].topk(5).indices.tolist()
            records.write(
                "layer",
                layer=layer,
                by_share=torch.nonzero(shares[layer]).flatten().tolist(),
                by_variance=torch.nonzero(variable[layer]).flatten().tolist(),
                shares={str(d): round(float(pooled.shares()[0, layer, d]), 4) for d in ever},
                contributions={
                    str(d): round(float(parts[layer, d]), 5)
                    for d in dict.fromkeys([*outliers, *largest])
                },
                cosine=round(float(pooled.cosines()[0, layer]), 5),
                **{
                    name: round(float(viewed.pooled().cosines()[0, layer]), 5)
                    for name, viewed in zip(
                        ("centred", "standardised", "without"), again.viewed, strict=True
                    )
                },
                top_share=round(float(geometry.top_share(parts[layer])), 5),
                isotropy=float(f"{geometry.partition_isotropy(sample.of(layer)):.4g}"),
                isotropy_without=float(
                    f"{geometry.partition_isotropy(views[2](layer, sample.of(layer))):.4g}"
                ),
                norm=float(f"{float(pooled.norms()[0, layer]):.5g}"),
                first_norm=float(f"{float(first.norm[layer]):.5g}"),
                first_held=round(float(first.held[layer, list(outliers)].sum()), 5),
            )
        weights = torch.from_numpy(halves(count))

        def ratio(weights: Tensor) -> np.ndarray:
            pair = [
                each.drawn(weights).cosines()[:, 1:-1].mean(1) for each in (again.viewed[2], sums)
            ]
            return (pair[0] / pair[1]).numpy()

        whole = interval(float(ratio(torch.ones(1, count))[0]), ratio(weights), count)
        records.write("anisotropy", value=whole.value, low=whole.low, high=whole.high)


def measure_frequency(run: Frequencies, workplace: Workplace) -> None:
    """Events "link" by coordinate, "others" once."""
    model, ready, materials = opened(run.model, run.reading)
    outliers = outliers_in(workplace.finished)
    count, layers, width = ready.documents.count, len(layers_of(model)) + 1, width_of(model)
    free = np.setdiff1d(np.arange(width), outliers)
    others = sorted(
        map(int, np.random.default_rng(run.seed).choice(free, run.others, replace=False))
    )
    seen = Occurrences(
        ready.documents.ids, ready.documents.of, layers=layers, coordinates=(*outliers, *others)
    )
    measure(model, ready.documents, also=(seen.take,), progress=workplace.progress)
    shape = (layers, len(outliers) + len(others))
    sizes = seen.types()
    value = sizes.link(ready.counts).reshape(shape)
    given = sizes.link(ready.counts, given_position=True).reshape(shape)
    signed = seen.types(signed=True).link(ready.counts).reshape(shape)
    ours = seen.types(only=outliers)
    link = linked(ours, ready.counts, documents=count)
    resampled = link.resampled.reshape(-1, layers, len(outliers))
    far = reach(resampled, count)
    inner = slice(1, -1)
    with workplace.recording(run, seed=run.seed, materials=materials) as records:
        for place, coordinate in enumerate(outliers):
            mean = interval(
                float(value[inner, place].mean()), resampled[:, inner, place].mean(1), count
            )
            records.write(
                "link",
                coordinate=coordinate,
                value=mean.value,
                low=mean.low,
                high=mean.high,
                by_layer=_rounded(value[:, place]),
                reach_by_layer=_rounded(far[:, place]),
                given_position_by_layer=_rounded(given[:, place]),
                signed_by_layer=_rounded(signed[:, place]),
            )
        rest = value[:, len(outliers) :]
        records.write(
            "others",
            coordinates=others,
            types=len(sizes.ids),
            averaged=_rounded(rest[inner].mean(0)),
            p95=float(np.quantile(np.abs(rest[inner].mean(0)), 0.95)),
            median_by_layer=_rounded(np.median(np.abs(rest), 1)),
            p95_by_layer=_rounded(np.quantile(np.abs(rest), 0.95, axis=1)),
        )
        size = np.abs(resampled).mean(2)
        records.write(
            "halves",
            size_by_layer=_rounded(np.abs(value[:, : len(outliers)]).mean(1)),
            resampled=[_rounded(row, 4) for row in size],
        )


def measure_disabling(run: Disabling, workplace: Workplace) -> None:
    """Events "arm": the model as it is, then each way and each set."""
    model, ready, materials = opened(run.model, run.reading)
    outliers = tuple(outliers_in(workplace.finished))
    means = measure(model, ready.documents).sums.pooled().means()[0]
    gains = gains_of(norms_of(model))
    random = random_sets(
        width_of(model), len(outliers), besides=outliers, times=run.random, seed=run.seed
    )
    matched = matched_sets(gains, outliers, besides=outliers, times=run.matched, seed=run.seed)
    arms = [
        ("as it is", (), silenced(model, ()), True),
        ("found", outliers, silenced(model, outliers), True),
    ]
    arms += [(f"only {d}", (d,), silenced(model, (d,)), True) for d in outliers]
    arms += [
        ("found, zero in the stream", outliers, removed(model, outliers), False),
        (
            "found, zero but at position 0",
            outliers,
            removed(model, outliers, spares_first=True),
            False,
        ),
        (
            "found, at their mean",
            outliers,
            averaged(model, outliers, means, spares_first=False),
            False,
        ),
        (
            "found, at their mean but at position 0",
            outliers,
            averaged(model, outliers, means),
            False,
        ),
    ]
    arms += [("random", each, silenced(model, each), at == 0) for at, each in enumerate(random)]
    arms += [("matched", each, silenced(model, each), at == 0) for at, each in enumerate(matched)]
    with workplace.recording(run, seed=run.seed, materials=materials) as records:
        for done, (name, coordinates, disabled, looks) in enumerate(arms, start=1):
            with attending_eagerly(model), disabled:
                seen = behaviour(
                    model, ready.documents, delimiters=ready.delimiters if looks else None
                )
            values: dict[str, object] = {
                "loss_nats": _rounded(seen.loss_nats, 6), "distinct": seen.distinct,
            }  # fmt: skip
            if looks:
                values["to_first"] = _rounded(seen.to_first.mean(0))
                values["to_first_by_layer"] = _rounded(seen.to_first.mean(1))
                values["to_delimiters"] = _rounded(seen.to_delimiters.mean(0))
            records.write("arm", arm=name, coordinates=list(coordinates), **values)
            workplace.progress(done, len(arms), name)


def measure_by_layer(run: ByLayer, workplace: Workplace) -> None:
    """Events "layer": the loss with the outliers disabled in one layer's norms; layer 0 is none."""
    model, ready, materials = opened(run.model, run.reading)
    outliers = outliers_in(workplace.finished)
    layers = len(layers_of(model))
    with workplace.recording(run, seed=run.seed, materials=materials) as records:
        for layer in range(layers + 1):
            with silenced(model, outliers if layer else (), layers=(layer,)):
                seen = behaviour(model, ready.documents)
            records.write("layer", layer=layer, loss_nats=_rounded(seen.loss_nats, 6))
            workplace.progress(layer + 1, layers + 1, f"layer {layer}")


def turn(run: Turning, workplace: Workplace) -> None:
    """Event "turned": outliers before and after, and the largest difference of logits."""
    shared, ready, materials = opened(run.model, run.reading)
    model = copy.deepcopy(shared)
    some = ready.documents.ids[:4]

    def look() -> tuple[geometry.Sums, Tensor]:
        with torch.no_grad():
            logits = model(input_ids=some, use_cache=False).logits
        return measure(model, ready.documents, progress=workplace.progress).sums, logits

    before, logits = look()
    rotate(model, random_rotation(width_of(model), seed=run.seed))
    after, turned = look()
    with workplace.recording(run, seed=run.seed, materials=materials) as records:
        records.write(
            "turned",
            largest_logit=float(logits.abs().max()),
            logit_difference=float((turned - logits).abs().max()),
            **{
                f"{name}_{when}": values
                for when, sums in (("before", before), ("after", after))
                for name, values in (
                    ("outliers", geometry.by_share(sums).sum(1).tolist()),
                    ("cosine", _rounded(sums.pooled().cosines()[0])),
                    ("top_share", _rounded(geometry.top_share(sums.pooled().contributions()[0]))),
                )
            },
        )


def speak(study: Speaking, workplace: Workplace) -> None:
    """Train; the record's events "outliers" are the result."""
    train(
        study.run,
        study=study,
        record=workplace.record,
        checkpoints=workplace.scratch / "checkpoints",
        progress=workplace.progress,
        sinks=workplace.sinks,
        overrides=workplace.overrides,
        observers=(Outliers(),),
    )
    if is_main_rank():
        with workplace.concluding():
            pass


def _speaking(study: Speaking) -> Stage:
    return Stage(name=study.run.name, run=study, perform=lambda at: speak(study, at))


def _stages(scale: Scale) -> list[Stage]:
    """The languages, then SmolLM2; one seed, few documents, no turning and no layers at smoke scale."""
    seeds = SEEDS[:1] if scale == "smoke" else SEEDS
    stages = [_speaking(recipes.speaking(arm, seed, scale)) for seed in seeds for arm in ARMS]
    seen, links, off = recipes.geometry(scale), recipes.frequencies(scale), recipes.disabling(scale)
    layers, turned = recipes.by_layer(scale), recipes.turning(scale)
    stages += [
        Stage(name=seen.name, run=seen, perform=lambda at: measure_geometry(seen, at)),
        Stage(
            name=links.name, run=links, perform=lambda at: measure_frequency(links, at),
            reads=(seen.name,),
        ),
        Stage(
            name=off.name, run=off, perform=lambda at: measure_disabling(off, at),
            reads=(seen.name,),
        ),
    ]  # fmt: skip
    if scale == "laptop":
        stages.append(Stage(name=turned.name, run=turned, perform=lambda at: turn(turned, at)))
        stages.append(
            Stage(
                name=layers.name, run=layers, perform=lambda at: measure_by_layer(layers, at),
                reads=(seen.name,),
            )
        )  # fmt: skip
    return stages


def _drawings(scale: Scale) -> Sequence[Drawing]:
    from fourfold_outliers.reproduce import figures  # needs matplotlib, and nothing else does

    return figures.drawings(scale)


EXPERIMENT = Experiment(
    package="outliers",
    title="Outlier dimensions",
    paper="Puccetti, Rogers, Drozd, Dell'Orletta: Outliers Dimensions that Disrupt Transformers Are "
    "Driven by Frequency. Findings of EMNLP 2022",
    idea="A handful of coordinates of the residual stream lie far from the others in most tokens and "
    "layers; without them the model breaks down, and how often a token occurs in training is said to "
    "drive them.",
    headline=headline,
    picture="languages",
    claims=CLAIMS,
    stages=_stages,
    drawings=_drawings,
    launches=lambda: (),
    tables=TABLES,
)
