"""The fair table: every method at equal bytes read, on the same text of one model.

A method reads keys and values in full, and an index that tells which. What both take together is set to a
share of what dense attention reads, by the traffic model:

- rankings: for every size of index that is offered (coordinates, channels, pages, codes) the number of keys
  follows;
- adaptive methods (vAttention, MagicPIG, skip-softmax): the one parameter that sets how much they read is
  found by bisection on a text before the windows that are scored; what they read on these is counted.

Of a method's offers at a share, the one whose predictions stay nearest to full attention's on such a text
competes. All keep the same sinks and the same window, within their bytes. `oracle` is exact top-k without the
bytes of its ranking: what the best ranking could do, which no method that has to find keys can.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from fourfold_loki.attention_mode import AttentionCall, Observe, Sparse
from fourfold_loki.basis import Basis, fit
from fourfold_loki.budget import Budget, Share, Threshold
from fourfold_loki.evaluate.perplexity import FULL, each_arm
from fourfold_loki.evaluate.traffic import read_share
from fourfold_loki.huggingface.reads import Reads
from fourfold_loki.huggingface.session import attending
from fourfold_loki.moments import Statistics
from fourfold_loki.selectors import (
    H2O,
    DoubleSparsity,
    Exact,
    HashAttention,
    Loki,
    MagicPIG,
    PQCache,
    Quest,
    Random,
    Selector,
    SkipSoftmax,
    SparQ,
    Streaming,
    VAttention,
)
from fourfold_parallel.common.progress import Progress, silent

SINKS, WINDOW = 4, 8
"""First and last keys that every method keeps."""
ORACLE = "oracle"
INDICES = (1 / 8, 1 / 4, 1 / 2)
"""Shares of a method's bytes that its index may take."""
READING_ALL = (ORACLE, "loki", "pqcache", "streaming", "skip-softmax")
"""Methods above half of the bytes: one that reads all keys, and a few to compare it with."""
DELTA = 0.1
"""Probability of a larger error than vAttention's epsilon."""
PROBED, LAYERS_APART = 8, 4
"""Queries of a text, and layers, by which parameters of adaptive methods are found."""
ROUNDS = 8
"""Of bisection."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """The sizes by which bytes are counted, and what is read where."""

    head_width: int
    group: int
    """Query heads of a key/value head."""
    seen: tuple[int, ...]
    """Keys that each query sees."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Contender:
    """A method set to read a share of what dense attention reads."""

    mode: Sparse
    predicted: float
    """What it reads: by the traffic model where the amount is fixed, else as counted when it was set."""
    is_fixed: bool
    setting: str
    """Of the index, or the parameter that was found."""


Entries = Mapping[tuple[str, float], Contender]
"""By name and share."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ranking:
    """A method whose amount is fixed before it runs."""

    selector: Selector
    setting: str
    page: int = 1

    def contender(self, share: float, traffic: Traffic) -> Contender | None:
        """As many keys as the share leaves beside the index; None where it leaves too few."""
        free = 0.5 if isinstance(self.selector, Exact) else 0.0

        def budget(kept: float) -> Budget:
            return Budget(amount=Share(of_visible=kept), sinks=SINKS, window=WINDOW, page=self.page)

        def read(kept: float) -> float:
            sizes = {"head_width": traffic.head_width, "group": traffic.group}
            return read_share(self.selector, budget(kept), traffic.seen, **sizes) - free

        def pages(tokens: int) -> int:
            return (tokens + 2 * self.page - 2) // self.page * self.page

        low, high = (pages(SINKS) + pages(WINDOW)) / min(traffic.seen), 1.0
        if low > high or read(low) > share:
            return None
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if read(middle) <= share else (low, middle)
        mode = Sparse(selector=self.selector, budget=budget(low))
        return Contender(mode=mode, predicted=read(low), is_fixed=True, setting=self.setting)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Family:
    """A method whose reads one number sets: from `low` to `high` it reads more and more."""

    at: Callable[[float], Sparse]
    low: float
    high: float
    says: Callable[[float], str]

    def contender(self, share: float, count: Callable[[Sparse], float]) -> Contender | None:
        """The number at which it reads the share; None where it cannot read so little, or so much."""
        low, high = self.low, self.high
        if not count(self.at(low)) <= share <= count(self.at(high)):
            return None
        for _ in range(ROUNDS):
            middle = (low + high) / 2
            low, high = (middle, high) if count(self.at(middle)) <= share else (low, middle)
        mode = self.at(low)
        return Contender(mode=mode, predicted=count(mode), is_fixed=False, setting=self.says(low))


Offer = Ranking | Family


def offers(
    statistics: Statistics, signatures: HashAttention, share: float, *, group: int
) -> dict[str, tuple[Offer, ...]]:
    """Every method with the sizes of index that it may take at a share.

    Args:
        statistics: of a calibration.
        signatures: learned on one.
        share: of dense attention's bytes.
        group: query heads of a key/value head.
    """
    layers, head_width = statistics.layers, statistics.keys.outer.shape[-1]
    balanced, published = fit(statistics), fit(statistics, "pca")
    # An index of w numbers a key takes w / (2 head_width) of the bytes.
    widths = dict.fromkeys(max(1, round(2 * head_width * share * part)) for part in INDICES)
    channels = dict.fromkeys(max(1, width // group) for width in widths)
    pages = dict.fromkeys(2 ** round(math.log2(1 / (share * part))) for part in INDICES)
    bits = signatures.keys[0].offsets[-1].shape[-1]

    def coordinates(basis: Basis, width: int) -> Loki:
        return Loki(basis=basis, widths=(width,) * layers)

    def labels(width: int) -> DoubleSparsity:
        return DoubleSparsity.from_statistics(statistics, channels=width)

    def vattention(width: int, part: float) -> Family:
        heavy = Budget(amount=Share(of_visible=share * part), sinks=SINKS, window=WINDOW)

        def at(log_error: float) -> Sparse:
            sampling = VAttention(
                heavy=coordinates(balanced, width),
                epsilon=math.exp(log_error),
                delta=DELTA,
                first=0.01,
                fewest=16,
            )
            return Sparse(selector=sampling, budget=heavy)

        return Family(
            at=at,
            low=math.log(10),
            high=math.log(1e-3),
            says=lambda x: f"{width} coordinates, {part:g} heavy, epsilon {math.exp(x):.2g}",
        )

    def magicpig(bits: int) -> Family:
        budget = Budget(amount=Threshold(score=2), sinks=SINKS, window=WINDOW, selection="per head")

        def tables(x: float) -> int:
            return max(2, round(math.exp(x)))

        return Family(
            at=lambda x: Sparse(selector=MagicPIG(hashes=tables(x), bits=bits), budget=budget),
            low=math.log(2),
            high=math.log(250),
            says=lambda x: f"{tables(x)} tables of {bits} bits",
        )

    def skip_softmax(score: float) -> Sparse:
        budget = Budget(amount=Threshold(score=score), sinks=SINKS, window=WINDOW)
        return Sparse(selector=SkipSoftmax(block=64), budget=budget)

    every: dict[str, tuple[Offer, ...]] = {
        ORACLE: (Ranking(selector=Exact(), setting="all scores"),),
        "loki": tuple(
            Ranking(selector=coordinates(balanced, width), setting=f"{width} coordinates")
            for width in widths
        ),
        "loki-pca": tuple(
            Ranking(selector=coordinates(published, width), setting=f"{width} coordinates")
            for width in widths
        ),
        "sparq": tuple(
            Ranking(selector=SparQ(channels=count), setting=f"{count} channels a query head")
            for count in channels
        ),
        "double-sparsity": tuple(
            Ranking(selector=labels(width), setting=f"{width} channels") for width in widths
        ),
        "quest": tuple(
            Ranking(selector=Quest(page=page), setting=f"pages of {page}", page=page)
            for page in pages
        ),
        "pqcache": tuple(
            Ranking(selector=PQCache(parts=parts, bits=6), setting=f"{parts} codes of 6 bits")
            for parts in (2, 4, 8)
            if head_width % parts == 0
        ),
        "hash-attention": (Ranking(selector=signatures, setting=f"{bits} bits"),),
        "h2o": (Ranking(selector=H2O(), setting="none"),),
        "streaming": (Ranking(selector=Streaming(sinks=SINKS), setting="none"),),
        "random": (Ranking(selector=Random(seed=0), setting="none"),),
        "vattention": tuple(vattention(list(widths)[1], part) for part in (1 / 4, 1 / 2)),
        "magicpig": tuple(magicpig(count) for count in (6, 8, 10)),
        "skip-softmax": (
            Family(at=skip_softmax, low=10.0, high=-30.0, says=lambda x: f"λ = e^{x:.3g}"),
        ),
    }
    return every if share <= 1 / 2 else {name: every[name] for name in READING_ALL}


@torch.no_grad()
def watched(model: PreTrainedModel, ids: Int[Tensor, " token"]) -> list[AttentionCall]:
    """Some layers' calls on a text in full attention, of the last queries and without values."""
    calls: list[AttentionCall] = []

    def take(call: AttentionCall) -> None:
        if call.layer % LAYERS_APART == 0:
            calls.append(
                replace(
                    call,
                    queries=call.queries[:, :, -PROBED:].clone(),
                    keys=call.keys.clone(),
                    values=call.values[:, :, :0],
                    visible=call.visible[:, :, -PROBED:].clone(),
                )
            )

    with attending(model, Observe(observer=take)):
        model.base_model(ids[None], use_cache=False)
    return calls


def counted(model: PreTrainedModel, mode: Sparse, calls: Sequence[AttentionCall]) -> float:
    """Elements that a mode reads over those of dense attention, for queries that were watched."""
    reads = Reads.of(model.config.get_text_config(), mode.selector, mode.budget.amount)
    for call in calls:
        among = call.candidates(queries=PROBED)
        selection = mode.selector.select(among, mode.budget)
        reads.add_masks(selection.keep, among.visible, kv_heads=call.keys.shape[1])
        reads.looked_up += selection.looked_up
    return reads.read_share


Places = Mapping[tuple[str, float], int]
"""By name and share: which offer competes."""


def choose(
    model: PreTrainedModel,
    statistics: Statistics,
    signatures: HashAttention,
    probes: Int[Tensor, "window context"],
    *,
    shares: Sequence[float],
    prompt: int,
    progress: Progress = silent,
) -> Places:
    """Of every method's offers at every share the one whose predictions stay nearest to full attention's.

    Args:
        model: the model.
        statistics: of a calibration.
        signatures: learned on one.
        probes: windows, none of which is scored later.
        shares: of dense attention's bytes.
        prompt: tokens of a window before the first query that selects.
        progress: told of every share.
    """
    places: dict[tuple[str, float], int] = {}
    entering = _Entering.of(model, statistics, signatures, probes, prompt=prompt)
    for done, share in enumerate(shares, start=1):
        entered = {
            (f"{name}/{place}", share): contender
            for name, each in entering.offers(share).items()
            if len(each) > 1
            for place, offer in enumerate(each)
            if (contender := entering.contender(offer, share)) is not None
        }
        apart: dict[str, float] = {}
        for score in compete(model, entered, probes, prompt=prompt):
            apart[score.name] = apart.get(score.name, 0.0) + score.divergence
        for arm in sorted(apart, key=lambda arm: apart[arm]):
            name, _, place = arm.partition("/")
            if place:
                places.setdefault((name, share), int(place))
        progress(done, len(shares), f"{share:g} of the bytes")
    return places


def contenders(
    model: PreTrainedModel,
    statistics: Statistics,
    signatures: HashAttention,
    probes: Int[Tensor, "window context"],
    *,
    places: Places,
    shares: Sequence[float],
    prompt: int,
) -> Entries:
    """Every method at every share that it can read, by the offer that was chosen, else by the next it can.

    Args:
        model: the model.
        statistics: of a calibration.
        signatures: learned on one.
        probes: windows as long as those that will be scored, and none of them.
        places: of `choose`.
        shares: of dense attention's bytes.
        prompt: tokens of a window before the first query that selects.
    """
    best: dict[tuple[str, float], Contender] = {}
    entering = _Entering.of(model, statistics, signatures, probes, prompt=prompt)
    for share in shares:
        for name, each in entering.offers(share).items():
            place = places.get((name, share), 0)
            for offer in (*each[place:], *each[:place]):
                if (contender := entering.contender(offer, share)) is not None:
                    best[name, share] = contender
                    break
    return best


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Entering:
    """A model, its calibration and its traffic: enough to set an offer to a share."""

    model: PreTrainedModel
    statistics: Statistics
    signatures: HashAttention
    calls: list[AttentionCall]
    traffic: Traffic

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        statistics: Statistics,
        signatures: HashAttention,
        probes: Int[Tensor, "window context"],
        *,
        prompt: int,
    ) -> "_Entering":
        config = model.config.get_text_config()
        return cls(
            model=model,
            statistics=statistics,
            signatures=signatures,
            calls=[call for probe in probes for call in watched(model, probe)],
            traffic=Traffic(
                head_width=statistics.keys.outer.shape[-1],
                group=config.num_attention_heads // config.num_key_value_heads,
                seen=tuple(range(prompt, probes.shape[1])),
            ),
        )

    def offers(self, share: float) -> dict[str, tuple[Offer, ...]]:
        return offers(self.statistics, self.signatures, share, group=self.traffic.group)

    def contender(self, offer: Offer, share: float) -> Contender | None:
        if isinstance(offer, Ranking):
            return offer.contender(share, self.traffic)
        return offer.contender(share, lambda mode: counted(self.model, mode, self.calls))


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A method at a share, on one window; full attention has a share of 1."""

    name: str
    share: float
    window: int
    tokens: int
    """That were scored."""
    nats: float
    """Loss of a token, mean."""
    divergence: float
    """Of the predictions from full attention's, Kullback and Leibler's, in nats a token, mean."""
    read: float
    """Elements read over those of dense attention, counted; of the oracle without its ranking."""


@torch.no_grad()
def compete(
    model: PreTrainedModel,
    entered: Entries,
    windows: Int[Tensor, "window context"],
    *,
    prompt: int,
) -> Iterator[Score]:
    """Full attention and every contender on every window, each window by itself."""
    names = {f"{name}:{share:g}": (name, share) for name, share in entered}
    arms = {arm: entered[key].mode for arm, key in names.items()}
    for place, window in enumerate(windows):
        targets, full = window[prompt:].to(model.device), None
        for arm, reads, logits in each_arm(model, window[None], arms, prompt=prompt):
            name, share = names.get(arm, (FULL, 1.0))
            told = logits[0].float().log_softmax(-1)
            full = told if full is None else full
            apart = F.kl_div(told, full, log_target=True, reduction="sum") / len(targets)
            read = 1.0 if reads is None else reads.read_share
            yield Score(
                name=name,
                share=share,
                window=place,
                tokens=len(targets),
                nats=float(F.nll_loss(told, targets)),
                divergence=max(0.0, float(apart)),
                read=read - 0.5 if name == ORACLE else read,
            )
