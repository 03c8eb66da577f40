"""Laws of the model: padding, caches, company and depth change nothing that they should not."""

import copy
import warnings
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from fourfold_recurrent_depth import (
    RecurrentCache,
    estimate_cache_bytes,
    state_table,
)
from fourfold_recurrent_depth.exits import (
    Custom,
    LatentDiff,
)

ROUNDING = 3e-5
"""float32 sums in another order, contracted by the recurrence; logits are of size one to ten."""


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = ROUNDING) -> bool:
    return bool((a - b).abs().max() < tolerance)


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    options.setdefault("init_scale", 0.0)
    return model(tokens, **options).logits


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("exits", [None, LatentDiff(threshold=0.2, scope="token")])
def test_padding_changes_nothing(
    tiny: Any, tokens: torch.Tensor, side: str, attn: str, exits: Any
) -> None:
    """On either side, for every real token, with every backend, at full and at adaptive depth."""
    tiny.set_attn_implementation(attn)
    table = state_table(64, 32, seed=0)
    pad = torch.full((3, 5), 9)
    order = [pad, tokens] if side == "left" else [tokens, pad]
    mask = torch.cat([torch.full_like(x, x is tokens, dtype=torch.bool) for x in order], 1).long()
    padded = logits(tiny, torch.cat(order, 1), attention_mask=mask, initial_state=table, exit=exits)
    padded = padded[:, 5:] if side == "left" else padded[:, :12]
    assert close(padded, logits(tiny, tokens, initial_state=table, exit=exits))


def test_attention_backends_agree(tiny: Any, tokens: torch.Tensor) -> None:
    """Flex, uncompiled, equals sdpa with and without padding; flash is refused where it is not installed."""
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    expected = [logits(tiny, tokens), logits(tiny, tokens, attention_mask=mask)]
    tiny.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # torch's own imports are deprecated, and flex wants a compiler
        found = [logits(tiny, tokens), logits(tiny, tokens, attention_mask=mask)]
    assert close(found[0], expected[0])
    assert close(found[1][mask.bool()], expected[1][mask.bool()])
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        tiny(tokens, exit="kl")
    if find_spec("flash_attn") is None:
        with pytest.raises(ImportError, match=r"[Ff]lash"):
            tiny.set_attn_implementation("flash_attention_2")


def test_a_cache_equals_no_cache_whatever_the_chunks(tiny: Any, tokens: torch.Tensor) -> None:
    """Also where capacity grows on the way, and where later passes take other numbers of recurrences."""
    whole = logits(tiny, tokens, num_steps=5)
    for chunks in ((12,), (1,) * 12, (5, 4, 3)):
        cache, at, parts = RecurrentCache(tiny.config, steps=5, capacity=2), 0, []
        for count in chunks:
            parts.append(
                logits(
                    tiny,
                    tokens[:, at : at + count],
                    past_key_values=cache,
                    use_cache=True,
                    num_steps=5,
                )
            )
            at += count
        assert close(torch.cat(parts, 1), whole)


def test_a_token_is_read_at_its_deepest(tiny: Any, tokens: torch.Tensor) -> None:
    """Oracle: shallow and deep passes in one cache equal attention over keys gathered by depth."""
    depths = [2, 5, 3]
    cache, parts = RecurrentCache(tiny.config, steps=1), []
    for place, depth in enumerate(depths):
        parts.append(
            logits(
                tiny,
                tokens[:, place : place + 1],
                past_key_values=cache,
                use_cache=True,
                num_steps=depth,
            )
        )
    one_pass = logits(
        tiny, tokens[:, :3], exit=Custom(function=_by_depth(depths), scope="token"), num_steps=5
    )
    assert close(torch.cat(parts, 1), one_pass)


def _by_depth(depths: list[int]) -> Any:
    """An exit function that stops token t after depths[t] recurrences; rows of three tokens."""
    done = {"checks": 0}

    def function(now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        done["checks"] += 1
        wanted = torch.tensor(depths).repeat(len(now) // len(depths))
        return (wanted > done["checks"]).float()

    return function


@pytest.mark.parametrize("what", ["sample", "beams", "assisted", "static", "contrastive_rows"])
def test_transformers_generation(tiny: Any, tokens: torch.Tensor, what: str) -> None:
    """Sampling, beams, an assistant, a preallocated cache and several samples per prompt run, with exits."""
    options: dict[str, Any] = {
        "max_new_tokens": 6,
        "pad_token_id": 0,
        "num_steps": 4,
        "init_scale": 0.0,
    }
    greedy = tiny.generate(tokens[:1], do_sample=False, **options)
    match what:
        case "sample":
            torch.manual_seed(0)
            made = tiny.generate(tokens, do_sample=True, top_p=0.9, exit="latent_diff", **options)
            assert made.shape == (3, 18)
        case "beams":
            made = tiny.generate(
                tokens[:1], num_beams=3, do_sample=False, exit="latent_diff", **options
            )
            uncached = tiny.generate(
                tokens[:1], num_beams=3, do_sample=False, use_cache=False,
                exit=LatentDiff(scope="token"), **options,
            )  # fmt: skip
            assert made.shape == uncached.shape
        case "assisted":
            made = tiny.generate(tokens[:1], assistant_model=tiny, do_sample=False, **options)
            assert made.tolist() == greedy.tolist()
        case "static":
            made = tiny.generate(
                tokens[:1], do_sample=False, cache_implementation="static", **options
            )
            assert made.tolist() == greedy.tolist()
        case "contrastive_rows":
            made = tiny.generate(tokens[:2], do_sample=True, num_return_sequences=3, **options)
            assert made.shape[0] == 6


@pytest.mark.parametrize("exits", [None, LatentDiff(threshold=0.2, scope="token")])
@pytest.mark.parametrize("helper", ["model", "prompt"])
def test_refused_candidates_leave_no_trace(
    tiny: Any, tokens: torch.Tensor, exits: Any, helper: str
) -> None:
    """Another model's guesses, and the prompt's own n-grams, are mostly wrong: the tokens are greedy's."""
    options: dict[str, Any] = {
        "max_new_tokens": 8, "pad_token_id": 0, "num_steps": 4, "init_scale": 0.0, "do_sample": False,
        "exit": exits,
    }  # fmt: skip
    prompt = tokens[:1, :4].repeat(1, 3)
    greedy = tiny.generate(prompt, **options)
    if helper == "prompt":
        helped = tiny.generate(prompt, prompt_lookup_num_tokens=3, **options)
    else:
        other = copy.deepcopy(tiny)
        with torch.no_grad():
            for parameter in other.transformer["coda"].parameters():
                parameter.copy_(parameter.roll(1, 0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transformers' own call of the assistant is deprecated
            helped = tiny.generate(prompt, assistant_model=other, **options)
    assert helped.tolist() == greedy.tolist()


def test_an_assistant_of_another_family_helps(
    iterated: Any, dense: Any, tokens: torch.Tensor
) -> None:
    """It is asked without the arguments that it does not have; its guesses change no token."""
    options: dict[str, Any] = {
        "max_new_tokens": 8,
        "pad_token_id": 0,
        "num_steps": 4,
        "do_sample": False,
    }
    greedy = iterated.generate(tokens[:1], **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own call of the assistant is deprecated
        helped = iterated.generate(tokens[:1], assistant_model=dense, **options)
    assert helped.tolist() == greedy.tolist()


def test_a_cropped_cache_is_the_shorter_cache(tiny: Any, tokens: torch.Tensor) -> None:
    """Negative numbers remove, as transformers counts; any other is refused."""
    cache = RecurrentCache(tiny.config, steps=6)
    options: Any = {"past_key_values": cache, "use_cache": True}
    logits(tiny, tokens, **options)
    cache.crop(0)
    cache.crop(-4)
    assert cache.exit_steps is not None
    assert cache.exit_steps.shape[1] == cache.get_seq_length() == 8
    assert close(logits(tiny, tokens[:, 8:], **options), logits(tiny, tokens)[:, 8:])
    for wrong in (1, -13):
        with pytest.raises(ValueError, match="use -n"):
            cache.crop(wrong)


def test_beams_with_and_without_cache_agree(tiny: Any, tokens: torch.Tensor) -> None:
    """Rows are reordered in every slot."""
    options: Any = {"max_new_tokens": 6, "pad_token_id": 0, "num_beams": 3, "init_scale": 0.0}
    with_cache = tiny.generate(tokens, **options)
    assert with_cache.tolist() == tiny.generate(tokens, use_cache=False, **options).tolist()


def test_the_cache_is_as_large_as_estimated(tiny: Any, tokens: torch.Tensor) -> None:
    for budget in (None, 1, 3):
        cache = RecurrentCache(tiny.config, steps=6, budget=budget)
        logits(tiny, tokens, past_key_values=cache, use_cache=True)
        assert cache.nbytes() == estimate_cache_bytes(
            tiny.config, tokens=12, steps=6, batch=3, budget=budget, element_bytes=4
        )
    for wrong in (0, 9):
        with pytest.raises(ValueError, match=f"budget={wrong}"):
            estimate_cache_bytes(tiny.config, tokens=12, steps=6, budget=wrong)


def test_huginns_cache_is_as_large_as_the_paper_says() -> None:
    """2.79 MB a token at 32 recurrences in bfloat16; 0.17 MB with one kept."""
    from fourfold_recurrent_depth import RecurrentDepthConfig

    config = RecurrentDepthConfig()
    assert estimate_cache_bytes(config, tokens=1, steps=32) == 2_787_840
    assert estimate_cache_bytes(config, tokens=1, steps=32, budget=1) == 168_960


def saved_bytes(model: Any, tokens: torch.Tensor, steps: tuple[int, int]) -> int:
    sizes: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(tokens, labels=tokens, num_steps=steps, init_scale=0.0)
    out.loss.backward()
    return sum(sizes.values())


def test_recurrences_without_gradient_save_nothing(tiny: Any, tokens: torch.Tensor) -> None:
    """Saved tensors of a training pass: as many bytes for n = 0, 1 and 20; more with larger k."""
    tiny.train()
    few, some, many = (saved_bytes(tiny, tokens, (n, 2)) for n in (0, 1, 20))
    assert few == some == many
    assert saved_bytes(tiny, tokens, (0, 4)) > few


def test_checkpointed_gradients_are_the_gradients(tiny: Any, tokens: torch.Tensor) -> None:
    """Activation checkpointing saves memory and changes no number."""
    tiny.train()
    found = []
    for checkpoints in (False, True):
        if checkpoints:
            tiny.activation_checkpointing_enable({"use_reentrant": False})
        tiny.zero_grad()
        tiny(tokens, labels=tokens, num_steps=(2, 4), init_scale=0.0).loss.backward()
        found.append({name: p.grad.clone() for name, p in tiny.named_parameters()})
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


def test_rows_of_their_own_depth_equal_rows_alone(tiny: Any, tokens: torch.Tensor) -> None:
    """Recurrences per row: state and gradient are those of a pass for that row."""
    tiny.train()
    depths = torch.tensor([2, 6, 4])
    tiny.zero_grad()
    out = tiny(tokens, num_steps=depths, init_scale=0.0)
    out.logits.square().sum().backward()
    together = tiny.transformer["adapter"].weight.grad.clone()
    tiny.zero_grad()
    for row, depth in enumerate(depths.tolist()):
        k = min(3, depth)
        alone = tiny(tokens[row : row + 1], num_steps=(depth - k, k), init_scale=0.0)
        assert close(out.final_state[row].detach(), alone.final_state[0].detach())
        alone.logits.square().sum().backward()
    grown = tiny.transformer["adapter"].weight.grad
    assert close(together, grown, 1e-4 * float(grown.abs().max()))


def test_gradients_are_those_of_finite_differences(tiny: Any, tokens: torch.Tensor) -> None:
    """Our own backward passes, in float64, through the whole model."""
    tiny.double().train()
    weight = tiny.transformer["core_block"][0].norm_2.weight
    fc = tiny.transformer["core_block"][1].mlp.fc.weight

    def loss() -> torch.Tensor:
        return tiny(tokens, num_steps=(0, 3), init_scale=0.0).logits.square().mean()

    loss().backward()
    for parameter, at in ((weight, (3,)), (fc, (5, 7)), (fc, (60, 2))):
        step, slope = 1e-6, parameter.grad[at].item()
        with torch.no_grad():
            parameter[at] += step
            above = loss().item()
            parameter[at] -= 2 * step
            below = loss().item()
            parameter[at] += step
        assert (above - below) / (2 * step) == pytest.approx(slope, rel=1e-5, abs=1e-9)


def test_bfloat16_is_close_and_keeps_exact_angles(tiny: Any, tokens: torch.Tensor) -> None:
    """Logits within rounding of bfloat16 (8 bits, tens of roundings); angles stay float32."""
    wide = logits(tiny, tokens, num_steps=2)
    narrow = logits(tiny.to(torch.bfloat16), tokens, num_steps=2)
    assert narrow.dtype == torch.float32
    assert (wide - narrow).abs().mean() < 0.03 * wide.std()


def test_labels_are_shifted_as_in_transformers(tiny: Any, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        out = tiny(tokens, labels=tokens, init_scale=0.0)
    by_hand = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    )
    assert close(out.loss, by_hand, 1e-6)
    embeds = tiny.get_input_embeddings()(tokens)
    assert torch.equal(logits(tiny, None, inputs_embeds=embeds), out.logits)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("exits", [None, LatentDiff(threshold=0.2, scope="token")])
def test_packed_texts_do_not_see_each_other(
    tiny: Any, tokens: torch.Tensor, cached: bool, exits: Any
) -> None:
    """Positions that begin anew begin a text, with a cache and exits too."""
    places = torch.cat([torch.arange(5), torch.arange(7)])[None].expand(3, -1)
    packed = logits(tiny, tokens, position_ids=places, use_cache=cached, exit=exits)
    assert close(packed[:, :5], logits(tiny, tokens[:, :5], exit=exits))
    assert close(packed[:, 5:], logits(tiny, tokens[:, 5:], exit=exits))


def test_shifted_labels_that_are_given_are_used(tiny: Any, tokens: torch.Tensor) -> None:
    """As every model of transformers does."""
    shifted = tokens.roll(-2, 1)
    with torch.no_grad():
        out = tiny(tokens, labels=tokens, shift_labels=shifted, init_scale=0.0)
    expected = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), shifted.flatten())
    assert close(out.loss, expected, 1e-6)
