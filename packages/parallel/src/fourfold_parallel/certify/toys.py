"""Any configuration of transformers at toy size, and the model of it, random and in float64.

    model = toy_model(toy(AutoConfig.from_pretrained("mistralai/Mixtral-8x7B-v0.1")))

Every kind of layer of the published model occurs; widths, heads, experts and vocabulary are small
and differ from one another, so that a size taken for another shows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

WIDTH, HEADS, GROUPS, HEAD_WIDTH, INNER = 64, 8, 4, 8, 96
EXPERTS, CHOSEN, EXPERT_INNER = 8, 2, 48
LATENT, ROTARY, VOCABULARY, POSITIONS, WINDOW = 16, 4, 128, 64, 8
LAYERS = 6
"""At most; two where all are alike."""

Fields = dict[str, Any]
Shrink = Callable[[Any, Fields], Any]


def _at_most(limit: int) -> Shrink:
    return lambda value, _: min(value, limit)


def _groups(value: int, fields: Fields) -> int:
    """As many as heads, one, or half as many: as it was."""
    heads = _first(fields, "num_attention_heads", "n_heads", "n_head", "num_heads") or HEADS
    return HEADS if value >= heads else min(value, GROUPS)


def _experts_a_token(value: int, _: Fields) -> int:
    return min(value, CHOSEN)


SIZES: list[tuple[str, int | float | Shrink]] = [
    # Layers are counted in `toy`, since lists are cut with them.
    (r"(num_nextn_predict|num_mtp)_layers", 0),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_(start_index|interval)", _at_most(1)),
    (r"moe_layer_end_index", LAYERS),
    (r"(attn|expert)_layer_period|decoder_sparse_step", _at_most(2)),
    (r"(attn|expert)_layer_offset", _at_most(1)),
    (r"(global_attn_every_n_layers|sliding_window_pattern|no_rope_layer_interval)", _at_most(2)),
    (r"layer_group_size|interleave_moe_layer_step|n_layers_per_attn_res_block", _at_most(2)),
    # Widths.
    (r"(|text_|embedding_|attention_)hidden_size|d_model|n_embd|emb_dim|embedding_(size|dim)", WIDTH),
    (r"(in|out)put_embedding_size|word_embed_proj_dim|lru_width|cross_attention_hidden_size", WIDTH),
    (r"backbone_hidden_size|adapter_in(_dim|put_size)|(pronunciation|shape)_embed_dim|ple_embed_dim", WIDTH),
    (r"(moe_|expert_ffn_|shared_|moe_shared_|ffn_expert_).*(intermediate_size|hidden_size)", EXPERT_INNER),
    (r"shared_experts?_intermediate_size", EXPERT_INNER),
    (r".*(intermediate_size|ffn_dim|ffn_hidden_size|n_inner|feed_forward_size)(_mlp)?", INNER),
    (r"dim_ff|dff|d_inner", INNER),
    (r"mamba_intermediate", 2 * WIDTH),
    (r"hidden_size_per_layer_input|laurel_rank|gated_norm_rank|adapter_rank|hc_lowrank", 8),
    # Heads.
    (r"(swa_|indexer_)?(num_key_value_heads|num_kv_heads|kv_n_heads|kv_heads)", _groups),
    (r"(encoder|decoder|num_(en|de)coder)_attention_heads|attention_heads", HEADS),
    (r"(swa_)?num_attention_heads|n_heads?|num_heads|num_query_groups", HEADS),
    (r"(swa_|attention_)?head_dim|d_head|dim_head|attention_head_size|kv_channels", HEAD_WIDTH),
    (r"qk_nope_head_dim|v_head_dim", HEAD_WIDTH),
    (r"qk_rope_head_dim|rotary_dim", ROTARY),
    (r"qk_head_dim", HEAD_WIDTH + ROTARY),
    (r"[qkvo]+_lora_rank|moe_latent_size", LATENT),
    (r"o_groups|d_rel|n_groups|mamba_n_?groups", _at_most(2)),
    (r"index(er)?_n_heads", 2),
    (r"index(er)?_head_dim", HEAD_WIDTH),
    (r"index_topk|index_topk_blocks|index_block_size", 4),
    # Linear attention, convolutions, state spaces.
    (r"linear_num_key_heads", GROUPS),
    (r"linear_num(_value)?_heads", HEADS),
    (r"linear_(key_|value_)?head_dim", HEAD_WIDTH),
    (r"mamba_n_heads|n_mamba_heads|mamba_num_heads", HEADS),
    (r"mamba_(d_head|head_?dim)", 2 * WIDTH // HEADS),
    (r"mamba_d_ssm", 2 * WIDTH),
    (r"(mamba_d_|ssm_)?state(_size)?", HEAD_WIDTH),
    (r"mamba_dt_rank|time_step_rank", 4),
    (r"(mamba_)?chunk_size", 8),
    (r"router_hidden_size", LATENT),
    # Experts.
    (r"(moe_)?num_(local_)?experts|n_routed_experts", EXPERTS),
    (r"(moe_)?num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts", _experts_a_token),
    (r"zero_expert_num", 4),
    (r"n_group|num_expert_group", _at_most(2)),
    (r"topk_group", _at_most(1)),
    (r"(n|num|moe_num)_shared_experts", _at_most(2)),
    # Tokens and positions.
    (r"(|decoder_|unpadded_)vocab_size(_per_layer_input)?", VOCABULARY),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|context_length", POSITIONS),
    (r"max_(source|target)_positions|rel_extent", POSITIONS),
    (r".*sliding_window(_size)?|(|attention_|local_attention_)window_(size|len)|local_attention", WINDOW),
    (r"attention_chunk_size|(lsh|local)_attn_chunk_length", WINDOW),
]  # fmt: skip
"""What a field of a configuration becomes, by the first pattern that its name matches."""

COUNTS = re.compile(
    r"num_hidden_layers|n_layers?|num_layers|((num_)?(encoder|decoder)_)layers|num_blocks|depth"
)
DROPPED = re.compile(r".*(dropout|pdrop|layerdrop|jitter_noise)(_p|_prob|_rate)?")


def _first(fields: Mapping[str, Any], *names: str) -> Any:
    return next((fields[name] for name in names if fields.get(name) is not None), None)


EXCEPTIONS: dict[str, Fields] = {
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": GROUPS}},
    "gemma3n_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "altup_num_inputs": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "intermediate_size": [INNER] * 4,
        "activation_sparsity_pattern": [0.95, 0.0, 0.95, 0.0],
    },
    "dots3_note_text": {"head_dim": HEAD_WIDTH + ROTARY},
    "mamba2": {"head_dim": 2 * WIDTH // HEADS},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "hash_seed": 0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4, "attention_hidden_size": 2 * WIDTH, "attention_head_dim": 2 * HEAD_WIDTH,
        "layers_block_type": ["linear_attention", "hybrid"] * 2, "n_mamba_heads": 2,
    },
    "zamba2": {
        "num_hidden_layers": 4, "attention_hidden_size": 2 * WIDTH, "attention_head_dim": 2 * HEAD_WIDTH,
        "layers_block_type": ["linear_attention", "hybrid"] * 2, "hybrid_layer_ids": [1, 3],
    },
}  # fmt: skip
"""What a type needs besides: fields that the patterns cannot know, over what they give."""

TELLING: dict[str, Any] = {
    "logits_scaling": 2.0, "logit_scale": 0.25, "lm_head_multiplier": 0.5, "residual_multiplier": 0.5,
    "embedding_multiplier": 2.0, "key_multiplier": 0.5, "attention_out_multiplier": 0.5,
    "final_logit_softcapping": 3.0, "logits_soft_cap": 3.0, "output_logit_soft_cap": 3.0,
}  # fmt: skip
"""Factors and caps that are often published as one or absent, at values that show."""


def toy(
    config: PretrainedConfig, *, grouped: bool = False, telling: bool = False
) -> PretrainedConfig:
    """The configuration at toy size: every kind of layer occurs, nothing drops out.

    Args:
        config: Of any causal language model.
        grouped: Let two heads share keys and values where the class can, whatever is published.
        telling: Set factors and caps that the class has to values that show.

    Raises:
        ValueError: Its class does not take the small sizes; transformers' reason is in it.
    """
    fields = _shrunk(config.to_dict(), type(config), grouped=grouped, telling=telling)
    try:
        return type(config)(**fields)
    except Exception as error:
        raise ValueError(
            f"{config.model_type} does not take the sizes of a toy ({error}); add what it needs "
            "to EXCEPTIONS of fourfold_parallel.certify.toys"
        ) from error


def default_toy(model_type: str, *, telling: bool = True) -> PretrainedConfig:
    """The toy of a type as its class makes it, with grouped heads and, if `telling`, factors that show."""
    config = CONFIG_MAPPING[model_type](**DEFAULTS.get(model_type, {}))
    return toy(config, grouped=True, telling=telling)


QSA: Fields = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}  # fmt: skip
DEFAULTS: dict[str, Fields] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    },
    "dbrx": {"attn_config": {"clip_qkv": 0.5, "kv_n_heads": 8}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": {
        "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
    },
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp": {"text_config": QSA},
    "qwen4_exp_text": QSA,
}  # fmt: skip
"""With what a class is called where its defaults make no configuration."""


NOT_BUILT = {
    "blt": "its patcher's shapes do not shrink with the model",
    "dots3_note": "checks its towers' adapters against the published widths",
    "gemma3n": "needs timm for its vision tower",
    "gemma4_assistant": "drafts from another model's keys and values",
    "gemma4_unified_assistant": "drafts from another model's keys and values",
    "git": "takes no labels without an image",
    "musicgen": "needs the configuration of its decoder",
    "musicgen_melody": "needs the configuration of its decoder",
}
"""Types that make no toy by themselves, and why."""


def causal_types() -> list[str]:
    """Every type that transformers maps to a causal language model."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _shrunk(fields: Fields, of: type[PretrainedConfig], *, grouped: bool, telling: bool) -> Fields:
    fields = {name: value for name, value in fields.items() if not name.startswith("_")}
    model_type = fields.pop("model_type", "")
    for name in (
        "transformers_version",
        "architectures",
        "dtype",
        "auto_map",
        "quantization_config",
    ):
        fields.pop(name, None)
    small = _layers_cut(fields)
    if "head_dim" in fields:
        fields = {**fields, "head_dim": fields["head_dim"] or HEAD_WIDTH}
        is_rotary = fields["head_dim"] == fields.get("qk_rope_head_dim")
        small["head_dim"] = ROTARY if is_rotary else HEAD_WIDTH
    parts: Fields = dict(vars(of).get("sub_configs", {}))
    for name, value in small.items():
        if isinstance(value, dict) and ("model_type" in value or name in parts):
            kind: str = value.get("model_type") or ""
            inner = CONFIG_MAPPING[kind] if kind in CONFIG_MAPPING else parts.get(name)
            if inner is None or inner is AutoConfig:
                inner = PretrainedConfig
            small[name] = {
                **_shrunk(value, inner, grouped=grouped, telling=telling),
                **({"model_type": kind} if kind else {}),
            }
        elif name.endswith(("token_id", "token_index")) and value is not None:
            small[name] = _token(value, name)
        elif name.startswith("rope_parameters") and value is not None:
            small[name] = _rope(value, fields)
        elif telling and name in TELLING and not isinstance(value, list):
            small[name] = TELLING[name]
        elif name == "head_dim":
            continue
        elif DROPPED.fullmatch(name) and isinstance(value, float):
            small[name] = 0.0
        else:
            small[name] = _size(name, value, fields)
    kv_heads = small.get("num_key_value_heads")
    if grouped and kv_heads == small.get("num_attention_heads") and not small.get("kv_lora_rank"):
        small["num_key_value_heads"] = GROUPS
    return _over(small, EXCEPTIONS.get(model_type, {}))


def _over(fields: Fields, exceptions: Fields) -> Fields:
    """Fields, and inner ones, replaced by a type's own."""
    inner = {
        name: _over(fields[name], value)
        for name, value in exceptions.items()
        if isinstance(value, dict) and isinstance(fields.get(name), dict)
    }
    return {**fields, **exceptions, **inner}


def _size(name: str, value: Any, fields: Fields) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float | list):
        return value
    to = next((to for pattern, to in SIZES if re.fullmatch(pattern, name)), None)
    if to is None or not value:
        return value
    if isinstance(value, list):
        return [_size(name, item, fields) for item in value]
    return to(value, fields) if callable(to) else to


def _layers_cut(fields: Fields) -> Fields:
    """The fields with as few layers as show every kind, and lists of layers cut alike."""
    count = _first(fields, *(name for name in fields if COUNTS.fullmatch(name)))
    small = dict(fields)
    for name, value in fields.items():
        if COUNTS.fullmatch(name) and isinstance(value, int):
            small[name] = 2
    if not isinstance(count, int):
        return small
    lists = {
        name: value
        for name, value in fields.items()
        if isinstance(value, list | tuple) and len(value) == count
    }
    own = fields.get("per_layer_config") or {}
    own = {int(layer): value for layer, value in own.items()}
    rows = zip(*lists.values(), map(own.get, range(count)), strict=True)
    kinds = [json.dumps(row) for row in rows]
    first = sorted({kinds.index(kind) for kind in kinds})[:LAYERS]
    periodic = any(re.fullmatch(PERIODS, name) and value for name, value in fields.items())
    kept = first if len(first) > 1 else [*range(4 if periodic else 2)]
    for name, value in fields.items():
        if COUNTS.fullmatch(name) and value == count:
            small[name] = len(kept)
    for name, value in lists.items():
        small[name] = [value[min(layer, count - 1)] for layer in kept]
    if own:
        small["per_layer_config"] = {
            place: {
                name: 2 * HEAD_WIDTH
                if name == "head_dim"
                else _size(name, value, {**fields, **own[layer]})
                for name, value in own[layer].items()
            }
            for place, layer in enumerate(kept)
            if layer in own
        }
    return small


PERIODS = (
    r".*(_period|_pattern|_interval|_every_n_layers|_sparse_step|_layer_step|layer_group_size)|"
    r"first_k_dense_replace|num_dense_layers|n_layers_per_attn_res_block"
)
"""Fields by which layers differ that no list names; four layers show them."""


def _token(value: Any, name: str) -> Any:
    if isinstance(value, list):
        return [_token(item, name) for item in value]
    if value < VOCABULARY:
        return value
    return VOCABULARY - 1 - sum(name.encode()) % 16  # unlike one another, above the batch's tokens


def _rope(value: Any, fields: Fields) -> Any:
    """Rotary parameters for a head of eight; sections of several positions in its proportions."""
    if not isinstance(value, dict):
        return value
    if not any(name in value for name in ("rope_type", "rope_theta")):
        return {name: _rope(inner, fields) for name, inner in value.items()}
    part = value.get("partial_rotary_factor") or 1.0
    if fields.get("qk_rope_head_dim") and not fields.get("head_dim"):
        part = 1.0
    turned = max(2, int(HEAD_WIDTH * part) // 2 * 2)
    small = dict(value)
    if value.get("partial_rotary_factor") is not None:
        small["partial_rotary_factor"] = turned / HEAD_WIDTH
    for name in ("long_factor", "short_factor"):
        if isinstance(value.get(name), list):
            small[name] = value[name][: turned // 2]
    if "mrope_section" in value:
        small["mrope_section"] = [turned // 2 - 2 * (turned // 6), turned // 6, turned // 6]
    for name in ("original_max_position_embeddings",):
        if name in value:
            small[name] = POSITIONS // 2
    return small


def toy_model(
    config: PretrainedConfig, *, dtype: torch.dtype = torch.float64, seed: int = 0
) -> PreTrainedModel:
    """A model of a configuration, every parameter random, in evaluation mode.

    Around what its class begins with (gains about one, decays about their range) lies noise, so that
    no term is zero and no norm is one.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    except TypeError:
        model = AutoModelForCausalLM.from_config(config)
    model = model.to(torch.float64).train(config.model_type in ONLY_TRAINED)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            begun = torch.nan_to_num(parameter, nan=0.0, posinf=0.0, neginf=0.0).clamp(-20, 20)
            parameter.copy_(begun + NOISE * noise)
    return model.to(dtype)


ONLY_TRAINED = {"reformer"}
"""Types that refuse gradients in evaluation mode; a toy drops nothing, so the mode is no difference."""

NOISE = WIDTH**-0.5
"""Products of the residual stream keep its size."""


class _Wide(TorchFunctionMode):
    """Every float32 that a model file asks for is float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.float:
            return args[0].double()
        if any(value is torch.float32 for value in args):
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        if kwargs and any(value is torch.float32 for value in kwargs.values()):
            kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
        return func(*args, **kwargs)


@contextmanager
def in_float64() -> Iterator[None]:
    """A scope in which model files' detours through float32 are float64, so that equal is 1e-12."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Wide():
            yield
    finally:
        torch.set_default_dtype(before)
