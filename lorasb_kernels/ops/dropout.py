"""The dropout mask as a function of a seed and an element's index, nothing else.

Squares (Widynski, "Squares: A Fast Counter-Based RNG", arXiv:2004.06278): four
rounds of middle-square on a 64-bit counter and key give 32 random bits per element.
Every backend computes the same bits, so the mask depends neither on tile sizes nor
on the backend, and backward regenerates it instead of storing it.
"""

import torch

_LOW32 = 0xFFFFFFFF


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


def random_bits(rows: int, columns: int, seed: torch.Tensor) -> torch.Tensor:
    """int64 [rows, columns] of 32-bit values; element (i, j) has counter i·columns + j."""
    key = seed | 1
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


__all__ = ["keep_mask", "keep_threshold", "new_seed", "random_bits"]
