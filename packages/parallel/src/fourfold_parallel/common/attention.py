"""The implementation of attention that a model runs, by transformers' own names."""

from __future__ import annotations

from typing import Literal

from transformers.utils.import_utils import (
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_flash_attn_4_available,
)

Attention = Literal[
    "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4"
]
FUSED: tuple[Attention, ...] = (
    "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4",
)  # fmt: skip
"""Those that never hold the scores of all pairs of tokens."""
_FLASH = {
    "flash_attention_2": (is_flash_attn_2_available, "flash-attn"),
    "flash_attention_3": (is_flash_attn_3_available, "flash-attn-3"),
    "flash_attention_4": (is_flash_attn_4_available, "flash-attn-4"),
}


def usable(attention: Attention) -> Attention:
    """The name as it is, where this machine can run it.

    flash-attn is no extra of ours: its build reads the torch that is there, which a resolver cannot give it.

    Raises:
        ValueError: The library or its GPU is missing; says how it is installed and what runs instead.
    """
    if attention in _FLASH:
        is_available, library = _FLASH[attention]
        if not is_available():
            raise ValueError(
                f"attention={attention!r} needs a CUDA GPU that it supports and the library {library}, "
                f"which is built against the torch that is installed: pip install --no-build-isolation "
                f"{library}; or take attention='sdpa', which gives the same values anywhere"
            )
    return attention
