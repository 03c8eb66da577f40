"""Call the packages' C++ thousands of times under a sanitizer of the compiler, and compare with torch.

    scripts/env python scripts/sanitize.py address     # out of bounds, use after free, undefined behaviour
    scripts/env python scripts/sanitize.py thread      # two threads that meet
    scripts/env python scripts/sanitize.py memory      # no sanitizer: whether the process grows

Shapes, formats and numbers of threads are drawn anew for each call, and its inputs are made for it and freed
after it. Needs GCC with its sanitizers (Debian's g++). The first fault ends the run with the report of it.
"""

import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from fourfold_goldfish import Goldfish
from fourfold_loki.cache import tiled
from fourfold_loki.kernels import cpu
from fourfold_loki.kernels import native as loki
from fourfold_loki.kernels.page_read import PageRead
from fourfold_parallel.common.files import cache_folder
from fourfold_recurrent_depth import (
    RecurrentCache,
    RecurrentDepthConfig,
    RecurrentDepthForCausalLM,
)
from fourfold_recurrent_depth.exits import KL, LatentDiff

ROOT = Path(__file__).resolve().parents[1]
Kind = Literal["address", "thread", "memory"]
FLAGS = {
    # Without -O3 the compiler is done in a minute; later flags win.
    "address": "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all",
    "thread": "-O1 -g -fno-omit-frame-pointer -fsanitize=thread",
}
PRELOADED = {"address": ("libasan.so", "libubsan.so", "libstdc++.so"), "thread": ("libtsan.so",)}
OPTIONS = {
    # Python frees little at its end.
    "ASAN_OPTIONS": "detect_leaks=0:strict_init_order=1:detect_stack_use_after_return=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    # What torch and Python do is not instrumented: it would be misread. Their locks are still seen.
    "TSAN_OPTIONS": "halt_on_error=1:history_size=4:ignore_noninstrumented_modules=1",
}
INSIDE = "FOURFOLD_SANITIZED"
COMPARED = 5
"""One call in so many is computed by torch too."""
NEW_MODEL = 40
"""Passes after which a model is freed, and one of another shape made."""
FLOAT32, BFLOAT16 = 1e-4, 2e-2
"""Relative to the largest number of an output, in sums of up to a thousand terms."""
GROWTH_BYTES = 16 << 20
"""What the process may grow from a fifth of the calls to the last: the heap's fragments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """What to look for, and for how long."""

    kind: Annotated[Kind, tyro.conf.Positional]
    calls: int = 10_000
    """Of each kernel."""
    limit_s: float = 1200
    """For each kernel; fewer calls are said and fail the run."""
    seed: int = 0


def main() -> None:
    """The command, and under a sanitizer the process that it starts."""
    chosen = tyro.cli(Chosen, description=__doc__)
    if chosen.kind == "memory" or INSIDE in os.environ:
        call_all(chosen)
        return
    preloaded = [where(name) for name in PRELOADED[chosen.kind]]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:]],
            env={
                **os.environ,
                **OPTIONS,
                INSIDE: chosen.kind,
                "LD_PRELOAD": " ".join(preloaded),
                "FOURFOLD_CXXFLAGS": FLAGS[chosen.kind],
                "FOURFOLD_CACHE": folder,
                "FOURFOLD_THREADS": "own",
            },
            check=False,
        )
    raise SystemExit(done.returncode)


def where(library: str) -> str:
    """The path of a library of the compiler."""
    named = ["c++", f"-print-file-name={library}"]
    path = subprocess.run(named, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(path).is_absolute():
        raise SystemExit(
            f"{library} is not with c++; install GCC's sanitizers, as Debian's g++ brings them"
        )
    return path


def call_all(chosen: Chosen) -> None:
    """Call each kernel as often as asked; any difference or growth ends the run."""
    kernels = (("loki", decode, 1), ("recurrent depth", Passes(), 3), ("goldfish", drop, 1))
    for name, caller, calls_each in kernels:
        draw = random.Random(f"{chosen.seed} {name}")  # noqa: S311 - shapes, not secrets
        generator = torch.Generator().manual_seed(chosen.seed)
        started_s, warm_bytes, compared = time.perf_counter(), 0, 0
        turns = -(-chosen.calls // calls_each)
        for done in range(turns):
            if time.perf_counter() - started_s > chosen.limit_s:
                raise SystemExit(
                    f"{name}: {done * calls_each} of {chosen.calls} calls in {chosen.limit_s:.0f} s; "
                    "give it more with --limit-s, or ask for fewer with --calls"
                )
            torch.set_num_threads(draw.choice((1, 2)))
            compared += caller(draw, generator, is_compared=done % COMPARED == 0)
            if done == turns // 5:
                warm_bytes = resident_bytes()
        grown = resident_bytes() - warm_bytes
        elapsed_s = time.perf_counter() - started_s
        print(
            f"{name}: {chosen.calls} calls, {compared} compared, {elapsed_s:.0f} s; resident "
            f"{warm_bytes >> 20} MiB after a fifth, {grown / 2**20:+.1f} MiB since",
            flush=True,
        )
        # A sanitizer keeps what is freed for a while.
        if chosen.kind == "memory" and grown > GROWTH_BYTES:
            raise SystemExit(f"{name} grew by {grown} bytes")
    check_all_called()


def check_all_called() -> None:
    """Every C++ file of the packages has been loaded, or this script does not know it."""
    sources = Counter(path.parts[-len(path.relative_to(ROOT).parts) + 3] for path in cpp_files())
    built = str(cache_folder() / "native")
    mapped = {
        line.split()[-1]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if built in line
    }
    loaded = Counter(Path(path).parent.name.split(".")[0] for path in mapped)
    if sources != loaded:
        raise SystemExit(f"C++ files by package: {dict(sources)}; called: {dict(loaded)}")


def cpp_files() -> list[Path]:
    """Those of the packages."""
    return sorted(ROOT.glob("packages/*/src/**/*.cpp"))


def resident_bytes() -> int:
    """Memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def compare(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float, about: object) -> None:
    """End the run where outputs differ."""
    if not ours.numel():
        return
    apart = (ours.double() - theirs.double()).abs().max().item()
    if not apart <= tolerance * max(1.0, theirs.abs().max().item()):
        raise SystemExit(f"differs by {apart} from torch's form: {about}")


def decode(draw: random.Random, generator: torch.Generator, *, is_compared: bool) -> bool:
    """One token decoded by loki's kernel; gives whether it was compared."""
    batch, kv_heads, group = draw.choice((0, 1, 1, 2, 3)), draw.randint(1, 3), draw.randint(1, 9)
    head_width, value_width = 16 * draw.randint(1, 8), 16 * draw.randint(1, 8)
    width, page = draw.randint(1, head_width), draw.choice((1, 2, 7, 16, 32, 64, 100))
    room = 64 * draw.randint(1, 8)
    length = draw.choice((1, room, draw.randint(1, room)))
    held = math.ceil(length / page)
    pages = draw.choice((1, held, draw.randint(1, held)))
    # Fewer forced pages than are read, as `Budget` has it: otherwise the order of ties decides.
    spare = max(0, (pages - 3) * page)
    sinks = draw.randint(0, spare)
    window = draw.randint(0, spare - sinks)
    dtype = draw.choice((torch.float32, torch.bfloat16))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    queries = normal(batch, kv_heads * group, 1, head_width)
    keys = normal(batch, kv_heads, room, head_width)
    values = normal(batch, kv_heads, room, value_width)
    is_ruined = draw.random() < 0.05
    if is_ruined and batch:
        queries[-1, draw.randrange(kv_heads * group)] = draw.choice((math.nan, math.inf, 1e38))
    leading = tiled(keys[..., :width])
    read = PageRead(
        length=length, pages=pages, page=page, sinks=sinks, window=window, scaling=head_width**-0.5
    )
    output = loki.decode(queries, keys, values, leading, read)
    is_compared = is_compared and batch > 0 and not is_ruined and room % page == 0
    if is_compared:
        tolerance = FLOAT32 if dtype == torch.float32 else BFLOAT16
        wide = (queries.float(), keys.float(), values.float(), leading.float())
        expected = cpu.decode(*wide, read)
        compare(output, expected, tolerance, (queries.shape, keys.shape, read))
    return is_compared


def drop(draw: random.Random, generator: torch.Generator, *, is_compared: bool) -> bool:
    """One mask of goldfish's kernel; gives whether it was compared."""
    goldfish = Goldfish(
        k=draw.randint(2, 6),
        context=draw.choice((1, 2, 13, 50)),
        window=draw.choice(("exclusive", "inclusive")),
        boundary=draw.choice(("reset", "prefix", "straddle")),
        key=draw.choice((0, 5)),
    )
    rows, row = draw.randint(0, 5), max(1, goldfish.shortest) + draw.choice((0, 1, 70, 40_000))
    dtype = draw.choice((torch.int32, torch.int64))
    tokens = torch.randint(0, 50_000, (rows, row), generator=generator).to(dtype)
    documents = None
    if draw.random() < 0.5:
        documents = torch.randint(0, 2, (rows, row), generator=generator).cumsum(1)
    dropped = goldfish.drop(tokens, documents)
    if is_compared:
        expected = goldfish._by_operations(tokens.long(), documents)  # noqa: SLF001 - the twin
        compare(dropped.double(), expected.double(), 0.0, (goldfish, tokens.shape))
    return is_compared


class Passes:
    """Forward passes of small recurrent models of many shapes, with caches, masks and exits."""

    def __init__(self) -> None:
        self._left = 0
        self._model: Any = None
        self._exact: Any = None

    def __call__(
        self, draw: random.Random, generator: torch.Generator, *, is_compared: bool
    ) -> bool:
        """A pass, or two with a cache; gives whether they were compared."""
        if not self._left:
            self._left = NEW_MODEL
            self._model, self._exact = models(draw)
        self._left -= 1
        batch, tokens = draw.choice((0, 1, 1, 2, 3, 5)), draw.choice((1, 1, 2, 7, 15, 16, 17, 40))
        steps, exits = (
            draw.randint(1, 5),
            draw.choice((None, None, LatentDiff(threshold=0.3), KL(threshold=0.3))),
        )
        if not batch:
            exits = None  # judging nobody is refused
        budget = draw.choice((None, None, 1, steps))
        ids = torch.randint(0, 64, (batch, tokens), generator=generator)
        padding = draw.choice((0, 0, tokens // 2)) if batch > 1 else 0
        # An exit's threshold can lie between two roundings; transformers' attention refuses no rows.
        is_compared = is_compared and exits is None and batch > 0
        options: dict[str, Any] = {"num_steps": steps}
        turns = draw.choice((0, 1, 3))
        outputs = []
        for model in (self._model, self._exact)[: 1 + is_compared]:
            mask = torch.ones_like(ids)
            mask[:1, :padding] = 0
            if turns:
                options["past_key_values"] = RecurrentCache(
                    model.config, steps=steps, budget=budget, capacity=8
                )
            with torch.no_grad():
                out = model(ids, attention_mask=mask, init_scale=0.0, exit=exits, **options)
                for _ in range(turns - 1):
                    mask = torch.cat([mask, mask.new_ones(batch, 1)], dim=1)
                    new = ids[:, :1]
                    out = model(new, attention_mask=mask, init_scale=0.0, exit=exits, **options)
            outputs.append(out.logits)
        if is_compared:
            about = (self._model.config, ids.shape, steps, budget, turns, padding)
            compare(outputs[0][:, -1:], outputs[1][:, -1:], FLOAT32, about)
        return is_compared


def models(draw: random.Random) -> tuple[Any, Any]:
    """A model that the compiled blocks take, and the same in float64, which they leave to torch."""
    heads, head_width = draw.choice(
        ((1, 16), (2, 16), (1, 48), (2, 48), (5, 16), (4, 32), (1, 128))
    )
    config = RecurrentDepthConfig(
        n_embd=heads * head_width, n_heads=heads, n_layers_in_prelude=draw.randint(1, 2),
        n_layers_in_recurrent_block=draw.randint(1, 3), n_layers_in_coda=draw.randint(1, 2),
        intermediate_size=16 * draw.randint(1, 20), vocab_size=64, padding_multiple=64, block_size=64,
        mean_recurrence=4, mean_backprop_depth=2,
    )  # fmt: skip
    config._attn_implementation = "sdpa"  # noqa: SLF001 - transformers' own name
    model = RecurrentDepthForCausalLM(config).eval()
    exact = RecurrentDepthForCausalLM(config).eval().double()
    exact.load_state_dict(model.state_dict())
    return model, exact


if __name__ == "__main__":
    main()
