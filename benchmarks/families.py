"""Every causal language model of transformers at toy size: right, or refused by name.

    scripts/env python benchmarks/families.py [--only mixtral,deepseek_v3] [--out FILE.jsonl]

Each type is built random and small, in float64, and compared with itself on five grids of four gloo
ranks: loss, logits, every gradient, one optimizer step. Types that FILE already holds are passed over,
so that a sweep that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from transformers import PretrainedConfig

from fourfold_parallel.certify.compare import EXACT, Outcome, on_grids, worst_of
from fourfold_parallel.certify.toys import NOT_BUILT, causal_types, default_toy
from fourfold_parallel.testing.grids import Sizes
from fourfold_parallel.testing.ranks import LawBrokenError, close_ranks, run_on_ranks

RANKS = 4
GRIDS: dict[str, Sizes] = {
    "row4": (1, 1, 4, 1), "col4": (1, 1, 1, 4), "depth4": (1, 4, 1, 1), "row2col2": (1, 1, 2, 2),
    "row2depth2": (1, 2, 2, 1),
}  # fmt: skip


def has_plan(config: PretrainedConfig) -> bool:
    """Whether the type publishes a tensor-parallel plan."""
    return bool(config.base_model_tp_plan or config.get_text_config().base_model_tp_plan)


def grids_of(model_type: str, how: dict[str, Any]) -> tuple[PretrainedConfig, dict[str, Outcome]]:
    """The outcome of each grid; ranks are started anew after a crash, which may leave them apart."""
    config = default_toy(model_type)
    try:
        by_rank = run_on_ranks(
            RANKS,
            on_grids,
            config=config,
            grids=[*GRIDS.values()],
            dtype=torch.float64,
            limit=EXACT,
            how=how,
        )
    except LawBrokenError as error:
        return config, {name: Outcome(result="crash", message=str(error)[-400:]) for name in GRIDS}
    outcomes = {
        name: worst_of(ranks) for name, ranks in zip(GRIDS, zip(*by_rank, strict=True), strict=True)
    }
    if any(outcome.result == "crash" for outcome in outcomes.values()):
        close_ranks(RANKS)
    return config, outcomes


def main() -> None:
    """Sweep, and say each type's outcome as it comes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default="", help="types, separated by commas")
    parser.add_argument(
        "--out", type=Path, help="append to this JSONL, and pass over what it holds"
    )
    parser.add_argument("--plan", action="store_true", help="only types that publish a plan")
    parser.add_argument("--whole", choices=["allow", "refuse"], help="handed to parallelize")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    how = {"whole": given.whole} if given.whole else {}
    names = [name.strip() for name in given.only.split(",") if name.strip()] or causal_types()
    if unknown := [name for name in names if name not in causal_types()]:
        parser.error(
            f"{unknown} are no causal language models of transformers {transformers.__version__}"
        )
    done = set()
    if given.out and given.out.exists():
        lines = given.out.read_text(encoding="utf-8").splitlines()
        done = {event["family"] for event in map(json.loads, lines)}
    console = Console(soft_wrap=True, highlight=False)
    for name in names:
        if name in done:
            continue
        started_s = time.perf_counter()
        event: dict[str, Any] = {"family": name, "transformers": transformers.__version__}
        if name in NOT_BUILT:
            event["not_built"] = NOT_BUILT[name]
            console.print(f"{name:26} not built: {NOT_BUILT[name]}")
        else:
            config, outcomes = grids_of(name, how)
            event["plan"] = has_plan(config)
            if given.plan and not event["plan"]:
                continue
            event["parallel"] = {grid: outcome.as_dict() for grid, outcome in outcomes.items()}
            elapsed_s = time.perf_counter() - started_s
            words = "  ".join(
                f"{grid} {outcome.result}"
                + (f" {outcome.difference:.0e}" if outcome.result in ("equal", "wrong") else "")
                for grid, outcome in outcomes.items()
            )
            console.print(f"{name:26} {words}   {elapsed_s:.1f} s")
            for text in {o.message: None for o in outcomes.values() if o.message}:
                console.print(f"    {text}", markup=False)
        if given.out:
            with given.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")


if __name__ == "__main__":
    main()
