"""Commands for a model of yours: calibrate, rank, doctor, ppl, autotune."""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fourfold_loki.basis import Basis, fit
from fourfold_loki.budget import Budget, Share
from fourfold_loki.calibrate import calibrate, windows
from fourfold_loki.doctor import diagnose
from fourfold_loki.evaluate import FULL, score
from fourfold_loki.plan import Sparse
from fourfold_loki.selectors import Exact, Loki, Streaming
from fourfold_loki.tune import autotune
from fourfold_parallel.run import cli
from fourfold_parallel.run.corpora import TextFiles, Wikipedia
from fourfold_parallel.run.models import SmolLM2

console = cli.console()


def say(*cells: str) -> None:
    """One line of a table: the first column wide, the others narrow."""
    first, *others = cells
    console.print(f"{first:<10}" + "".join(f"{cell:>16}" for cell in others), markup=False)


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
    statistics = calibrate(
        model, tokenizer, texts_of(options), tokens=options.tokens, context=options.context
    )
    basis = fit(statistics, options.kind)
    basis.save(options.out)
    console.print(
        f"{basis.label.kind} basis of {basis.layers} layers from {options.tokens} tokens: {options.out}"
    )


def run_rank(options: argparse.Namespace) -> None:
    """Print the rank at 90 % by layer."""
    model, tokenizer = model_of(options.model)
    statistics = calibrate(
        model, tokenizer, texts_of(options), tokens=options.tokens, context=options.context
    )
    before, after = statistics.keys_before.rank(0.9), statistics.keys.rank(0.9)
    say("layer", "before rotary", "after rotary")
    for layer in range(statistics.layers):
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
    "autotune": run_autotune,
}


def parser() -> argparse.ArgumentParser:
    """Arguments of all commands."""
    text = argparse.ArgumentParser(prog="python -m fourfold_loki", description=__doc__)
    some = text.add_subparsers(dest="command", required=True)
    for name, run in COMMANDS.items():
        one = some.add_parser(name, help=run.__doc__)
        one.add_argument("model", help="a hub id, a folder, or smollm2")
        one.add_argument("--text", nargs="*", default=[], help="files; without: Wikipedia")
        one.add_argument(
            "--tokens", type=int, default=8192 if name in {"calibrate", "rank"} else 2048
        )
        one.add_argument("--context", type=int, default=1024, help="tokens a window")
        if name == "calibrate":
            one.add_argument(
                "--kind", choices=["pca", "pca_uncentred", "balanced"], default="balanced"
            )
            one.add_argument("--out", type=Path, default=Path("basis.safetensors"))
        if name in {"doctor", "ppl", "autotune"}:
            one.add_argument("--basis", type=Path, required=True, help="written by calibrate")
            one.add_argument("--page", type=int, default=16, help="keys are read in pages")
        if name in {"doctor", "ppl"}:
            one.add_argument("--share", type=float, default=0.25, help="of the keys")
            one.add_argument("--divisor", type=int, default=4, help="head width over width")
        if name == "autotune":
            one.add_argument("--max-loss", type=float, default=1.0, help="percent of perplexity")
    return text


def main(arguments: Sequence[str]) -> None:
    """Run a command; say what is wrong with it in one line."""
    options = parser().parse_args(arguments)
    cli.start(console)
    try:
        COMMANDS[options.command](options)
    except ValueError as error:
        console.print(f"[red]{error}[/red]", soft_wrap=True)
        sys.exit(2)
