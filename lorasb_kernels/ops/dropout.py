"""The dropout mask as a function of a seed and an element's index, nothing else.

Squares (Widynski, "Squares: A Fast Counter-Based RNG", arXiv:2004.06278): four
rounds of middle-square on a 64-bit counter and key give 32 random bits per element.
Every backend computes the same bits, so the mask depends neither on tile sizes nor
on the backend, and backward regenerates it instead of storing it.
"""

import torch

_LOW32 = 0xFFFFFFFF
# 64-bit constants, as the signed numbers that torch takes.
_SPLITMIX = tuple(
    constant - 2**64 for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def new_seed(device: torch.device) -> torch.Tensor:
    """A fresh int64 [1] seed from the device's own generator.

    Drawn on the device, without a host sync: it follows `torch.manual_seed`, activation
    checkpointing restores it, and each replay of a CUDA graph draws a new one.
    """
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


def keep_threshold(dropout: float) -> int:
    """An element is kept when its 32 random bits are at least this number."""
    return min(round(dropout * 2**32), _LOW32)


def _rotate32(x: torch.Tensor) -> torch.Tensor:
    return (x << 32) | ((x >> 32) & _LOW32)


def key_of(seed: torch.Tensor) -> torch.Tensor:
    """The generator's key for an int64 seed: mixed, and odd.

    Squares needs a key of irregular bits: with the key 5 it would keep 61 % where 70 % are asked
    for. The finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) makes one of any seed.
    """
    z = seed + _SPLITMIX[0]
    z = (z ^ _shifted(z, 30)) * _SPLITMIX[1]
    z = (z ^ _shifted(z, 27)) * _SPLITMIX[2]
    return (z ^ _shifted(z, 31)) | 1


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """A right shift that fills with zeros, as of unsigned numbers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def random_bits(rows: int, columns: int, seed: torch.Tensor) -> torch.Tensor:
    """int64 [rows, columns] of 32-bit values; element (i, j) has counter i·columns + j."""
    key = key_of(seed)
    counter = torch.arange(rows * columns, dtype=torch.int64, device=seed.device)
    y = counter * key
    z = y + key
    x = _rotate32(y * y + y)
    x = _rotate32(x * x + z)
    x = _rotate32(x * x + y)
    x = x * x + z
    return ((x >> 32) & _LOW32).view(rows, columns)


def keep_mask(rows: int, columns: int, dropout: float, seed: torch.Tensor) -> torch.Tensor:
    """bool [rows, columns], True where the element is kept."""
    return random_bits(rows, columns, seed) >= keep_threshold(dropout)


__all__ = ["keep_mask", "keep_threshold", "key_of", "new_seed", "random_bits"]
