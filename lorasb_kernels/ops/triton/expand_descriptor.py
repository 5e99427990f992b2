"""Frozen product and expansion in one launch, fed by Hopper's tensor memory accelerator (TMA).

    y = x Wᵀ + drop(p Bᵀ) + bias          [M, N]

The fused route of `expand.py` with operands and result described by tensor maps: one thread
requests a whole tile; the hardware computes its addresses, masks its edges and swizzles it in
shared memory, where the tensor cores read both operands. That frees the registers and the issue
slots that address arithmetic would take. Bytes and flops are those of the fused route.

A tensor map needs its base and its rows at multiples of 16 bytes, and one contiguous dimension
(`route_decision.describable`); a transposed view is described as the matrix that it is a view of.
Maps are made on the host at each launch and passed by value, so a CUDA graph keeps them.

The contraction is one loop over r + K: a step multiplies a tile of (p, B) or of (x, W), selected by
its descriptor. The blocks are persistent. Triton merges the loop over tiles with that loop
(`flatten`), so the next tile's loads are in flight while a tile is stored. It is stored in two
halves: a buffer of half the size leaves room for another stage. With dropout the sum over the rank
has a loop of its own, after which it is masked; two loops are not merged, and a block takes one
tile. `docs/how_it_works.md` has the counts, and what `warp_specialize` does on sm_90.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from lorasb_kernels.ops.dropout import keep_threshold
from lorasb_kernels.ops.precision import dot_precision
from lorasb_kernels.ops.triton.parts import GROUP_M, grouped_tile, keep_mask, launch_guard
from lorasb_kernels.ops.triton.tiles import (
    ExpandTile,
    architecture,
    multiprocessors,
    resident_blocks,
)


@triton.jit(do_not_specialize=["M", "programs"])
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
    programs,
    keep_scale,
    threshold,
    TRANSPOSED: tl.constexpr,
    BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    operands = (x_desc, weight_desc, p_desc, factor_desc, y_desc, bias_ptr, seed_ptr)
    numbers = (M, N, K, r, keep_scale, threshold)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    if DROPOUT:
        store_tile(
            tl.program_id(0),
            operands,
            numbers,
            TRANSPOSED,
            BIAS,
            True,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            GROUP_M,
            PRECISION,
        )
    else:
        for tile in tl.range(tl.program_id(0), tiles, programs, flatten=True):
            store_tile(
                tile,
                operands,
                numbers,
                TRANSPOSED,
                BIAS,
                False,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                GROUP_M,
                PRECISION,
            )


@triton.jit
def store_tile(
    tile,
    operands,
    numbers,
    TRANSPOSED: tl.constexpr,
    BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Computes and stores the tile-th tile of y."""
    x_desc, weight_desc, p_desc, factor_desc, y_desc, bias_ptr, seed_ptr = operands
    M, N, K, r, keep_scale, threshold = numbers
    row_tiles, column_tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    rank_steps = tl.cdiv(r, BLOCK_K)
    steps = rank_steps + tl.cdiv(K, BLOCK_K)
    row_tile, column_tile = grouped_tile(tile, row_tiles, column_tiles, GROUP_M)
    row = row_tile * BLOCK_M
    column = column_tile * BLOCK_N
    first = 0

    # The rank comes first: the delta is added while the sum is small, and the mask is applied
    # while the accumulator holds nothing else.
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if DROPOUT:
        first = rank_steps
        for step in range(rank_steps):
            k = step * BLOCK_K
            factor = load_columns(factor_desc, column, k, TRANSPOSED)
            acc = tl.dot(p_desc.load([row, k]), factor, acc, input_precision=PRECISION)
        rows = row + tl.arange(0, BLOCK_M)
        columns = column + tl.arange(0, BLOCK_N)
        keep = keep_mask(tl.load(seed_ptr), rows, columns, N, threshold)
        acc = tl.where(keep, acc * keep_scale, 0.0)
    for step in range(first, steps):
        if step < rank_steps:
            left_desc, right_desc = p_desc, factor_desc
            k = step * BLOCK_K
        else:
            left_desc, right_desc = x_desc, weight_desc
            k = (step - rank_steps) * BLOCK_K
        right = load_columns(right_desc, column, k, TRANSPOSED)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(left_desc.load([row, k]), right, acc, input_precision=PRECISION)
    if BIAS:
        columns = column + tl.arange(0, BLOCK_N)
        bias = tl.load(bias_ptr + columns, mask=columns < N, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
    left_half, right_half = tl.split(halves)
    y_desc.store([row, column], left_half.to(y_desc.dtype))
    y_desc.store([row, column + BLOCK_N // 2], right_half.to(y_desc.dtype))


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
    if (weight.stride(1) == 1) != (factor.stride(1) == 1):  # a loop takes tiles of one orientation
        factor = factor.contiguous() if weight.stride(1) == 1 else factor.T.contiguous().T
    x_desc, _ = _describe(x, tile.BLOCK_M, tile.BLOCK_K)
    weight_desc, transposed = _describe(weight, tile.BLOCK_N, tile.BLOCK_K)
    p_desc, _ = _describe(p, tile.BLOCK_M, tile.BLOCK_K)
    factor_desc, _ = _describe(factor, tile.BLOCK_N, tile.BLOCK_K)
    y_desc, _ = _describe(y, tile.BLOCK_M, tile.BLOCK_N // 2)
    tiles = triton.cdiv(M, tile.BLOCK_M) * triton.cdiv(N, tile.BLOCK_N)
    programs = tiles
    if dropout == 0:
        device = architecture(x.device), multiprocessors(x.device)
        programs = min(tiles, resident_blocks(tile, x.dtype, *device))
    with launch_guard(y):
        expand_descriptor_kernel[(programs,)](
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
            programs,
            1 / (1 - dropout),
            keep_threshold(dropout),
            TRANSPOSED=transposed,
            BIAS=bias is not None,
            DROPOUT=dropout > 0,
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
