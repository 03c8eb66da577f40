"""Laws of the attack."""

import pytest
import torch

from fourfold_goldfish.memorization.extraction import (
    Beam,
    Extraction,
    Lookahead,
    Sampling,
    chance_of_any,
    compare,
    continuation,
    diverged_on_dropped,
    extract,
    grid,
    next_log_probabilities,
    recital_probabilities,
    sample,
)
from fourfold_goldfish.reproduce.measures import recital_law
from fourfold_parallel.run.models import Llama

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
    own = extract(model, passages, suffix=8, batch=2)
    other = extract(model, altered, suffix=8, batch=2)
    assert [recital.exact for recital in own] == [True, True, True]
    assert [recital.matched for recital in other] == [8, 4, 8]
    assert other[1].rouge_l < 1.0 == own[1].rouge_l


def test_an_early_end_is_a_miss() -> None:
    [recital] = compare(torch.tensor([[5, 6, -1, -1]]), torch.tensor([[5, 6, 7, 8]]))
    assert not recital.exact
    assert (recital.matched, recital.rouge_l) == (2, 0.5)


def test_divergences_are_counted_where_they_happen() -> None:
    dropped = torch.tensor([[False, True, False], [True, False, False], [True, True, True]])
    recitals = [
        Extraction(exact=False, rouge_l=0.4, matched=1, longest_run=1, edit_similarity=0.3),
        Extraction(exact=False, rouge_l=0.4, matched=1, longest_run=1, edit_similarity=0.3),
        Extraction(exact=True, rouge_l=1.0, matched=3, longest_run=3, edit_similarity=1.0),
    ]
    assert diverged_on_dropped(recitals, dropped) == (1, 2)


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
        )


def model_and_prompts() -> tuple[object, torch.Tensor]:
    model = TINY.build(seed=0).eval()
    model.generation_config.eos_token_id = None
    return model, torch.arange(1, 9)[None].repeat(3, 1) + torch.arange(3)[:, None]


def likelihood(model: object, rows: torch.Tensor, suffix: int) -> torch.Tensor:
    every = next_log_probabilities(model, rows)[:, -suffix - 1 : -1]  # type: ignore[arg-type]
    return every.gather(-1, rows[:, -suffix:, None]).squeeze(-1).sum(-1)


def test_beams_find_continuations_at_least_as_likely_as_greedy_ones() -> None:
    model, prompt = model_and_prompts()
    greedy = extract_tokens(model, prompt, Beam(beams=1))
    searched = extract_tokens(model, prompt, Beam(beams=16))
    better = likelihood(model, searched, 6) - likelihood(model, greedy, 6)
    assert bool((better >= -1e-5).all())
    assert bool((better > 1e-3).any())


def extract_tokens(model: object, prompt: torch.Tensor, decoding: Beam | Lookahead) -> torch.Tensor:
    return torch.cat([prompt, continuation(model, prompt, 6, decoding)], dim=1)  # type: ignore[arg-type]


def test_looking_ahead_keeps_the_candidate_with_the_surest_future() -> None:
    """Against trying every candidate by hand; where the model is always sure enough, it is greedy."""
    model, prompt = model_and_prompts()
    never = Lookahead(candidates=4, steps=2, unsure_below=0.0)
    assert torch.equal(
        extract_tokens(model, prompt, never), extract_tokens(model, prompt, Beam(beams=1))
    )
    always = Lookahead(candidates=4, steps=2, unsure_below=1.1)
    row = prompt[:1]
    for _ in range(2):
        sureness = {}
        for token in next_log_probabilities(model, row)[0, -1].topk(4).indices:  # type: ignore[arg-type]
            ahead = torch.cat([row, token[None, None]], dim=1)
            total = 0.0
            for _ in range(2):
                best = next_log_probabilities(model, ahead)[0, -1].max(-1)  # type: ignore[arg-type]
                total += best.values.item()
                ahead = torch.cat([ahead, best.indices[None, None]], dim=1)
            sureness[int(token)] = total
        chosen = max(sureness, key=lambda token: sureness[token])
        row = torch.cat([row, torch.tensor([[chosen]])], dim=1)
    continued = continuation(model, prompt[:1], 2, always)  # type: ignore[arg-type]
    assert torch.equal(continued, row[:, -2:])


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=0.5), Sampling(top_k=3), Sampling(top_p=0.5, temperature=2)],
)
def test_the_chance_of_recital_is_what_sampling_finds(sampling: Sampling) -> None:
    """In closed form, against 4,000 samples of two tokens."""
    model, prompt = model_and_prompts()
    likely = continuation(model, prompt[:1], 2, Beam(beams=1))  # type: ignore[arg-type]
    passage = torch.cat([prompt[:1], likely], dim=1)
    chance = recital_probabilities(model, passage, suffix=2, sampling=sampling).item()  # type: ignore[arg-type]
    state = torch.random.get_rng_state()
    drawn, again = (
        sample(model, prompt[:1].expand(4000, -1), 2, sampling=sampling, seed=3)  # type: ignore[arg-type]
        for _ in range(2)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(drawn, again)
    share = (drawn == likely).all(dim=1).double().mean().item()
    # Four standard errors of 4,000 draws, and one draw.
    assert abs(share - chance) < 4 * (chance / 4000) ** 0.5 + 1 / 4000


def test_top_k_and_top_p_keep_the_likeliest_tokens() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    kept = lambda sampling: sampling.log_probabilities(logits).exp().tolist()  # noqa: E731
    assert kept(Sampling(top_k=2)) == pytest.approx([0, 4 / 7, 0, 3 / 7])
    assert kept(Sampling(top_p=0.6)) == pytest.approx([0, 4 / 7, 0, 3 / 7])
    assert kept(Sampling(top_p=0.3)) == pytest.approx([0, 1, 0, 0])
    assert kept(Sampling(top_k=3, top_p=0.7)) == pytest.approx([0, 4 / 7, 0, 3 / 7])
    with pytest.raises(ValueError, match="temperature=0"):
        Sampling(temperature=0)


def test_many_samples_find_what_one_seldom_does() -> None:
    chance = torch.tensor([0.0, 0.01, 1e-12, 1.0])
    assert chance_of_any(chance, 100).tolist() == pytest.approx(
        [0, 1 - 0.99**100, 1e-10, 1], rel=1e-6
    )


def test_a_grid_covers_prompts_and_offsets() -> None:
    """A model's own continuation comes back from the whole prompt, at offset 0."""
    model, prompt = model_and_prompts()
    passages = extract_tokens(model, prompt, Beam(beams=1))
    cells = [
        *grid(
            model,  # type: ignore[arg-type]
            passages,
            offsets=(0, 3),
            prompts=(4, 5),
            suffix=6,
            batch=4,
        )
    ]
    assert [(cell.offset, cell.prompt) for cell in cells] == [(0, 4), (0, 5), (3, 4), (3, 5)]
    [whole] = grid(
        model,  # type: ignore[arg-type]
        passages,
        offsets=(0,),
        prompts=(8,),
        suffix=6,
        batch=4,
    )
    assert (whole.exact, whole.rouge_l) == (1.0, 1.0)
    with pytest.raises(ValueError, match=r"offset 4 \+ prompt 8 \+ suffix 6 = 18 tokens"):
        [*grid(model, passages, offsets=(4,), prompts=(8,), suffix=6, batch=4)]  # type: ignore[arg-type]
