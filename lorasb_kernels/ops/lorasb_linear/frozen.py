"""The frozen product: with W itself, or by a layer that runs its own kernel.

    plain W          y = expand(x, W, p, B, bias)
    frozen layer     y = multiply(x), then y += p Bᵀ in place

This library never reads a quantized W: the quantizer's library multiplies by it, and returns it
dequantized for `dx = dy W`. bitsandbytes and torchao also dequantize it in their own backward, so
dx costs the same; they may keep x for backward as well, which is not done here.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class FrozenLayer:
    """A frozen linear layer, given by what it computes instead of by a weight [m, n].

    Args:
        shape: (m, n).
        multiply: maps [M, n] to [M, m], bias included; called without gradients. Its output
            is modified in place.
        dense: returns W [m, n] as a plain tensor, in each backward pass that needs dx.
    """

    shape: tuple[int, int]
    multiply: Callable[[torch.Tensor], torch.Tensor]
    dense: Callable[[], torch.Tensor]


def dense(weight: torch.Tensor | FrozenLayer, dtype: torch.dtype) -> torch.Tensor:
    """W as a plain tensor; what a `FrozenLayer` returns is cast to `dtype`."""
    return weight.dense().to(dtype) if isinstance(weight, FrozenLayer) else weight


__all__ = ["FrozenLayer", "dense"]
