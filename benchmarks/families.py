"""Every causal language model of transformers at toy size, in every package: right, or refused by name.

    scripts/env python benchmarks/families.py [--only mixtral,deepseek_v3] [--out FILE.jsonl]
    scripts/env python benchmarks/families.py --record    # all, into the committed record, and its page

Each type is built small and random, and compared with itself:

parallel  on five grids of four gloo ranks, in float64: loss, logits, every gradient, one optimizer step
loki      at full budget with dense greedy decoding; a quarter of the budget must run, and read a quarter
goldfish  the loss without logits with masked cross-entropy on the model's own logits, and its gradients
retrofit  at one recurrence with the dense model, padded too, and in `generate`; three recurrences must train

Types that FILE holds from the installed transformers are passed over, so that a sweep that was stopped
goes on; others are measured anew.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from torch import Tensor
from transformers import PretrainedConfig

from fourfold_goldfish import CompactedNextToken, Goldfish
from fourfold_loki import Budget, Share, fit, loki
from fourfold_loki.calibration import calibrate_tokens
from fourfold_parallel.certify.compare import (
    EXACT,
    GridOutcome,
    batch_of,
    failed,
    largest,
    on_grids,
    relative,
    worst_of,
)
from fourfold_parallel.certify.toys import (
    NOT_BUILT,
    causal_types,
    default_toy,
    in_float64,
    toy_model,
)
from fourfold_parallel.run.data import Batch
from fourfold_parallel.run.objective import NextToken
from fourfold_parallel.testing.grids import Sizes
from fourfold_parallel.testing.ranks import LawBrokenError, close_ranks, run_on_ranks
from fourfold_recurrent_depth.retrofit import retrofit

RECORD = Path(__file__).with_suffix(".jsonl")
README = Path(__file__).parents[1] / "packages/parallel/README.md"
PAGE = README.parent / "docs/families.md"
RANKS = 4
GRIDS: dict[str, Sizes] = {
    "row4": (1, 1, 4, 1), "col4": (1, 1, 1, 4), "depth4": (1, 4, 1, 1), "row2col2": (1, 1, 2, 2),
    "row2depth2": (1, 2, 2, 1),
}  # fmt: skip
ROUNDED = 1e-3
"""Of logits in float32, in which bases are fitted; a fault shows at one and above."""
NEW_TOKENS = 8
Outcomes = dict[str, GridOutcome]


def has_plan(config: PretrainedConfig) -> bool:
    """Whether the type publishes a tensor-parallel plan."""
    return bool(config.base_model_tp_plan)


def on_the_grid(config: PretrainedConfig, how: dict[str, Any]) -> Outcomes:
    """The outcome of each grid; ranks are started anew after a crash, which may leave them apart."""
    for is_last in (False, True):
        try:
            by_rank = run_on_ranks(
                RANKS,
                on_grids,
                config=config,
                grids=[*GRIDS.values()],
                dtype=torch.float64,
                how=how,
            )
        except LawBrokenError as error:
            if is_last:  # a machine that stands still for minutes is no fault of a model
                return {
                    name: GridOutcome(result="crash", message=str(error)[-400:]) for name in GRIDS
                }
        else:
            by_grid = zip(*by_rank, strict=True)
            outcomes = {name: worst_of(ranks) for name, ranks in zip(GRIDS, by_grid, strict=True)}
            if any(outcome.result == "crash" for outcome in outcomes.values()):
                close_ranks(RANKS)
            return outcomes
    raise AssertionError


def judged(differences: dict[str, float], limit: float) -> GridOutcome:
    """Equal where every difference is within the limit."""
    is_equal = all(difference <= limit for difference in differences.values())
    return GridOutcome(result="equal" if is_equal else "wrong", differences=differences)


def greedy(model: Any, tokens: Tensor, mask: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Tokens and logits of greedy decoding."""
    out = model.generate(
        tokens, attention_mask=mask, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False,
        return_dict_in_generate=True, output_logits=True, pad_token_id=0, eos_token_id=None, **options,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits)


def decoded(ours: tuple[Tensor, Tensor], full: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Differences of two greedy decodings."""
    return {
        "tokens": float((ours[0] != full[0]).any()),
        "logits": relative(ours[1], full[1], scale=largest(full[1])),
    }


def with_loki(config: PretrainedConfig) -> GridOutcome:
    """Full budget against dense greedy decoding, with the model's cache and a LokiCache; a quarter runs."""
    model: Any = toy_model(config, dtype=torch.float32).eval()
    batch = batch_of(rows=4, tokens=24)
    mask = torch.ones_like(batch.tokens)
    mask[0, :5] = 0
    try:
        full = greedy(model, batch.tokens, mask)
    except Exception as error:  # noqa: BLE001 - then there is nothing to compare with
        return GridOutcome(result="refused", message=f"transformers' own generate: {error}")
    basis = fit(calibrate_tokens(model, batch_of(rows=8, tokens=48).tokens))
    everything, quarter = (Budget(amount=Share(of_visible=share)) for share in (1.0, 0.25))
    with loki(model, basis, everything) as session:
        differences = decoded(greedy(model, batch.tokens, mask), full)
        try:
            held = session.cached()
        except ValueError:  # models whose caches hold more than keys
            held = None
        if held is not None:
            cached = decoded(greedy(model, batch.tokens, mask, **held), full)
            differences |= {f"{name} with a LokiCache": value for name, value in cached.items()}
    with loki(model, basis, quarter) as session:
        _, logits = greedy(model, batch.tokens, mask)
        share = session.reads.share
    differences["after the session"] = decoded(greedy(model, batch.tokens, mask), full)["logits"]
    found = judged(differences, ROUNDED)
    if found.result == "equal" and not (torch.isfinite(logits).all() and share < 0.5):
        return GridOutcome(
            result="wrong", differences=differences, message=f"a quarter reads {share:.2f}"
        )
    return found


def with_goldfish(config: PretrainedConfig) -> GridOutcome:
    """The loss without logits, and its gradients, against the model's own logits."""
    with in_float64():
        model: Any = toy_model(config)
        tokens = batch_of(rows=3, tokens=25).tokens
        batch = Batch(tokens=tokens, document_ids=torch.zeros_like(tokens), addresses=(0, 1, 2))
        mask = Goldfish(k=2, context=4)
        found = []
        for objective in (NextToken(mask=mask), CompactedNextToken(mask=mask, chunk=7)):
            model.zero_grad()
            loss = objective.loss(model, batch, objective.targets(batch)).nats_sum
            loss.backward()
            gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            found.append((loss.detach(), gradients))
    (expected, of_all), (ours, gradients) = found
    if gradients.keys() != of_all.keys():
        return GridOutcome(
            result="wrong", message=f"gradients of {sorted(gradients.keys() ^ of_all.keys())[:3]}"
        )
    small = 1e-3 * max(largest(gradient) for gradient in of_all.values())
    apart = {
        name: relative(gradients[name], gradient, scale=max(largest(gradient), small))
        for name, gradient in of_all.items()
    }
    loss_apart = relative(ours, expected, scale=largest(expected))
    return judged({"loss": loss_apart, "gradients": max(apart.values())}, EXACT)


def with_recurrence(config: PretrainedConfig) -> GridOutcome:
    """All layers, once through: the dense model. Three times through: it trains."""
    with in_float64():
        dense: Any = toy_model(config)
        batch = batch_of(rows=3, tokens=12)
        mask = torch.ones_like(batch.tokens)
        mask[0, :4] = 0
        kept = mask.bool()
        recurrent = layers_twice(dense)
        try:
            full = greedy(dense, batch.tokens, mask)
        except Exception:  # noqa: BLE001 - some cannot generate; their logits are still compared
            full = None
        with torch.no_grad():
            logits = [
                (model(batch.tokens, **given).logits)
                for given in ({}, {"attention_mask": mask})
                for model in (dense, recurrent)
            ]
        differences = {
            "logits": relative(logits[1], logits[0], scale=largest(logits[0])),
            "padded logits": relative(logits[3][kept], logits[2][kept], scale=largest(logits[2])),
        }
        if full is not None:
            for name, value in decoded(greedy(recurrent, batch.tokens, mask), full).items():
                differences[f"generated {name}"] = value
        out = recurrent(batch.tokens, labels=batch.tokens, num_steps=3)
        out.loss.backward()
        greedy(recurrent, batch.tokens, mask, num_steps=3)
    norm = recurrent.adapter.weight.grad.norm()
    if not (torch.isfinite(norm) and norm > 0):
        return GridOutcome(
            result="wrong", differences=differences, message="no gradient of the adapter"
        )
    return judged(differences, EXACT)


def layers_twice(dense: Any) -> Any:
    """A retrofitted copy that leaves no layer out."""
    twin = copy.deepcopy(dense)
    inner = twin.get_decoder()
    count = len(inner.layers) if hasattr(inner, "layers") else 1
    return retrofit(twin, min(1, count - 1), max(1, count - 2), 1 if count > 2 else 0)


PAPERS: dict[str, tuple[str, Callable[[PretrainedConfig], GridOutcome]]] = {
    "loki": ("fourfold_loki", with_loki),
    "goldfish": ("fourfold_goldfish", with_goldfish),
    "retrofit": ("fourfold_recurrent_depth", with_recurrence),
}


def of_paper(name: str, config: PretrainedConfig) -> GridOutcome:
    """What a paper's package makes of a type."""
    package, measure = PAPERS[name]
    try:
        return measure(config)
    except Exception as error:  # noqa: BLE001 - whatever a model raises is its outcome
        return failed(error, ours=str(Path(import_module(package).__file__ or "").parent))


def short(outcome: GridOutcome) -> dict[str, Any]:
    """For the record: differences to two digits, and where only if something is wrong."""
    values = outcome.as_dict()
    values.pop("whole", None)
    if outcome.result != "wrong":
        values.pop("where", None)
    if outcome.differences:
        values["differences"] = {k: float(f"{v:.1e}") for k, v in outcome.differences.items()}
    return values


def event_of(model_type: str, what: list[str], how: dict[str, Any]) -> dict[str, Any]:
    """The line of a type in the record."""
    event: dict[str, Any] = {"family": model_type, "transformers": transformers.__version__}
    if model_type in NOT_BUILT:
        return event | {"not_built": NOT_BUILT[model_type]}
    config = default_toy(model_type)
    event["plan"] = has_plan(config)
    if "parallel" in what:
        outcomes = on_the_grid(config, how)
        event["parallel"] = {name: short(outcome) for name, outcome in outcomes.items()}
        blocks = (block for outcome in outcomes.values() for block in outcome.whole)
        event["whole"] = [*dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", block) for block in blocks)]
    for name in PAPERS:
        if name in what:
            # Retrofitting refuses factors that are not one, and few published models have one.
            toy = default_toy(model_type, telling=name != "retrofit")
            event[name] = short(of_paper(name, toy))
    return event


def said(event: dict[str, Any]) -> str:
    """A line for a person, and the messages under it."""
    if "not_built" in event:
        return f"{event['family']:26} not built: {event['not_built']}"
    outcomes = event.get("parallel", {}) | {name: event[name] for name in PAPERS if name in event}
    words = []
    for name, outcome in outcomes.items():
        largest_one = max(outcome.get("differences", {}).values(), default=None)
        number = "" if largest_one is None else f" {largest_one:.0e}"
        words.append(f"{name} {outcome['result']}{number}")
    messages = {f"\n    {o['message']}": None for o in outcomes.values() if "message" in o}
    return f"{event['family']:26} {'  '.join(words)}{''.join(messages)}"


def read(path: Path) -> list[dict[str, Any]]:
    """A record's events, one a type; the last one of a type stands."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    events = {event["family"]: event for event in map(json.loads, lines)}
    return [events[name] for name in sorted(events)]


WORST = ("equal", "refused", "wrong", "crash")


def grid_result(event: dict[str, Any]) -> str:
    """The worst of a type's grids; of equal ones, whether blocks ran whole."""
    outcomes = event["parallel"].values()
    worst = max((outcome["result"] for outcome in outcomes), key=WORST.index)
    return "equal, partly whole" if worst == "equal" and event["whole"] else worst


def reason(message: str, family: str) -> str:
    """A refusal's first line, without the names of one type's classes and without its numbers."""
    text = re.sub(
        r"\b\w+(ForCausalLM|LMHeadModel|ForConditionalGeneration|WithLMHead)\b", "it", message
    )
    text = re.sub(
        rf"^{re.escape(family)}\b|\b\w+_text(?= computes| has)", "it", text.splitlines()[0]
    )
    text = re.sub(r"\b\w+Attention\b", "its attention", text)
    return re.sub(r"\d+(\.\d+)?", "N", text) + ":"


def page(events: list[dict[str, Any]]) -> str:
    """What every type gave, as Markdown."""
    built = [event for event in events if "not_built" not in event]
    rows = [("parallel, types that publish a plan", [e for e in built if e["plan"]], grid_result)]
    rows += [("parallel, types without a plan", [e for e in built if not e["plan"]], grid_result)]
    rows += [(name, built, lambda e, name=name: e[name]["result"]) for name in PAPERS]
    results = ("equal", "equal, partly whole", "refused", "wrong", "crash")
    lines = [
        "# Families of models",
        "",
        f"Every causal language model of transformers {built[0]['transformers']} at toy size with random "
        "weights, compared with itself",
        "(`benchmarks/families.py --record` makes this page and its record, `benchmarks/families.jsonl`).",
        "",
        f"- parallel: {', '.join(GRIDS)}, in float64: loss, logits, every gradient and one",
        f"  optimizer step within {EXACT:.0e}. *Partly whole*: blocks that no rule of the grid covers are",
        "  computed alike by every rank of row and col.",
        "- loki: greedy decoding at full budget, with the model's cache and a LokiCache; a quarter of the "
        "budget runs.",
        "- goldfish: the loss without logits, and its gradients, with those of the model's own logits.",
        "- retrofit: all layers once through with the dense model, padded too, and in `generate`; three",
        "  times through it trains.",
        "",
        "| | " + " | ".join(results) + " |",
        "|---" * (len(results) + 1) + "|",
    ]
    for name, group, result in rows:
        counts = [sum(result(event) == wanted for event in group) for wanted in results]
        lines.append(f"| {name} | {' | '.join(str(count or '') for count in counts)} |")
    lines += [
        "",
        "| type | plan | parallel | blocks whole | loki | goldfish | retrofit |",
        "|---|---|---|---|---|---|---|",
    ]
    for event in built:
        papers = " | ".join(event[name]["result"] for name in PAPERS)
        plan = "yes" if event["plan"] else ""
        blocks = ", ".join(f"`{name}`" for name in event["whole"])
        lines.append(f"| {event['family']} | {plan} | {grid_result(event)} | {blocks} | {papers} |")
    lines += ["", "Not built at toy size:", ""]
    lines += [f"- {e['family']}: {e['not_built']}" for e in events if "not_built" in e]
    lines += ["", "## Refusals", ""]
    for name in ("parallel", *PAPERS):
        reasons: dict[str, list[str]] = {}
        for event in built:
            outcomes = event[name].values() if name == "parallel" else [event[name]]
            texts = [outcome["message"] for outcome in outcomes if outcome["result"] == "refused"]
            for text in texts[:1]:
                reasons.setdefault(reason(text, event["family"]), []).append(event["family"])
        for text, families in sorted(reasons.items(), key=lambda item: (-len(item[1]), item[0])):
            lines.append(f"- {name}: {text} *{', '.join(families)}*")
    return "\n".join(lines) + "\n"


def row(events: list[dict[str, Any]]) -> str:
    """The line of the README's table."""
    built = [event for event in events if "not_built" not in event]
    parts = []
    for has, word in ((True, "with a published plan"), (False, "without")):
        group = [event for event in built if event["plan"] is has]
        equal = [event for event in group if grid_result(event).startswith("equal")]
        divided = sum(not event["whole"] for event in equal)
        parts.append(f"{word} {len(equal)} of {len(group)} ({divided} without a whole block)")
    return (
        f"{ROW} of {', '.join(GRIDS)} | | {'; '.join(parts)}; the others are refused by name | toy size, "
        f"random weights, float64, transformers {built[0]['transformers']} | `benchmarks/families.jsonl` |"
    )


ROW = "| types of causal models whose loss, logits, every gradient and step equal one process' on each"
"""How the README's line begins."""


def write_pages(events: list[dict[str, Any]]) -> None:
    """The page of the record, and the README's line."""
    PAGE.write_text(page(events), encoding="utf-8")
    lines = README.read_text(encoding="utf-8").splitlines()
    lines = [row(events) if line.startswith(ROW) else line for line in lines]
    README.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Sweep, and say each type's outcome as it comes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default="", help="types, separated by commas")
    parser.add_argument("--what", default="parallel,loki,goldfish,retrofit", help="packages")
    parser.add_argument(
        "--out", type=Path, help="append to this JSONL, and pass over what it holds"
    )
    parser.add_argument("--record", action="store_true", help="write the committed record and page")
    parser.add_argument("--plan", action="store_true", help="only types that publish a plan")
    parser.add_argument("--whole", choices=["allow", "refuse"], help="handed to parallelize")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    how = {"whole": given.whole} if given.whole else {}
    names = [name.strip() for name in given.only.split(",") if name.strip()] or causal_types()
    if given.record and (given.only or given.plan or given.what.count(",") < 3):
        parser.error("--record sweeps every type in every package; leave the other choices out")
    if unknown := [name for name in names if name not in causal_types()]:
        parser.error(
            f"{unknown} are no causal language models of transformers {transformers.__version__}"
        )
    out = RECORD if given.record else given.out
    version = transformers.__version__
    done = {e["family"] for e in read(out) if e["transformers"] == version} if out else set[str]()
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for name in names:
        if name in done:
            continue
        if given.plan and (name in NOT_BUILT or not has_plan(default_toy(name))):
            continue
        started_s = time.perf_counter()
        event = event_of(name, given.what.split(","), how)
        console.print(f"{said(event)}   {time.perf_counter() - started_s:.1f} s")
        if out:
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")
    if given.record:
        events = [event for event in read(RECORD) if event["transformers"] == version]
        RECORD.write_text("".join(json.dumps(e) + "\n" for e in events), encoding="utf-8")
        write_pages(events)


if __name__ == "__main__":
    main()
