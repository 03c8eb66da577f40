"""Laws of the attack."""

import pytest
import torch

from fourfold_goldfish.claims import recital_law
from fourfold_goldfish.memorization import Extraction, compare, diverged_on_dropped, extract
from fourfold_parallel.run.models import Llama
from fourfold_parallel.run.progress import silent

TINY = Llama(
    width=16, depth=1, heads=2, kv_heads=1, hidden=32, vocabulary=64, context=32, tied=False
)


def test_a_model_recites_what_it_writes_itself() -> None:
    """Passages that are a model's own greedy continuations come back verbatim; altered ones diverge there."""
    model = TINY.build(seed=0).eval()
    model.generation_config.eos_token_id = None
    prompt = torch.arange(1, 9)[None].repeat(3, 1) + torch.arange(3)[:, None]
    passages = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False
    )
    altered = passages.clone()
    altered[1, 12] = (altered[1, 12] + 1) % 64
    own = extract(model, passages, suffix=8, batch=2, progress=silent)
    other = extract(model, altered, suffix=8, batch=2, progress=silent)
    assert [one.exact for one in own] == [True, True, True]
    assert [one.matched for one in other] == [8, 4, 8]
    assert other[1].rouge_l < 1.0 == own[1].rouge_l


def test_an_early_end_is_a_miss() -> None:
    [one] = compare(torch.tensor([[5, 6, -1, -1]]), torch.tensor([[5, 6, 7, 8]]))
    assert not one.exact
    assert (one.matched, one.rouge_l) == (2, 0.5)


def test_divergences_are_counted_where_they_happen() -> None:
    dropped = torch.tensor([[False, True, False], [True, False, False], [True, True, True]])
    found = [
        Extraction(exact=False, rouge_l=0.4, matched=1, longest_run=1, edit_similarity=0.3),
        Extraction(exact=False, rouge_l=0.4, matched=1, longest_run=1, edit_similarity=0.3),
        Extraction(exact=True, rouge_l=1.0, matched=3, longest_run=3, edit_similarity=1.0),
    ]
    assert diverged_on_dropped(found, dropped) == (1, 2)


def test_the_law_of_recital_is_the_chance_that_no_token_was_left_out() -> None:
    assert recital_law(4, 1) == 0.75
    assert recital_law(4, 10, guess=1.0) == 1.0
    assert recital_law(32, 24) == pytest.approx(0.467, abs=5e-4)


def test_a_suffix_that_leaves_no_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="suffix=9 of passages of 9 tokens"):
        extract(
            TINY.build(seed=0),
            torch.ones(1, 9, dtype=torch.long),
            suffix=9,
            batch=1,
            progress=silent,
        )
