"""Compiled stages give what modules give; what is wrapped, watched or mixed is not compiled."""

import shutil
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from fourfold_parallel.common import native as runtime
from fourfold_recurrent_depth import RecurrentCache, state_table
from fourfold_recurrent_depth.exits import KL, LatentDiff
from fourfold_recurrent_depth.fast import compiled as native

ROUNDING = 3e-5
"""As in test_model.py: float32 sums in another order, contracted; logits are of size one to ten."""
FORMS = ("modules", "compiled")
STAGES = {"prelude", "core_block", "coda"}
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, runtime.COMPILERS)), reason="needs a C++ compiler, as Debian's g++"
)


def compiled(model: Any, tokens: torch.Tensor) -> set[str]:
    """Names of the stages that a pass of these tokens has in C++."""
    stages = model.begin(tokens, None)[1].stages
    assert set(stages) == STAGES
    return {name for name, stage in stages.items() if isinstance(stage, native.CompiledStage)}


def use(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let passes without gradient run through one form of the blocks."""
    if form == "modules":
        monkeypatch.setattr(native, "library", lambda: None)


@torch.no_grad()
def passes(model: Any, tokens: torch.Tensor, *, padded: bool, budget: int | None) -> list[Any]:
    """Logits of a prompt, of cached tokens with both kinds of exits, and of a pass without cache."""
    mask = torch.ones_like(tokens)
    mask[0, :4] = 1 - int(padded)
    cache = RecurrentCache(model.config, steps=5, budget=budget)
    found = []
    for at, exits in ((0, None), (1, LatentDiff(threshold=0.3)), (2, KL(threshold=0.3)), (3, None)):
        out = model(
            tokens[:, :1] + at if at else tokens,
            attention_mask=torch.cat([mask, torch.ones_like(mask[:, :at])], dim=1),
            past_key_values=cache, exit=exits, init_scale=0.0, use_cache=True, num_steps=5,
        )  # fmt: skip
        found += [out.logits, cache.exit_steps]
    scope = LatentDiff(threshold=0.3, scope="token")
    bare = [model(tokens, num_steps=3, init_scale=0.0, exit=exits) for exits in (None, scope)]
    return [*found, *(out.logits for out in bare)]


@needs_compiler
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("budget", [None, 1, 2])
@pytest.mark.parametrize("length", [12, 37])
def test_every_form_gives_what_modules_give(
    tiny: Any, padded: bool, budget: int | None, length: int
) -> None:
    """Prompts, cached tokens and rows that stop; packed and unpacked products."""
    tokens = torch.randint(0, 60, (3, length), generator=torch.Generator().manual_seed(2))
    found = []
    for form in FORMS:
        with pytest.MonkeyPatch.context() as patch:
            use(form, patch)
            assert compiled(tiny, tokens) == (STAGES if form == "compiled" else set())
            found.append(passes(tiny, tokens, padded=padded, budget=budget))
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            torch.testing.assert_close(same, one, rtol=0, atol=ROUNDING)


@needs_compiler
@pytest.mark.parametrize("length", [1, 20])
@pytest.mark.parametrize("form", FORMS[1:])  # transformers' attention refuses such a batch
def test_a_batch_of_no_rows_has_no_logits(
    tiny: Any, form: str, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a cache and without; the compiled form divided by its number of rows, which ended the process."""
    use(form, monkeypatch)
    cache = RecurrentCache(tiny.config, steps=2)
    tokens = torch.zeros(0, length, dtype=torch.long)
    with torch.no_grad():
        for held in (None, cache, cache):
            assert tiny(tokens, num_steps=2, past_key_values=held).logits.shape == (0, length, 64)


@needs_compiler
@pytest.mark.parametrize("gain", [1.0, 30.0])
@pytest.mark.parametrize("length", [1, 40])
def test_compiled_blocks_are_as_exact_as_torchs(make: Any, gain: float, length: int) -> None:
    """One recurrence against float64, also where softmax and silu saturate: twice torch's error at most."""
    model = make(n_embd=64, intermediate_size=112)
    for name, parameter in model.named_parameters():
        if "Wqkv" in name or "mlp.fc" in name:
            parameter.data *= gain
    tokens = torch.randint(0, 64, (2, length), generator=torch.Generator().manual_seed(3))
    found = {}
    with torch.no_grad():
        for form in ("modules", "compiled", "exact"):
            with pytest.MonkeyPatch.context() as patch:
                use(form if form != "exact" else "compiled", patch)
                if form == "exact":
                    model.double()
                out = model(tokens, num_steps=1, initial_state=state_table(64, 64, seed=1))
                found[form] = out.final_state.double()
    ours, theirs = ((found[form] - found["exact"]).abs().max() for form in ("compiled", "modules"))
    assert 0 < ours < 2 * theirs


@needs_compiler
@pytest.mark.parametrize(
    ("width", "heads", "hidden"), [(48, 1, 80), (96, 2, 112), (80, 5, 16), (160, 2, 96)]
)
def test_products_of_any_size(make: Any, width: int, heads: int, hidden: int) -> None:
    """Whole tiles and panels, and every remainder of them: 1 to 33 tokens of one row and of three."""
    model = make(n_embd=width, n_heads=heads, intermediate_size=hidden)
    generator = torch.Generator().manual_seed(3)
    for rows in (1, 3):
        for length in range(1, 34):
            tokens = torch.randint(0, 64, (rows, length), generator=generator)
            s, injected = torch.randn(2, rows, length, width, generator=generator)
            found = []
            for form in FORMS:
                with pytest.MonkeyPatch.context() as patch, torch.no_grad():
                    use(form, patch)
                    this_pass = model.begin(tokens, None)[1]
                    assert bool(compiled(model, tokens)) == (form == "compiled")
                    found.append(model.recur(s, injected, this_pass, 0, 2))
            torch.testing.assert_close(found[1], found[0], rtol=0, atol=ROUNDING)


@needs_compiler
@pytest.mark.parametrize("length", [1, 12, 37])
def test_a_rows_numbers_are_its_own(tiny: Any, length: int) -> None:
    """Bit for bit, in any company and on any number of threads."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 64, (13, length), generator=generator)
    s, injected = torch.randn(2, 13, length, 32, generator=generator)
    this_pass = tiny.begin(tokens, None)[1]
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        together = tiny.recur(s, injected, this_pass, 0, 3)
        for rows in ([3], [6, 0], [1, 2, 3, 4, 12], [*range(1, 13)]):
            here = this_pass.of_rows(torch.tensor(rows))
            assert torch.equal(tiny.recur(s[rows], injected[rows], here, 0, 3), together[rows])
        patch.setattr(native, "WORTH_SHARING", 0)
        torch.set_num_threads(3)
        assert torch.equal(tiny.recur(s, injected, this_pass, 0, 3), together)


@pytest.fixture(params=["x86-64", "x86-64-v3"])
def narrow_vectors(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Libraries compiled for the first 64-bit processors, in vectors of four, and for AVX2, of eight."""
    monkeypatch.setenv("FOURFOLD_INSTRUCTIONS", request.param)
    runtime.load.cache_clear()
    yield
    runtime.load.cache_clear()


@needs_compiler
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="x86-64-v3 needs a processor with AVX2",
)
@pytest.mark.usefixtures("narrow_vectors")
def test_narrower_vectors_compute_the_same(tiny: Any, tokens: torch.Tensor) -> None:
    ours = passes(tiny, tokens, padded=True, budget=None)
    with pytest.MonkeyPatch.context() as patch:
        use("modules", patch)
        theirs = passes(tiny, tokens, padded=True, budget=None)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=ROUNDING)


@needs_compiler
def test_what_the_compiled_form_does_not_take(tiny: Any, make: Any, tokens: torch.Tensor) -> None:
    """Other widths and formats, masks that add, and counters of torch's operations: modules."""
    odd = make(n_embd=24, intermediate_size=40)
    assert compiled(odd, tokens) == set()
    with torch.no_grad():
        expected = tiny(tokens, num_steps=2, init_scale=0.0)
        with FlopCounterMode(display=False) as counter:
            tiny(tokens, num_steps=2, init_scale=0.0)
        assert counter.get_total_flops() > 0
        adding = torch.full((12, 12), -1e9).triu(1).expand(3, 1, 12, 12)
        found = tiny(tokens, attention_mask=adding, num_steps=2, init_scale=0.0)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=ROUNDING)
    handle = tiny.transformer["adapter"].register_forward_hook(lambda *_: None)
    assert compiled(tiny, tokens) == {"prelude", "coda"}
    handle.remove()
    assert compiled(tiny, tokens) == STAGES
    tiny.config.reference_semantics = True
    assert compiled(tiny, tokens) == {"prelude", "coda"}
    tiny.config.reference_semantics = False
    assert compiled(tiny.double(), tokens) == set()


@needs_compiler
def test_a_core_alone_is_compiled(make: Any, tokens: torch.Tensor) -> None:
    """Without prelude and coda, as the automaton's models are: the core in C++, and modules' numbers."""
    model = make(n_layers_in_prelude=0, n_layers_in_coda=0)
    assert compiled(model, tokens) == {"core_block"}
    with torch.no_grad():
        ours = model(tokens).logits
        with pytest.MonkeyPatch.context() as patch:
            use("modules", patch)
            torch.testing.assert_close(ours, model(tokens).logits, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(
    ("shape", "slot", "dtype"),
    [
        ((3, 2, 1, 16), 0, torch.float32),
        ((2, 4, 1, 16), 0, torch.float32),
        ((2, 2, 1, 16), 6, torch.float32),
        ((2, 2, 1, 16), 0, torch.bfloat16),
    ],
)
def test_memory_that_a_cache_does_not_hold_is_refused(
    tiny: Any, tokens: torch.Tensor, shape: tuple[int, ...], slot: int, dtype: torch.dtype
) -> None:
    """Other rows than are selected, other heads, a slot too many, another format; and what fits is given."""
    cache = RecurrentCache(tiny.config, steps=2)
    with torch.no_grad():
        tiny(tokens, past_key_values=cache, use_cache=True, num_steps=2)
    cache.select(torch.tensor([0, 2]), None)
    with pytest.raises(
        ValueError, match=r"opened for this pass|wide in a RecurrentCache of 2 heads"
    ):
        cache.views(torch.zeros(shape, dtype=dtype), [slot], 1)
    assert cache.views(torch.zeros(2, 2, 1, 16), [5], 1)[1].place == 12


@pytest.mark.parametrize("length", [12, 37])
def test_new_weights_are_seen(tiny: Any, length: int) -> None:
    """Nothing packed outlives its pass: what an optimizer or a checkpoint writes counts at the next one."""
    tokens = torch.randint(0, 64, (3, length), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        before = tiny(tokens, num_steps=2, init_scale=0.0).logits
        for change in (lambda weight: weight.mul_(2), lambda weight: weight.data.mul_(2)):
            change(tiny.transformer["core_block"][0].mlp.fc.weight)
            after = tiny(tokens, num_steps=2, init_scale=0.0).logits
            assert not torch.allclose(after, before)
            before = after


@needs_compiler
@pytest.mark.parametrize("change", ["bias", "eps", "width", "class", "global hook"])
def test_changed_parts_are_seen(
    tiny: Any, tokens: torch.Tensor, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bias, one norm's eps, a narrower MLP, a patched class, a hook on all modules: what modules give."""
    core = tiny.transformer["core_block"]
    options: Any = {"num_steps": 2, "init_scale": 0.0}
    with torch.no_grad():
        before = tiny(tokens, **options).logits
        match change:
            case "bias":
                core[0].mlp.fc.bias = nn.Parameter(torch.ones(96))
            case "eps":
                core[0].norm_2.eps = 0.5
            case "width":
                fc, proj = core[1].mlp.fc, core[1].mlp.proj
                fc.weight = nn.Parameter(fc.weight.view(2, 48, 32)[:, :16].flatten(0, 1))
                proj.weight = nn.Parameter(proj.weight[:, :16].contiguous())
            case "class":
                plain = nn.Linear.forward
                monkeypatch.setattr(nn.Linear, "forward", lambda self, x: plain(self, x) * 1.1)
            case _:
                halve = lambda part, _, x: x / 2 if isinstance(part, nn.Linear) else None  # noqa: E731
                hooked = nn.modules.module.register_module_forward_hook(halve)
        found = tiny(tokens, **options).logits
        use("modules", monkeypatch)
        expected = tiny(tokens, **options).logits
    if change == "global hook":
        hooked.remove()
    assert not torch.allclose(found, before, atol=1e-2)
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)


@needs_compiler
def test_functions_of_functions_see_every_operation(tiny: Any, tokens: torch.Tensor) -> None:
    """Forward derivatives, which no address carries, and vmap over rows take torch's operations."""
    embeds = tiny.get_input_embeddings()(tokens).detach()

    def states(x: torch.Tensor) -> torch.Tensor:
        return tiny(inputs_embeds=x, num_steps=2, init_scale=0.0).final_state

    with torch.no_grad(), warnings.catch_warnings():
        # Torch's own decompositions are scripted, which is deprecated.
        warnings.simplefilter("ignore")
        rows = torch.vmap(lambda x: states(x[None])[0])(embeds)
        torch.testing.assert_close(rows, states(embeds), rtol=0, atol=ROUNDING)
        assert compiled(tiny, tokens) == STAGES
        with forward_ad.dual_level():
            assert compiled(tiny, tokens) == set()


@needs_compiler
def test_what_is_not_plain_keeps_its_modules(tiny: Any, tokens: torch.Tensor) -> None:
    """A hook, a wrapped product, another backend, mixed precision; the other stages where it is one's own."""
    block = tiny.transformer["core_block"][1]
    handle = block.mlp.fc.register_forward_hook(lambda *_: None)
    assert compiled(tiny, tokens) == STAGES - {"core_block"}
    handle.remove()
    assert compiled(tiny, tokens) == STAGES
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compiled(tiny, tokens) == set()
    tiny.set_attn_implementation("eager")
    assert compiled(tiny, tokens) == set()
    tiny.set_attn_implementation("sdpa")

    class Wrapped(nn.Linear):
        pass

    block.attn.proj.__class__ = Wrapped
    assert compiled(tiny, tokens) == STAGES - {"core_block"}
    block.attn.proj.__class__ = nn.Linear
    assert compiled(tiny.to(torch.bfloat16), tokens) == set()


@pytest.mark.parametrize("exits", [None, LatentDiff(threshold=0.2)])
def test_low_rank_adapters_equal_what_they_merge_to(make: Any, exits: Any) -> None:
    """peft's "all-linear" wraps the adapter too, whose halves are multiplied apart otherwise."""
    peft: Any = pytest.importorskip("peft")
    tokens = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks transformers under a name that is deprecated
        wrapped: Any = peft.get_peft_model(make(), config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    assert any("adapter.lora_B" in name for name, _ in wrapped.named_parameters())
    wrapped(tokens, labels=tokens, num_steps=(2, 2), init_scale=0.0).loss.backward()
    lora = {name: one.grad for name, one in wrapped.named_parameters() if "lora_" in name}
    assert all(grad is not None and bool(grad.any()) for grad in lora.values())
    options: dict[str, Any] = {"num_steps": 5, "init_scale": 0.0, "exit": exits}
    with torch.no_grad():
        apart = wrapped.eval()(tokens, **options).logits
        merged = wrapped.merge_and_unload().eval()
        assert torch.allclose(apart, merged(tokens, **options).logits, atol=1e-4)
