"""Decoding and training against the published algorithm written plainly, interleaved, in one process.

scripts/env python benchmarks/recurrent_depth_speed.py [decode|adaptive|refill|train|memory|published ...]

Appends JSON lines to recurrent_depth_speed.jsonl beside it, under the native instruction set and under
x86-64-v3 with torch held to the same. Times are processor seconds of one thread, so that other work on the
machine disturbs them little; ratios are medians over interleaved repetitions, and of the fastest ones.
`published` is Huginn's own code at equal weights, in an environment of its own, since it needs an older
transformers: FOURFOLD_HUGINN names its checkout, FOURFOLD_HUGINN_PYTHON the interpreter.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import instruction_sets
import torch
from recurrent_depth_plain import Plain
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fourfold_recurrent_depth import (
    RecurrentCache,
    RecurrentDepthConfig,
    RecurrentDepthForCausalLM,
    Request,
    estimate_cache_bytes,
    serve,
)
from fourfold_recurrent_depth.exits import KL, Criterion, LatentDiff

RESULTS = Path(__file__).with_suffix(".jsonl")
DEPTHS = (16, 32)
"""Recurrences at full depth: a shallow one, and the published."""
PUBLISHED_ROUNDS = 5


@torch.no_grad()
def contracting(width: int, heads: int, hidden: int, vocabulary: int) -> RecurrentDepthForCausalLM:
    """The published layout (2, 4, 2) with weights of gain one and a core that contracts.

    Fresh weights predict nothing and hardly move; these settle token by token, as trained ones do.
    """
    config = RecurrentDepthConfig(
        n_embd=width, n_heads=heads, intermediate_size=hidden, vocab_size=vocabulary,
        padding_multiple=1, block_size=1024, mean_recurrence=DEPTHS[-1],
    )  # fmt: skip
    config._attn_implementation = "sdpa"  # noqa: SLF001 - transformers' own way
    model = RecurrentDepthForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn / math.sqrt(parameter.shape[1]))
        elif name.endswith("qk_bias"):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    adapter: Any = model.part("adapter")
    adapter.weight[:, :width] *= 0.5
    return model.eval()


def interleaved(
    ways: dict[str, Callable[[], Any]], *, repeats: int
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Processor seconds of each way, taking turns; and what each gave last."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    given: dict[str, Any] = {}
    for _ in range(repeats):
        for name, way in ways.items():
            started_s = time.process_time()
            given[name] = way()
            times[name].append(time.process_time() - started_s)
    return times, given


def ours(
    model: RecurrentDepthForCausalLM, prompt: Tensor, new: int, steps: int, **options: Any
) -> tuple[Tensor, Any]:
    """Our greedy tokens from zero states, and the recurrences of every token."""
    cache = RecurrentCache(model.config, steps=steps, capacity=prompt.shape[1] + new)
    made = cast(Any, model).generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False,
        num_steps=steps, init_scale=0.0, eos_token_id=None, pad_token_id=0, past_key_values=cache,
        **options,
    )  # fmt: skip
    return made[:, prompt.shape[1] :], cache.exit_steps


def write(kind: str, **values: Any) -> None:
    """Append a line with the machine and the versions."""
    facts = instruction_sets.machine(torch.get_num_threads(), os.getloadavg()[0])
    instruction_sets.write({"benchmark": kind, **values, **facts})


def ratio(times: dict[str, list[float]], slow: str, fast: str) -> float:
    """Median of the paired ratios."""
    pairs = zip(times[slow], times[fast], strict=True)
    return round(statistics.median(a / b for a, b in pairs), 2)


def least(times: dict[str, list[float]], slow: str, fast: str) -> float:
    """Ratio of the fastest repetitions."""
    return round(min(times[slow]) / min(times[fast]), 2)


def shapes() -> dict[str, RecurrentDepthForCausalLM]:
    """Two widths of the published layout."""
    return {
        "width 64": contracting(64, 4, 112, 384),
        "width 256": contracting(256, 8, 704, 1024),
    }


def decode() -> None:
    """Full depth: prompt and new tokens, one row and eight, and a longer context."""
    for name, model in shapes().items():
        plain = Plain(model)
        cases = [(1, 64, steps) for steps in DEPTHS] + [(8, 64, steps) for steps in DEPTHS]
        if name == "width 64":
            cases.append((8, 256, DEPTHS[-1]))
        for rows, length, steps in cases:
            new = 12 if name == "width 64" and length == 64 else 6
            prompt = torch.randint(
                0, 384, (rows, length), generator=torch.Generator().manual_seed(1)
            )
            times, given = interleaved(
                {
                    "plain": lambda p=prompt, n=new, r=steps, one=plain: one.generate(
                        p, new=n, steps=r, threshold=None
                    ),
                    "ours": lambda p=prompt, n=new, r=steps, m=model: ours(m, p, n, r),
                    "plain prompt": lambda p=prompt, r=steps, one=plain: one.generate(
                        p, new=1, steps=r, threshold=None
                    ),
                    "ours prompt": lambda p=prompt, r=steps, m=model: ours(m, p, 1, r),
                },
                repeats=3,
            )
            behind = {
                who: [a - b for a, b in zip(times[who], times[f"{who} prompt"], strict=True)]
                for who in ("plain", "ours")
            }
            write(
                "decode", shape=name, rows=rows, prompt_tokens=length, new_tokens=new, recurrences=steps,
                seconds=times, speedup=ratio(times, "plain", "ours"),
                speedup_by_least=least(times, "plain", "ours"),
                speedup_behind_the_prompt=ratio(behind, "plain", "ours"),
                ours_tokens_per_s=round(rows * (new - 1) / statistics.median(behind["ours"]), 2),
                same_tokens=bool(torch.equal(given["plain"][0], given["ours"][0])),
            )  # fmt: skip


def adaptive() -> None:
    """KL exits at batch 8: plain as published, plain row by row, ours; and what exits save us."""
    threshold, rows, length, new = 1e-3, 8, 48, 8
    for (name, model), steps in itertools.product(shapes().items(), DEPTHS):
        plain = Plain(model)
        prompt = torch.randint(0, 384, (rows, length), generator=torch.Generator().manual_seed(1))
        alone = [prompt[row : row + 1] for row in range(rows)]

        def one_by_one(plain: Plain = plain, alone: list[Tensor] = alone, r: int = steps) -> Tensor:
            made = [plain.generate(p, new=new, steps=r, threshold=threshold)[0] for p in alone]
            return torch.cat(made)

        def way(
            m: RecurrentDepthForCausalLM = model, p: Tensor = prompt, r: int = steps, **exits: Any
        ) -> tuple[Tensor, Any]:
            return ours(m, p, new, r, **exits)

        times, given = interleaved(
            {
                "plain batch": lambda p=prompt, one=plain, r=steps: one.generate(
                    p, new=new, steps=r, threshold=threshold
                )[0],
                "plain rows": one_by_one,
                "ours full": way,
                "ours kl": partial(way, exit=KL(threshold=threshold)),
                "ours latent": partial(way, exit=LatentDiff(threshold=0.03)),
                "ours kl, every 4": partial(way, exit=KL(threshold=threshold, every=4)),
                "ours latent, every 4": partial(way, exit=LatentDiff(threshold=0.03, every=4)),
            },
            repeats=2 if name == "width 256" else 3,
        )
        greedy = given["ours full"][0]
        write(
            "adaptive", shape=name, rows=rows, prompt_tokens=length, new_tokens=new, recurrences=steps,
            kl_threshold=threshold, latent_threshold=0.03, seconds=times,
            over_plain_batch=ratio(times, "plain batch", "ours kl"),
            over_plain_rows=ratio(times, "plain rows", "ours kl"),
            kl_every_4_over_plain_batch_by_least=least(times, "plain batch", "ours kl, every 4"),
            kl_over_full_depth=ratio(times, "ours full", "ours kl"),
            latent_over_full_depth=ratio(times, "ours full", "ours latent"),
            kl_every_4_over_full_depth=ratio(times, "ours full", "ours kl, every 4"),
            latent_every_4_over_full_depth=ratio(times, "ours full", "ours latent, every 4"),
            kl_every_4_over_plain_batch=ratio(times, "plain batch", "ours kl, every 4"),
            same_tokens_as_plain_rows=bool(torch.equal(given["plain rows"], given["ours kl"][0])),
            same_tokens_as_plain_batch=bool(torch.equal(given["plain batch"], given["ours kl"][0])),
            kl_agreement_with_full_depth=_share_equal(given["ours kl"][0], greedy),
            latent_agreement_with_full_depth=_share_equal(given["ours latent"][0], greedy),
            kl_every_4_agreement_with_full_depth=_share_equal(given["ours kl, every 4"][0], greedy),
            latent_every_4_agreement_with_full_depth=_share_equal(
                given["ours latent, every 4"][0], greedy
            ),
            kl_mean_recurrences=float(given["ours kl"][1].double().mean()),
            latent_mean_recurrences=float(given["ours latent"][1].double().mean()),
            kl_slowest_row=float(given["ours kl"][1].amax(0).double().mean()),
            latent_slowest_row=float(given["ours latent"][1].amax(0).double().mean()),
        )  # fmt: skip


def refilled(
    model: RecurrentDepthForCausalLM, prompts: Tensor, new: int, slots: int, criterion: Criterion
) -> tuple[Tensor, Tensor]:
    """Our greedy tokens from zero states where settled rows make room, and the recurrences of each."""
    requests = (
        Request(tokens=prompt.tolist(), max_new_tokens=new, label=row)
        for row, prompt in enumerate(prompts)
    )
    answers = serve(
        model, requests, slots=slots, num_steps=DEPTHS[-1], exit=criterion, init_scale=0.0
    )
    made = sorted(answers, key=lambda answer: answer.request.label)
    return torch.tensor([one.tokens for one in made]), torch.tensor(
        [one.exit_steps for one in made]
    )


REFILL = {"width 64": (64, 0.3), "width 256": (32, 0.3)}
"""New tokens, and the threshold at which these models take about 10 recurrences."""


def refill() -> None:
    """Batches that refill against full depth, batch by batch, and against exits that wait for the slowest.

    The plain algorithm answers the first batch alone, at full depth; its time counts by the token. Prompts
    are short: each is a pass of its own where rows refill; full depth reads those of a batch together.
    """
    length, depth = 8, DEPTHS[-1]
    for (name, model), (rows, waves) in itertools.product(shapes().items(), ((8, 4), (32, 3))):
        plain, (new, threshold) = Plain(model), REFILL[name]
        criterion = LatentDiff(threshold=threshold, every=4)
        prompts = torch.randint(
            0, 384, (rows * waves, length), generator=torch.Generator().manual_seed(1)
        )

        def batches(
            m: RecurrentDepthForCausalLM = model,
            p: Tensor = prompts,
            n: int = new,
            r: int = rows,
            **exits: Any,
        ) -> Tensor:
            return torch.cat([ours(m, part, n, depth, **exits)[0] for part in p.split(r)])

        times, given = interleaved(
            {
                "ours full": batches,
                "ours refilled": partial(refilled, model, prompts, new, rows, criterion),
                "ours waiting": partial(batches, exit=criterion),
                "plain full, first batch": lambda p=prompts[:rows], n=new, one=plain: one.generate(
                    p, new=n, steps=depth, threshold=None
                )[0],
            },
            repeats=3 if rows == 8 else 2,
        )
        tokens, steps = given["ours refilled"]
        write(
            "refill", shape=name, rows=rows, requests=len(prompts), prompt_tokens=length, new_tokens=new,
            recurrences=depth, latent_threshold=threshold, every=4, seconds=times,
            refilled_over_full_depth=ratio(times, "ours full", "ours refilled"),
            refilled_over_full_depth_by_least=least(times, "ours full", "ours refilled"),
            refilled_over_waiting=ratio(times, "ours waiting", "ours refilled"),
            refilled_over_plain=round(
                waves * ratio(times, "plain full, first batch", "ours refilled"), 2
            ),
            refilled_tokens_per_s=round(tokens.numel() / statistics.median(times["ours refilled"]), 2),
            mean_recurrences=float(steps.double().mean()),
            slowest_row=float(steps.view(waves, rows, new).amax(1).double().mean()),
            same_tokens_as_waiting=bool(torch.equal(tokens, given["ours waiting"])),
            agreement_with_full_depth=_share_equal(tokens, given["ours full"]),
        )  # fmt: skip


def _share_equal(tokens: Tensor, others: Tensor) -> float:
    return float((tokens == others).double().mean())


def training() -> None:
    """One forward and backward at (n, k) = (12, 4) and (24, 8): same loss, same gradients."""
    for name, model in shapes().items():
        plain = Plain(model)
        model.train()
        rows, length = (8, 128) if name == "width 64" else (2, 128)
        tokens = torch.randint(0, 384, (rows, length), generator=torch.Generator().manual_seed(1))
        for n, k in ((12, 4), (24, 8)):

            def step_plain(
                n: int = n, k: int = k, one: Plain = plain, tokens: Tensor = tokens
            ) -> float:
                one.model.zero_grad()
                loss = one.loss(tokens, without=n, with_gradient=k)
                loss.backward()
                return loss.item()

            def step_ours(
                n: int = n,
                k: int = k,
                m: RecurrentDepthForCausalLM = model,
                tokens: Tensor = tokens,
            ) -> float:
                m.zero_grad()
                loss = cast(Any, m)(tokens, labels=tokens, num_steps=(n, k), init_scale=0.0).loss
                loss.backward()
                return loss.item()

            times, given = interleaved({"plain": step_plain, "ours": step_ours}, repeats=4)
            write(
                "train", shape=name, rows=rows, tokens=length, without_gradient=n, with_gradient=k,
                plain_s=times["plain"], ours_s=times["ours"], speedup=ratio(times, "plain", "ours"),
                speedup_by_least=least(times, "plain", "ours"),
                plain_loss_nats=given["plain"], ours_loss_nats=given["ours"],
                loss_difference=abs(given["plain"] - given["ours"]),
            )  # fmt: skip


def memory() -> None:
    """Saved tensors of a training step over n, and the cache against its estimate."""
    model = shapes()["width 64"].train()
    tokens = torch.randint(0, 384, (2, 64), generator=torch.Generator().manual_seed(1))
    saved = {}
    for n in (0, 8, 32):
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            cast(Any, model)(tokens, labels=tokens, num_steps=(n, 4), init_scale=0.0)
        saved[n] = sum(sizes.values())
    model.eval()
    rows = []
    for budget in (None, 4, 1):
        cache = RecurrentCache(model.config, steps=DEPTHS[0], budget=budget)
        with torch.no_grad():
            cast(Any, model)(tokens, past_key_values=cache, use_cache=True, num_steps=DEPTHS[0])
        estimate = estimate_cache_bytes(
            model.config, tokens=64, steps=DEPTHS[0], batch=2, budget=budget, element_bytes=4
        )
        rows.append(
            {"kv_budget": budget, "cache_bytes": cache.nbytes(), "estimated_bytes": estimate}
        )
    write("memory", saved_bytes_by_steps_without_gradient=saved, caches=rows)


def published() -> None:
    """Huginn's own code on our weights, decoding and training, beside ours: ratios, or why there are none."""
    checkout, interpreter = (
        os.environ.get(name, "") for name in ("FOURFOLD_HUGINN", "FOURFOLD_HUGINN_PYTHON")
    )
    if not checkout or not interpreter:
        write(
            "published",
            skipped="FOURFOLD_HUGINN and FOURFOLD_HUGINN_PYTHON name no checkout of the published code and "
            "no interpreter that runs it",
        )
        return
    prompt = torch.randint(0, 384, (8, 64), generator=torch.Generator().manual_seed(1))
    shorts = torch.randint(0, 384, (32, 8), generator=torch.Generator().manual_seed(1))
    for name, model in shapes().items():
        new, threshold = REFILL[name]
        criterion = LatentDiff(threshold=threshold, every=4)

        def step(m: RecurrentDepthForCausalLM = model) -> float:
            m.train().zero_grad()
            loss = cast(Any, m)(prompt, labels=prompt, num_steps=(12, 4), init_scale=0.0).loss
            loss.backward()
            m.eval()
            return loss.item()

        ways: dict[str, Callable[[], Any]] = {
            "decode": lambda m=model: ours(m, prompt, 6, DEPTHS[0])[0].tolist(),
            "train": step,
            "refill": lambda m=model, n=new, c=criterion: refilled(m, shorts, n, 8, c)[0].tolist(),
        }
        asked = {
            "decode": ("decode", {"tokens": prompt.tolist(), "new": 6, "steps": DEPTHS[0]}),
            "train": ("train", {"tokens": prompt.tolist(), "steps": [12, 4]}),
            # The first of four batches, at full depth.
            "refill": ("decode", {"tokens": shorts[:8].tolist(), "new": new, "steps": DEPTHS[-1]}),
        }
        times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        results: dict[str, tuple[Any, Any]] = {}
        with published_code(model, checkout, interpreter) as ask:
            for round_ in range(PUBLISHED_ROUNDS + 1):
                for way, call in ways.items():
                    started_s = time.process_time()
                    mine = call()
                    seconds = time.process_time() - started_s
                    theirs = ask(asked[way])
                    results[way] = mine, theirs["result"]
                    if round_:
                        times[way].append((seconds, theirs["seconds"]))
        write(
            "published", shape=name, rows=8, rounds=PUBLISHED_ROUNDS, seconds=times,
            recurrences={"decode": DEPTHS[0], "train": (12, 4), "refill": DEPTHS[-1]},
            prompt_tokens={"decode": 64, "refill": 8}, new_tokens={"decode": 6, "refill": new},
            decode_over_published=_median_ratio(times["decode"]),
            train_over_published=_median_ratio(times["train"]),
            refilled_over_published=round(4 * _median_ratio(times["refill"]), 2),
            same_tokens=results["decode"][0] == results["decode"][1],
            loss_nats=results["train"],
        )  # fmt: skip


@contextmanager
def published_code(
    model: RecurrentDepthForCausalLM, checkout: str, interpreter: str
) -> Iterator[Callable[[Any], Any]]:
    """A process that performs what it is asked with the published code and this model's weights."""
    script = Path(__file__).with_name("recurrent_depth_published.py")
    with tempfile.TemporaryDirectory() as folder:
        torch.save(model.state_dict(), Path(folder) / "weights.pt")
        (Path(folder) / "config.json").write_text(json.dumps(model.config.to_dict()))
        command = [interpreter, script, checkout, folder]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(command, text=True, **pipes) as peer:
            questions, answers = cast(Any, peer.stdin), cast(Any, peer.stdout)

            def ask(question: Any) -> Any:
                print(json.dumps(question), file=questions, flush=True)
                answer = answers.readline()
                if not answer:
                    raise SystemExit("the published code ended; what it said stands above")
                return json.loads(answer)

            yield ask
            questions.close()


def _median_ratio(pairs: list[tuple[float, float]]) -> float:
    """Theirs over ours, in each round."""
    return round(statistics.median(theirs / mine for mine, theirs in pairs), 2)


WAYS = {
    "decode": decode,
    "adaptive": adaptive,
    "refill": refill,
    "train": training,
    "memory": memory,
    "published": published,
}


def main() -> None:
    """Run what is asked for, or everything."""
    torch.set_num_threads(1)
    asked = sys.argv[1:] or list(WAYS)
    unknown = sorted(set(asked) - set(WAYS))
    if unknown:
        raise SystemExit(f"{unknown[0]!r} is not known; use {', '.join(WAYS)}")
    if instruction_sets.is_inside():
        for name in asked:
            WAYS[name]()
        return
    lines = instruction_sets.on_each()
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
