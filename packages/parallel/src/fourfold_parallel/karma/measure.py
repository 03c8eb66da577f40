"""Timed microbatches of small Llamas under several engines in turn, and drawn stacks."""

from __future__ import annotations

import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from fourfold_parallel.grid.engine import Fourfold
from fourfold_parallel.grid.gradients import local
from fourfold_parallel.karma.measures import MATCHED
from fourfold_parallel.launch import Ranks
from fourfold_parallel.plan.blocks import BlockCost, Stack, middle
from fourfold_parallel.plan.machine import Channel
from fourfold_parallel.run.engines import DDP, Engine, Session, Single
from fourfold_parallel.run.hosted import HostUpdate
from fourfold_parallel.run.outofcore import Decisions, OutOfCore
from fourfold_parallel.run.stores import Disk, Host, Throttled

ROW = 128
VOCABULARY = 256
"""Small, so that blocks are nearly all of a step."""
EVERYTHING = 2**62
"""Bytes that keep any of these models."""


def llama(layers: int, width: int) -> LlamaConfig:
    """The shape of the studies' models."""
    return LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 32,
        num_key_value_heads=width // 32, intermediate_size=3 * width, vocab_size=VOCABULARY,
        max_position_embeddings=ROW, use_cache=False,
    )  # fmt: skip


class Trained:
    """A model on an engine, and this rank's share of a batch."""

    def __init__(self, session: Session, tokens: int) -> None:
        self.session = session
        random = torch.Generator().manual_seed(0)
        rows = torch.randint(0, VOCABULARY, (tokens // ROW, ROW), generator=random)
        self.rows: Tensor = rows.chunk(session.ranks)[session.rank]

    def microbatch(self) -> None:
        """Forward and backward; gradients do not add up."""
        self.session.optimizer.zero_grad()
        with self.session.microbatch(is_last=True):
            logits = self.session.model(input_ids=self.rows, use_cache=False).logits
            # The mean over what this rank has of the vocabulary: no engine needs to exchange anything for it.
            self.session.backward(logits.float().square().mean())

    def seconds(self) -> float:
        """Of one microbatch."""
        started_s = time.perf_counter()
        self.microbatch()
        return time.perf_counter() - started_s


@contextmanager
def trained(engine: Engine, config: LlamaConfig, tokens: int) -> Iterator[Trained]:
    """A fresh model, whose first microbatch is over: it has measured and planned."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rows = tokens // ROW
    with engine.open(model, optimizer, precision="fp32", batch=rows, microbatch=rows) as session:
        ready = Trained(session, tokens)
        ready.microbatch()
        yield ready


def in_turn(
    engines: Mapping[str, Engine], config: LlamaConfig, tokens: int, rounds: int
) -> dict[str, list[float]]:
    """Seconds of a microbatch under each engine, so many rounds, all engines in each."""
    with ExitStack() as scope:
        ready: dict[str, Trained | Measured] = {
            name: scope.enter_context(trained(engine, config, tokens))
            for name, engine in engines.items()
        }
        return alternated(ready, rounds)


def alternated(
    models: Mapping[str, Trained | Measured | Stepped], rounds: int
) -> dict[str, list[float]]:
    """Seconds of a microbatch of each model; a first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):
        for name, model in models.items():
            model.session.wait()
            seconds = model.seconds()
            if turn:
                times[name].append(round(seconds, 5))
    return times


class Measured:
    """A model whose blocks are measured anew whenever its turn comes."""

    def __init__(self, model: Trained) -> None:
        self.model = model
        self.session: Session = model.session
        self.stacks: list[Stack] = []

    def seconds(self) -> float:
        """Measures; gives seconds of a microbatch in which everything is kept, blocks taken one by one."""
        session: Any = self.session
        session.planner.plans.clear()
        self.model.microbatch()
        [(stack, *_)] = session.planner.plans.values()
        self.stacks.append(stack)
        return stack.compute_s


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreRoad:
    """A model's blocks, and a store that is slowed to be so busy."""

    stack: Stack
    channel: Channel
    store: Throttled


PROFILES = 3


def road(config: LlamaConfig, tokens: int, busy: float) -> StoreRoad:
    """A model's blocks, measured, and a store so slow that all of them take `busy` of the computation."""
    with trained(OutOfCore(inner=Single(), budget=EVERYTHING), config, tokens) as ready:
        measured = Measured(ready)
        for _ in range(PROFILES):
            measured.seconds()
    stack = middle(measured.stacks)
    rate = 2 * stack.saved_bytes / (busy * stack.compute_s)
    channel = Channel(out_bytes_per_s=rate, in_bytes_per_s=rate)
    return StoreRoad(stack=stack, channel=channel, store=Throttled(store=Disk(), bytes_per_s=rate))


def fixed(road: StoreRoad, decisions: str, budget: float) -> OutOfCore:
    """Decisions made elsewhere, on a road."""
    return OutOfCore(
        inner=Single(), budget=Decisions(letters=decisions, budget=budget), store=road.store
    )


def drawn(generator: random.Random, blocks: int) -> tuple[Stack, Channel, float]:
    """A stack, a channel and a budget: sizes and times of each block within a factor of four."""
    row = []
    for _ in range(blocks):
        forward_s, saved = generator.uniform(0.5, 2.0), generator.randint(50, 200)
        row.append(
            BlockCost(
                forward_s=forward_s, backward_s=forward_s * generator.uniform(1.7, 2.3),
                saved_bytes=saved, input_bytes=saved // generator.randint(5, 20),
                spare_bytes=generator.randint(0, saved // 5),
            )
        )  # fmt: skip
    if generator.random() < 0.5:  # most models' blocks are alike
        row = row[:1] * blocks
    stack = Stack(
        blocks=tuple(row), before_s=0.1, between_s=generator.uniform(0.0, 2.0), after_s=0.1
    )
    rate = stack.saved_bytes / stack.compute_s * generator.uniform(0.5, 4.0)
    channel = Channel(
        out_bytes_per_s=rate, in_bytes_per_s=rate * generator.uniform(0.7, 1.4),
        out_latency_s=generator.uniform(0, 0.1), in_latency_s=generator.uniform(0, 0.1),
    )  # fmt: skip
    room = stack.largest_budget - stack.smallest_budget
    return stack, channel, stack.smallest_budget + room * generator.uniform(0.0, 0.9)


LARGE_PIECES = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Environment in which larger pieces of memory are the system's own from the start of a process: freed, they
leave the resident set. Without it glibc keeps them, and hides what training frees."""


def resident_growth(run: Callable[[], None]) -> int:
    """The most by which a call enlarges this process' resident set, on Linux.

    Raises:
        ValueError: The process was started without `LARGE_PIECES`.
    """
    missing = [
        f"{name}={value}" for name, value in LARGE_PIECES.items() if os.environ.get(name) != value
    ]
    if missing:
        raise ValueError(
            f"start this process with {' '.join(missing)}, or its resident set tells nothing"
        )
    run()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"this system does not tell {key}; the study needs Linux")


def peak_bytes(model: Trained) -> int:
    """Weights, AdamW's two moments, and the most that a microbatch adds."""
    weights = sum(local(p.detach()).nbytes for p in model.session.model.parameters())
    model.session.optimizer.zero_grad()

    def run() -> None:
        model.microbatch()
        model.session.optimizer.zero_grad()

    return 3 * weights + resident_growth(run)


def equal_memory(
    *, grid: str, width: int, layers: int, tokens: int, busy: float, rounds: int
) -> dict[str, Any]:
    """A law of two ranks: DDP out of core with the memory that a grid takes, in turn with the grid.

    Args:
        grid: `row` or `depth`, of size 2.
        width: of the model.
        layers: of the model.
        tokens: of a rank under data parallelism.
        busy: see `Hybrid`.
        rounds: timed.
    """
    config = llama(layers, width)
    model_parallel = Fourfold(row=2) if grid == "row" else Fourfold(depth=2)
    with trained(model_parallel, config, 2 * tokens) as other:
        target = Ranks().gather(peak_bytes(other))[0]
        with trained(OutOfCore(inner=DDP(), budget=EVERYTHING), config, 2 * tokens) as whole:
            session: Any = whole.session
            [(stack, *_)] = session.planner.plans.values()
            plain = Ranks().gather(peak_bytes(whole))[0]
        rate = 2 * stack.saved_bytes / (busy * stack.compute_s)
        store = Throttled(store=Disk(), bytes_per_s=Ranks().gather(rate)[0])
        budget = stack.largest_budget - max(0, plain - target)
        times: dict[str, list[float]] = {}
        decisions, peak = "", 0
        for last in (False, False, True):
            budget = min(max(budget, stack.smallest_budget), stack.largest_budget)
            engine = OutOfCore(inner=DDP(), budget=Ranks().gather(budget)[0], store=store)
            with trained(engine, config, 2 * tokens) as mine:
                peak = Ranks().gather(peak_bytes(mine))[0]
                if last or abs(peak / target - 1) <= MATCHED / 2:
                    times = alternated({"ours": mine, "grid": other}, rounds)
                    session = mine.session
                    decisions = session.planner.choices[-1].decisions
                    break
                budget += target - peak
    return {
        "ours_s": times["ours"], "grid_s": times["grid"], "ours_peak_bytes": peak,
        "grid_peak_bytes": target, "plain_peak_bytes": plain, "decisions": decisions,
    }  # fmt: skip


class Stepped:
    """A model of which whole steps are timed."""

    def __init__(self, model: Trained) -> None:
        self.model = model
        self.session: Session = model.session

    def seconds(self) -> float:
        """Of a microbatch and its update."""
        started_s = time.perf_counter()
        self.model.microbatch()
        self.session.update(1.0)
        return time.perf_counter() - started_s


def host_updates(
    *, layers: int, width: int, tokens: int, busy: float, latency_s: float, rounds: int
) -> dict[str, Any]:
    """A law of two ranks: steps with updates on the host, stages in a pipeline and in sequence, in turn.

    Args:
        layers: of the model.
        width: of the model.
        tokens: of a rank's microbatch.
        busy: see `HostUpdates`.
        latency_s: see `HostUpdates`.
        rounds: timed.
    """
    config = llama(layers, width)
    ranks = Ranks()
    with trained(HostUpdate(), config, 2 * tokens) as model:
        model.session.update(1.0)
        plain_s = statistics.median(Stepped(model).seconds() for _ in range(PROFILES))
        weights = sum(p.nbytes for p in model.session.model.parameters())
    rate = min(ranks.gather(weights / (busy * plain_s)))
    way = Throttled(store=Host(), bytes_per_s=rate)
    pipelined = HostUpdate(store=way, exchange_latency_s=latency_s, exchange_bytes=1)
    in_sequence = replace(pipelined, pipelined=False)
    engines = {
        "pipelined": pipelined,
        "in_sequence": in_sequence,
        "in_one": replace(in_sequence, exchange_bytes=EVERYTHING),
    }
    with ExitStack() as scope:
        ready: dict[str, Stepped] = {}
        for name, engine in engines.items():
            ready[name] = Stepped(scope.enter_context(trained(engine, config, 2 * tokens)))
            ready[name].session.update(1.0)
        times = alternated(ready, rounds)
    return {f"{name}_s": row for name, row in times.items()} | {
        "bytes_per_s": rate, "plain_s": plain_s,
    }  # fmt: skip
