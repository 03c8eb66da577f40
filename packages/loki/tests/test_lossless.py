"""Drafts change nothing: the tokens and the distribution of attention to all keys."""

from collections import Counter
from copy import deepcopy
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from fourfold_loki import Basis, Budget, Count, Lossless, Share, fit, loki
from fourfold_loki.calibration import calibrate_tokens
from fourfold_loki.huggingface.lossless import anew, stays
from fourfold_loki.huggingface.session import Session
from fourfold_parallel.certify.toys import default_toy, toy_model

FEW = Budget(amount=Count(keys=4))
"""So few that drafts go wrong."""


@pytest.fixture(scope="module")
def exact(llama: PreTrainedModel, tokens: Any) -> tuple[PreTrainedModel, Basis]:
    """The small model in float64, where no two tokens tie."""
    model = deepcopy(llama).double()
    return model, fit(calibrate_tokens(model, tokens(8, 64)))


def lossless(
    model: PreTrainedModel, session: Session, ids: Tensor, **ways: Any
) -> tuple[list[int], Lossless]:
    decoder = Lossless(
        session=session, **{k: ways.pop(k) for k in ("lookahead", "surety") if k in ways}
    )
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        custom_generate=decoder,
        **session.cached(),
        **ways,
    )
    return out[0].tolist(), decoder


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "repetition": {"repetition_penalty": 1.5},
    "stopped": {"eos_token_id": list(range(2, 40))},
    "a token": {"max_new_tokens": 1},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lookahead", [1, 3, 8])
@pytest.mark.parametrize("keys", [1, 4, 16])
def test_greedy_tokens_are_those_of_attention_to_all_keys(
    exact: tuple[PreTrainedModel, Basis], tokens: Any, way: str, lookahead: int, keys: int
) -> None:
    model, basis = exact
    ids = tokens(1, 40, keys)
    ways = {"do_sample": False, "max_new_tokens": 24, **WAYS[way]}
    full = model.generate(ids, attention_mask=torch.ones_like(ids), **ways)[0].tolist()
    with loki(model, basis, Budget(amount=Count(keys=keys)), width=4) as session:
        ours, decoder = lossless(model, session, ids, lookahead=lookahead, surety=0.0, **ways)
    assert ours == full
    assert decoder.accepted <= decoder.drafted
    if way == "greedy" and keys == 1 and lookahead > 1:
        assert decoder.accepted < decoder.drafted
    made = len(full) - 40
    assert made == decoder.accepted + decoder.verified or way == "stopped"


@pytest.mark.parametrize(
    "model_type", ["qwen3", "phi3", "gemma3_text", "glm", "olmo2", "mixtral", "stablelm", "cohere"]
)
def test_other_rotary_models_too(model_type: str, tokens: Any) -> None:
    """With norms of keys, windows, parts of coordinates, neighbours that turn, experts."""
    model = toy_model(default_toy(model_type), dtype=torch.float64)
    basis, ids = fit(calibrate_tokens(model, tokens(4, 64))), tokens(1, 30)
    ways = {"do_sample": False, "max_new_tokens": 16, "eos_token_id": None, "pad_token_id": 0}
    full = model.generate(ids, attention_mask=torch.ones_like(ids), **ways)[0].tolist()
    with loki(model, basis, FEW, width=2) as session:
        ours, decoder = lossless(model, session, ids, surety=0.0, **ways)
    assert ours == full
    assert decoder.drafted > 0


def test_reading_everything_accepts_everything(
    exact: tuple[PreTrainedModel, Basis], tokens: Any
) -> None:
    model, basis = exact
    with loki(model, basis, Budget(amount=Share(of_visible=1.0))) as session:
        _, decoder = lossless(
            model,
            session,
            tokens(1, 40),
            lookahead=4,
            surety=0.0,
            do_sample=False,
            max_new_tokens=20,
        )
    assert decoder.acceptance == 1
    assert decoder.verified == 4


def test_a_cache_goes_on_where_it_stopped(
    exact: tuple[PreTrainedModel, Basis], tokens: Any
) -> None:
    """All tokens but the last are held, as after any `generate`; with what a dense pass writes for them."""
    model, basis = exact
    ids = tokens(1, 40)
    ways = {"do_sample": False, "max_new_tokens": 16}
    with loki(model, basis, FEW, width=4) as session:
        cache = session.cache()
        decoder = Lossless(session=session, surety=0.0)
        for _ in range(2):
            ids = model.generate(
                ids, attention_mask=torch.ones_like(ids), custom_generate=decoder,
                past_key_values=cache, **ways,
            )  # fmt: skip
            assert cache.get_seq_length() == ids.shape[1] - 1
        dense = session.cache()
        model.base_model(ids[:, :-1], past_key_values=dense)
        for held, fresh in zip(cache.layers, dense.layers, strict=True):
            for own, other in ((held.keys[:, :, :71], fresh.keys[:, :, :71]),
                               (held.leading[:, :, 0], fresh.leading[:, :, 0])):  # fmt: skip
                torch.testing.assert_close(own, other, atol=1e-5, rtol=0)  # angles are of float32
    full = model.generate(tokens(1, 40), do_sample=False, max_new_tokens=32)
    assert ids.tolist() == full.tolist()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=9).filter(
        lambda pairs: sum(p for p, _ in pairs) > 1e-3 and sum(q for _, q in pairs) > 1e-3
    )
)
def test_a_draft_that_stays_or_is_drawn_anew_is_distributed_as_ours(
    pairs: list[tuple[float, float]],
) -> None:
    """Every case, enumerated: q(x) stays(x) + (probability that none stays) anew(x) = p(x)."""
    ours, theirs = torch.tensor(pairs, dtype=torch.float64).T
    ours, theirs = ours / ours.sum(), theirs / theirs.sum()
    kept = theirs * stays(ours, theirs)
    total = kept + (1 - kept.sum()) * anew(ours, theirs)
    torch.testing.assert_close(total, ours, atol=1e-12, rtol=0)


def test_samples_are_distributed_as_those_of_attention_to_all_keys(make_llama: Any) -> None:
    """Two tokens of five, all 25 outcomes by chi-square: as dense, and unlike the drafts' own."""
    model = make_llama(heads=2, kv_heads=1)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, 97, (1, 24), generator=generator)
    basis = fit(calibrate_tokens(model, torch.randint(2, 97, (4, 64), generator=generator)))
    ways = {"do_sample": True, "top_k": 5, "temperature": 2.0, "max_new_tokens": 2}

    def distribution(prefix: Tensor) -> dict[int, float]:
        with torch.no_grad():
            top = (model(prefix).logits[0, -1] / 2.0).topk(5)
        return dict(zip(top.indices.tolist(), top.values.softmax(-1).tolist(), strict=True))

    expected: dict[tuple[int, int], float] = {}
    for first, chance in distribution(ids).items():
        longer = torch.cat([ids, torch.tensor([[first]])], 1)
        for second, given_first in distribution(longer).items():
            expected[first, second] = chance * given_first
    torch.manual_seed(0)
    draws = 400
    with loki(model, basis, Budget(amount=Count(keys=2)), width=2) as session:
        cache = session.cache()
        decoder = Lossless(session=session, surety=0.0)
        counts: Counter[tuple[int, int]] = Counter()
        for _ in range(draws):
            cache.reset()
            out = model.generate(ids, custom_generate=decoder, past_key_values=cache, **ways)
            counts[tuple(out[0, -2:].tolist())] += 1
    assert set(counts) <= set(expected)
    likely = {pair: p for pair, p in expected.items() if draws * p >= 5}
    rest = 1 - sum(likely.values())
    terms = [(counts[pair], draws * p) for pair, p in likely.items()]
    terms.append((draws - sum(counts[pair] for pair in likely), max(draws * rest, 1e-9)))
    statistic = sum((seen - mean) ** 2 / mean for seen, mean in terms if mean > 1)
    # 24 degrees of freedom: 52 is exceeded once in a thousand times.
    assert statistic < 52
    assert 0.05 < decoder.acceptance < 0.95
    assert len(list(product(range(5), repeat=2))) == len(expected)


def test_what_it_cannot_do_is_refused(exact: tuple[PreTrainedModel, Basis], tokens: Any) -> None:
    model, basis = exact
    with pytest.raises(ValueError, match="lookahead=0"), loki(model, basis, FEW) as session:
        Lossless(session=session, lookahead=0)
    with loki(model, basis, FEW) as session:
        decoder = Lossless(session=session)
        for ids, ways, words in (
            (tokens(2, 20), session.cached(), "batch of 2"),
            (tokens(1, 20), {}, "session.cached"),
            (tokens(1, 20), {**session.cached(), "return_dict_in_generate": True}, "return_dict"),
        ):
            with pytest.raises(ValueError, match=words):
                model.generate(
                    ids, custom_generate=decoder, max_new_tokens=4, do_sample=False, **ways
                )
