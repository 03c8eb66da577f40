"""Laws of every exit criterion: a new subclass of `Criterion` is run through them by existing.

A threshold is chosen for each from what it measures on the tokens at hand, so that rows differ in depth.
"""

import sys
from dataclasses import replace
from inspect import isabstract
from typing import Any

import pytest
import torch

from fourfold_recurrent_depth import RecurrentCache
from fourfold_recurrent_depth.exits import (
    NAMED,
    Criterion,
    Custom,
    Fixed,
    Gate,
    criterion_named,
    stopping,
)

ROUNDING = 3e-5
"""As in test_model.py."""
STEPS = 8
GIVEN: dict[type[Criterion], dict[str, Any]] = {
    Fixed: {"threshold": 3},
    Gate: {"gate": lambda now: now[..., :1] - 1, "threshold": 0.5},
    Custom: {"function": lambda now, before: (now - before).norm(dim=-1) / before.norm(dim=-1)},
}
"""What criteria without defaults are made with."""


def kinds(of: type[Criterion] = Criterion) -> list[type[Criterion]]:
    """Every criterion that a loaded module defines."""
    found = [kind for child in of.__subclasses__() for kind in [child, *kinds(child)]]
    # A dataclass with slots is made twice, and only the second is the module's.
    named = [kind for kind in found if getattr(sys.modules[kind.__module__], kind.__name__) is kind]
    return [kind for kind in named if not isabstract(kind)]


@pytest.fixture(params=kinds(), ids=lambda kind: kind.__name__)
def kind(request: pytest.FixtureRequest) -> type[Criterion]:
    return request.param


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=ROUNDING)


@torch.no_grad()
def path(model: Any, tokens: torch.Tensor, reads: str) -> torch.Tensor:
    """(step, row, token, features) from s_0 on: states, or logits with zeros before the first."""
    out = model(tokens, num_steps=STEPS, output_hidden_states=True)
    if reads == "state":
        return torch.stack(out.hidden_states)
    logits = [model(tokens, num_steps=r).logits for r in range(1, STEPS + 1)]
    return torch.stack([torch.zeros_like(logits[0]), *logits])


def measured(criterion: Criterion, features: torch.Tensor) -> torch.Tensor:
    """(check, token): what a criterion measures of tokens at every check."""
    memory, values = criterion.begin(features[0]), []
    for step in range(criterion.every, len(features), criterion.every):
        value, memory = criterion.measure(features[step], memory)
        values.append(value)
    return torch.stack(values)


def undecided(kind: type[Criterion], model: Any, tokens: torch.Tensor, **changes: Any) -> Criterion:
    """A criterion of the kind whose threshold stops rows at different depths.

    It lies between two values, so that rounding decides nothing. A row of many tokens stops by their mean
    where states are read, by its last where logits are.
    """
    criterion = kind(**{**GIVEN.get(kind, {}), **changes})
    if kind is Fixed:
        return criterion
    features = path(model, tokens, criterion.reads)
    values = measured(criterion, features.flatten(1, 2)).unflatten(1, tokens.shape)
    values = values.mean(-1) if criterion.reads == "state" else values[..., -1]
    values = values.flatten().unique()
    middle = len(values) // 2
    return replace(criterion, threshold=float(values[middle - 1 : middle + 1].mean()))


def first_stop(criterion: Criterion, features: torch.Tensor) -> list[int]:
    """Oracle: the depth at which each token stops, read off the whole path."""
    depths = [STEPS] * features.shape[1]
    for token in range(features.shape[1]):
        memory = criterion.begin(features[0, token : token + 1])
        for step in range(criterion.every, STEPS, criterion.every):
            value, memory = criterion.measure(features[step, token : token + 1], memory)
            if step >= criterion.min_steps and bool(criterion.stops(value)):
                depths[token] = step
                break
    return depths


@pytest.mark.parametrize("changes", [{}, {"every": 3}, {"min_steps": 5}])
def test_tokens_stop_where_the_measure_says(
    tiny: Any, tokens: torch.Tensor, kind: type[Criterion], changes: dict[str, int]
) -> None:
    """Read off the full path, token by token, in loops; never before `min_steps` or between checks."""
    many = tokens.reshape(-1, 1)
    criterion = undecided(kind, tiny, many, **changes)
    with torch.no_grad():
        out = tiny(many, num_steps=STEPS, exit=criterion)
    expected = first_stop(criterion, path(tiny, many, criterion.reads)[:, :, 0])
    assert out.exit_steps[:, 0].tolist() == expected
    if kind is not Fixed and not changes:
        assert len(set(expected)) > 1, "the threshold must decide something"


def test_a_measure_does_not_look_at_other_tokens(
    tiny: Any, tokens: torch.Tensor, kind: type[Criterion]
) -> None:
    """Tokens measured in another order, or some of them, have the values that they had."""
    criterion = undecided(kind, tiny, tokens)
    features = path(tiny, tokens, criterion.reads).flatten(1, 2)
    values = measured(criterion, features)
    order = torch.randperm(features.shape[1], generator=torch.Generator().manual_seed(0))[:20]
    close(measured(criterion, features[:, order]).float(), values[:, order].float())
    assert all(len(part) == features.shape[1] for part in criterion.begin(features[0]))


@pytest.mark.parametrize("budget", [None, 1, 2])
def test_an_exit_that_never_comes_is_full_depth(
    tiny: Any, tokens: torch.Tensor, kind: type[Criterion], budget: int | None
) -> None:
    """No token may stop before the last recurrence: as without a criterion, whatever the cache keeps."""
    parts: list[list[torch.Tensor]] = [[], []]
    never = kind(**{**GIVEN.get(kind, {}), "min_steps": STEPS})
    for found, exits in zip(parts, (None, never), strict=True):
        cache = RecurrentCache(tiny.config, steps=STEPS, budget=budget)
        for first, last in ((0, 7), (7, 8), (8, 12)):
            with torch.no_grad():
                out = tiny(
                    tokens[:, first:last], past_key_values=cache, use_cache=True, num_steps=STEPS, exit=exits,
                )  # fmt: skip
            found.append(out.logits[:, -1])
    close(torch.stack(parts[1]), torch.stack(parts[0]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_judged(
    tiny: Any, tokens: torch.Tensor, kind: type[Criterion], side: str
) -> None:
    """Rows stop together where they stop without padding: by their own last token, and not by 0 / 0."""
    criterion = undecided(kind, tiny, tokens)
    pad = torch.full((3, 5), 9)
    order = [pad, tokens] if side == "left" else [tokens, pad]
    mask = torch.cat([torch.full_like(part, part is tokens) for part in order], 1)
    with torch.no_grad():
        plain = tiny(tokens, num_steps=STEPS, exit=criterion)
        padded = tiny(torch.cat(order, 1), attention_mask=mask, num_steps=STEPS, exit=criterion)
    assert plain.exit_steps.min() < STEPS
    assert torch.equal(padded.exit_steps[mask.bool()].view(3, 12), plain.exit_steps)
    assert bool((padded.exit_steps[~mask.bool()] == 0).all())
    close(padded.logits[mask.bool()].view_as(plain.logits), plain.logits)


def test_what_a_row_does_in_company_it_does_alone(
    tiny: Any, tokens: torch.Tensor, kind: type[Criterion]
) -> None:
    """Exit steps and logits of each row, token by token through a cache, in batches of any make-up."""
    criterion = undecided(kind, tiny, tokens.reshape(-1, 1))

    def run(rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        cache = RecurrentCache(tiny.config, steps=STEPS)
        options: Any = {"past_key_values": cache, "use_cache": True, "num_steps": STEPS}
        with torch.no_grad():
            found = [
                tiny(tokens[rows, at : at + 1], exit=criterion, **options).logits
                for at in range(12)
            ]
        assert cache.exit_steps is not None
        return torch.cat(found, 1), cache.exit_steps

    alone = [run([row]) for row in range(3)]
    if kind is not Fixed:
        assert len({tuple(steps[0].tolist()) for _, steps in alone}) == 3, "rows must differ"
    for rows in ([0, 1, 2], [2, 0], [1, 1, 2, 0]):
        together, steps = run(rows)
        for index, row in enumerate(rows):
            assert steps[index].tolist() == alone[row][1][0].tolist()
            close(together[index], alone[row][0][0])


@pytest.mark.parametrize("changes", [{}, {"every": 3}, {"min_steps": 4}])
def test_checks_taken_together_are_checks_taken_one_by_one(
    tiny: Any,
    tokens: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[Criterion],
    changes: dict[str, int],
) -> None:
    """Tokens, recurrences, logits and what later tokens read, with padding and rows that leave."""
    criterion = undecided(kind, tiny, tokens.reshape(-1, 1), **changes)
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    results = []
    for together in (1, 2, 4, 100):
        monkeypatch.setattr(stopping, "TOGETHER", together)
        cache = RecurrentCache(tiny.config, steps=STEPS)
        options: Any = {"past_key_values": cache, "use_cache": True, "num_steps": STEPS}
        parts = []
        for first, last in ((0, 7), (7, 8), (8, 9), (9, 10), (10, 11)):
            exits = criterion if last < 11 else None
            with torch.no_grad():
                out = tiny(
                    tokens[:, first:last], attention_mask=mask[:, :last], exit=exits, **options
                )
            parts.append(out.logits[:, -1])
        results.append((torch.stack(parts), cache.exit_steps))
    for parts, steps in results[1:]:
        assert steps.tolist() == results[0][1].tolist()
        close(parts, results[0][0])


def test_rows_of_several_lengths_generate_what_they_do_alone(
    tiny: Any, tokens: torch.Tensor, kind: type[Criterion]
) -> None:
    """Left padding in `generate`, with rows that leave the loop at different depths."""
    criterion = undecided(kind, tiny, tokens.reshape(-1, 1))
    lengths = [4, 7, 12]
    padded, mask = torch.zeros(3, 12, dtype=torch.long), torch.zeros(3, 12, dtype=torch.long)
    for row, length in enumerate(lengths):
        padded[row, 12 - length :], mask[row, 12 - length :] = tokens[row, :length], 1
    options: Any = {
        "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "exit": criterion, "num_steps": STEPS,
    }  # fmt: skip
    together = tiny.generate(padded, attention_mask=mask, **options)[:, 12:]
    for row, length in enumerate(lengths):
        alone = tiny.generate(tokens[row : row + 1, :length], **options)[:, length:]
        assert together[row].tolist() == alone[0].tolist()


@pytest.mark.parametrize("padded", [False, True])
def test_tokens_that_stop_by_themselves_stop_where_they_do_when_decoded(
    tiny: Any, tokens: torch.Tensor, kind: type[Criterion], padded: bool
) -> None:
    """The depths and logits of a prompt, with a cache and without, are those of token after token."""
    criterion = undecided(kind, tiny, tokens.reshape(-1, 1), scope="token")
    mask = torch.ones_like(tokens)
    if padded:
        mask[1, :4] = 0
    options: Any = {"num_steps": STEPS, "exit": criterion}
    with torch.no_grad():
        whole = tiny(tokens, attention_mask=mask, **options)
        cached = tiny(tokens, attention_mask=mask, use_cache=True, **options)
        for row in range(3):
            real = tokens[row : row + 1, mask[row].bool()]
            cache = RecurrentCache(tiny.config, steps=STEPS)
            parts = [
                tiny(one, past_key_values=cache, use_cache=True, **options).logits
                for one in real.split(1, dim=1)
            ]
            assert cache.exit_steps is not None
            for found in (whole, cached):
                assert (
                    found.exit_steps[row, mask[row].bool()].tolist() == cache.exit_steps[0].tolist()
                )
                close(found.logits[row, mask[row].bool()], torch.cat(parts, 1)[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"every": 0}, "every=0"),
        ({"min_steps": 0}, "min_steps=0"),
        ({"scope": "rows"}, "scope='rows'"),
        ({"threshold": float("nan")}, "threshold=nan"),
    ],
)
def test_what_cannot_judge_is_refused(
    kind: type[Criterion], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**{**GIVEN.get(kind, {}), **changes})


@pytest.mark.parametrize("name", NAMED)
def test_names_are_criteria(name: str) -> None:
    """With the published thresholds, hyphens as good as underscores; every kind is exported."""
    assert type(criterion_named(name)) in kinds()
    assert criterion_named(name.replace("_", "-")) == criterion_named(name)
