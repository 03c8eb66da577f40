"""Training out of core beside its peers, in turn in one process: seconds by budget, and memory.

    python outofcore.py OUT.jsonl [--parts speed overlap memory larger]

speed: plain training, transformers' checkpointing of every layer, a twin of torch's `save_on_cpu` that
copies (the original copies nothing on a CPU), KARMA's greedy strategy, PooCH's rule and ours, under four
budgets and two speeds of the store. The slower memory is a file, slowed to the speed that a line names;
all peers use the same one. overlap: a store that is busy for 80 % of the computation. memory: the growth
of the resident set under ten budgets. larger: twice the layers under the budget that holds half of them,
and its gradients beside those of more memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fourfold_parallel.common.records import commit, hardware, versions
from fourfold_parallel.karma.measure import (
    EVERYTHING,
    LARGE_PIECES,
    StoreRoad,
    alternated,
    fixed,
    in_turn,
    llama,
    resident_growth,
    road,
    trained,
)
from fourfold_parallel.plan.outofcore import choose, greedy, pooch, seconds_of
from fourfold_parallel.run.engines import Engine, Session, Single
from fourfold_parallel.run.outofcore import OutOfCore
from fourfold_parallel.run.stores import Disk, Shelf, Throttled

WIDTH, TOKENS = 192, 512
BUDGETS = (0.3, 0.5, 0.75, 1.0)
BUSY = (0.8, 1.6)


@dataclass(frozen=True, kw_only=True)
class Checkpointed:
    """Plain training with every decoder layer checkpointed by transformers."""

    takes_outlines: ClassVar[bool] = False

    @contextmanager
    def open(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        precision: Literal["fp32", "bf16"],
        batch: int,
        microbatch: int,
    ) -> Iterator[Session]:
        """A session of one process."""
        switched: Any = model
        switched.activation_checkpointing_enable({"use_reentrant": False})
        with Single().open(
            model, optimizer, precision=precision, batch=batch, microbatch=microbatch
        ) as session:
            yield session


@dataclass(frozen=True, kw_only=True)
class SavedOnCpu:
    """A twin of torch's `save_on_cpu`: a tensor goes out as it is saved, and comes in as it is asked for.

    As there: in order, nothing ahead, weights and views too. On a CPU the original copies nothing.
    """

    takes_outlines: ClassVar[bool] = False
    store: Throttled

    @contextmanager
    def open(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        precision: Literal["fp32", "bf16"],
        batch: int,
        microbatch: int,
    ) -> Iterator[Session]:
        """A session of one process."""
        with Single().open(
            model, optimizer, precision=precision, batch=batch, microbatch=microbatch
        ) as session:
            shelf = self.store.open(session.device)
            inner = session.microbatch

            @contextmanager
            def copying(*, is_last: bool) -> Iterator[None]:
                with inner(is_last=is_last), hooks(shelf):
                    yield

            changed: Any = session
            changed.microbatch = copying
            yield session
            shelf.close()


def hooks(shelf: Shelf) -> Any:
    """Every saved tensor through a shelf, at once."""

    def pack(tensor: Tensor) -> tuple[Any, torch.Size, torch.dtype]:
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        return shelf.write([flat]), tensor.size(), tensor.dtype

    def unpack(held: tuple[Any, torch.Size, torch.dtype]) -> Tensor:
        kept, size, dtype = held
        back = torch.empty(size, dtype=dtype)
        shelf.read(kept, [back.view(-1).view(torch.uint8)])
        shelf.drop(kept)
        return back

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def speed(rounds: int) -> Iterator[dict[str, Any]]:
    """A line for each speed of the store: all peers and budgets in turn."""
    config = llama(8, WIDTH)
    for busy in BUSY:
        way = road(config, TOKENS, busy)
        engines: dict[str, Engine] = {
            "plain": Single(), "checkpoint everywhere": Checkpointed(),
            "save_on_cpu, copying": SavedOnCpu(store=way.store),
        }  # fmt: skip
        plans: dict[str, str] = {}
        for share in BUDGETS:
            budget = share * way.stack.largest_budget
            for name, strategy in (("greedy", greedy), ("PooCH", pooch), ("ours", _ours)):
                plans[f"{name} {share}"] = letters = strategy(way.stack, way.channel, budget)
                engines[f"{name} {share}"] = fixed(way, letters, budget)
        times = in_turn(engines, config, TOKENS, rounds)
        medians = {name: statistics.median(seconds) for name, seconds in times.items()}
        yield {
            "event": "speed", "busy": busy, "layers": 8, "width": WIDTH, "tokens": TOKENS,
            "plain_bytes": way.stack.saved_bytes, "decisions": plans, "seconds": times,
            "over_plain": {name: round(s / medians["plain"], 3) for name, s in medians.items()},
            "ours_over_best_peer": {
                share: round(medians[f"ours {share}"] / min(_peers(medians, share, way)), 3)
                for share in BUDGETS
            },
        }  # fmt: skip


def _ours(stack: Any, channel: Any, budget: float) -> str:
    return choose(stack, channel, budget).decisions


def _peers(medians: dict[str, float], share: float, way: StoreRoad) -> list[float]:
    """Seconds of the peers that a budget allows: checkpointing needs all inputs and a block."""
    names = [f"greedy {share}", f"PooCH {share}", "save_on_cpu, copying"]
    inputs = sum(block.input_bytes for block in way.stack.blocks)
    if inputs + way.stack.smallest_budget <= share * way.stack.largest_budget:
        names.append("checkpoint everywhere")
    if share >= 1:
        names.append("plain")
    return [medians[name] for name in names]


def overlap(rounds: int) -> Iterator[dict[str, Any]]:
    """Half the memory, and a store that all blocks keep busy for 80 % of the computation."""
    config = llama(8, WIDTH)
    way = road(config, TOKENS, 0.8)
    budget = 0.5 * way.stack.largest_budget
    letters = choose(way.stack, way.channel, budget).decisions
    engines: dict[str, Engine] = {"plain": Single(), "ours": fixed(way, letters, budget)}
    times = in_turn(engines, config, TOKENS, rounds)
    ours, plain = (statistics.median(times[name]) for name in ("ours", "plain"))
    yield {
        "event": "overlap", "decisions": letters, "seconds": times, "over_plain": round(ours / plain, 3),
        "predicted_over_plain": round(
            seconds_of(way.stack, way.channel, letters, budget) / way.stack.compute_s, 3
        ),
    }  # fmt: skip


def memory(rounds: int) -> Iterator[dict[str, Any]]:
    """Growth of the resident set in a microbatch, less the gradients', under ten budgets."""
    del rounds
    config, tokens = llama(6, 256), 2048
    store = Throttled(store=Disk(), bytes_per_s=1e9)
    with trained(OutOfCore(inner=Single(), budget=EVERYTHING), config, tokens) as ready:
        session: Any = ready.session
        [(stack, *_)] = session.planner.plans.values()
    least, most = stack.smallest_budget, stack.largest_budget
    for part in range(10):
        budget = least + (most - least) * part // 9
        with trained(
            OutOfCore(inner=Single(), budget=budget, store=store), config, tokens
        ) as ready:
            session = ready.session
            weights = sum(p.nbytes for p in session.model.parameters())
            session.optimizer.zero_grad()

            def run(ready: Any = ready) -> None:
                ready.microbatch()
                ready.session.optimizer.zero_grad()

            growth = resident_growth(run)
            yield {
                "event": "memory", "budget_bytes": budget, "resident_bytes": growth - weights,
                "over_budget": round((growth - weights) / budget, 3),
                "decisions": session.planner.choices[-1].decisions,
            }  # fmt: skip


def larger(rounds: int) -> Iterator[dict[str, Any]]:
    """Twice the layers where half of them fit, beside the same model on memory for all."""
    config = llama(12, WIDTH)
    way = road(config, TOKENS, 1.0)
    budget = 0.5 * way.stack.largest_budget
    letters = choose(way.stack, way.channel, budget).decisions
    with (
        trained(fixed(way, letters, budget), config, TOKENS) as half,
        trained(Single(), config, TOKENS) as whole,
    ):
        times = alternated({"half": half, "whole": whole}, rounds)
        pairs = zip(half.session.model.parameters(), whole.session.model.parameters(), strict=True)
        are_equal = all(
            a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad)
            for a, b in pairs
        )
    yield {
        "event": "larger", "layers": 12, "decisions": letters, "gradients_equal": are_equal,
        "over_whole": round(statistics.median(times["half"]) / statistics.median(times["whole"]), 3),
    }  # fmt: skip


PARTS = {"speed": speed, "overlap": overlap, "memory": memory, "larger": larger}


def main() -> None:
    """Measure and record."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("out", type=Path)
    asked.add_argument("--parts", nargs="*", default=[*PARTS], choices=[*PARTS])
    asked.add_argument("--rounds", type=int, default=5)
    options = asked.parse_args()
    torch.set_num_threads(1)
    if "memory" in options.parts and any(os.environ.get(n) != v for n, v in LARGE_PIECES.items()):
        os.environ.update(LARGE_PIECES)
        os.execv(sys.executable, [sys.executable, *sys.argv])  # noqa: S606 - this program itself
    about = {"hardware": hardware(), "versions": versions(), "commit": commit()}
    with options.out.open("a", encoding="utf-8") as out:
        for name in options.parts:
            for line in PARTS[name](options.rounds):
                print(json.dumps({k: v for k, v in line.items() if k != "seconds"}))
                out.write(json.dumps({**line, **about}) + "\n")
                out.flush()


if __name__ == "__main__":
    main()
