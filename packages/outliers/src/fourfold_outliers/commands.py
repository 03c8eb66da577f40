"""The commands of `fourfold-outliers` besides `reproduce`: a signature is the options."""

import json as as_json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fourfold_parallel.reproduce.cli import Switch

if TYPE_CHECKING:
    from fourfold_outliers.report import Report


def report(
    model: Annotated[str, tyro.conf.arg(metavar="MODEL")],
    /,
    *,
    text: tuple[Path, ...] = (),
    tokens: int = 8192,
    context: int = 256,
    seed: int = 0,
    out: Path = Path("outliers.html"),
    json: Switch = False,
) -> None:
    """Say which coordinates are outliers, what they carry, their link to frequency, and what they are worth.

    Prints a table and writes a page. Some dozen passes over the text; SmolLM2-135M takes a few minutes.

    Args:
        model: Hub id, folder, or smollm2.
        text: Text files, a document each; without any, the Wikipedia articles in the wheel of gensim.
        tokens: Tokens of the text to read.
        context: Tokens of a window.
        seed: Of the coordinates that are drawn for comparison.
        out: The page.
        json: Print everything as JSON instead of the table.
    """
    _check(model, text, tokens, context, out)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fourfold_outliers.page import write_page
    from fourfold_outliers.report import outlier_report
    from fourfold_parallel.reproduce.terminal import Bars, console, start
    from fourfold_parallel.run.corpora import TextFiles, Wikipedia
    from fourfold_parallel.run.models import model_place

    target = console()
    start(target)
    files = TextFiles(paths=tuple(map(str, text)), licence="yours") if text else Wikipedia()
    corpus = files.load()
    place = model_place(model)
    loaded: Any = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    loaded = loaded.to("cuda" if torch.cuda.is_available() else "cpu")
    bars = Bars(target, 1)
    with bars.running():
        made = outlier_report(
            loaded,
            AutoTokenizer.from_pretrained(place),
            corpus.texts,
            name=model,
            corpus=corpus.material.name,
            tokens=tokens,
            context=context,
            seed=seed,
            progress=bars.named("report"),
        )
    write_page(made, out)
    sys.stdout.write(_json(made) if json else _table(made))
    target.print(f"page: {out.resolve().as_uri()}", soft_wrap=True)


def _check(model: str, text: tuple[Path, ...], tokens: int, context: int, out: Path) -> None:
    missing = [path for path in text if not path.is_file()]
    if missing:
        raise ValueError(f"--text {missing[0]} is no file; name text files that are there")
    if not 32 <= context <= tokens:
        raise ValueError(
            f"--context {context} of --tokens {tokens}; use 32 to {tokens} tokens a window"
        )
    if out.suffix != ".html":
        raise ValueError(f"--out {out} is no page; name a file that ends in .html")
    if model.startswith(("/", "./", "../", "~")) and not Path(model).is_dir():
        raise ValueError(f"{model} is no folder; name a model's folder, a hub id, or smollm2")


def _json(made: "Report") -> str:
    from fourfold_parallel.common.values import to_json

    return as_json.dumps(to_json(made), indent=1) + "\n"


def _table(made: "Report") -> str:
    """The sentence, the outliers and the layers, as text."""
    from io import StringIO

    from rich.console import Console
    from rich.table import Table

    links = {link.coordinate: link for link in made.links}
    alone = {each.coordinates: each for each in made.effects}
    inner = made.layers[1:-1]
    who = Table(
        "coordinate", "layers", "of the cosine", "link to frequency", "loss without it", box=None
    )
    for d in made.outliers:
        part = sum(layer.contributions[str(d)] for layer in inner)
        size = links[d].size
        who.add_row(
            str(d),
            f"{sum(d in layer.outliers for layer in inner)} of {len(inner)}",
            f"{part / sum(layer.cosine for layer in inner):.0%}",
            f"{size.value:+.2f} [{size.low:+.2f}, {size.high:+.2f}]",
            f"{alone[(d,)].rise.value:+.2f} nats",
        )
    many = Table(
        "layer", "outliers", "cosine", "without", "top three", "first token in them", box=None
    )
    for layer in made.layers:
        many.add_row(
            str(layer.layer),
            " ".join(map(str, layer.outliers)) or "-",
            f"{layer.cosine:.3f}",
            f"{layer.without:.3f}",
            f"{layer.top_share:.0%}",
            f"{layer.first_held:.0%}",
        )
    text = StringIO()
    paper = Console(file=text, width=100, highlight=False)
    paper.print(made.sentence, soft_wrap=True)
    if made.outliers:
        paper.print()
        paper.print(who)
    paper.print()
    paper.print(many)
    return text.getvalue()
