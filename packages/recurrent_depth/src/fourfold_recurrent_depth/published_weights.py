"""Read published weights, whichever of their layouts they come in, and refuse any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from fourfold_recurrent_depth.causal_lm import RecurrentDepthForCausalLM
from fourfold_recurrent_depth.configuration import RecurrentDepthConfig

PICKLED = ("model.pt", "pytorch_model.bin")
"""Names of files of weights that are no safetensors, as Parcae's code looks for them."""
TRAINING_PREFIX = "_orig_mod._original_module."
"""Prefix that torch.compile and the training wrapper put before every name of a `.pth` checkpoint."""


def load_published(
    folder: Path, *, dtype: torch.dtype = torch.float32, training: Path | None = None
) -> RecurrentDepthForCausalLM:
    """A model from a folder of the published layout, checked key by key before anything is built.

    `AutoModelForCausalLM.from_pretrained` reads the same folder and, as everywhere in transformers,
    warns where this raises.

    Args:
        folder: with `config.json` and, unless `training` is given, safetensors or one of `PICKLED`.
        dtype: of the weights; the rotary table stays float32.
        training: a `.pth` checkpoint of the training code, whose names carry a prefix.

    Raises:
        ValueError: keys are missing, left over or of another shape.
    """
    config = RecurrentDepthConfig.from_pretrained(folder)
    if training is None and not any(folder.glob("*.safetensors")):
        training = next((folder / name for name in PICKLED if (folder / name).exists()), None)
    with torch.device("meta"):
        model = RecurrentDepthForCausalLM(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    weights = _training_weights(training) if training else None
    shapes = _shapes(folder) if weights is None else {n: tuple(w.shape) for n, w in weights.items()}
    optional = {"freqs_cis"} | ({"lm_head.weight"} if config.tie_embeddings else set())
    missing = sorted(set(expected) - set(shapes) - optional)
    extra = sorted(set(shapes) - set(expected))
    other = sorted(name for name in set(shapes) & set(expected) if shapes[name] != expected[name])
    if missing or extra or other:
        raise ValueError(
            f"{training or folder} is not a checkpoint of its config: {len(missing)} keys missing "
            f"{missing[:3]}, {len(extra)} left over {extra[:3]}, {len(other)} of another shape "
            f"{other[:3]}; use the config.json that belongs to the weights"
        )
    model = RecurrentDepthForCausalLM(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    if weights is None:
        weights = {}
        for file in sorted(folder.glob("*.safetensors")):
            weights |= load_file(file)
    weights.pop("freqs_cis", None)
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    return model.eval()


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no safetensors; name the folder of the weights")
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                shapes[name] = tuple(file.get_slice(name).get_shape())
    return shapes


def _training_weights(path: Path) -> dict[str, Tensor]:
    """Weights of a training checkpoint: the prefix off, the second copy (`forward_module`) left out."""
    saved: Any = torch.load(path, map_location="cpu", weights_only=True)
    saved = saved.get("model", saved)
    return {
        name.removeprefix(TRAINING_PREFIX): tensor
        for name, tensor in saved.items()
        if "forward_module" not in name
    }
