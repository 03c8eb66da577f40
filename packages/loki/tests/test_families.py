"""Other families of models than Llama: what they do otherwise is followed, or refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    DynamicCache,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from fourfold_loki import Budget, Count, Lossless, Share, Sparse, attending, fit, loki
from fourfold_loki.cache import LokiLayer
from fourfold_loki.calibration import calibrate_tokens
from fourfold_loki.huggingface.sites import cache_name, sites
from fourfold_loki.selectors import Exact, Loki
from fourfold_parallel.certify.toys import NOT_BUILT, causal_types, default_toy, toy_model

Tokens = Callable[..., torch.Tensor]

EVERYTHING = Budget(amount=Share(of_visible=1.0))
QUARTER = Budget(amount=Share(of_visible=0.25))
FLOAT32 = 2e-4
"""Logits of order ten after a few layers."""
CONFIGS = {
    "Gemma3n": "Gemma3nTextConfig",
    "Gemma4": "Gemma4TextConfig",
    "Dots3Note": "Dots3NoteTextConfig",
}
"""Names that do not follow the others."""


def other_model(name: str, *, layers: int = 4, **settings: Any) -> PreTrainedModel:
    """A small random model of another family, with peaked attention."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 64,
        "vocab_size": 97,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    config = getattr(transformers, CONFIGS.get(name, f"{name}Config"))(**{**sizes, **settings})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for place, parameter in model.named_parameters():
            if place.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.mul_(8)
    return model


def steps(model: PreTrainedModel, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the last tokens, one by one after a prompt of 30."""
    with torch.no_grad():
        model(ids[:, :30], past_key_values=cache)
        return torch.cat(
            [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(30, 40)], 1
        )


def test_a_hybrid_model_selects_in_its_attention_layers(tokens: Tokens) -> None:
    """Layers of convolutions count in `layer_types`, and have no place in a basis."""
    model = other_model("Lfm2", layer_types=["conv", "conv", "full_attention", "full_attention"])
    basis, ids = fit(calibrate_tokens(model, tokens(4, 64))), tokens(1, 40)
    full = steps(model, DynamicCache(config=model.config), ids)
    for budget, is_full in ((EVERYTHING, True), (Budget(amount=Count(keys=1)), False)):
        with loki(model, basis, budget) as session:
            logits = steps(model, DynamicCache(config=model.config), ids)
            assert session.reads.queries == 20
            assert torch.allclose(logits, full, atol=FLOAT32, rtol=0) == is_full
            with pytest.raises(ValueError, match="layers without attention"):
                session.cache()


@pytest.mark.parametrize("dense", [(), (3,)], ids=str)
def test_layers_that_read_the_keys_of_others_read_them_turned(
    tokens: Tokens, dense: tuple[int, ...]
) -> None:
    """Gemma 3n's last layers have no keys of their own."""
    model = other_model(
        "Gemma3n",
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        sliding_window=16,
        vocab_size_per_layer_input=97,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        intermediate_size=[64] * 4,
        activation_sparsity_pattern=[0.0] * 4,
        altup_num_inputs=2,
    )
    basis, ids = fit(calibrate_tokens(model, tokens(4, 64))), tokens(1, 40)
    full = steps(model, DynamicCache(config=model.config), ids)
    mode = Sparse(
        selector=Loki(basis=basis, widths=(4,) * 4), budget=EVERYTHING, dense_layers=dense
    )
    with attending(model, mode) as session:
        torch.testing.assert_close(steps(model, session.cache(), ids), full, atol=FLOAT32, rtol=0)


MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_d_ssm": 64,
    "mamba_chunk_size": 8, "mamba_expand": 2,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "settings", "selecting"),
    [
        ("FalconH1", MAMBA, 4),  # attention and a state space side by side
        ("Zaya", EXPERTS, 4),  # convolutions before the attention
        ("MiniMax", {"layer_types": ["linear_attention", "full_attention"] * 2, **EXPERTS}, 2),
        # The layers that attend come first, under the numbers that they would have alone.
        (
            "MiniMax",
            {"layer_types": ["full_attention"] * 2 + ["linear_attention"] * 2, **EXPERTS},
            2,
        ),
        (
            "Lfm2Moe",
            {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1, **EXPERTS},
            2,
        ),
    ],
)
def test_hybrid_layers_select_beside_their_state(
    tokens: Tokens, name: str, settings: dict[str, Any], selecting: int
) -> None:
    """Their attention sees everything before; with the model's own cache, which holds the state."""
    model, ids = other_model(name, **settings), tokens(1, 40)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.5)  # Zaya's keys begin as zeros

    def own() -> torch.Tensor:
        with torch.no_grad():
            cache = model(ids[:, :30], use_cache=True).past_key_values
        with torch.no_grad():
            rows = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(30, 40)]
        return torch.cat(rows, 1)

    full, basis = own(), fit(calibrate_tokens(model, tokens(8, 64)))
    assert basis.layers == selecting
    for budget, is_full in ((EVERYTHING, True), (Budget(amount=Count(keys=1)), False)):
        with loki(model, basis, budget) as session:
            logits = own()
            assert session.reads.queries == 10 * selecting
            assert torch.allclose(logits, full, atol=1e-5, rtol=0) == is_full
            with pytest.raises(ValueError, match="layers without attention or hybrid ones"):
                session.cache()


@pytest.mark.parametrize("budget", [EVERYTHING, QUARTER], ids=str)
def test_values_that_a_model_rearranges_are_decoded_as_it_gives_them(
    tokens: Tokens, budget: Budget
) -> None:
    """Differential attention halves and repeats the values that it got from the cache."""
    model, ids = other_model("DiffLlama"), tokens(1, 40)
    basis = fit(calibrate_tokens(model, tokens(4, 64)))
    full = steps(model, DynamicCache(config=model.config), ids)
    with loki(model, basis, budget) as session:
        theirs = steps(model, DynamicCache(config=model.config), ids)
        ours = steps(model, session.cache(), ids)
    torch.testing.assert_close(ours, theirs, atol=FLOAT32, rtol=0)
    assert torch.allclose(ours, full, atol=FLOAT32, rtol=0) == (budget is EVERYTHING)


def test_keys_that_a_model_changes_behind_the_cache_are_refused(
    tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A LokiCache gives them in the basis, in which the queries would not be."""
    model = other_model("Llama")
    basis = fit(calibrate_tokens(model, tokens(4, 64)))
    given = LokiLayer.update

    def copied(layer: LokiLayer, *states: Any, **options: Any) -> Any:
        keys, values = given(layer, *states, **options)
        return keys.clone(), values

    monkeypatch.setattr(LokiLayer, "update", copied)
    with (
        loki(model, basis, EVERYTHING) as session,
        pytest.raises(ValueError, match="LlamaAttention attends to other keys than its cache gave"),
    ):
        steps(model, session.cache(), tokens(1, 40))


@pytest.mark.parametrize("name", ["Gemma4", "Dots3Note"])
def test_layers_of_different_shapes_are_refused(tokens: Tokens, name: str) -> None:
    settings: dict[str, Any] = {"num_key_value_heads": 4}
    if name == "Gemma4":
        settings |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97}
    model = other_model(name, **settings)
    with pytest.raises(ValueError, match=rf"of {name}ForCausalLM differs from layer to layer"):
        calibrate_tokens(model, tokens(4, 64))


def test_layers_of_an_unknown_kind_are_named_and_not_kept_dense_in_silence(tokens: Tokens) -> None:
    """Unless they are listed; windows are known to stay dense."""
    model = other_model("Qwen3", layer_types=["full_attention"] * 4)
    basis = fit(calibrate_tokens(model, tokens(4, 64)))
    model.config.layer_types = [
        "full_attention",
        "indexed_attention",
        "sliding_attention",
        "hybrid",
    ]
    with (
        pytest.raises(
            ValueError, match=r"layers \(1,\) of Qwen3ForCausalLM are of type 'indexed_att"
        ),
        loki(model, basis, QUARTER),
    ):
        pass
    mode = Sparse(selector=Loki(basis=basis, widths=(4,) * 4), budget=QUARTER, dense_layers=(1,))
    with attending(model, mode) as session:
        assert [session.is_dense(site, site.layer) for site in sites(model)] == [
            False,
            True,
            True,
            False,
        ]


def test_sinks_beside_the_keys_are_refused_in_dense_layers_too(tokens: Tokens) -> None:
    """gpt-oss adds a number of its own to the softmax."""
    model = other_model(
        "GptOss", layers=2, sliding_window=16, num_local_experts=2, num_experts_per_tok=1
    )
    with pytest.raises(ValueError, match="s_aux of GptOssAttention"):
        calibrate_tokens(model, tokens(4, 64))
    dense = Sparse(selector=Exact(), budget=EVERYTHING, dense_layers=(0,))
    with attending(model, dense), pytest.raises(ValueError, match="s_aux of GptOssAttention"):
        model(tokens(1, 20))


def test_the_other_parts_of_a_model_keep_their_attention(tokens: Tokens) -> None:
    """A vision tower that computes eagerly does so during a session and after it."""
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            text_config={
                "model_type": "llama",
                "hidden_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "intermediate_size": 64,
                "vocab_size": 97,
                "max_position_embeddings": 128,
            },
            vision_config={
                "model_type": "clip_vision_model",
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 32,
                "image_size": 16,
                "patch_size": 8,
            },
            image_token_index=96,
        )
    ).eval()
    model.set_attn_implementation({"vision_config": "eager", "text_config": "sdpa"})

    def names() -> tuple[str, str, str]:
        whole = model.config
        parts = (whole, whole.vision_config, whole.text_config)
        return tuple(part._attn_implementation for part in parts)  # type: ignore[return-value]

    before = names()
    basis = fit(calibrate_tokens(model, tokens(4, 64) % 96))
    assert names() == before
    ids = torch.cat([tokens(1, 10) % 96, torch.full((1, 4), 96)], 1)
    image = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        full = model(ids, pixel_values=image).logits
        with loki(model, basis, QUARTER):
            assert names() == (before[0], "eager", "loki")
            assert torch.equal(model(ids, pixel_values=image).logits, full)
    assert names() == before


@pytest.mark.parametrize("name", ["Cohere", "Glm", "SmolLM3"])
def test_keys_before_an_unlike_embedding_are_unknown(tokens: Tokens, name: str) -> None:
    """Cohere and GLM turn neighbouring coordinates, and every fourth layer of SmolLM3 turns none."""
    statistics = calibrate_tokens(other_model(name), tokens(4, 64))
    assert fit(statistics).layers == 4
    with pytest.raises(ValueError, match="not known of this model"):
        fit(statistics, stage="before rotary")


def test_keys_before_a_like_embedding_are_known(tokens: Tokens) -> None:
    """With norms after the projections, and a part of the coordinates that is not turned."""
    for name in ("Qwen3", "Phi"):
        statistics = calibrate_tokens(other_model(name), tokens(4, 64))
        assert fit(statistics, stage="before rotary").layers == 4


@pytest.mark.parametrize("model_type", ["deepseek_v3", "longcat_flash", "minicpm3"])
def test_latent_attention_is_refused_by_its_keys(tokens: Tokens, model_type: str) -> None:
    """Its keys are put together of two parts, twelve wide, where the configuration states one of four."""
    model = toy_model(default_toy(model_type), dtype=torch.float32)
    with pytest.raises(
        ValueError, match=r"8 key/value heads of width 12, and .* states 8 of width"
    ):
        calibrate_tokens(model, tokens(4, 32))


def test_configurations_that_do_not_describe_the_keys_are_refused(tokens: Tokens) -> None:
    torch.manual_seed(0)
    neox = transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            vocab_size=97,
            max_position_embeddings=128,
        )
    )
    with pytest.raises(ValueError, match="GPTNeoXForCausalLM states no num_key_value_heads"):
        calibrate_tokens(neox, tokens(4, 64))
    with pytest.raises(ValueError, match=r"4 key/value heads of width 16, and .* states 2"):
        calibrate_tokens(other_model("Persimmon"), tokens(4, 64))


KNOWN = {
    "llama": "right",
    "qwen3": "right",  # norms of keys
    "granite": "right",  # scores scaled by a number of its own
    "gemma3_text": "right",  # windows, which stay dense
    "falcon_h1": "right",  # a state space beside each attention
    "qwen3_next": "right",  # linear attention in most layers, gates, parts of heads that turn
    "gemma2": "softcap of Gemma2Attention",  # capped scores
    "gpt_oss": "s_aux of GptOssAttention",  # sinks in the softmax
    "doge": "adds a bias to scores",
    "qwen4_exp_text": "are of type 'indexed_attention'",
    "mistral": "no layer of MistralForCausalLM would select",  # nothing but windows
    "gpt2": "GPT2LMHeadModel has no rotary embedding",
    "deepseek_v3": "attends to 8 key/value heads of width 12",
    "gemma4_text": "differs from layer to layer",
}
"""A type of each kind, and what becomes of it: right, or words of its refusal."""
ROUNDED = 1e-4
"""Of logits, over the largest."""


def outcome(model_type: str) -> str:
    """`right` where every way to read everything gives dense logits and few keys give others; or why not.

    Fails where something is wrong in silence.
    """
    model: Any = toy_model(default_toy(model_type), dtype=torch.float32).eval()
    ids = torch.randint(2, 100, (1, 24), generator=torch.Generator().manual_seed(0))
    model.generation_config.eos_token_id = None

    def generated(**ways: Any) -> tuple[list[int], torch.Tensor]:
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0,
            return_dict_in_generate=True, output_logits=True, **ways,
        )  # fmt: skip
        return made.sequences[0].tolist(), torch.cat(made.logits)

    try:
        tokens, full = generated()
    except Exception as error:  # noqa: BLE001 - then there is nothing to be right about
        return f"transformers' own generate fails: {error}"
    try:
        statistics = calibrate_tokens(
            model, torch.randint(2, 100, (8, 48), generator=torch.Generator().manual_seed(1))
        )
        basis = fit(statistics)
        with loki(model, basis, EVERYTHING) as session:
            logits = {"its own cache": generated()[1]}
            try:
                caches = {
                    "our cache": session.cache(),
                    "pages": session.paged_cache(rows=1, capacity=48),
                }
            except ValueError:
                caches = {}  # of models that keep other state than keys; named in a test above
            logits |= {
                name: generated(**{cache_name(model): cache})[1] for name, cache in caches.items()
            }
        with loki(model, basis, Budget(amount=Count(keys=1))) as session:
            _, few = generated()
            reads = session.reads
            if caches:
                decoder = Lossless(session=session, surety=0.0)
                drafted = model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False,
                    pad_token_id=0, custom_generate=decoder, **session.cached(),
                )  # fmt: skip
                assert drafted[0].tolist() == tokens
    except ValueError as refusal:
        return str(refusal)
    size = float(full.abs().max())
    for name, own in logits.items():
        assert float((own - full).abs().max()) < ROUNDED * size, name
    assert reads.queries
    assert reads.share < 0.5
    assert not torch.equal(few, full)
    return "right"


@pytest.mark.parametrize("model_type", KNOWN)
def test_a_family_is_right_or_refused_by_name(model_type: str) -> None:
    assert KNOWN[model_type] in outcome(model_type)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(set(causal_types()) - set(NOT_BUILT) - set(KNOWN)))
def test_no_family_is_wrong_in_silence(model_type: str) -> None:
    """All of them, minutes together; `benchmarks/families.py` records the same with padded batches."""
    said = outcome(model_type)
    # Every refusal of ours names the class and, behind a semicolon, the way out.
    assert said == "right" or "; " in said or said.startswith("transformers' own")
