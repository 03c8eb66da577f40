"""The configuration of a looped model, in the words of the published `config.json` of its family.

A `Family` is the little in which looped models differ, as values:

    family      s_0                   injected in each loop    behind each loop   between core and coda
    huginn      drawn                 adapter([s, e])          nothing            the last norm
    parcae      drawn                 decay * s + dt * B e     nothing            a product
    ouro        the embedding         nothing                  the last norm      there is no coda
    nanbeige    the embedding         nothing                  the last norm      there is no coda

Parts bear the names of the published weights, so that a published file is read, and written, as it is.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PreTrainedConfig

_SILU = {"hidden_act": "silu", "attention_dropout": 0.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """The form of a looped model, and the words of its published configuration and weights."""

    model_type: str
    """In `config.json`."""
    architecture: str
    source: str
    """The paper."""

    # The recurrence.
    begins: Literal["noise", "embedding"]
    """s_0 is drawn, or it is the prelude's output."""
    injects: Literal["product", "decay"] | None
    """The embedding enters each recurrence by a product with [s, e], beside a state that decays, or never."""
    norm_follows_loop: bool
    """The last norm follows every recurrence, and nothing stands between it and the head."""
    bridge: Literal["norm", "product"] | None
    """Between core and coda: the last norm, a product of its own, or nothing."""
    has_gate: bool = False
    """A learned gate gives, behind each recurrence, the probability to stop there."""

    # A block.
    norms: Literal["sums", "branches", "inputs"]
    """Beside the inputs of attention and MLP, the sums with the residual stream are normalised, or the
    outputs before they are added, or neither."""
    fused: bool = False
    """Queries, keys and values come from one product, with a bias on queries and keys."""
    heads_norm: bool = False
    """Queries and keys are normalised, without gains, after their rotation."""
    mlp: Literal["halves", "gate", "square"]
    """A gate that is half of one product, a product of its own, or none: half of relu squared."""
    rotates: Literal["pairs", "halves"]
    """Feature 2i turns with 2i + 1 (by a table among the weights), or i with i + width / 2."""
    scales_embedding: bool = False
    """By the root of the width."""
    token_values: bool = False
    """Tables of values by token, gated into the values of every other layer."""

    # Its words.
    root: str
    """The module that holds the parts below."""
    parts: Mapping[str, str] = field(default_factory=dict)
    """Names of parts, where they are not Huginn's."""
    block: Mapping[str, str] = field(default_factory=dict)
    """Names of a block's parts, where they are not Huginn's."""
    projections: tuple[str, ...]
    """Of an attention: into it, the last one out of it."""
    layers: tuple[str, ...]
    """Of an MLP: into it, the last one out of it."""
    words: Mapping[str, str]
    """Published words of a configuration, by ours."""
    implied: Mapping[str, Any] = field(default_factory=dict)
    """Fields that follow from the family; a published configuration has no word for them."""
    choices: Mapping[str, Any]
    """Published choices of which this package implements one each: written, and checked when read."""


HUGINN = Family(
    model_type="huginn_raven", architecture="RavenForCausalLM", source="arXiv 2502.05171",
    begins="noise", injects="product", norm_follows_loop=False, bridge="norm",
    norms="sums", fused=True, mlp="halves", rotates="pairs", scales_embedding=True,
    root="transformer", projections=("Wqkv", "proj"), layers=("fc", "proj"), words={},
    choices={
        "activation_checkpoint_impl": "per-iteration",
        "architecture_class_name": "RecurrentGPT",
        "bias": False,
        "block_class_name": "SandwichBlock",
        "init_orthogonal": False,
        "init_strategy": "takase",
        "injection_type": "linear",
        "mlp_class_name": "GatedMLP",
        "nonlin_name": "SiLU",
        "norm_class_name": "RMSNorm_llama",
        "qk_bias": True,
        "sampling_scheme": "poisson-lognormal-filling",
        "state_init": "like-init",
        "test_time_noise": 0,
        "test_time_noise_type": "fixed",
    },
)  # fmt: skip

PARCAE = Family(
    model_type="parcae", architecture="Parcae", source="arXiv 2604.12946",
    begins="noise", injects="decay", norm_follows_loop=False, bridge="product",
    norms="inputs", heads_norm=True, mlp="square", rotates="pairs", token_values=True,
    root="transformer", parts={"bridge": "C"}, block={"norm_3": "norm_2"},
    projections=("c_q", "c_k", "c_v", "c_proj"), layers=("fc", "proj"),
    words={"n_heads": "num_attention_heads"},
    choices={
        "bias": False, "block_class_name": "TransformerPreNormBlock", "center_attention": False,
        "clip_qkv": None, "debias_attention": False, "init_orthogonal": True,
        "init_strategy": "scaled-zero", "injection_type": "diagonal", "logit_softcap": None,
        "mlp_class_name": "BaseMLP", "mup_model_scaling_factor": 1, "nonlin_name": "ReLU2",
        "norm_class_name": "RMSNorm", "qk_bias": False, "qk_norm": True,
        "randomize_positions_from": None, "state_init": "like-init", "use_abacus": False,
    },
)  # fmt: skip

_LLAMA: dict[str, Any] = {
    "root": "model",
    "parts": {"wte": "embed_tokens", "core_block": "layers", "ln_f": "norm", "gate": "early_exit_gate"},
    "projections": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "layers": ("gate_proj", "up_proj", "down_proj"),
    "begins": "embedding", "injects": None, "norm_follows_loop": True, "bridge": None,
    "mlp": "gate", "rotates": "halves",
    "implied": {"n_layers_in_prelude": 0, "n_layers_in_coda": 0, "padding_multiple": 1},
}  # fmt: skip
"""Every layer is looped, and there is nothing else; names are Llama's."""
_LLAMA_WORDS = {
    "n_embd": "hidden_size", "n_heads": "num_attention_heads", "head_width": "head_dim",
    "n_layers_in_recurrent_block": "num_hidden_layers", "block_size": "max_position_embeddings",
    "norm_eps": "rms_norm_eps", "rope_base": "rope_theta",
}  # fmt: skip

OURO = Family(
    model_type="ouro", architecture="OuroForCausalLM", source="arXiv 2510.25741",
    norms="branches", has_gate=True,
    block={
        "norm_1": "input_layernorm", "attn": "self_attn", "norm_2": "input_layernorm_2",
        "norm_3": "post_attention_layernorm", "norm_4": "post_attention_layernorm_2",
    },
    words={**_LLAMA_WORDS, "mean_recurrence": "total_ut_steps"},
    choices={**_SILU, "early_exit_step": None, "use_sliding_window": False},
    **_LLAMA,
)  # fmt: skip

NANBEIGE = Family(
    model_type="nanbeige", architecture="NanbeigeForCausalLM", source="arXiv 2607.22083",
    norms="inputs",
    block={"norm_1": "input_layernorm", "attn": "self_attn", "norm_3": "post_attention_layernorm"},
    words={**_LLAMA_WORDS, "mean_recurrence": "num_loops"},
    choices={
        **_SILU, "attention_bias": False, "emb_neighbor_num": None, "enable_depth_attention": False,
        "enable_double_loop_split": False, "enable_h_res_identity": False,
        "enable_hyper_connection": False, "enable_mhc": False, "insert_ngram_layer_idx": [],
        "loop_loss_weights": [], "loop_share_kv": False, "mlp_bias": False, "ngram_insert_all_layers": False,
        "pretraining_tp": 1, "qk_layernorm": False,
    },
    **_LLAMA,
)  # fmt: skip

FAMILIES = {family.model_type: family for family in (HUGINN, PARCAE, OURO, NANBEIGE)}
"""By model type."""

_DERIVED = ("effective_expected_depth", "head_dim", "init_values", "n_layers", "padded_vocab_size")
"""Published values that follow from others: written, never read, so that they cannot disagree."""
_OF_FAMILIES: dict[str, tuple[str, ...]] = {
    "head_width": ("ouro", "nanbeige"),
    "norm_follows_loop": ("nanbeige",),
    "prelude_norm": ("parcae",),
    "early_exit_threshold": ("ouro",),
}
"""Fields that mean something in some families alone, and are written there."""


class RecurrentDepthConfig(PreTrainedConfig):
    """Shape of a recurrent-depth model; the defaults are Huginn-0125's (Geiping et al. 2025, table 3).

    Reads and writes the published `config.json` of each family. Whatever follows from other values is
    computed anew.
    """

    model_type = "huginn_raven"
    keys_to_ignore_at_inference = [  # noqa: RUF012 - transformers' own declaration
        "past_key_values", "final_state", "latent_states", "exit_steps",
    ]  # fmt: skip
    attribute_map = {  # noqa: RUF012
        "hidden_size": "n_embd",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
        "max_position_embeddings": "block_size",
    }

    family: str = "huginn_raven"
    """The published model type whose form this is; see `Family`."""
    n_embd: int = 5280
    n_heads: int = 55
    num_key_value_heads: int = -1
    """By default `n_heads`. Fewer share their keys, where the family's keys have no bias of their own."""
    head_width: int = -1
    """By default `n_embd / n_heads`."""
    n_layers_in_prelude: int = 2
    n_layers_in_recurrent_block: int = 4
    n_layers_in_coda: int = 2
    intermediate_size: int = 17920
    vocab_size: int = 65536
    padding_multiple: int = 4096
    block_size: int = 4096
    """Positions of the rotary table."""
    mean_recurrence: int = 32
    """Recurrences in evaluation, and their mean in training."""
    mean_backprop_depth: int = 8
    """Recurrences at the end of a training pass that carry gradients."""
    norm_eps: float = 1e-6
    rope_base: float = 50_000
    tie_embeddings: bool = True
    norm_follows_loop: bool = True
    """False where the last norm of a family that normalises each loop stands behind the last loop alone
    (Nanbeige's `skip_loop_final_norm`)."""
    prelude_norm: bool = False
    """A norm behind the prelude (Parcae)."""
    early_exit_threshold: float = 1.0
    """Cumulative probability at which the learned gate stops a token; a criterion may say another (Ouro)."""
    reference_semantics: bool = False
    """Reproduce the published code where it departs from the paper or from transformers.

    Attention masks are ignored, labels are taken as already shifted, the adapter multiplies the
    concatenated state and embedding in one product, and the up half of the MLP starts small.
    """
    serves_slots: bool = False
    """`num_hidden_layers` counts each layer once for each recurrence, as servers with paged caches need."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *given: Any, **kwargs: Any) -> Any:
        """As in transformers, for every family; see `from_dict`."""
        config, kwargs = cls.get_config_dict(pretrained_model_name_or_path, *given, **kwargs)
        return cls.from_dict(config, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, for the model types of `FAMILIES` alone.

        Raises:
            ValueError: the dictionary is another type's, of which transformers would take over what it knows.
        """
        given = config_dict.get("model_type", config_dict.get("family", HUGINN.model_type))
        if config_dict.get("_class_name") == "ParcaeConfig":
            given = "parcae"
        if given not in FAMILIES:
            raise ValueError(
                f"a configuration of model type {given!r}; this package reads {', '.join(FAMILIES)}, so use "
                "the model's own code"
            )
        return super().from_dict({**config_dict, "family": given}, **kwargs)

    def __post_init__(self, **kwargs: Any) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family={self.family!r}; use one of {', '.join(FAMILIES)}")
        form = self.form
        self.__dict__["model_type"] = form.model_type
        if form is not HUGINN:
            self._translate(kwargs)
        for other, name in self.attribute_map.items():
            if other in kwargs:
                kwargs[name] = kwargs.pop(other)
        for name in [name for name in kwargs if name in self.attribute_map.values()]:
            if name not in _DERIVED:
                setattr(self, name, kwargs.pop(name))
        for name in (*_DERIVED, "model_type", "_class_name"):
            kwargs.pop(name, None)
        self._refuse_choices(kwargs)
        self.tie_embeddings = kwargs.pop("tie_word_embeddings", self.tie_embeddings)
        if self.num_key_value_heads in (-1, None):
            self.num_key_value_heads = self.n_heads
        self._check()
        super().__post_init__(**kwargs)

    def _refuse_choices(self, kwargs: dict[str, Any]) -> None:
        """Take out the published choices, and raise where one is another than is implemented here."""
        for name in ("rope_scaling", "rope_parameters"):
            if kwargs.pop(name, None):
                raise ValueError(
                    f"{name} asks for other positions than the published; leave it out"
                )
        if kwargs.get("quantization_config"):
            raise ValueError(
                "quantization_config: quantised weights are not read here; use the unquantised ones"
            )
        for name, value in self.form.choices.items():
            if kwargs.pop(name, value) not in (value, None if value == [] else value):
                raise ValueError(
                    f"{name} differs from {value!r}, the one published choice; this package implements "
                    "no other"
                )

    def _translate(self, kwargs: dict[str, Any]) -> None:
        """A published configuration's words into ours."""
        form = self.form
        for ours, word in form.words.items():
            value = kwargs.pop(word, None)
            if value is not None:
                setattr(self, ours, value)
        for ours, value in form.implied.items():
            setattr(self, ours, value)
        self.norm_follows_loop = form.norm_follows_loop and self.norm_follows_loop
        if form.rotates == "halves":
            _llama_words(self, kwargs)
        else:
            _parcae_words(self, kwargs)

    def _check(self) -> None:
        counts = (
            "n_embd", "n_heads", "n_layers_in_recurrent_block", "mean_recurrence", "mean_backprop_depth",
            "intermediate_size", "vocab_size", "padding_multiple", "block_size", "num_key_value_heads",
        )  # fmt: skip
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; use 1 or more")
        if min(self.n_layers_in_prelude, self.n_layers_in_coda) < 0:
            raise ValueError(
                f"n_layers_in_prelude={self.n_layers_in_prelude}, n_layers_in_coda={self.n_layers_in_coda}; "
                "use 0 or more"
            )
        if (self.head_width < 1 and self.n_embd % self.n_heads) or self.head_dim % 2:
            raise ValueError(
                f"n_embd={self.n_embd} over n_heads={self.n_heads} is not an even head width; "
                f"use a multiple of {2 * self.n_heads}"
            )
        is_grouped = self.num_key_value_heads != self.n_heads
        if is_grouped and self.form.rotates == "pairs":
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} differs from n_heads={self.n_heads}; "
                f"the heads of {self.family} are not grouped, so use equal numbers"
            )
        if self.n_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} does not divide n_heads={self.n_heads}; "
                "use a divisor"
            )
        if self.reference_semantics and self.form is not HUGINN:
            raise ValueError(
                f"reference_semantics reproduces Huginn's code, and this is {self.family}; leave it out"
            )

    @property
    def form(self) -> Family:
        """The family's form."""
        return FAMILIES[self.family]

    @property
    def tie_word_embeddings(self) -> bool:
        """True where the head shares the embedding's weight, as transformers calls it."""
        return self.tie_embeddings

    @tie_word_embeddings.setter
    def tie_word_embeddings(self, value: bool) -> None:
        self.tie_embeddings = value

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.head_width if self.head_width > 0 else self.n_embd // self.n_heads

    @property
    def n_layers(self) -> int:
        """Blocks that have weights, or the slots of a cache that serves all their recurrences."""
        times = self.mean_recurrence if self.serves_slots else 1
        around = self.n_layers_in_prelude + self.n_layers_in_coda
        return around + self.n_layers_in_recurrent_block * times

    @property
    def effective_expected_depth(self) -> int:
        """Blocks that a token passes at the mean recurrence: l in the initialisation (section 4.1)."""
        recurrent = self.n_layers_in_recurrent_block * self.mean_recurrence
        return self.n_layers_in_prelude + recurrent + self.n_layers_in_coda

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: the vocabulary rounded up."""
        return math.ceil(self.vocab_size / self.padding_multiple) * self.padding_multiple

    @property
    def init_values(self) -> dict[str, float]:
        """Standard deviations of fresh weights (Takase et al. 2023): sqrt(2/(5h)), and over sqrt(2l)."""
        std = math.sqrt(2 / (5 * self.n_embd))
        return {
            "embed_scale": math.sqrt(self.n_embd) if self.form.scales_embedding else 1.0,
            "embedding": std,
            "out_proj": std / math.sqrt(2 * self.effective_expected_depth),
            "std": std,
        }

    def to_dict(self) -> dict[str, Any]:
        """The published keys, derived values included."""
        out, form = super().to_dict(), self.form
        if not out.get("reference_semantics"):
            out.pop("reference_semantics", None)
        out.pop("serves_slots", None)
        for name, families in _OF_FAMILIES.items():
            if self.family not in families:
                out.pop(name, None)
        out.pop("family", None)
        out |= form.choices
        out["tie_word_embeddings"] = self.tie_embeddings
        out["architectures"] = [form.architecture]
        if form is HUGINN:
            return out | {name: getattr(self, name) for name in _DERIVED}
        for ours, word in form.words.items():
            out.pop(ours, None)
            out[word] = self.head_dim if ours == "head_width" else getattr(self, ours)
        for name in form.implied:
            out.pop(name, None)
        out["model_type"] = form.model_type
        if form.rotates == "halves":
            out.pop("tie_embeddings", None)
        else:
            out |= {
                "_class_name": "ParcaeConfig", "padded_vocab_size": self.padded_vocab_size,
                "recurrent_embedding_dimension": self.n_embd,
                "recurrent_intermediation_embedding_dimension": self.intermediate_size,
                "rope_settings": {"rope_base": self.rope_base, "use_rope": True, "rope_condense_ratio": 1},
            }  # fmt: skip
            out.pop("rope_base", None)
        if self.family == "nanbeige":
            out["skip_loop_final_norm"] = not out.pop("norm_follows_loop")
        return out

    def to_diff_dict(self) -> dict[str, Any]:
        """The saved keys: those of `to_dict` that differ from every configuration of transformers."""
        kept = ("tie_word_embeddings", "model_type")
        return super().to_diff_dict() | {name: self.to_dict()[name] for name in kept}


def _llama_words(config: RecurrentDepthConfig, kwargs: dict[str, Any]) -> None:
    """Take over the rest of Ouro's or Nanbeige's configuration.

    Raises:
        ValueError: for sliding windows, of which caches here hold none.
    """
    rope = kwargs.pop("rope_parameters", None) or {}
    if rope:
        config.rope_base = rope.get("rope_theta", config.rope_base)
        if rope.get("rope_type", "default") != "default":
            raise ValueError(
                f"rope_parameters of type {rope['rope_type']!r} ask for other positions than the published; "
                "leave them out"
            )
    if {*(kwargs.pop("layer_types", None) or ())} - {"full_attention"}:
        raise ValueError(
            "layer_types names sliding windows, and a looped layer's cache here holds every token; use "
            "'full_attention' for all"
        )
    kwargs.setdefault("tie_word_embeddings", False)
    if "skip_loop_final_norm" in kwargs:
        config.norm_follows_loop = not kwargs.pop("skip_loop_final_norm")
    if config.family == "nanbeige" and kwargs.get("loop_loss_weights"):
        raise ValueError(
            "loop_loss_weights set the number of loops by a loss of each, which is not implemented here; "
            "leave them out, and give num_loops"
        )


def _parcae_words(config: RecurrentDepthConfig, kwargs: dict[str, Any]) -> None:
    """Take over the rest of Parcae's configuration.

    Raises:
        ValueError: for a state of other width than the stream, or other positions.
    """
    for name, ours in (
        ("recurrent_embedding_dimension", config.n_embd),
        ("recurrent_intermediation_embedding_dimension", config.intermediate_size),
        ("recurrent_num_attention_heads", config.n_heads),
    ):
        given = kwargs.pop(name, None)
        if given not in (None, ours):
            raise ValueError(
                f"{name}={given} differs from the other blocks' {ours}; states of their own shape are not "
                "implemented here"
            )
    rope = kwargs.pop("rope_settings", None) or {}
    if not rope.get("use_rope", True) or rope.get("rope_condense_ratio", 1) != 1:
        raise ValueError(
            f"rope_settings={rope} ask for other positions than the published; leave them out"
        )
    config.rope_base = rope.get("rope_base", config.rope_base)
    if config.n_embd < 32:
        raise ValueError(
            f"n_embd={config.n_embd} is narrower than the 32 features that a gate of values reads; use more"
        )
