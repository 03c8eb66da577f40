"""A checksum of a tensor that does not depend on how the tensor is cut.

The element at `(i, j, ...)`, its bits read as an integer, is multiplied by an odd 64-bit number for `i`,
one for `j`, ..., and all products are summed modulo 2^64. So the checksums of pieces that make up a tensor
add up to the tensor's: ranks check together what they hold, on any grid, against what was written on any
other.

A change of one element always changes the sum: an odd number times a difference of at most 64 bits is not
zero modulo 2^64. Changes of several elements cancel with a probability of about 2^-32 at most. It finds
what disks, networks and mistakes do; it is no protection against somebody who means to deceive.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 1 << 18
"""Elements worked on at a time: two megabytes, which stay in a processor's cache."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MODULUS = 1 << 64


def checksum(values: Tensor, offsets: Sequence[int]) -> int:
    """The checksum of a rectangle of a tensor, from 0 to 2^64 - 1; those of all its rectangles add up.

    Args:
        values: the rectangle, in any memory format, on any device.
        offsets: of its first element in the whole tensor.
    """
    if values.numel() == 0:
        return 0
    if values.is_complex():
        values, offsets = torch.view_as_real(values), (*offsets, 0)
    bits = values.detach().view(_BITS[values.element_size()])
    if bits.ndim == 0:
        bits, offsets = bits[None], (0,)
    factors = [
        _factors(bits.ndim - dim, start, length, bits.device)
        for dim, (start, length) in enumerate(zip(offsets, bits.shape, strict=True))
    ]
    rows = max(1, BLOCK * bits.shape[0] // bits.numel())
    total = 0
    for block, first in zip(bits.split(rows), factors[0].split(rows), strict=True):
        sums = block.to(torch.int64, copy=True)  # of 64-bit numbers too: it is changed in place
        for factor in reversed(factors[1:]):
            sums = sums.mul_(factor).sum(-1)
        total += int(sums.mul_(first).sum())
    return total % _MODULUS


def shown(value: int) -> str:
    """A checksum as files hold it: 16 hexadecimal digits."""
    return f"{value:016x}"


def signed(value: int) -> int:
    """The same number modulo 2^64, as a signed integer of 64 bits, which ranks can sum."""
    return value - _MODULUS if value >= _MODULUS // 2 else value


def _factors(direction: int, start: int, length: int, device: torch.device) -> Tensor:
    """Odd numbers for the places `start`, `start + 1`, ... along a direction, counted from the last dim.

    SplitMix64 (Steele, Lea and Flood 2014), whose outputs for successive inputs pass the tests of randomness.
    """
    places = torch.arange(start, start + length, dtype=torch.int64, device=device)
    mixed = (places + (direction << 40)) * signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ _shifted(mixed, shift)) * signed(factor)
    return (mixed ^ _shifted(mixed, 31)) | 1


def _shifted(values: Tensor, bits: int) -> Tensor:
    """A right shift that fills with zeros; torch's of signed integers repeats the sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)
