"""Measurements of trained models, as plain functions from a model to events of a record."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from scipy import stats
from torch import Tensor
from transformers import PreTrainedModel

from fourfold_recurrent_depth.analysis import latents
from fourfold_recurrent_depth.analysis.flops import costs
from fourfold_recurrent_depth.cache import RecurrentCache
from fourfold_recurrent_depth.causal_lm import RecurrentDepthForCausalLM
from fourfold_recurrent_depth.decoding.latent_cache import LatentBasis, LatentCache
from fourfold_recurrent_depth.exits import KL, Criterion, LatentDiff
from fourfold_recurrent_depth.reproduce.tasks.addition import BASE, sums_of
from fourfold_recurrent_depth.reproduce.tasks.automaton import encode, targets_of
from fourfold_recurrent_depth.states import state_table

Event = tuple[str, dict[str, Any]]
DEPTHS = (1, 2, 3, 4, 6, 8, 16, 32, 64)
"""Recurrences at which accuracy is measured."""
EXIT_SEED = 11
"""Seed of evaluation rows and initial states: never that of a training run."""
RANKS = (4, 8, 16, 32, 64, 128)
"""Numbers of a token that a latent cache keeps."""
SKIPPED = 4
"""First cells of a row, which see so little that every k is easy; left out of exit statistics."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exam:
    """Held-out rows for every difficulty."""

    hardest: int
    cells: int
    rows: int
    """Rows for each k."""

    def of(self, k: int) -> tuple[Int[Tensor, "row cell"], Int[Tensor, "row cell"]]:
        """Tokens and targets of one difficulty."""
        generator = torch.Generator().manual_seed(10_000 * EXIT_SEED + k)
        cells = torch.randint(0, 2, (self.rows, self.cells), generator=generator)
        tokens = encode(cells, torch.full((self.rows,), k))
        return tokens, targets_of(tokens)

    def all(
        self,
    ) -> tuple[Int[Tensor, "row cell"], Int[Tensor, "row cell"], Int[Tensor, "row cell"]]:
        """Tokens, targets and k of all difficulties together."""
        parts = [self.of(k) for k in range(1, self.hardest + 1)]
        tokens, targets = (torch.cat(list(column)) for column in zip(*parts, strict=True))
        return tokens, targets, tokens // 2 + 1


@torch.no_grad()
def accuracy_by_depth(
    model: RecurrentDepthForCausalLM, exam: Exam, depths: Sequence[int] = DEPTHS
) -> Iterator[Event]:
    """Share of cells predicted, for every k and every number of recurrences, from one trajectory."""
    for k in range(1, exam.hardest + 1):
        tokens, targets = exam.of(k)
        states = latents.trajectory(model, tokens, steps=max(depths), seed=EXIT_SEED)
        _, this_pass, _ = model.begin(tokens, None)
        for r in depths:
            logits = model.predict(states[r], this_pass)
            right = (logits.argmax(-1) == targets).double().mean().item()
            yield "accuracy", {"k": k, "recurrences": r, "accuracy": round(right, 5)}


@torch.no_grad()
def held_out(model: RecurrentDepthForCausalLM, exam: Exam, *, steps: int) -> Event:
    """Loss and accuracy over all difficulties at one depth."""
    tokens, targets, _ = exam.all()
    table = state_table(model.config.block_size, model.config.n_embd, seed=EXIT_SEED)
    logits = model(tokens, num_steps=steps, initial_state=table).logits
    assert logits is not None
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    right = (logits.argmax(-1) == targets).double().mean()
    return "held_out", {"loss_nats": round(float(loss), 6), "accuracy": round(float(right), 5)}


@torch.no_grad()
def loss_by_depth(
    model: PreTrainedModel, tokens: Int[Tensor, "row token"], depths: Sequence[int]
) -> Iterator[Event]:
    """Next-token loss after so many recurrences each; of a dense model, which has no depths, once."""
    for r in depths or (None,):
        options: Any = {} if r is None else {"num_steps": r}
        logits = model(input_ids=tokens[:, :-1], use_cache=False, **options).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        yield "held_out", {"recurrences": r, "loss_nats": round(float(loss), 6)}


@torch.no_grad()
def addition_by_depth(
    model: RecurrentDepthForCausalLM, *, operands: int, rows: int
) -> Iterator[Event]:
    """Share of sums that are right, for every number of operands and of recurrences."""
    generator = torch.Generator().manual_seed(10_000 * EXIT_SEED)
    digits = torch.randint(0, BASE, (rows, operands), generator=generator)
    states = latents.trajectory(model, digits, steps=max(DEPTHS), seed=EXIT_SEED)
    _, this_pass, _ = model.begin(digits, None)
    for r in DEPTHS:
        logits = model.predict(states[r], this_pass)
        right = (logits.argmax(-1) == sums_of(digits)).double().mean(0)
        for m, share in enumerate(right.tolist(), start=1):
            yield "addition", {"operands": m, "recurrences": r, "accuracy": round(share, 5)}


@torch.no_grad()
def exits(
    model: RecurrentDepthForCausalLM,
    exam: Exam,
    criteria: Sequence[tuple[str, Criterion]],
    steps: int,
) -> Iterator[Event]:
    """Exit steps against difficulty, accuracy against full depth and against a fixed depth of equal cost."""
    tokens, targets, k = (part for part in exam.all())
    table = state_table(model.config.block_size, model.config.n_embd, seed=EXIT_SEED)
    seen = slice(SKIPPED, None)

    def right_at(**options: Any) -> tuple[Tensor, Any]:
        out = model(tokens, initial_state=table, **options)
        assert out.logits is not None
        return (out.logits.argmax(-1) == targets).double()[:, seen], out

    full, _ = right_at(num_steps=steps)
    price = costs(model.config, context=tokens.shape[1])
    for name, criterion in criteria:
        right, out = right_at(num_steps=steps, exit=criterion)
        taken = out.exit_steps[:, seen].double()
        mean = float(taken.mean())
        checks = mean if criterion.reads == "logits" else 0.0
        flops = price.forward(mean, checks=checks)
        equal = max(1, min(steps, round((flops - price.forward(0)) / price.recurrence)))
        fixed, _ = right_at(num_steps=equal)
        spearman: Any = stats.spearmanr(taken.flatten(), k[:, seen].flatten())
        yield (
            "exits",
            {
                "criterion": name,
                "threshold": criterion.threshold,
                "mean_recurrences": round(mean, 4),
                "full_recurrences": steps,
                "accuracy": round(float(right.mean()), 5),
                "full_accuracy": round(float(full.mean()), 5),
                "equal_cost_recurrences": equal,
                "equal_cost_accuracy": round(float(fixed.mean()), 5),
                "flops_share": round(flops / price.forward(steps), 4),
                "spearman": round(float(spearman.statistic), 4),
            },
        )
        for difficulty in range(1, exam.hardest + 1):
            chosen = taken[k[:, seen] == difficulty].long()
            counts = torch.bincount(chosen, minlength=steps + 1)[1:]
            yield (
                "exit_steps",
                {
                    "criterion": name,
                    "k": difficulty,
                    "mean_recurrences": round(float(chosen.double().mean()), 4),
                    "tokens_by_recurrences": counts.tolist(),
                },
            )


def latent_paths(model: RecurrentDepthForCausalLM, exam: Exam) -> Iterator[Event]:
    """Path independence, what trajectories end in, and how token-specific convergence is."""
    reduced = Exam(hardest=exam.hardest, cells=exam.cells, rows=min(8, exam.rows))
    tokens, _, k = reduced.all()
    for steps in (4, 16, 64):
        paths = latents.path_independence(model, tokens, steps=steps, seeds=range(5))
        yield (
            "path",
            {
                "recurrences": steps,
                "mean_distance": round(float(paths.distance.mean()), 6),
                "share_within_2_percent": round(float((paths.distance <= 0.02).double().mean()), 5),
                "share_same_prediction": round(float(paths.agrees.double().mean()), 5),
                "distance_deciles": [
                    round(float(q), 6)
                    for q in paths.distance.flatten().quantile(torch.arange(11) / 10)
                ],
            },
        )
    paths = [latents.trajectory(model, tokens, steps=64, seed=seed) for seed in range(3)]
    steps_to_settle = torch.stack(
        [latents.convergence_steps(states, tolerance=0.05).double() for states in paths]
    )
    yield (
        "convergence",
        {
            "variance_over_tokens": round(float(steps_to_settle.mean(0).var()), 5),
            "variance_over_initial_states": round(float(steps_to_settle.var(0).mean()), 5),
        },
    )
    states = paths[0]
    kinds: dict[str, int] = {"fixed point": 0, "orbit": 0, "slider": 0, "unsettled": 0}
    for row in range(tokens.shape[0]):
        for token in range(SKIPPED, tokens.shape[1], 3):
            kinds[latents.classify(states[:, row, token])[0]] += 1
    yield "ends", {name.replace(" ", "_"): count for name, count in kinds.items()}
    components = latents.principal_components(states[:, ::8, -1], count=2)
    for index in range(components.shape[1]):
        path = [[round(float(x), 4) for x in point] for point in components[:33, index]]
        yield "trajectory", {"k": int(k[8 * index, 0]), "components": path}


@torch.no_grad()
def cache_policies(
    model: RecurrentDepthForCausalLM,
    rows: Int[Tensor, "row token"],
    targets: Int[Tensor, "row token"],
    text: Int[Tensor, "row token"],
    *,
    steps: int,
    prompt: int,
) -> Iterator[Event]:
    """Loss of teacher-forced decoding behind a prompt, and bytes a token, for every way to keep keys.

    Those of all recurrences, of some in turn, of the last alone, or one vector for all of them, whose
    directions are fitted to `text`. A target of -100 is not asked for.
    """
    config = model.config
    ranks = [rank for rank in RANKS if rank < text.numel()]
    basis = LatentBasis.fit(model, text, steps=steps, rank=max(ranks))
    caches: list[tuple[dict[str, Any], RecurrentCache]] = [
        (
            {"policy": policy, "recurrences_kept": budget or steps},
            RecurrentCache(config, steps=steps, budget=budget),
        )
        for policy, budget in (("own", None), ("shared", 4), ("shared", 2), ("last", 1))
    ]
    for rank in ranks:
        fewer = basis.first(rank)
        told = {"policy": "latent", "rank": rank, "variance": round(float(fewer.shares.sum()), 6)}
        caches.append((told, LatentCache(config, fewer)))
    table = state_table(config.block_size, config.n_embd, seed=EXIT_SEED)
    for told, cache in caches:
        options: dict[str, Any] = {
            "past_key_values": cache, "use_cache": True, "num_steps": steps, "initial_state": table,
        }  # fmt: skip
        said = [model(rows[:, :prompt], logits_to_keep=1, **options).logits]
        said += [
            model(rows[:, place : place + 1], **options).logits
            for place in range(prompt, rows.shape[1])
        ]
        logits, asked = torch.cat(said, dim=1).double(), targets[:, prompt - 1 :]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), asked.flatten())
        right = (logits.argmax(-1) == asked)[asked != -100].double().mean()
        yield (
            "cache",
            {
                **told,
                "loss_nats": round(float(loss), 6),
                "accuracy": round(float(right), 5),
                "bytes_per_token": cache.nbytes() // rows.numel(),
            },
        )


@torch.no_grad()
def warm_start(
    model: RecurrentDepthForCausalLM, rows: Int[Tensor, "row token"], *, steps: int, prompt: int
) -> Iterator[Event]:
    """Exit steps and loss of teacher-forced decoding, from fresh states and from the last token's."""
    table = state_table(model.config.block_size, model.config.n_embd, seed=EXIT_SEED)
    for warm in (False, True):
        cache = RecurrentCache(model.config, steps=steps)
        options: dict[str, Any] = {
            "past_key_values": cache, "use_cache": True, "num_steps": steps, "warm_start": warm,
            "exit": KL(threshold=5e-4), "initial_state": table,
        }  # fmt: skip
        nats = torch.zeros((), dtype=torch.float64)
        out = model(rows[:, :prompt], logits_to_keep=1, **options)
        for place in range(prompt, rows.shape[1]):
            assert out.logits is not None
            log_p = out.logits[:, -1].log_softmax(-1)
            nats -= log_p.gather(1, rows[:, place : place + 1]).double().sum()
            out = model(rows[:, place : place + 1], **options)
        assert cache.exit_steps is not None
        taken = cache.exit_steps[:, prompt:].double()
        count = rows.shape[0] * (rows.shape[1] - prompt)
        yield (
            "warm_start",
            {
                "warm": warm,
                "mean_recurrences": round(float(taken.mean()), 4),
                "loss_nats": round(float(nats) / count, 6),
            },
        )


CRITERIA: tuple[tuple[str, Criterion], ...] = (
    ("kl", KL(threshold=5e-4, scope="token")),
    ("latent_diff", LatentDiff(threshold=0.03, scope="token")),
    ("latent_diff, lags 2", LatentDiff(threshold=0.03, lags=2, scope="token")),
)
"""Criteria whose exits are measured; thresholds are the published ones."""
