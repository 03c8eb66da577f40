"""Commands for a model of yours: calibrate, rank, doctor, ppl, passkey, tasks, bench, autotune."""

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fourfold_loki.basis import Basis, fit
from fourfold_loki.evaluate.bench import contenders, timed
from fourfold_loki.budget import Budget, Share
from fourfold_loki.calibrate import calibrate, windows
from fourfold_loki.evaluate.doctor import diagnose
from fourfold_loki.evaluate.perplexity import FULL, score
from fourfold_loki.evaluate.passkey import hide, retrieve
from fourfold_loki.attention_mode import Sparse
from fourfold_loki.selectors import Exact, Loki, Streaming
from fourfold_loki.evaluate.traffic import DEVICES, Shape, predict
from fourfold_loki.evaluate.tune import autotune
from fourfold_parallel.reproduce import cli
from fourfold_parallel.run.corpora import TextFiles, Wikipedia
from fourfold_parallel.run.models import SmolLM2

console = cli.console()

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where passkeys are hidden: in front of the text to behind it."""


def say(*cells: str) -> None:
    """One line of a table: the first column wide, the others narrow."""
    first, *others = cells
    console.print(f"{first:<10}" + "".join(f"{cell:>14}" for cell in others), markup=False)


def model_of(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model by its hub id or folder; "smollm2" for the one that installs as a package."""
    place = str(SmolLM2().folder()) if name == "smollm2" else name
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(place)


def texts_of(options: argparse.Namespace) -> tuple[str, ...]:
    """The files named, or Wikipedia articles where none is."""
    if options.text:
        return TextFiles(paths=tuple(options.text), licence="yours").load().texts
    return Wikipedia().load().texts


def text_windows(
    options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase
) -> Int[Tensor, "window context"]:
    """Text to try a basis on: from the end, where no calibration reaches that begins at the beginning."""
    texts = texts_of(options)[::-1]
    return windows(tokenizer, texts, tokens=options.tokens, context=options.context)


def run_calibrate(options: argparse.Namespace) -> None:
    """Write a basis."""
    model, tokenizer = model_of(options.model)
    measured = calibrate(
        model, tokenizer, texts_of(options), tokens=options.tokens, context=options.context
    )
    basis = fit(measured, options.kind)
    basis.save(options.out)
    console.print(
        f"{basis.label.kind} basis of {basis.layers} layers from {options.tokens} tokens: {options.out}"
    )


def run_rank(options: argparse.Namespace) -> None:
    """Print the rank at 90 % by layer."""
    model, tokenizer = model_of(options.model)
    measured = calibrate(
        model, tokenizer, texts_of(options), tokens=options.tokens, context=options.context
    )
    before, after = (measured.of(stage)[0].rank(0.9) for stage in ("before rotary", "after rotary"))
    say("layer", "before rotary", "after rotary")
    for layer in range(measured.layers):
        say(str(layer), str(before[layer].tolist()), str(after[layer].tolist()))
    console.print(
        f"mean {float(before.double().mean()):.1f} before, {float(after.double().mean()):.1f} after"
    )


def arms_of(options: argparse.Namespace, basis: Basis) -> dict[str, Sparse]:
    """Loki by the options, between a perfect ranking and none."""
    budget = Budget(amount=Share(of_visible=options.share), page=options.page)
    width = max(1, basis.head_width // options.divisor)
    return {
        "exact": Sparse(selector=Exact(), budget=budget),
        "loki": Sparse(selector=Loki(basis=basis, widths=(width,) * basis.layers), budget=budget),
        "streaming": Sparse(selector=Streaming(sinks=4), budget=budget),
    }


def run_doctor(options: argparse.Namespace) -> None:
    """Print what a basis would do, layer by layer."""
    model, tokenizer = model_of(options.model)
    basis = Basis.load(options.basis)
    [window] = text_windows(options, tokenizer)[:1]
    arms = {"loki": arms_of(options, basis)["loki"]}
    say("layer", "keys recalled", "mass recalled", "sink kept", "sink's mass")
    worst = 1.0
    for one in diagnose(model, window, arms):
        numbers = (one.recall, one.mass_recall, one.sink_kept, one.sink_mass)
        say(str(one.layer), *(f"{number:.3f}" for number in numbers))
        worst = min(worst, one.mass_recall)
    console.print(f"least attention mass kept in a layer: {worst:.3f}")


def run_ppl(options: argparse.Namespace) -> None:
    """Print what a budget costs."""
    model, tokenizer = model_of(options.model)
    basis = Basis.load(options.basis)
    ids = text_windows(options, tokenizer)
    arms = arms_of(options, basis)
    scored = list(score(model, ids, arms, prompt=options.context // 2))
    full = torch.cat([one.nats for one in scored if one.arm == FULL])
    say("arm", "perplexity", "added", "read of dense")
    for arm in (FULL, *arms):
        mine = [one for one in scored if one.arm == arm]
        nats = torch.cat([one.nats for one in mine])
        added = math.expm1(float((nats - full).mean()))
        read = sum(one.read_share for one in mine) / len(mine)
        say(arm, f"{math.exp(float(nats.mean())):.3f}", f"{added:+.2%}", f"{read:.1%}")
    console.print(f"{len(full)} tokens after prompts of {options.context // 2}")


def run_passkey(options: argparse.Namespace) -> None:
    """Print at which depths a number is found."""
    model, tokenizer = model_of(options.model)
    arms = arms_of(options, Basis.load(options.basis))
    filling = text_windows(options, tokenizer).flatten()
    hidden = hide(tokenizer, filling, context=options.context, depths=DEPTHS, keys=options.passkeys)
    found = list(retrieve(model, hidden, arms))
    say("arm", *(f"depth {depth:.0%}" for depth in DEPTHS))
    for arm in (FULL, *arms):
        told = [
            [one.is_found for one in found if (one.arm, one.depth) == (arm, depth)]
            for depth in DEPTHS
        ]
        say(arm, *(f"{sum(each)} of {len(each)}" for each in told))


def run_tasks(options: argparse.Namespace) -> None:
    """Print lm-evaluation-harness's scores of full attention and Loki on a task of local text."""
    # The harness is the extra [evaluation] of this package.
    from lm_eval.models.huggingface import HFLM

    from fourfold_loki.evaluate.harness import LokiLM, asked, continuations

    model, tokenizer = model_of(options.model)
    task = continuations(tokenizer, text_windows(options, tokenizer), answer=options.context // 8)
    shared = {"pretrained": model, "tokenizer": tokenizer, "batch_size": 4}
    selective: Any = LokiLM  # lm-eval's decorator hides the signature from type checkers
    ours = selective(
        basis=str(options.basis),
        share=options.share,
        page=options.page,
        divisor=options.divisor,
        **shared,
    )
    say("arm", "accuracy", "by length", "questions")
    for name, lm in ((FULL, HFLM(**shared)), ("loki", ours)):
        found = asked(lm, task)
        scores = found["results"]["continuations"]
        questions = found["n-samples"]["continuations"]["effective"]
        say(name, f"{scores['acc,none']:.3f}", f"{scores['acc_norm,none']:.3f}", str(questions))
    console.print(str(ours.reads))


def run_bench(options: argparse.Namespace) -> None:
    """Print the time of a token's attention on this CPU, and what the traffic model says of others."""
    place = str(SmolLM2().folder()) if options.model == "smollm2" else options.model
    config = AutoConfig.from_pretrained(place)
    with torch.device("meta"):
        weights = AutoModelForCausalLM.from_config(config).num_parameters()
    shape = Shape.of(config.get_text_config(), weights=weights, bytes_each=4)
    width = max(1, shape.head_width // options.divisor)
    say("tokens", "sdpa ms", "packed ms", "loki ms", "packed / loki", "bytes say")
    for tokens in options.lengths:
        run = contenders(
            shape.heads,
            shape.kv_heads,
            shape.head_width,
            tokens=tokens,
            dtype=torch.float32,
            share=options.share,
            page=options.page,
            divisor=options.divisor,
        )
        ms = {name: statistics.median(times) for name, times in timed(run, seconds=1.5).items()}
        packed = min(ms["packed"], ms["packed sdpa"])
        bytes_say = shape.cache_bytes(tokens) / shape.cache_bytes(
            tokens, share=options.share, width=width
        )
        numbers = (ms["sdpa"], packed, ms["loki"], packed / ms["loki"], bytes_say)
        say(str(tokens), *(f"{number:.2f}" for number in numbers))
    console.print("one layer's attention for one sequence, float32, this CPU; below: predictions")
    half = replace(shape, bytes_each=2)
    for device in DEVICES:
        for tokens in options.lengths:
            told = predict(half, device, tokens=tokens, batch=8, share=options.share, width=width)
            console.print(
                f"{device.name}, {tokens} tokens, batch of 8, 16 bits: {1e3 * told.dense_s:.2f} ms a step, "
                f"{1e3 * told.sparse_s:.2f} with Loki: {told.speedup:.2f} times as fast"
            )


def run_autotune(options: argparse.Namespace) -> None:
    """Print the cheapest setting within the loss."""
    model, tokenizer = model_of(options.model)
    basis = Basis.load(options.basis)
    chosen, tried = autotune(
        model,
        text_windows(options, tokenizer),
        basis,
        max_loss=options.max_loss / 100,
        prompt=options.context // 2,
        page=options.page,
    )
    for trial in tried:
        console.print(
            f"share {trial.share}, width {trial.width}: {math.expm1(trial.nats):+.2%} perplexity, "
            f"at most {math.expm1(trial.nats_bound):+.2%}; reads {trial.read_share:.1%}"
        )
    console.print(f"use Share(of_visible={chosen.share}), width={chosen.width}")


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "calibrate": run_calibrate,
    "rank": run_rank,
    "doctor": run_doctor,
    "ppl": run_ppl,
    "passkey": run_passkey,
    "tasks": run_tasks,
    "bench": run_bench,
    "autotune": run_autotune,
}


def parser() -> argparse.ArgumentParser:
    """Arguments of all commands."""
    text = argparse.ArgumentParser(prog="python -m fourfold_loki", description=__doc__)
    some = text.add_subparsers(dest="command", required=True)
    for name, run in COMMANDS.items():
        one = some.add_parser(name, help=run.__doc__)
        one.add_argument("model", help="a hub id, a folder, or smollm2")
        if name != "bench":
            one.add_argument("--text", nargs="*", default=[], help="files; without: Wikipedia")
            tokens = {"calibrate": 8192, "rank": 8192, "passkey": 16384}.get(name, 2048)
            one.add_argument("--tokens", type=int, default=tokens, help="of the text")
            one.add_argument("--context", type=int, default=1024, help="tokens a window")
        if name == "calibrate":
            one.add_argument(
                "--kind", choices=["pca", "pca_uncentred", "balanced"], default="balanced"
            )
            one.add_argument("--out", type=Path, default=Path("basis.safetensors"))
        if name in {"doctor", "ppl", "passkey", "tasks", "autotune"}:
            one.add_argument("--basis", type=Path, required=True, help="written by calibrate")
        if name in {"doctor", "ppl", "passkey", "tasks", "bench", "autotune"}:
            one.add_argument("--page", type=int, default=16, help="keys are read in pages")
        if name in {"doctor", "ppl", "passkey", "tasks", "bench"}:
            one.add_argument("--share", type=float, default=0.25, help="of the keys")
            one.add_argument("--divisor", type=int, default=4, help="head width over width")
        if name == "passkey":
            one.add_argument("--passkeys", type=int, nargs="+", default=[71432, 50986, 26817])
        if name == "bench":
            one.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
        if name == "autotune":
            one.add_argument("--max-loss", type=float, default=1.0, help="percent of perplexity")
    return text


def main(arguments: Sequence[str]) -> None:
    """Run a command; say what is wrong with it in one line."""
    options = parser().parse_args(arguments)
    cli.start(console)
    try:
        COMMANDS[options.command](options)
    except (ValueError, OSError) as error:
        console.print(f"[red]{error}[/red]", soft_wrap=True)
        sys.exit(2)
