"""The configuration of a recurrent-depth model, in the words of the published `config.json`."""

import math
from typing import Any

from transformers import PreTrainedConfig

_CHOICES: dict[str, Any] = {
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
}
"""Published choices of which this package implements one each: written, and checked when read."""

_DERIVED = ("effective_expected_depth", "head_dim", "init_values", "n_layers", "padded_vocab_size")
"""Published values that follow from others: written, never read, so that they cannot disagree."""


_LOOPED = {
    "ouro": "all its layers and the last norm, without an adapter, and exits by a learned gate",
    "nanbeige": "all its layers and the last norm, without an adapter, at one depth",
    "parcae": "behind an injection with a bounded norm",
}
"""Looped models of other forms, by their model type."""


class RecurrentDepthConfig(PreTrainedConfig):
    """Shape of a recurrent-depth model; the defaults are Huginn-0125's (Geiping et al. 2025, table 3).

    Reads and writes the published `config.json`. Whatever follows from other values is computed anew.
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

    n_embd: int = 5280
    n_heads: int = 55
    num_key_value_heads: int = -1
    """Equal to `n_heads`: queries and keys share their bias table, so heads cannot be grouped."""
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
    reference_semantics: bool = False
    """Reproduce the published code where it departs from the paper or from transformers.

    Attention masks are ignored, labels are taken as already shifted, the adapter multiplies the
    concatenated state and embedding in one product, and the up half of the MLP starts small.
    """

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, for this type of model alone.

        Raises:
            ValueError: the dictionary is another type's, of which transformers would take over what it knows.
        """
        given = config_dict.get("model_type", cls.model_type)
        if given != cls.model_type:
            more = f", which loops {_LOOPED[given]}" if given in _LOOPED else ""
            raise ValueError(
                f"a configuration of model type {given!r}{more}; this package reads {cls.model_type!r} "
                "alone, so use the model's own code"
            )
        return super().from_dict(config_dict, **kwargs)

    def __post_init__(self, **kwargs: Any) -> None:
        for other, name in self.attribute_map.items():
            if other in kwargs:
                kwargs[name] = kwargs.pop(other)
        for name in [name for name in kwargs if name in self.attribute_map.values()]:
            if name not in _DERIVED:
                setattr(self, name, kwargs.pop(name))
        for name in _DERIVED:
            kwargs.pop(name, None)
        for name in ("rope_scaling", "rope_parameters"):
            if kwargs.pop(name, None):
                raise ValueError(
                    f"{name} asks for other positions than the published; leave it out"
                )
        for name, value in _CHOICES.items():
            if kwargs.pop(name, value) != value:
                raise ValueError(
                    f"{name} differs from {value!r}, the one published choice; this package implements "
                    "no other"
                )
        self.tie_embeddings = kwargs.pop("tie_word_embeddings", self.tie_embeddings)
        if self.num_key_value_heads == -1:
            self.num_key_value_heads = self.n_heads
        self._check()
        super().__post_init__(**kwargs)

    def _check(self) -> None:
        counts = (
            "n_embd", "n_heads", "n_layers_in_recurrent_block", "mean_recurrence", "mean_backprop_depth",
            "intermediate_size", "vocab_size", "padding_multiple", "block_size",
        )  # fmt: skip
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; use 1 or more")
        if min(self.n_layers_in_prelude, self.n_layers_in_coda) < 0:
            raise ValueError(
                f"n_layers_in_prelude={self.n_layers_in_prelude}, n_layers_in_coda={self.n_layers_in_coda}; "
                "use 0 or more"
            )
        if self.n_embd % self.n_heads or (self.n_embd // self.n_heads) % 2:
            raise ValueError(
                f"n_embd={self.n_embd} over n_heads={self.n_heads} is not an even head width; "
                f"use a multiple of {2 * self.n_heads}"
            )
        if self.num_key_value_heads != self.n_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} differs from n_heads={self.n_heads}; "
                "the bias on keys has one row per head, so use equal numbers"
            )

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
        return self.n_embd // self.n_heads

    @property
    def n_layers(self) -> int:
        """Blocks that have weights."""
        return self.n_layers_in_prelude + self.n_layers_in_recurrent_block + self.n_layers_in_coda

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
            "embed_scale": math.sqrt(self.n_embd),
            "embedding": std,
            "out_proj": std / math.sqrt(2 * self.effective_expected_depth),
            "std": std,
        }

    def to_dict(self) -> dict[str, Any]:
        """The published keys, derived values included."""
        out = super().to_dict()
        if not out.get("reference_semantics"):
            out.pop("reference_semantics", None)
        out |= {name: getattr(self, name) for name in _DERIVED} | _CHOICES
        out["tie_word_embeddings"] = self.tie_embeddings
        out["architectures"] = ["RavenForCausalLM"]
        return out
