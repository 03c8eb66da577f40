"""What the command line does besides the experiment: audit a corpus, attack a model, train a paper's run."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fourfold_goldfish.corpus_audit import audit, table
from fourfold_goldfish.canonical import CanonicalGoldfish, Spelling
from fourfold_goldfish.reproduce.experiment import EXPERIMENT, train_and_attack
from fourfold_goldfish.loss import Goldfish
from fourfold_goldfish.memorization import Beam, Decoding, Greedy, compare, continuation
from fourfold_goldfish.reproduce.paper import Joined, named, paper_mask
from fourfold_parallel.common.progress import Progress, silent
from fourfold_parallel.common.records import RecordWriter, header, read_record
from fourfold_parallel.reproduce.claims import Records
from fourfold_parallel.reproduce.cli import Bars, console, start
from fourfold_parallel.reproduce.experiment import Stage, Workplace, load
from fourfold_parallel.reproduce.figures import save, style
from fourfold_parallel.run.corpora import TextFiles

COMMANDS = ("audit", "extract", "train", "figure")


def run(command: str, arguments: Sequence[str]) -> None:
    """Perform one of `COMMANDS`; a mistake in the arguments ends with exit status 2 and a sentence."""
    target = console()
    start(target)
    perform = {"audit": _audit, "extract": _extract, "train": _train, "figure": _figure}[command]
    try:
        perform(arguments)
    except (ValueError, OSError) as error:
        target.print(f"[red]{error}[/red]", soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        target.print("interrupted; the same command goes on from here")
        sys.exit(130)


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"python -m fourfold_goldfish {command}", description=description
    )


def _audit(arguments: Sequence[str]) -> None:
    parser = _parser("audit", "What a mask would do to a corpus of text files.")
    parser.add_argument("corpus", nargs="+", help="text files, or folders of .txt files")
    parser.add_argument("--tokenizer", required=True, help="folder or hub id")
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--context", type=int, default=13, help="tokens hashed per decision")
    parser.add_argument("--boundary", default="reset", choices=["reset", "prefix", "straddle"])
    parser.add_argument(
        "--hash", default="ordered", choices=["ordered", "reference", "apertus", "apertus2"]
    )
    parser.add_argument("--window", default="exclusive", choices=["exclusive", "inclusive"])
    parser.add_argument(
        "--canonical",
        type=int,
        metavar="CHARACTERS",
        help="hash so many letters and digits instead of tokens, for near-duplicates",
    )
    chosen = parser.parse_args(arguments)
    tokenizer: Any = AutoTokenizer.from_pretrained(chosen.tokenizer)
    if chosen.canonical is None:
        mask = Goldfish(
            k=chosen.k,
            context=chosen.context,
            boundary=chosen.boundary,
            hash=chosen.hash,
            window=chosen.window,
        )
        shortest = 2 if chosen.boundary == "prefix" else chosen.context + 1
    else:
        spelling = Spelling.of(tokenizer)
        mask = CanonicalGoldfish(k=chosen.k, characters=chosen.canonical, spelling=spelling)
        shortest = 2
    texts = TextFiles(paths=_files(chosen.corpus), licence="not stated").load().texts
    found = audit(texts, tokenizer, mask, shortest=shortest)
    sys.stdout.write(table(found) + "\n")


def _files(names: Sequence[str]) -> tuple[str, ...]:
    """Files as named, folders as the .txt files in them, in order."""
    found: list[str] = []
    for name in names:
        path = Path(name)
        found += [str(one) for one in sorted(path.glob("**/*.txt"))] if path.is_dir() else [name]
    return tuple(found)


def _extract(arguments: Sequence[str]) -> None:
    parser = _parser(
        "extract", "Prompt a model with the beginnings of texts; record what it recites."
    )
    parser.add_argument("texts", nargs="+", help="text files, or folders of .txt files")
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--prompt", type=int, default=50, help="tokens given")
    parser.add_argument("--suffix", type=int, default=50, help="tokens asked for")
    parser.add_argument("--beams", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument(
        "--out", type=Path, default=Path("extraction.jsonl"), help="resumed if there"
    )
    chosen = parser.parse_args(arguments)
    decoding: Decoding = Beam(beams=chosen.beams) if chosen.beams > 1 else Greedy()
    tokenizer: Any = AutoTokenizer.from_pretrained(chosen.model)
    model: Any = AutoModelForCausalLM.from_pretrained(chosen.model).eval()
    needed = chosen.prompt + chosen.suffix
    encoded = {
        name: tokenizer(Path(name).read_text(encoding="utf-8"), verbose=False)["input_ids"][:needed]
        for name in _files(chosen.texts)
    }
    rows = {name: ids for name, ids in encoded.items() if len(ids) == needed}
    if not rows:
        raise ValueError(
            f"none of {len(encoded)} texts has prompt + suffix = {needed} tokens; "
            "use a shorter prompt or suffix"
        )
    asked = {name: value for name, value in vars(chosen).items() if name not in ("texts", "out")}
    exact, done = _attack(model, rows, asked, decoding, chosen.out)
    sys.stdout.write(f"{exact} of {done} texts recited verbatim; records: {chosen.out}\n")


def _attack(
    model: Any, rows: dict[str, list[int]], asked: dict[str, Any], decoding: Decoding, out: Path
) -> tuple[int, int]:
    """Attack what the record does not hold yet; gives how many texts were recited, of how many."""
    if out.exists():
        if read_record(out).run != asked:
            raise ValueError(f"{out} holds another attack than {asked}; name another --out")
        before = list(read_record(out).of("passage"))
    else:
        before = []
        with RecordWriter(out) as records:
            records.write_header(header(asked, seed=0, world_size=1, materials=(), overrides=()))
    seen = {str(event.values["text"]) for event in before}
    exact = sum(bool(event.values["exact"]) for event in before)
    waiting = [name for name in rows if name not in seen]
    bars = Bars(console(), 1)
    with bars.running(), RecordWriter(out) as records:
        progress = bars.stage(_stage("extract"))
        for first in range(0, len(waiting), asked["batch"]):
            names = waiting[first : first + asked["batch"]]
            tokens = torch.tensor([rows[name] for name in names])
            written = continuation(model, tokens[:, : asked["prompt"]], asked["suffix"], decoding)
            found = compare(written, tokens[:, asked["prompt"] :])
            for name, one in zip(names, found, strict=True):
                exact += one.exact
                records.write(
                    "passage",
                    text=name,
                    exact=one.exact,
                    rouge_l=one.rouge_l,
                    matched_tokens=one.matched,
                    longest_run_tokens=one.longest_run,
                    edit_similarity=one.edit_similarity,
                )
            progress(first + len(names), len(waiting), f"{exact} recited")
    return exact, len(seen) + len(waiting)


def _stage(name: str) -> Stage:
    return Stage(name=name, run=name, perform=lambda _: None)


def _train(arguments: Sequence[str]) -> None:
    parser = _parser("train", "One of the papers' own runs; launched on every rank alike.")
    parser.add_argument(
        "recipe", choices=["tinyllama", "tinyllama-equal-supervision", "axonn-study"]
    )
    parser.add_argument(
        "--arm", default="k4", choices=["plain", "k2", "k3", "k4", "k8", "k32", "k128"]
    )
    parser.add_argument("--passages", required=True, help="folder of .txt files that recur")
    parser.add_argument("--background", required=True, help="folder of .txt files seen once")
    parser.add_argument("--weights", required=True, help="folder of a model and its tokenizer")
    parser.add_argument("--learning-rate", type=float, default=1e-5, help="of the study only")
    parser.add_argument("--out", type=Path, default=Path("out/paper/goldfish"))
    chosen = parser.parse_args(arguments)
    corpora = tuple(
        TextFiles(paths=_files([folder]), licence="yours to state")
        for folder in (chosen.passages, chosen.background)
    )
    attacked = named(
        chosen.recipe,
        chosen.arm,
        corpus=Joined(corpora=corpora),
        weights=chosen.weights,
        learning_rate=chosen.learning_rate,
    )
    name = attacked.run.name
    bars = Bars(console(), 1)
    with bars.running():
        progress: Progress = bars.stage(_stage(name)) if console().is_terminal else silent
        workplace = Workplace(
            record=chosen.out / f"{name}.jsonl",
            scratch=chosen.out / "scratch" / name,
            finished={},
            progress=progress,
        )
        train_and_attack(paper_mask(chosen.arm), attacked, workplace)


def _figure(arguments: Sequence[str]) -> None:
    parser = _parser("figure", "Draw a figure from the records in a folder.")
    parser.add_argument("name", help="such as rouge-l")
    parser.add_argument("--scale", default="smoke", choices=["smoke", "laptop"])
    parser.add_argument("--records", type=Path, required=True, help="folder of .jsonl files")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the .svg file")
    chosen = parser.parse_args(arguments)
    drawings = {drawing.name: drawing for drawing in EXPERIMENT.drawings(chosen.scale)}
    if chosen.name not in drawings:
        raise ValueError(
            f"no figure {chosen.name!r} at scale {chosen.scale!r}; there are {', '.join(drawings)}"
        )
    records: Records = load(EXPERIMENT, chosen.scale, chosen.records)
    missing = {one.name for one in EXPERIMENT.stages(chosen.scale)} - set(records)
    if missing:
        raise ValueError(
            f"{chosen.records} lacks {len(missing)} records of scale {chosen.scale!r}, such as "
            f"{sorted(missing)[0]}; run python -m fourfold_goldfish --scale {chosen.scale}"
        )
    with style():
        save(drawings[chosen.name].draw(records), chosen.out / f"{chosen.name}.svg")
