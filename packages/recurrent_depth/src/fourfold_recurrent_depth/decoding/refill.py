"""Batches that refill: a row that has settled leaves, and the next token or request takes its place.

The core has one set of weights for every recurrence, so rows at recurrences 2, 9 and 30 share its products
("depth batching"). Nobody waits for the slowest row: the time follows the mean number of recurrences.

What a row computes is its own. Where the blocks run compiled (`fast/compiled.py`), its states, its keys and
its exits by state are those of the row alone, bit for bit. By torch's modules, and in the head's product,
whose sums torch orders by the number of rows, they are so up to rounding: tokens are equal unless the two
likeliest, and exits unless a measure and its threshold, lie within it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
)  # fmt: skip

from fourfold_recurrent_depth.cache import CACHE, RecurrentCache
from fourfold_recurrent_depth.causal_lm import RecurrentDepthForCausalLM
from fourfold_recurrent_depth.decoding.greedy import refuse_extras
from fourfold_recurrent_depth.exits.criteria import Criterion, Fixed, Memory, criterion_named
from fourfold_recurrent_depth.exits.stopping import next_check
from fourfold_recurrent_depth.fast.compiled import CompiledStage
from fourfold_recurrent_depth.fast.row_caches import RowCache, RowCaches
from fourfold_recurrent_depth.stages import Pass, either
from fourfold_recurrent_depth.states import FreshNoise, StateTable, TokenStates


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """A prompt, and how many tokens may follow it."""

    tokens: Sequence[int]
    max_new_tokens: int
    label: Any = None
    """Whatever tells this request from others; it comes back with the answer."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answer:
    """The tokens behind a prompt."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    """The end token among them."""
    exit_steps: list[int] = field(default_factory=list)
    """Recurrences after which each of these was spoken."""


Pick = Callable[[Answer, Float[Tensor, "1 vocabulary"]], int]
"""The next token of an answer, given the logits behind what there is of it."""


@torch.no_grad()
def serve(
    model: RecurrentDepthForCausalLM,
    requests: Iterable[Request | None],
    *,
    slots: int = 8,
    num_steps: int | None = None,
    exit: Criterion | str | Callable[..., Tensor] | None = None,  # noqa: A002 - the word for it
    kv_budget: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    initial_state: TokenStates | FreshNoise | StateTable | None = None,
    init_scale: float = 1.0,
    warm_start: bool = False,
    pick: Pick | None = None,
    ends: Callable[[Answer], bool] | None = None,
) -> Iterator[Answer]:
    """Answers, in the order in which they end; each is what its request alone would be answered.

    Args:
        model: decodes; its weights must not change meanwhile.
        requests: taken one by one as places become free, so that they may arrive while others run. None says
            that nothing waits just now; asked while no row runs, an iterator had better wait.
        slots: rows that share the core's recurrences at most.
        num_steps: recurrences of a token at most; by default `config.mean_recurrence`.
        exit: the criterion, as of a forward pass; without it all tokens take `num_steps`.
        kv_budget: recurrences that a cache keeps; by default all.
        eos_token_id: tokens that end an answer.
        initial_state: s_0 of tokens, as of a forward pass; not one tensor for all.
        init_scale: multiplies drawn states; 0 gives zeros.
        warm_start: a token begins from the state of the last one.
        pick: chooses tokens; by default the likeliest.
        ends: says whether an answer is whole; beside `eos_token_id` and `max_new_tokens`.

    Raises:
        ValueError: no slot, states of rows, a model that ignores masks, or a request that does not fit.
    """
    _refuse(model, slots, initial_state)
    steps = sum(model.recurrences(num_steps, 1)[:2])
    batch = _Batch(
        model, None if exit is None else criterion_named(exit).of(model), steps, kv_budget, pick,
        begin={"initial_state": initial_state, "init_scale": init_scale, "warm_start": warm_start},
    )  # fmt: skip
    last = {eos_token_id} if isinstance(eos_token_id, int) else {*(eos_token_id or ())}

    def has_ended(answer: Answer) -> bool:
        is_last = answer.tokens[-1] in last or len(answer.tokens) == answer.request.max_new_tokens
        return is_last or (ends is not None and ends(answer))

    waiting, is_open = iter(requests), True
    while batch.rows or is_open:
        # 1. Free places take requests. A prompt is a pass of its own, and gives the first token.
        while is_open and len(batch.rows) < slots:
            request = next(waiting, _END)
            is_open = request is not _END
            if not isinstance(request, Request):
                break
            batch.admit(request)
            if has_ended(batch.rows[-1].answer):
                yield batch.leave(len(batch.rows) - 1)
        if batch.rows:
            # 2. Rows with a new token read it: its recurrences begin.
            batch.read()
            # 3. All rows recur, each from where it is, until some are due; those that have settled speak.
            batch.recur()
            settled = batch.settled()
            # 4. A row whose last token that was leaves.
            for place in reversed(settled):
                if has_ended(batch.rows[place].answer):
                    yield batch.leave(place)


Some = Int[Tensor, " row"] | None
"""Places of rows; None for all."""
_END = object()
_BY_ROW = (
    EncoderNoRepeatNGramLogitsProcessor, EncoderRepetitionPenaltyLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
)  # fmt: skip
"""Processors that know a row by its place in the batch."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Row:
    """A request that runs."""

    answer: Answer
    cache: RowCache
    done: int = -1
    """Recurrences of the token under way; -1 where it is still to be read."""


class _Batch:
    """The rows that run, without gaps, and what the core's recurrence needs of each."""

    def __init__(
        self,
        model: RecurrentDepthForCausalLM,
        exits: Criterion | None,
        steps: int,
        budget: int | None,
        pick: Pick | None,
        *,
        begin: Mapping[str, Any],
    ) -> None:
        self.model, self.exits, self.steps, self.budget = model, exits, steps, budget
        self.pick, self.begin = pick, begin
        self.criterion = exits or Fixed(threshold=steps, every=steps)
        self.rows: list[_Row] = []
        self.s = torch.zeros(0, 1, model.config.n_embd, dtype=model.dtype, device=model.device)
        self.injected = self.s
        self.tokens = torch.zeros(0, 1, dtype=torch.long, device=model.device)
        self.rotary = self._rotations(self.tokens)
        self.memory: Memory = ()
        self.blank = self.s[:, 0]
        """Logits of nothing."""
        around = model.config.n_layers_in_prelude + model.config.n_layers_in_coda
        self.caches = RowCaches(around, model.config.n_layers_in_recurrent_block)
        _, any_pass, _ = model.begin(torch.zeros(1, 1, dtype=torch.long, device=model.device), None)
        self.stages = any_pass.stages

    def admit(self, request: Request) -> None:
        """A request becomes a row: its prompt is read whole, at the depth that the criterion gives it.

        Raises:
            ValueError: no prompt, no token asked for, or both longer than the model's table of positions.
        """
        prompt, most = len(request.tokens), request.max_new_tokens
        if min(prompt, most) < 1 or prompt + most > self.model.config.block_size:
            raise ValueError(
                f"a prompt of {prompt} tokens for {most} more; use 1 or more of both, and no more than "
                f"block_size={self.model.config.block_size} together"
            )
        cache = RowCache(
            self.model.config,
            steps=self.steps,
            budget=self.budget,
            prompt=prompt,
            capacity=prompt + most,
            stages=self.stages,
        )
        out = self.model(
            torch.tensor([[*request.tokens]], device=self.model.device), use_cache=True,
            logits_to_keep=1, num_steps=self.steps, exit=self.exits, **{CACHE: cache}, **self.begin,
        )  # fmt: skip
        assert out.logits is not None
        assert out.final_state is not None
        self.s = torch.cat([self.s, out.final_state[:, -1:]])
        self.injected = torch.cat([self.injected, self.injected.new_zeros(1, *self.s.shape[1:])])
        nothing = self.tokens.new_zeros(1, 1)
        self.tokens = torch.cat([self.tokens, nothing])
        self.rotary = torch.cat([self.rotary, self._rotations(nothing)])
        steps = self.steps if out.exit_steps is None else int(out.exit_steps[0, -1])
        self.rows.append(_Row(answer=Answer(request=request), cache=cache, done=steps))
        place = len(self.rows) - 1
        self.blank = torch.zeros_like(out.logits[:, -1])
        begun = self.criterion.begin(self._first(self._some([place])))
        known = self.memory or tuple(part[:0] for part in begun)
        self.memory = tuple(map(torch.cat, zip(known, begun, strict=True)))
        self._say([place], out.logits[:, -1])
        self.caches.add(cache)

    def leave(self, place: int) -> Answer:
        """A row goes, and those behind it move up."""
        keep = torch.arange(len(self.rows), device=self.s.device) != place
        self.s, self.injected, self.rotary = self.s[keep], self.injected[keep], self.rotary[keep]
        self.tokens = self.tokens[keep]
        self.memory = tuple(part[keep] for part in self.memory)
        self.caches.drop(place)
        return self.rows.pop(place).answer

    def read(self) -> None:
        """Rows whose token nobody has read embed it, and stand before its first recurrence."""
        fresh = [place for place, row in enumerate(self.rows) if row.done < 0]
        if not fresh:
            return
        new, some = [self.rows[place] for place in fresh], self._some(fresh)
        each = [[row.answer.tokens[-1], row.cache.length] for row in new]
        tokens, positions = torch.tensor(each, device=self.s.device).unsqueeze(-1).unbind(1)
        index = torch.arange(len(new), device=self.s.device) if some is None else some
        self.tokens[index], self.rotary[index] = tokens, self._rotations(positions)
        e = self.model.read(self.model.embed(tokens), self._pass(some))
        if not self.begin["warm_start"]:
            initial, scale = self.begin["initial_state"], self.begin["init_scale"]
            self.s[index] = self.model.start(e, tokens, positions, initial, scale=scale)
        self.injected[index] = self.model.inject(e)
        for part, begun in zip(self.memory, self.criterion.begin(self._first(some)), strict=True):
            part[index] = begun
        for row in new:
            row.done = 0

    def recur(self) -> None:
        """All rows go on, each from its own recurrence, until the first of them is to be judged."""
        count = min(
            next_check(self.criterion, row.done, self.steps) - row.done for row in self.rows
        )
        self.s = self.model.recur(self.s, self.injected, self._pass(None), 0, count)
        self.caches.advance(count)
        for row in self.rows:
            row.done += count

    def settled(self) -> list[int]:
        """Places of the rows that stop here: they have said their token, and their slots are full."""
        every, steps = self.criterion.every, self.steps
        due = [k for k, row in enumerate(self.rows) if row.done % every == 0 or row.done == steps]
        if not due:
            return due
        judged, reads_state = self._some(due), self.criterion.reads == "state"
        now = _of(judged, self.s)[:, 0] if reads_state else self._logits(judged)
        before = tuple(_of(judged, part) for part in self.memory)
        value, memory = self.criterion.measure(now, before)
        if judged is None:
            # Not the states' own memory, into which new tokens are read.
            self.memory = tuple(part.clone() for part in memory)
        else:
            for part, new in zip(self.memory, memory, strict=True):
                part[judged] = new
        stops, least = self.criterion.stops(value).tolist(), self.criterion.min_steps
        chosen = [
            number for number, (place, stop) in enumerate(zip(due, stops, strict=True))
            if self.rows[place].done == steps or (stop and self.rows[place].done >= least)
        ]  # fmt: skip
        places = [due[number] for number in chosen]
        if places:
            logits = self._logits(self._some(places)) if reads_state else now[chosen]
            core = self.stages["core_block"]
            if isinstance(core, CompiledStage):
                core.close(self.caches, places)
            else:
                self.caches.close(places)
            self._say(places, logits)
        return places

    def _say(self, places: Sequence[int], logits: Float[Tensor, "row vocabulary"]) -> None:
        """Choose tokens, which are to be read next."""
        pick = self.pick
        if pick is None:
            tokens = logits.argmax(-1).tolist()
        else:
            chosen = zip(places, logits.split(1), strict=True)
            tokens = [pick(self.rows[place].answer, row) for place, row in chosen]
        for place, token in zip(places, tokens, strict=True):
            row = self.rows[place]
            row.answer.exit_steps.append(row.done)
            row.answer.tokens.append(token)
            row.done = -1

    def _some(self, places: Sequence[int]) -> Some:
        return None if len(places) == len(self.rows) else torch.tensor(places, device=self.s.device)

    def _logits(self, some: Some) -> Float[Tensor, "row vocabulary"]:
        return self.model.predict(_of(some, self.s), self._pass(some))[:, -1]

    def _first(self, some: Some) -> Tensor:
        """The argument of a criterion's `begin`."""
        if self.criterion.reads == "state":
            return _of(some, self.s)[:, 0]
        return self.blank.expand(len(self.rows) if some is None else len(some), -1)

    def _rotations(self, positions: Int[Tensor, "row 1"]) -> Tensor:
        return self.model.rotations(positions, self.s.dtype).unsqueeze(2)

    def _pass(self, some: Some) -> Pass:
        caches = self.caches if some is None else self.caches.of(some)
        rotary, tokens = _of(some, self.rotary), _of(some, self.tokens)
        return self.model.locate_rows(self.s[: len(rotary)], rotary, caches, self.stages, tokens)


def _of(some: Some, part: Tensor) -> Tensor:
    """Some rows, or all, which are not copied."""
    return part if some is None else part.index_select(0, some)


def _refuse(model: RecurrentDepthForCausalLM, slots: int, initial_state: object) -> None:
    if slots < 1 or not isinstance(initial_state, TokenStates | FreshNoise | StateTable | None):
        raise ValueError(
            f"slots={slots}, initial_state of type {type(initial_state).__name__}; use 1 slot or more, and "
            "states by token or by position"
        )
    if model.config.reference_semantics:
        raise ValueError(
            "reference_semantics ignores masks, and rows of several lengths need them; leave it out"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Refill:
    """`serve` for `model.generate(prompts, custom_generate=Refill(slots=8), ...)`, for any number of prompts.

    Logits processors and stopping criteria are transformers' own; greedy decoding and sampling. They see a
    row as `generate` shows it, with its padding; so its tokens do not depend on when its neighbours end.
    """

    slots: int = 8
    """Rows that share the core's recurrences at most."""

    def __call__(
        self,
        model: RecurrentDepthForCausalLM,
        input_ids: Int[Tensor, "batch token"],
        *,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **options: Any,
    ) -> Int[Tensor, "batch longer"]:
        """Tokens of every row, padded behind its end.

        Args:
            model: decodes.
            input_ids: prompts, padded on the left where `attention_mask` says so.
            logits_processor: as `generate` prepares it.
            stopping_criteria: likewise.
            generation_config: for sampling or not, and the padding token.
            synced_gpus: not supported, since rows leave on each rank by themselves.
            streamer: not supported, since it takes whole batches.
            options: arguments of the model's forward pass.

        Raises:
            ValueError: for beams, a streamer, synced ranks, values of single rows, or without an empty cache.
        """
        refuse_extras(generation_config, options)
        if generation_config.num_beams > 1 or synced_gpus or streamer is not None:
            raise ValueError(
                "Refill decodes greedily or by sampling, without streamer and synced ranks; leave "
                "custom_generate out for the rest"
            )
        cache = options.get(CACHE)
        if not isinstance(cache, RecurrentCache) or cache.length:
            raise ValueError(
                "Refill gives every row a cache of its own; leave use_cache and past_key_values out"
            )
        if any(isinstance(processor, _BY_ROW) for processor in logits_processor):
            raise ValueError(
                "allowed tokens of each row by itself do not follow rows that leave; use no "
                "prefix_allowed_tokens_fn, or leave custom_generate out"
            )
        mask = options.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask.bool()
        limit = generation_config.max_length - input_ids.shape[1]
        made: dict[int, Tensor] = {}

        def whole(answer: Answer) -> Int[Tensor, "1 token"]:
            new = input_ids.new_tensor([answer.tokens], dtype=torch.long).view(1, -1)
            return torch.cat([input_ids[answer.request.label][None], new], dim=1)

        def pick(answer: Answer, logits: Tensor) -> int:
            row, scores = answer.request.label, logits
            for processor in logits_processor:
                scores = _of_row(processor, row)(whole(answer), scores)
            if generation_config.do_sample:
                return int(torch.multinomial(scores.softmax(-1), 1))
            return int(scores.argmax(-1))

        requests = (
            Request(tokens=tokens[mask[row].bool()].tolist(), max_new_tokens=limit, label=row)
            for row, tokens in enumerate(input_ids)
        )
        is_plain = not logits_processor and not generation_config.do_sample
        for answer in serve(
            model, requests, slots=self.slots, num_steps=options.get("num_steps"),
            exit=options.get("exit"), kv_budget=options.get("kv_budget"),
            initial_state=either(
                options.get("initial_state"), options.get("input_states"), ("initial_state", "input_states")
            ),
            init_scale=options.get("init_scale", 1.0), warm_start=options.get("warm_start", False),
            pick=None if is_plain else pick,
            ends=lambda answer: bool(stopping_criteria(whole(answer), None).any()),
        ):  # fmt: skip
            made[answer.request.label] = whole(answer)[0]
        padding = generation_config.pad_token_id
        rows = [made[row] for row in range(len(input_ids))]
        return torch.nn.utils.rnn.pad_sequence(
            rows, batch_first=True, padding_value=0 if padding is None else padding
        )


def _of_row(processor: Any, row: int) -> Any:
    """A processor for one row, where it knows how long each row's padding is."""
    padding = getattr(processor, "prompt_ignore_length", None)
    if not isinstance(padding, Tensor):
        return processor
    own = copy.copy(processor)
    own.prompt_ignore_length = padding[row : row + 1]
    return own
