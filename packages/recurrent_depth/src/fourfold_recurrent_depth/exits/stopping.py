"""The loops that tokens leave when they have thought enough: rows that have stopped cost nothing more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fourfold_recurrent_depth.cache import CandidateCache, RecurrentCache
from fourfold_recurrent_depth.exits.criteria import Criterion, Memory
from fourfold_recurrent_depth.stages import Pass

TOGETHER = 4
"""Recurrences of a decoded token whose logits are judged in one pass: a few recurrences more per token,
a quarter of the passes. With `every` above one, so many fewer are worth it."""


class Recurrent(Protocol):
    """The part of a model that the loops use."""

    def inject(self, e: Tensor) -> Tensor:
        """The share of the prelude's output that every recurrence is given."""
        ...

    def recur(
        self, s: Tensor, injected: Tensor, this_pass: Pass, step: int, count: int = 1
    ) -> Tensor:
        """`count` recurrences from recurrence `step` on."""
        ...

    def predict(self, s: Tensor, this_pass: Pass, logits_to_keep: int | Tensor = 0) -> Tensor:
        """Logits of a state."""
        ...


@dataclass(slots=True, kw_only=True)
class ExitResult:
    """The depths at which the tokens of a pass stopped, and their states there."""

    state: Float[Tensor, "batch token width"]
    steps: Int[Tensor, "batch token"]
    logits: Float[Tensor, "batch kept vocabulary"] | None
    """Of each row's last token, where the criterion read logits; else nobody has computed them."""


@torch.no_grad()
def iterate_until_exit(
    model: Recurrent,
    e: Float[Tensor, "batch token width"],
    s: Float[Tensor, "batch token width"],
    this_pass: Pass,
    cache: RecurrentCache,
    criterion: Criterion,
    *,
    steps: int,
    real: Bool[Tensor, "batch token"] | None,
) -> ExitResult:
    """Recur until every token has stopped, or `steps` times.

    Rows leave the loop when all their tokens have stopped, and the core runs on the others alone. What a
    token computes, and what others see of it, does not depend on its company: it attends to itself and
    to earlier tokens, and each of these is read at the recurrence in question or at its last one.

    Args:
        model: whose core, coda and head.
        e: the prelude's output.
        s: s_0.
        this_pass: positions and mask of the whole batch.
        cache: opened for this pass.
        criterion: when to stop.
        steps: recurrences at most.
        real: False for padding, which stops at once, at recurrence 0, and counts for nothing.
    """
    if goes_by_columns(criterion, e.shape[1]):
        return _columns(model, e, s, this_pass, cache, criterion, steps=steps, real=real)
    if e.shape[1] == 1 and cache.budget is None:
        return _one_token(model, e, s, this_pass, cache, criterion, steps=steps)
    return _many_tokens(model, e, s, this_pass, cache, criterion, steps=steps, real=real)


def goes_by_columns(criterion: Criterion, tokens: int) -> bool:
    """True where tokens stop by their own logits: the coda of one reads where those before it have ended."""
    is_judged = criterion.in_prompt and criterion.reads == "logits" and criterion.scope == "token"
    return tokens > 1 and is_judged


def _columns(
    model: Recurrent,
    e: Float[Tensor, "batch token width"],
    s: Float[Tensor, "batch token width"],
    this_pass: Pass,
    cache: RecurrentCache,
    criterion: Criterion,
    *,
    steps: int,
    real: Bool[Tensor, "batch token"] | None,
) -> ExitResult:
    """One token after another, as when they are decoded: in as many turns as there are tokens."""
    states, depths, before = [], [], cache.length
    for token in range(e.shape[1]):
        column = slice(token, token + 1)
        here = this_pass.of_token(token, cached=before + token)
        is_real = None if real is None or bool(real[:, column].all()) else real[:, column]
        judge = _many_tokens if is_real is not None or cache.budget is not None else _one_token
        padding = {"real": is_real} if judge is _many_tokens else {}
        result = judge(
            model, e[:, column], s[:, column], here, cache, criterion, steps=steps, **padding
        )
        states.append(result.state)
        depths.append(result.steps)
        cache.length += 1
    cache.length = before
    return ExitResult(state=torch.cat(states, 1), steps=torch.cat(depths, 1), logits=None)


def _many_tokens(
    model: Recurrent,
    e: Float[Tensor, "batch token width"],
    s: Float[Tensor, "batch token width"],
    this_pass: Pass,
    cache: RecurrentCache,
    criterion: Criterion,
    *,
    steps: int,
    real: Bool[Tensor, "batch token"] | None,
) -> ExitResult:
    """The loop as it is meant: check after every recurrence, and go on with the rows that remain."""
    batch, tokens = e.shape[:2]
    whole_rows = criterion.scope == "row"
    final, stopped_at = s.clone(), torch.full((batch, tokens), steps, device=e.device)
    logits: Tensor | None = None
    stopped_at = stopped_at if real is None else stopped_at * real
    judged = _judged(real, whole=whole_rows)
    # The survivors: their rows in the batch, and which of their tokens still run.
    rows = torch.arange(batch, device=e.device)
    running = torch.ones_like(stopped_at, dtype=torch.bool) if real is None else real.clone()
    injected, here, memory = model.inject(e), this_pass, None
    if real is not None:
        cache.select(None, running)
    is_judged, done = tokens == 1 or criterion.in_prompt, 0
    while done < steps:
        # 1. Recur up to the next check; tokens that have stopped keep the state that they stopped with.
        before, done = done, next_check(criterion, done, steps) if is_judged else steps
        new = model.recur(s, injected, here, before, done - before)
        s = new if tokens == 1 else torch.where(running.unsqueeze(-1), new, s)
        # 2. Measure, and decide who stops; after the last recurrence all who still run do.
        is_checked = is_judged and done % criterion.every == 0
        features = s
        if criterion.reads == "logits":
            kept = judged if isinstance(judged, int) else judged[rows]
            features = model.predict(s, here, kept)
        stops = running
        if is_checked:
            memory = memory or criterion.begin(_start(criterion, final[rows], features))
            value, memory = criterion.measure(features.flatten(0, 1), memory)
            value = _of_rows(value.unflatten(0, features.shape[:2]), running, whole=whole_rows)
            if done < steps:
                stops = running & criterion.stops(value) & (done >= criterion.min_steps)
        if criterion.reads == "logits":
            logits = features.new_zeros((batch, *features.shape[1:])) if logits is None else logits
            leaving = stops if features.shape[1] == tokens else stops.any(1, keepdim=True)
            logits[rows] = torch.where(leaving.unsqueeze(-1), features, logits[rows])
        # 3. Note where they stopped, and fill the slots that they will not reach.
        row, token = stops.nonzero(as_tuple=True)
        if not len(row):
            continue
        final[rows[row], token], stopped_at[rows[row], token] = s[row, token], done
        cache.stop(rows[row], token, depth=done)
        # 4. Go on with the rows of which a token still runs.
        running = running & ~stops
        keep = running.any(1).nonzero().flatten()
        if not len(keep):
            break
        if len(keep) < len(rows):
            memory = _memory_of(memory, keep, features.shape[1])
            rows, s, injected, running = rows[keep], s[keep], injected[keep], running[keep]
            here = this_pass.of_rows(rows)
        cache.select(
            None if len(rows) == batch else rows,
            None if bool(running.all()) else running,
        )
    cache.select(None, None)
    if (tokens > 1 and not whole_rows) or not isinstance(judged, int):
        # A token's coda keys were provisional for later ones as long as it ran: nobody has the logits.
        # And a row that is padded on the right was judged by its last real token.
        logits = None
    return ExitResult(state=final, steps=stopped_at, logits=logits)


def _one_token(
    model: Recurrent,
    e: Float[Tensor, "batch 1 width"],
    s: Float[Tensor, "batch 1 width"],
    this_pass: Pass,
    cache: RecurrentCache,
    criterion: Criterion,
    *,
    steps: int,
) -> ExitResult:
    """The loop for one new token of each row, with the same results in less time.

    A narrow pass costs almost as much for one row as for eight, and its share of Python counts. So
    rows leave when half of them have stopped, and a reader of logits judges several recurrences in
    one pass of coda and head. What a token computed beyond its exit is forgotten: `stop` copies its
    exit's keys over the deeper slots, which is why a cache with a budget, whose slots are used again,
    cannot take this way.
    """
    batch, reads_logits = len(e), criterion.reads == "logits"
    is_stackable = reads_logits and this_pass.takes_any_mask
    together = max(1, TOGETHER // criterion.every) if is_stackable else 1
    final, stopped_at = s.clone(), torch.full((batch, 1), steps, device=e.device)
    logits: Tensor | None = None
    rows = torch.arange(batch, device=e.device)
    running = torch.ones_like(rows, dtype=torch.bool)
    injected, here, memory, done = model.inject(e), this_pass, None, 0
    stopped: list[tuple[Tensor, int]] = []
    while bool(running.any()):
        # 1. Recur for as many checks as are judged together.
        states: dict[int, Tensor] = {}
        while done < steps and len(states) < together:
            before, done = done, next_check(criterion, done, steps)
            s = model.recur(s, injected, here, before, done - before)
            states[done] = s
        features, candidates = s, None
        # 2. Coda and head once for all of them: each state is a version of the token beside the cache.
        if reads_logits:
            candidates = CandidateCache(cache)
            apart = here.versions(len(states), candidates)
            versions = torch.cat([*states.values()], dim=1)
            features = model.predict(versions, apart)
            logits = features.new_zeros(batch, 1, features.shape[-1]) if logits is None else logits
        # 3. Judge the versions in order; a row's first that stops is the row's answer.
        for version, (step, state) in enumerate(states.items()):
            stops = running
            if step < steps:
                now = features[:, version] if reads_logits else state[:, 0]
                memory = memory or criterion.begin(_start(criterion, final[rows], now))
                value, memory = criterion.measure(now, memory)
                stops = running & criterion.stops(value) & (step >= criterion.min_steps)
            row = stops.nonzero().flatten()
            if len(row):
                left = rows[row]
                final[left], stopped_at[left] = state[row], step
                stopped.append((left, step))
                running = running & ~stops
                if candidates is not None and logits is not None:
                    logits[left] = features[row, version : version + 1]
                    candidates.keep(row, left, version=version)
        # 4. Shrink the batch once half of it has stopped.
        keep = running.nonzero().flatten()
        if 0 < len(keep) <= len(rows) // 2:
            memory = None if memory is None else tuple(part[keep] for part in memory)
            rows, s, injected, running = rows[keep], s[keep], injected[keep], running[keep]
            here = this_pass.of_rows(rows)
            cache.select(rows, None)
    for left, step in stopped:
        cache.stop(left, torch.zeros_like(left), depth=step)
    cache.select(None, None)
    return ExitResult(state=final, steps=stopped_at, logits=logits)


def next_check(criterion: Criterion, done: int, steps: int) -> int:
    """Recurrences done at the next check, or at the end."""
    return min(steps, (done // criterion.every + 1) * criterion.every)


def _start(criterion: Criterion, first: Tensor, features: Tensor) -> Tensor:
    """The argument of `begin`: s_0, or zeros like the logits, by token."""
    start = first if criterion.reads == "state" else torch.zeros_like(features)
    return start.flatten(0, -2)


def _judged(
    real: Bool[Tensor, "batch token"] | None, *, whole: bool
) -> int | Int[Tensor, "batch 1"]:
    """Whose logits a criterion reads: all (0), each row's last (1), or where each row's padding begins."""
    if not whole:
        return 0
    if real is None or bool(real[:, -1].all()):
        return 1
    return (real * torch.arange(real.shape[1], device=real.device)).argmax(1, keepdim=True)


def _of_rows(
    value: Float[Tensor, "row kept"], running: Bool[Tensor, "row token"], *, whole: bool
) -> Float[Tensor, "row judged"]:
    """Each token's value, or the mean over a row's running tokens where the row stops as one."""
    if not whole or value.shape[1] == 1:
        return value
    # Padding may be measured as anything, also as 0 / 0.
    return value.where(running, 0).sum(1, keepdim=True) / running.sum(1, keepdim=True)


def _memory_of(memory: Memory | None, keep: Int[Tensor, " kept"], tokens: int) -> Memory | None:
    """The memory of some rows."""
    if memory is None:
        return None
    return tuple(part.unflatten(0, (-1, tokens))[keep].flatten(0, 1) for part in memory)
