"""Frozen product and expansion in one launch, fed by Hopper's tensor memory accelerator (TMA).

    y = x Wᵀ + drop(p Bᵀ) + bias          [M, N]

The fused route of `expand.py` with operands and result described by tensor maps: one thread
requests a whole tile; the hardware computes its addresses, masks its edges and swizzles it in
shared memory, where the tensor cores read both operands. That frees the registers and the issue
slots that address arithmetic would take. Bytes and flops are those of the fused route.

A tensor map needs its base and its rows at multiples of 16 bytes, and one contiguous dimension
(`route_decision.describable`); a transposed view is described as the matrix that it is a view of.
Maps are made on the host at each launch and passed by value, so a CUDA graph keeps them.

One tile per block. A persistent loop over tiles would help if its loads could run ahead into the
next tile. For that Triton would have to flatten the loops over the rank and over K into it, but it
flattens only one inner loop. Instead, with 128×128 tiles two blocks share a multiprocessor: one
multiplies while the other stores. `docs/how_it_works.md` says what `warp_specialize` does on sm_90.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from lorasb_kernels.ops.dropout import keep_threshold
from lorasb_kernels.ops.precision import dot_precision
from lorasb_kernels.ops.triton.parts import GROUP_M, grouped_tile, keep_mask, launch_guard
from lorasb_kernels.ops.triton.tiles import EXPAND_BLOCK_R, ExpandTile


@triton.jit
def expand_descriptor_kernel(
    x_desc,
    weight_desc,
    p_desc,
    factor_desc,
    y_desc,
    bias_ptr,
    seed_ptr,
    M,
    N,
    K,
    r,
    keep_scale,
    threshold,
    WEIGHT_TRANSPOSED: tl.constexpr,
    FACTOR_TRANSPOSED: tl.constexpr,
    BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_tile, column_tile = grouped_tile(tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    row = row_tile * BLOCK_M
    column = column_tile * BLOCK_N

    # The rank comes first, so the mask is applied while the accumulator holds nothing else.
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, r, BLOCK_R):
        factor = load_columns(factor_desc, column, k, FACTOR_TRANSPOSED)  # [BLOCK_R, BLOCK_N]
        acc = tl.dot(p_desc.load([row, k]), factor, acc, input_precision=PRECISION)
    if DROPOUT:
        rows = row + tl.arange(0, BLOCK_M)
        columns = column + tl.arange(0, BLOCK_N)
        keep = keep_mask(tl.load(seed_ptr), rows, columns, N, threshold)
        acc = tl.where(keep, acc * keep_scale, 0.0)
    for k in range(0, K, BLOCK_K):
        weight = load_columns(weight_desc, column, k, WEIGHT_TRANSPOSED)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(x_desc.load([row, k]), weight, acc, input_precision=PRECISION)
    if BIAS:
        columns = column + tl.arange(0, BLOCK_N)
        bias = tl.load(bias_ptr + columns, mask=columns < N, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    y_desc.store([row, column], acc.to(y_desc.dtype))


@triton.jit
def load_columns(desc, column, k, TRANSPOSED: tl.constexpr):
    """A tile [contraction, columns] of an [N, K] matrix, stored as [K, N] if TRANSPOSED."""
    return desc.load([k, column]) if TRANSPOSED else desc.load([column, k]).T


def descriptor_expand(x, weight, p, factor, bias, dropout, seed, tile: ExpandTile) -> torch.Tensor:
    """`expand` in one launch; all matrices, including the result, must be `describable`."""
    (M, K), N, r = x.shape, weight.shape[0], p.shape[1]
    y = x.new_empty((M, N))
    if M == 0:
        return y
    x_desc, _ = _describe(x, tile.BLOCK_M, tile.BLOCK_K)
    weight_desc, weight_transposed = _describe(weight, tile.BLOCK_N, tile.BLOCK_K)
    p_desc, _ = _describe(p, tile.BLOCK_M, EXPAND_BLOCK_R)
    factor_desc, factor_transposed = _describe(factor, tile.BLOCK_N, EXPAND_BLOCK_R)
    y_desc, _ = _describe(y, tile.BLOCK_M, tile.BLOCK_N)
    tiles = triton.cdiv(M, tile.BLOCK_M) * triton.cdiv(N, tile.BLOCK_N)
    with launch_guard(y):
        expand_descriptor_kernel[(tiles,)](
            x_desc,
            weight_desc,
            p_desc,
            factor_desc,
            y_desc,
            None if bias is None else bias.contiguous(),
            seed,
            M,
            N,
            K,
            r,
            1 / (1 - dropout),
            keep_threshold(dropout),
            WEIGHT_TRANSPOSED=weight_transposed,
            FACTOR_TRANSPOSED=factor_transposed,
            BIAS=bias is not None,
            DROPOUT=dropout > 0,
            BLOCK_R=EXPAND_BLOCK_R,
            GROUP_M=GROUP_M,
            PRECISION=dot_precision(y.dtype),
            **tile.launch_options(),
        )
    return y


def _describe(matrix: torch.Tensor, rows: int, columns: int) -> tuple[TensorDescriptor, bool]:
    """A descriptor of tiles [rows, columns], and whether it is of the transposed matrix."""
    if matrix.stride(1) == 1:
        return TensorDescriptor.from_tensor(matrix, [rows, columns]), False
    return TensorDescriptor.from_tensor(matrix.T, [columns, rows]), True


__all__ = ["descriptor_expand", "expand_descriptor_kernel"]
