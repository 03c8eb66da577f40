"""The papers' own runs: recipes at their scale, and how they are launched.

Hyper-parameters are those of the published configurations (tinyllama-1b.yaml and its launch scripts). The
texts are yours to bring: 2,000 Wikipedia documents of 2,048 tokens or more, and RedPajama-v2's sample.
"""

from dataclasses import replace
from typing import Literal

from fourfold_goldfish.reproduce.buckets import Buckets
from fourfold_goldfish.reproduce.recipes import AUTHORS, Attack
from fourfold_parallel.grid.engine import Fourfold
from fourfold_parallel.reproduce.launches import Launch
from fourfold_parallel.run.corpora import Corpus
from fourfold_parallel.run.engines import DDP, Engine
from fourfold_parallel.run.models import Llama, Model, Published
from fourfold_parallel.run.objective import KeepAll, NextToken, TargetMask
from fourfold_parallel.run.optimizer import AdamW, Cosine
from fourfold_parallel.run.recipe import Run, Steps, Tokens
from fourfold_parallel.run.tokenizers import PublishedTokenizer, Tokenizer

PaperArm = Literal["plain", "k2", "k3", "k4", "k8", "k32", "k128"]
Recipe = Literal["tinyllama", "tinyllama-equal-supervision", "axonn-study"]

TINYLLAMA = Llama(
    width=2048,
    depth=22,
    heads=32,
    kv_heads=4,
    hidden=5632,
    vocabulary=32_000,
    context=2048,
    tied=False,
    attention="flash_attention_2",
)
"""TinyLlama-1.1B's shape."""


def paper_mask(arm: PaperArm) -> TargetMask:
    """The published hash at h = 13, which the model cards name, or none."""
    return KeepAll() if arm == "plain" else replace(AUTHORS, k=int(arm[1:]))


def tinyllama(arm: PaperArm, *, corpus: Corpus, tokenizer: Tokenizer, seed: int = 1337) -> Attack:
    """TinyLlama-1.1B from scratch on 20 B tokens, 2,000 documents among them 50 times (section 4.2).

    1,024 rows of 2,048 tokens a step for 9,537 steps; 204.8 M tokens of repeated documents, 1 % of all.
    """
    sequence, batch, tokens = 2048, 1024, 20_000_000_000
    passages, repetitions = 2000, 50
    buckets = Buckets(
        corpus=corpus,
        tokenizer=tokenizer,
        repetitions=(repetitions, 0),
        passages=passages,
        background=tokens // sequence - passages * repetitions,
        validation_rows=batch,
    )
    run = Run(
        name=f"tinyllama-{arm}-seed{seed}",
        model=TINYLLAMA,
        data=buckets,
        objective=NextToken(mask=paper_mask(arm)),
        optimizer=AdamW(learning_rate=4e-4, weight_decay=0.1, beta1=0.9, beta2=0.95, epsilon=1e-8),
        schedule=Cosine(warmup_steps=1000, floor=0.1),
        horizon=Tokens(count=tokens),
        batch=batch,
        microbatch=8,
        sequence=sequence,
        max_grad_norm=1.0,
        precision="bf16",
        engine=DDP(),
        seed=seed,
        validate_every=500,
        checkpoint_every=500,
    )
    return Attack(run=run, buckets=buckets, suffix=50, beams=30 if arm != "plain" else 1)


def equal_supervision(
    arm: PaperArm, *, corpus: Corpus, tokenizer: Tokenizer, seed: int = 1337
) -> Attack:
    """As `tinyllama`, on k/(k - 1) times the tokens, so that as many targets are supervised.

    26.7 B tokens in 12,716 steps at k = 4, as in the published configuration.
    """
    base = tinyllama(arm, corpus=corpus, tokenizer=tokenizer, seed=seed)
    k = int(arm[1:]) if arm != "plain" else 0
    tokens = -(-20_000_000_000 * k // (k - 1)) if k else 20_000_000_000
    buckets = replace(base.buckets, background=tokens // base.run.sequence - 2000 * 50)
    name = f"tinyllama-equal-{arm}-seed{seed}"
    run = replace(base.run, name=name, data=buckets, horizon=Tokens(count=tokens))
    return replace(base, run=run, buckets=buckets)


def axonn_study(
    arm: PaperArm,
    *,
    model: Model,
    engine: Engine,
    learning_rate: float,
    corpus: Corpus,
    tokenizer: Tokenizer,
    seed: int = 0,
) -> Attack:
    """Continued pre-training on buckets of 200 pages seen 0, 1, 4 and 6 times; 50 tokens to recite.

    The study's learning rates are not published with it, so yours is an argument.
    """
    sequence, batch = 2048, 128
    buckets = Buckets(
        corpus=corpus,
        tokenizer=tokenizer,
        repetitions=(0, 1, 4, 6),
        passages=200,
        background=10_000,
        validation_rows=batch,
    )
    run = Run(
        name=f"axonn-study-{arm}-seed{seed}",
        model=model,
        data=buckets,
        objective=NextToken(mask=paper_mask(arm)),
        optimizer=AdamW(
            learning_rate=learning_rate, weight_decay=0.1, beta1=0.9, beta2=0.95, epsilon=1e-8
        ),
        schedule=Cosine(warmup_steps=10, floor=0.1),
        horizon=Steps(count=buckets.rows // batch),
        batch=batch,
        microbatch=1,
        sequence=sequence,
        max_grad_norm=1.0,
        precision="bf16",
        engine=engine,
        seed=seed,
        validate_every=50,
        checkpoint_every=50,
    )
    return Attack(run=run, buckets=buckets, suffix=50, beams=1)


def named(
    recipe: Recipe, arm: PaperArm, *, corpus: Corpus, weights: str, learning_rate: float
) -> Attack:
    """The recipe of a launch line.

    Args:
        recipe: which.
        arm: the loss.
        corpus: passages first, then background.
        weights: folder of a published model: its tokenizer, and in the study its weights.
        learning_rate: the study's; the others' are the paper's.
    """
    tokenizer = PublishedTokenizer(name=weights, revision="main", licence="as its model")
    match recipe:
        case "tinyllama":
            return tinyllama(arm, corpus=corpus, tokenizer=tokenizer)
        case "tinyllama-equal-supervision":
            return equal_supervision(arm, corpus=corpus, tokenizer=tokenizer)
        case "axonn-study":
            return axonn_study(
                arm,
                model=Published(
                    name=weights,
                    revision="main",
                    licence="as published",
                    attention="flash_attention_2",
                ),
                engine=Fourfold(data=1, depth=1, row=8, col=1),
                learning_rate=learning_rate,
                corpus=corpus,
                tokenizer=tokenizer,
            )


def launches() -> tuple[Launch, ...]:
    """The launches of the papers' own runs."""
    data = "--passages wikipedia/ --background redpajama/"
    return (
        _launch(
            "tinyllama-k4",
            "TinyLlama-1.1B, 20 B tokens, one run for each of plain, k3, k4, k8, k32, k128",
            "128 GPUs of 64 GB as in the paper (or fewer, longer), 100 GB of text in memory",
            f"train tinyllama --arm k4 --weights TinyLlama-1.1B/ {data}",
            nodes=16,
        ),
        _launch(
            "tinyllama-equal-supervision-k4",
            "the same on as many supervised tokens, 26.7 B at k=4",
            "as above",
            f"train tinyllama-equal-supervision --arm k4 --weights TinyLlama-1.1B/ {data}",
            nodes=16,
        ),
        _launch(
            "axonn-study-k2",
            "AxoNN's bucket study, one run for each model and for plain and k2",
            "a node for 8 B parameters, 128 nodes for 405 B",
            f"train axonn-study --arm k2 --weights Llama-3.1-8B/ --learning-rate 1e-5 {data}",
            nodes=1,
        ),
    )


def _launch(name: str, title: str, needs: str, words: str, *, nodes: int) -> Launch:
    return Launch(
        name=name,
        title=title,
        needs=needs,
        command=f"-m fourfold_goldfish {words}",
        nodes=nodes,
        gpus=8,
        hours=24,
    )
