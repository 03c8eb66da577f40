"""Commands for a model of yours: calibrate, rank, doctor, ppl, passkey, tasks, bench, autotune.

Answers go to standard output, progress to standard error. What can be wrong is checked before anything heavy
is imported; transformers alone takes seconds.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import tyro

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fourfold_loki.attention_mode import Sparse
    from fourfold_loki.basis import Basis
    from fourfold_loki.moments import Statistics
    from fourfold_parallel.common.progress import Progress

Item = TypeVar("Item")

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Places of passkeys: in front of the text to behind it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """The text that a command reads."""

    text: tuple[Path, ...] = ()
    """Text files, in this order; without any, the Wikipedia articles in the wheel of gensim."""
    tokens: int = 2048
    """Tokens of the text to use."""
    context: int = 1024
    """Tokens a window."""

    def __post_init__(self) -> None:
        missing = [path for path in self.text if not path.is_file()]
        if missing:
            raise ValueError(f"--text {missing[0]} is no file; name text files that are there")
        if not 0 < self.context <= self.tokens:
            raise ValueError(
                f"--context {self.context} of --tokens {self.tokens}; use 1 to {self.tokens} tokens a window"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """The coordinates that rank and the keys that are read, in the words that `autotune` prints."""

    share: float = 0.25
    """Share of the keys that are read in full."""
    divisor: int = 4
    """Head width over the coordinates that rank."""
    page: int = 16
    """Keys are read in pages of this many."""
    sinks: int = 0
    """First tokens that are always read."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"--share {self.share} of the keys; use more than 0 and at most 1")
        if self.divisor < 1 or self.page < 1 or self.sinks < 0:
            raise ValueError(
                f"--divisor {self.divisor} --page {self.page} --sinks {self.sinks}; use 1 or more, 1 or "
                "more, 0 or more"
            )

    def __str__(self) -> str:
        """As every command takes it."""
        words = f"--share {self.share} --divisor {self.divisor} --page {self.page}"
        return f"{words} --sinks {self.sinks}" if self.sinks else words


Model = Annotated[str, tyro.conf.arg(metavar="MODEL")]
Flat = tyro.conf.arg(name="")
"""Options of a group without a prefix."""


def calibrate(
    model: Model,
    /,
    *,
    texts: Annotated[Texts, Flat] = Texts(tokens=8192),
    kind: Literal["pca", "pca_uncentred", "balanced"] = "balanced",
    out: Path = Path("basis.safetensors"),
) -> None:
    """Fit a basis to a model on a text, and write it to a file.

    Args:
        model: Hub id, folder, or smollm2.
        texts: What to calibrate on.
        kind: pca is the paper's; balanced looks at queries too and ranks better.
        out: File to write.
    """
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; name a file")
    out.parent.mkdir(parents=True, exist_ok=True)
    measured = _calibrated(model, texts)
    from fourfold_loki.basis import fit

    basis = fit(measured, kind)
    basis.save(out)
    _say(f"{kind} basis of {basis.layers} layers from {texts.tokens} tokens: {out}")


def rank(
    model: Model,
    /,
    *,
    texts: Annotated[Texts, Flat] = Texts(tokens=8192),
    share: float = 0.9,
) -> None:
    """Print how many principal directions of the keys hold a share of their variance, by layer and head.

    Args:
        model: Hub id, folder, or smollm2.
        texts: What to measure on.
        share: Of the variance.
    """
    if not 0 < share <= 1:
        raise ValueError(f"--share {share} of the variance; use more than 0 and at most 1")
    measured = _calibrated(model, texts)
    before, after = (
        measured.of(stage)[0].rank(share) for stage in ("before rotary", "after rotary")
    )
    _row("layer", "before rotary", "after rotary")
    for layer in range(measured.layers):
        _row(str(layer), str(before[layer].tolist()), str(after[layer].tolist()))
    _say(
        f"mean {float(before.double().mean()):.1f} before, {float(after.double().mean()):.1f} after"
    )


def doctor(
    model: Model,
    /,
    *,
    basis: Path = Path("basis.safetensors"),
    texts: Annotated[Texts, Flat] = Texts(),
    setting: Annotated[Setting, Flat] = Setting(),
) -> None:
    """Say what a basis and a budget would do to a model, layer by layer, and what to change.

    Args:
        model: Hub id, folder, or smollm2.
        basis: File that calibrate wrote.
        texts: What to look at: the first window.
        setting: What Loki reads.
    """
    loaded, tokenizer, fitted = _prepared(model, basis)
    from fourfold_loki.evaluate.doctor import diagnose, explain

    [window] = _windows(texts, tokenizer)[:1]
    arms = _arms(fitted, setting)
    layers = diagnose(loaded, window, {name: arms[name] for name in ("loki", "exact")})
    ours = [layer for layer in layers if layer.arm == "loki"]
    _row("layer", "keys recalled", "mass recalled", "sink kept", "sink's mass")
    for layer in ours:
        numbers = (layer.recall, layer.mass_recall, layer.sink_kept, layer.sink_mass)
        _row(str(layer.layer), *(f"{number:.3f}" for number in numbers))
    for sentence in explain(ours, [layer for layer in layers if layer.arm == "exact"]):
        _say(sentence)
    _say(f"Measure it: python -m fourfold_loki ppl {model} --basis {basis} {setting}")


def ppl(
    model: Model,
    /,
    *,
    basis: Path = Path("basis.safetensors"),
    texts: Annotated[Texts, Flat] = Texts(),
    setting: Annotated[Setting, Flat] = Setting(),
) -> None:
    """Print the perplexity that Loki adds, between a perfect ranking and the latest keys alone.

    Args:
        model: Hub id, folder, or smollm2.
        basis: File that calibrate wrote.
        texts: What to score: the second half of each window, after a dense first half.
        setting: What Loki reads.
    """
    loaded, tokenizer, fitted = _prepared(model, basis)
    import torch

    from fourfold_loki.evaluate.perplexity import FULL, score

    ids = _windows(texts, tokenizer)
    arms = _arms(fitted, setting)
    prompt = texts.context // 2
    scores = list(
        _watched(score(loaded, ids, arms, prompt=prompt), "scoring", len(ids) * (len(arms) + 1))
    )
    full = torch.cat([each.nats for each in scores if each.arm == FULL])
    _row("arm", "perplexity", "added", "read of dense")
    for arm in (FULL, *arms):
        mine = [each for each in scores if each.arm == arm]
        nats = torch.cat([each.nats for each in mine])
        added = math.expm1(float((nats - full).mean()))
        read = sum(each.read_share for each in mine) / len(mine)
        _row(arm, f"{math.exp(float(nats.mean())):.3f}", f"{added:+.2%}", f"{read:.1%}")
    _say(f"{len(full)} tokens after prompts of {prompt}")


def passkey(
    model: Model,
    /,
    *,
    basis: Path = Path("basis.safetensors"),
    texts: Annotated[Texts, Flat] = Texts(tokens=16384),
    setting: Annotated[Setting, Flat] = Setting(),
    passkeys: tuple[int, ...] = (71432, 50986, 26817),
) -> None:
    """Print at which depths of a text a hidden number is retrieved.

    Args:
        model: Hub id, folder, or smollm2.
        basis: File that calibrate wrote.
        texts: What to hide numbers in.
        setting: What Loki reads.
        passkeys: Numbers, with as many digits each.
    """
    loaded, tokenizer, fitted = _prepared(model, basis)
    from fourfold_loki.evaluate.passkey import hide, retrieve
    from fourfold_loki.evaluate.perplexity import FULL
    from fourfold_parallel.run.tokenizers import beginning

    filling = _windows(texts, tokenizer)[:, len(beginning(tokenizer)) :].flatten()
    hidden = hide(tokenizer, filling, context=texts.context, depths=DEPTHS, keys=passkeys)
    arms = _arms(fitted, setting)
    count = len(hidden.ids) * (len(arms) + 1)
    answers = list(_watched(retrieve(loaded, hidden, arms), "asking", count))
    _row("arm", *(f"depth {depth:.0%}" for depth in DEPTHS))
    for arm in (FULL, *arms):
        told = [
            [each.is_found for each in answers if (each.arm, each.depth) == (arm, depth)]
            for depth in DEPTHS
        ]
        _row(arm, *(f"{sum(each)} of {len(each)}" for each in told))


def tasks(
    model: Model,
    /,
    *,
    basis: Path = Path("basis.safetensors"),
    task: tuple[str, ...] = ("continuations",),
    include: tuple[Path, ...] = (),
    questions: int = 200,
    texts: Annotated[Texts, Flat] = Texts(),
    setting: Annotated[Setting, Flat] = Setting(),
) -> None:
    """Print lm-evaluation-harness's scores of full attention and of Loki. Needs the extra `evaluation`.

    Args:
        model: Hub id, folder, or smollm2.
        basis: File that calibrate wrote.
        task: Names of lm-evaluation-harness's tasks (`lm-eval ls tasks`), which it reads from the hub, or
            continuations: which of four passages of the text goes on a window?
        include: Folders with task files of yours.
        questions: Of each task, at most.
        texts: What continuations is made of.
        setting: What Loki reads.
    """
    for library in ("lm_eval", "datasets"):
        if importlib.util.find_spec(library) is None:
            raise ModuleNotFoundError(name=library)
    missing = [folder for folder in include if not folder.is_dir()]
    if missing:
        raise ValueError(f"--include {missing[0]} is no folder; name folders with task files")
    _check_model(model)
    _check_basis(model, basis)
    from fourfold_loki.evaluate.harness import compare, continuations, task_manager

    names = [name for name in task if name != "continuations"]
    manager = task_manager(names, include)
    loaded, tokenizer, _ = _prepared(model, basis)
    local = [
        continuations(tokenizer, _windows(texts, tokenizer), answer=texts.context // 8)
        for _ in range(len(task) - len(names))
    ]
    rows, reads = compare(
        loaded, tokenizer, [*local, *names], manager,
        basis=basis, share=setting.share, divisor=setting.divisor, page=setting.page,
        sinks=setting.sinks, questions=questions,
    )  # fmt: skip
    _row("task", "metric", "full", "loki", "questions")
    for row in rows:
        _row(row.task, row.metric, f"{row.full:.3f}", f"{row.loki:.3f}", str(row.questions))
    _say(str(reads))


def bench(
    model: Model,
    /,
    *,
    setting: Annotated[Setting, Flat] = Setting(),
    lengths: tuple[int, ...] = (4096, 8192, 16384, 32768),
    seconds: float = 1.5,
) -> None:
    """Print the time of a token's attention on this CPU, and what the traffic model says of GPUs.

    Args:
        model: Hub id, folder, or smollm2; only its configuration is read.
        setting: What Loki reads.
        lengths: Tokens in the cache.
        seconds: For each length; contenders take turns until then.
    """
    short = [length for length in lengths if length * setting.share < setting.page]
    if short:
        raise ValueError(
            f"--share {setting.share} of --lengths {short[0]} is less than a page of {setting.page}; use "
            "longer contexts or smaller pages"
        )
    _check_model(model)
    _note(f"reading the configuration of {model}")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from fourfold_loki.evaluate.bench import contenders, timed
    from fourfold_loki.evaluate.traffic import DEVICES, Shape, predict
    from fourfold_parallel.run.models import model_place

    config = AutoConfig.from_pretrained(model_place(model))
    with torch.device("meta"):
        weights = AutoModelForCausalLM.from_config(config).num_parameters()
    shape = Shape.of(config.get_text_config(), weights=weights, bytes_each=4)
    width = max(1, shape.head_width // setting.divisor)
    _row("tokens", "sdpa ms", "packed ms", "loki ms", "packed / loki", "bytes say")
    for tokens in _watched(lengths, "timing", len(lengths)):
        run = contenders(
            shape.heads, shape.kv_heads, shape.head_width, tokens=tokens, dtype=torch.float32,
            share=setting.share, page=setting.page, divisor=setting.divisor,
        )  # fmt: skip
        ms = {name: statistics.median(times) for name, times in timed(run, seconds=seconds).items()}
        packed = min(ms["packed"], ms["packed sdpa"])
        bytes_say = shape.cache_bytes(tokens) / shape.cache_bytes(
            tokens, share=setting.share, width=width
        )
        numbers = (ms["sdpa"], packed, ms["loki"], packed / ms["loki"], bytes_say)
        _row(str(tokens), *(f"{number:.2f}" for number in numbers))
    _say("One layer's attention for one sequence, float32, this CPU. Predictions:")
    half = replace(shape, bytes_each=2)
    for device in DEVICES:
        for tokens in lengths:
            told = predict(half, device, tokens=tokens, batch=8, share=setting.share, width=width)
            _say(
                f"{device.name}, {tokens} tokens, batch of 8, 16 bits: {1e3 * told.dense_s:.2f} ms a step, "
                f"{1e3 * told.sparse_s:.2f} with Loki: {told.speedup:.2f} times as fast"
            )


def table(
    model: Model,
    /,
    *,
    texts: Annotated[Texts, Flat] = Texts(tokens=8192),
    lengths: tuple[int, ...] = (512, 2048),
    shares: tuple[float, ...] = (0.125, 0.25),
    windows: int = 4,
    scored: int = 64,
    chart: Path = Path("table.svg"),
) -> None:
    """Print every method's distance from full attention at equal bytes read, and draw it. Needs matplotlib.

    Args:
        model: Hub id, folder, or smollm2.
        texts: What to calibrate on, from the first documents on; windows come from the last ones.
        lengths: Tokens of the windows; sizes of indices are chosen at the first length.
        shares: Of the bytes of the cache that dense attention reads for a token.
        windows: Of each length, besides one on which settings are found.
        scored: Last tokens of a window, which read by selection.
        chart: Figure to write, with bytes on its axis.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError(name="matplotlib")
    wrong = [share for share in shares if not 0 < share < 1]
    if wrong:
        raise ValueError(f"--shares {wrong[0]} of the bytes; use more than 0 and less than 1")
    if min(lengths) <= scored + 1 or windows < 2 or scored < 1:
        raise ValueError(
            f"--lengths {min(lengths)} --scored {scored} --windows {windows}; use windows longer than what "
            "is scored of them, and 2 of them or more"
        )
    whole, tokenizer = _loaded(model)
    from fourfold_loki.calibration import calibrate_tokens, learn_signatures
    from fourfold_loki.calibration import windows as windows_of
    from fourfold_loki.evaluate.table import choose, compete, contenders
    from fourfold_loki.evaluate.traffic import Shape
    from fourfold_loki.reproduce.figures import Reading, bytes_and_divergence
    from fourfold_parallel.reproduce.claims import over_seeds
    from fourfold_parallel.reproduce.figures import save, style

    documents = _documents(texts)
    ids = windows_of(tokenizer, documents, tokens=texts.tokens, context=texts.context)
    with _bar("calibrating") as progress:
        statistics = calibrate_tokens(whole, ids, progress=progress)
        signatures = learn_signatures(whole, ids, progress=progress)
    shape = Shape.of(whole.config.get_text_config(), weights=0, bytes_each=2)
    texts_of = {
        length: windows_of(
            tokenizer, documents[::-1], tokens=(windows + 1) * length, context=length
        )
        for length in lengths
    }
    with _bar("choosing settings") as progress:
        places = choose(
            whole, statistics, signatures, texts_of[lengths[0]][:1],
            shares=shares, prompt=lengths[0] - scored, progress=progress,
        )  # fmt: skip
    readings: list[Reading] = []
    for length, rows in texts_of.items():
        prompt = length - scored
        entered = contenders(
            whole, statistics, signatures, rows[:1], places=places, shares=shares, prompt=prompt
        )
        count = windows * (len(entered) + 1)
        racing = compete(whole, entered, rows[1:], prompt=prompt)
        scores = list(_watched(racing, f"{length} tokens", count))
        _row(f"{length} tokens", "share", "read", "divergence", "low", "high")
        for (name, share), entry in entered.items():
            mine = [score for score in scores if (score.name, score.share) == (name, share)]
            apart = over_seeds([score.divergence for score in mine])
            read = sum(score.read for score in mine) / windows
            numbers = (share, read, apart.value, apart.low, apart.high)
            _row(name, *(f"{number:.4f}" for number in numbers))
            _note(f"{name} at {share:g} of the bytes: {entry.setting}")
            readings.append(
                Reading(
                    arm=name,
                    context=length,
                    bytes_read=read * shape.cache_bytes(length),
                    divergence=apart.value,
                )
            )
    _say(
        f"Divergence from full attention in nats a token, {windows} windows a length, {scored} tokens of "
        "each. The oracle's ranking is not counted."
    )
    with style():
        save(bytes_and_divergence(readings), chart)
    _say(f"chart: {chart}")


def autotune(
    model: Model,
    /,
    *,
    basis: Path = Path("basis.safetensors"),
    texts: Annotated[Texts, Flat] = Texts(),
    page: int = 16,
    max_loss: float = 1.0,
) -> None:
    """Find the setting that reads least while the loss of perplexity is bounded.

    Standard output is the setting as options, so that `ppl MODEL $(... autotune MODEL)` measures it.

    Args:
        model: Hub id, folder, or smollm2.
        basis: File that calibrate wrote.
        texts: What to try settings on; not the calibration's text.
        page: Keys are read in pages of this many.
        max_loss: Largest increase of perplexity, in percent; held by the upper end of a 95 % interval.
    """
    Setting(page=page)
    if max_loss <= 0:
        raise ValueError(f"--max-loss {max_loss} allows no loss at all; use 1 for one percent")
    loaded, tokenizer, fitted = _prepared(model, basis)
    from fourfold_loki.evaluate.tune import autotune as tune

    windows = _windows(texts, tokenizer)
    with _bar("trying settings") as progress:
        chosen, tried = tune(
            loaded,
            windows,
            fitted,
            max_loss=max_loss / 100,
            prompt=texts.context // 2,
            page=page,
            progress=progress,
        )
    for trial in tried:
        _note(
            f"share {trial.share}, width {trial.width}: {math.expm1(trial.nats):+.2%} perplexity, "
            f"at most {math.expm1(trial.nats_bound):+.2%}; reads {trial.read_share:.1%}"
        )
    _note(
        f"in Python: loki(model, basis, Budget(amount=Share(of_visible={chosen.share}), page={page}), "
        f"width={chosen.width})"
    )
    _say(str(Setting(share=chosen.share, divisor=chosen.divisor, page=page)))


def _say(sentence: str) -> None:
    print(sentence)  # noqa: T201 - the answer, on standard output


def _note(sentence: str) -> None:
    print(sentence, file=sys.stderr)  # noqa: T201 - progress, away from the answer


def _row(*cells: str) -> None:
    """A line of a table: the first column wide, the others narrow."""
    first, *others = cells
    _say(f"{first:<14}" + "".join(f"{cell:>15}" for cell in others))


@contextmanager
def _bar(title: str) -> Iterator[Progress]:
    """A progress bar on standard error for the length of a block."""
    from fourfold_parallel.reproduce import terminal

    with terminal.Bars(terminal.console(), 1).running() as bars:
        yield bars.named(title)


def _watched(items: Iterable[Item], title: str, count: int) -> Iterator[Item]:
    """The items, with a bar that moves after each."""
    with _bar(title) as progress:
        for done, item in enumerate(items, start=1):
            progress(done, count, "")
            yield item


def _check_model(model: str) -> None:
    """Refuse a folder that is not there, before anything heavy is imported."""
    if model.startswith(("/", "./", "../", "~")) and not Path(model).is_dir():
        raise ValueError(f"{model} is no folder; name a model's folder, a hub id, or smollm2")


def _check_basis(model: str, basis: Path) -> None:
    """Refuse a file that is not there, likewise."""
    if not basis.is_file():
        raise ValueError(
            f"--basis {basis} is no file; write it by: python -m fourfold_loki calibrate {model} "
            f"--out {basis}"
        )


def _loaded(model: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model in float32 with its tokenizer."""
    _check_model(model)
    _note(f"reading {model}")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fourfold_parallel.reproduce import terminal
    from fourfold_parallel.run.models import model_place

    terminal.start(terminal.console())
    place = model_place(model)
    whole = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    return whole.eval(), AutoTokenizer.from_pretrained(place)


def _prepared(model: str, basis: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Basis]:
    """A model, its tokenizer and the basis of a file."""
    _check_model(model)
    _check_basis(model, basis)
    from fourfold_loki.basis import Basis
    from fourfold_loki.huggingface.sites import check_basis

    fitted = Basis.load(basis)
    whole, tokenizer = _loaded(model)
    check_basis(whole, fitted)
    return whole, tokenizer, fitted


def _calibrated(model: str, texts: Texts) -> Statistics:
    whole, tokenizer = _loaded(model)
    from fourfold_loki.calibration import calibrate as measure

    with _bar("calibrating") as progress:
        return measure(
            whole,
            tokenizer,
            _documents(texts),
            tokens=texts.tokens,
            context=texts.context,
            progress=progress,
        )


def _documents(texts: Texts) -> tuple[str, ...]:
    """The files named, or Wikipedia articles where none is."""
    from fourfold_parallel.run.corpora import TextFiles, Wikipedia

    if texts.text:
        return TextFiles(paths=tuple(map(str, texts.text)), licence="yours").load().texts
    _note("no --text: reading Wikipedia articles")
    return Wikipedia().load().texts


def _windows(texts: Texts, tokenizer: PreTrainedTokenizerBase) -> Int[Tensor, "window context"]:
    """Windows from the last documents on: calibration takes the first ones."""
    from fourfold_loki.calibration import windows

    documents = _documents(texts)[::-1]
    return windows(tokenizer, documents, tokens=texts.tokens, context=texts.context)


def _arms(basis: Basis, setting: Setting) -> dict[str, Sparse]:
    """Loki as asked for, between a perfect ranking and none, under one budget."""
    from fourfold_loki.attention_mode import Sparse
    from fourfold_loki.budget import Budget, Share
    from fourfold_loki.selectors import Exact, Loki, Streaming

    budget = Budget(amount=Share(of_visible=setting.share), page=setting.page, sinks=setting.sinks)
    width = max(1, basis.head_width // setting.divisor)
    return {
        "exact": Sparse(selector=Exact(), budget=budget),
        "loki": Sparse(selector=Loki(basis=basis, widths=(width,) * basis.layers), budget=budget),
        "streaming": Sparse(selector=Streaming(sinks=4), budget=budget),
    }
