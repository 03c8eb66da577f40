"""Batches that refill answer every request as it is answered alone, and recur for nobody in vain."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fourfold_recurrent_depth import RecurrentCache, state_table
from fourfold_recurrent_depth.decoding.refill import Answer, Request, serve
from fourfold_recurrent_depth.exits import KL, ArgmaxStability, EntropyDiff, Fixed, LatentDiff
from fourfold_recurrent_depth.fast import compiled as native
from fourfold_recurrent_depth.fast.row_caches import RowCache, RowCaches

STEPS = 9
LENGTHS = (5, 1, 12, 3, 8, 12, 2)
"""Of the prompts; the second is one token, whose prompt is as any other."""
EXITS = {
    "full depth": None,
    "state": LatentDiff(threshold=0.2),
    "state, lags": LatentDiff(threshold=0.2, lags=3),
    "state, every 4": LatentDiff(threshold=0.3, every=4),
    "logits": KL(threshold=0.3),
    "logits, every 2": EntropyDiff(threshold=0.2, every=2, min_steps=3),
    "count": ArgmaxStability(threshold=2),
    "number": Fixed(threshold=4),
    "each token of a prompt": LatentDiff(threshold=0.2, scope="token"),
    "not in prompts": LatentDiff(threshold=0.2, in_prompt=False),
}


@pytest.fixture(params=["modules", "compiled"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The blocks by torch's modules, and in C++ where a compiler is here."""
    if request.param == "modules":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("needs a C++ compiler, as Debian's g++")
    return request.param


def requests(*, new: int = 7) -> list[Request]:
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(0, 64, (length,), generator=generator) for length in LENGTHS]
    return [
        Request(tokens=prompt.tolist(), max_new_tokens=1 + (new + row) % new, label=row)
        for row, prompt in enumerate(prompts)
    ]


def alone(model: Any, request: Request, **how: Any) -> tuple[list[int], list[int]]:
    """Tokens of one request by transformers' loop, and the recurrences behind each of them."""
    cache = RecurrentCache(model.config, steps=how["num_steps"], budget=how.get("kv_budget"))
    prompt = torch.tensor([request.tokens])
    made = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=request.max_new_tokens,
        do_sample=False, pad_token_id=0, past_key_values=cache, **how,
    )[0, prompt.shape[1] :].tolist()  # fmt: skip
    assert cache.exit_steps is not None
    return made, cache.exit_steps[0, prompt.shape[1] - 1 :].tolist()


def answered(answers: Iterator[Answer]) -> dict[int, tuple[list[int], list[int]]]:
    return {answer.request.label: (answer.tokens, answer.exit_steps) for answer in answers}


@pytest.mark.parametrize("exits", EXITS.values(), ids=EXITS)
def test_a_request_is_answered_as_it_is_alone(tiny: Any, form: str, exits: Any) -> None:
    """Tokens and recurrences, in places fewer than the requests, as many, and more."""
    how: dict[str, Any] = {"num_steps": STEPS, "exit": exits}
    asked = requests()
    expected = {request.label: alone(tiny, request, **how) for request in asked}
    if exits is not None and not isinstance(exits, Fixed):
        assert len({steps for _, each in expected.values() for steps in each}) > 1
    for slots in (1, 3, 7, 20):
        assert answered(serve(tiny, asked, slots=slots, **how)) == expected, (form, slots)


@pytest.mark.parametrize(
    "how",
    [
        {"kv_budget": 1}, {"kv_budget": 4}, {"warm_start": True}, {"init_scale": 0.0},
        {"initial_state": state_table(64, 32, seed=0)},
    ],
    ids=str,
)  # fmt: skip
def test_what_a_pass_takes_serving_takes(tiny: Any, form: str, how: dict[str, Any]) -> None:
    for exits in (None, LatentDiff(threshold=0.2), KL(threshold=0.3, every=2)):
        options = {"num_steps": STEPS, "exit": exits, **how}
        expected = {request.label: alone(tiny, request, **options) for request in requests()}
        assert answered(serve(tiny, requests(), slots=3, **options)) == expected, form


def test_an_end_token_ends_an_answer_and_its_place_is_used(tiny: Any) -> None:
    how: dict[str, Any] = {"num_steps": STEPS, "exit": LatentDiff(threshold=0.2)}
    free = {request.label: alone(tiny, request, **how)[0] for request in requests()}
    ends = [free[2][1], free[4][0], free[5][3]]
    expected = {
        request.label: alone(tiny, request, eos_token_id=ends, **how) for request in requests()
    }
    assert expected[4] != free[4]
    assert answered(serve(tiny, requests(), slots=2, eos_token_id=ends, **how)) == expected
    assert (
        answered(serve(tiny, requests()[4:5], eos_token_id=free[4][0], **how))[4][0] == free[4][:1]
    )
    short = answered(serve(tiny, requests(), ends=lambda answer: len(answer.tokens) == 2, **how))
    assert {label: tokens for label, (tokens, _) in short.items()} == {
        label: tokens[:2] for label, tokens in free.items()
    }


def test_requests_arrive_while_others_run(tiny: Any) -> None:
    """What comes late, also because of an answer, is answered as what comes at once; nobody waits for it."""
    how: dict[str, Any] = {"num_steps": STEPS, "exit": LatentDiff(threshold=0.2)}
    first, second, *later = requests()
    seen: list[int] = []

    def arriving() -> Iterator[Request | None]:
        yield first
        yield None
        yield second
        while not seen:
            yield None
        for request in later:
            yield request
            yield None

    found = {}
    for answer in serve(tiny, arriving(), slots=4, **how):
        seen.append(answer.request.label)
        found[answer.request.label] = (answer.tokens, answer.exit_steps)
    assert seen[0] in (0, 1)
    assert found == {request.label: alone(tiny, request, **how) for request in requests()}
    assert list(serve(tiny, [], **how)) == []


def test_time_follows_the_mean_and_not_the_slowest(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows times recurrences of the core are what the tokens took, prompts aside: none recurs for another."""
    recur, taken = type(tiny).recur, []

    def counted(self: Any, s: torch.Tensor, *rest: Any) -> torch.Tensor:
        if s.shape[1] == 1:
            taken.append(len(s) * (rest[-1] if len(rest) == 4 else 1))
        return recur(self, s, *rest)

    monkeypatch.setattr(type(tiny), "recur", counted)
    asked = [request for request in requests() if len(request.tokens) > 1]
    answers = list(serve(tiny, asked, slots=4, num_steps=STEPS, exit=LatentDiff(threshold=0.2)))
    assert sum(taken) == sum(sum(answer.exit_steps[1:]) for answer in answers)
    assert max(max(answer.exit_steps) for answer in answers) > min(
        min(answer.exit_steps[1:], default=STEPS) for answer in answers
    )


def test_a_rows_numbers_are_its_own_bit_for_bit(tiny: Any) -> None:
    """States and keys of rows at places and recurrences of their own, in company and alone."""
    if native.library() is None:
        pytest.skip("needs a C++ compiler, as Debian's g++")
    generator = torch.Generator().manual_seed(3)
    s, injected = torch.randn(2, 4, 1, 32, generator=generator)
    lengths, done = (5, 1, 17, 8), (0, 3, 7, 1)

    def caches() -> list[RowCache]:
        made = []
        for row, length in enumerate(lengths):
            cache = RowCache(tiny.config, steps=STEPS, budget=None, prompt=length, capacity=30)
            prompt = torch.full((1, length), row + 1)
            tiny(prompt, past_key_values=cache, use_cache=True, num_steps=3 + row)
            made.append(cache)
        return made

    def run(rows: list[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        index, held = torch.tensor(rows), [caches()[row] for row in rows]
        rotary = tiny.rotations(torch.tensor(lengths)[index], torch.float32)[:, None, None]
        line = RowCaches(held[0].around, held[0].per_step)
        for row, cache in zip(rows, held, strict=True):
            line.add(cache, done=done[row])
        stages = tiny.begin(torch.zeros(1, 1, dtype=torch.long), None)[1].stages
        here = tiny.locate_rows(s[index], rotary, line, stages)
        assert here.mask is None
        out = tiny.recur(s[index], injected[index], here, 0, 2)
        return out, [cache.held(8, 0)[0] for cache in held]

    with torch.no_grad():
        together, keys = run([0, 1, 2, 3])
        for rows in ([0], [1], [2], [3], [3, 1]):
            out, own = run(rows)
            assert torch.equal(out, together[rows])
            assert all(torch.equal(a, keys[row]) for a, row in zip(own, rows, strict=True))


@pytest.mark.parametrize(
    ("asked", "how", "message"),
    [
        ([], {"slots": 0}, "slots=0"),
        ([], {"initial_state": torch.zeros(1, 1, 32)}, "by token or by position"),
        ([Request(tokens=[], max_new_tokens=3)], {}, "a prompt of 0 tokens"),
        ([Request(tokens=[3], max_new_tokens=0)], {}, "for 0 more"),
        ([Request(tokens=[3], max_new_tokens=64)], {}, "block_size=64"),
        ([Request(tokens=[3], max_new_tokens=2)], {"num_steps": 0}, "fewer than 1 recurrence"),
        ([Request(tokens=[3], max_new_tokens=2)], {"num_steps": 2, "kv_budget": 3}, "2 or fewer"),
    ],
)
def test_what_cannot_be_served_is_refused(
    tiny: Any, asked: list[Request], how: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        list(serve(tiny, asked, **how))


def test_semantics_without_masks_are_refused(make: Any) -> None:
    with pytest.raises(ValueError, match="reference_semantics"):
        list(serve(make(reference_semantics=True), requests()))
