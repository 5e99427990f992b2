"""The route of a shape that nothing has measured: a pure function of the sizes.

Nothing is compiled or timed and no device is asked, so that every process decides alike, also
inside CUDA graphs, under `torch.compile` and in deterministic mode.
"""

from typing import NamedTuple

import torch

from lorasb_kernels.ops.triton.tiles import ExpandTile, expand_tile


class Rule(NamedTuple):
    """A route of `expand_route.ROUTES`, the tile of its kernel, and why."""

    name: str
    tile: ExpandTile
    reason: str


def unmeasured_route(
    arch: str,
    dtype: torch.dtype,
    M: int,
    N: int,
    K: int,
    r: int,
    transposed: bool,
    dropout: bool,
    aligned: bool = True,
) -> Rule:
    """The route of `expand` for M rows, N outputs, a contraction over K and rank r.

    Args:
        arch: `"sm_86"` and so on.
        dtype: of the operands.
        M, N, K, r: sizes.
        transposed: whether the weight is a transposed view, as for the input gradient.
        dropout: whether there is a mask.
        aligned: False if an operand cannot be described by a tensor map.
    """
    tile = expand_tile(arch, dtype, dropout)
    return Rule("two_call", tile, "the vendor's GEMM is safe")


__all__ = ["Rule", "unmeasured_route"]
