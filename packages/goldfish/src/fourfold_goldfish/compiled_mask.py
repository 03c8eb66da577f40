"""The ordered hash in C++ (`mask.cpp`), for rows on a CPU: in one pass what `loss.py` does in a dozen."""

import ctypes

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from fourfold_parallel.common import native

WORTH_SHARING = 1 << 17
"""Tokens from which a second thread pays."""

_NUMBER = ctypes.c_int64


class _Mask(ctypes.Structure):
    _fields_ = (
        ("row", _NUMBER),
        ("context", _NUMBER),
        ("sees_target", _NUMBER),
        ("is_reset", _NUMBER),
        ("is_prefix", _NUMBER),
        ("key", ctypes.c_uint64),
        ("below", _NUMBER),
    )


def takes(tokens: Tensor) -> bool:
    """True where `drop` can compute with these ids and there is something to compile it with."""
    return (
        type(tokens) is Tensor
        and tokens.device.type == "cpu"
        and tokens.dtype in (torch.int32, torch.int64)
        and not torch.compiler.is_compiling()
        and library() is not None
    )


def drop(
    tokens: Int[Tensor, "batch row"],
    document_ids: Int[Tensor, "batch row"] | None,
    *,
    context: int,
    sees_target: bool,
    is_prefix: bool,
    is_reset: bool,
    key_word: int,
    below: int,
) -> Bool[Tensor, "batch row"] | None:
    """`Goldfish.drop` of the ordered hash, or None where an id is negative.

    Args:
        tokens: int32 or int64, on a CPU.
        document_ids: which document each token belongs to; None where a row is one document.
        context: tokens hashed, at least one.
        sees_target: True where a window ends with its target.
        is_prefix: True where a window begins with its document and may be shorter.
        is_reset: True where a window that reaches into the document before decides nothing.
        key_word: the key, mixed.
        below: a word that is smaller, as an int64, leaves its target out.
    """
    compiled = library()
    assert compiled is not None
    rows, row = tokens.shape
    ids = tokens.contiguous()
    documents = None if document_ids is None else document_ids.to("cpu", torch.int64).contiguous()
    dropped = torch.zeros(rows, row, dtype=torch.bool)
    is_reset = is_reset and documents is not None
    mask = _Mask(row, context, sees_target, is_reset, is_prefix, key_word, below)
    function = compiled.fourfold_goldfish_drop
    function.restype = _NUMBER
    arguments = (
        ctypes.byref(mask),
        ctypes.c_void_p(ids.data_ptr()),
        ctypes.c_int32(ids.dtype == torch.int64),
        ctypes.c_void_p(None if documents is None else documents.data_ptr()),
        ctypes.c_void_p(dropped.data_ptr()),
    )
    signs: list[int] = []

    def some(first: int, last: int) -> None:
        signs.append(function(*arguments, _NUMBER(first), _NUMBER(last)))

    if ids.numel() < WORTH_SHARING:
        some(0, rows)
    else:
        native.share(rows, some)
    return None if any(sign < 0 for sign in signs) else dropped


def library() -> ctypes.CDLL | None:
    """The compiled mask, or None where nothing here can compile it."""
    return native.load("fourfold_goldfish", "mask.cpp")
