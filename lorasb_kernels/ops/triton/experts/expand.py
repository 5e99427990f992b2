"""Frozen product and expansion of each expert's tokens, as one grouped GEMM.

    y[t] = x[t] W_eᵀ + drop(p[t] B_eᵀ) + bias_e         [M, N]

The contraction over the rank comes first and runs on over the columns of x, in one accumulator;
the block is that of `ops/triton/expand.py`, with the tile's expert looked up first. Reads x and p,
and W and B of an expert from device memory once if it has tokens, as long as L2 holds the tiles of
a group; writes y once; 2·M·N·(K + r) flops. Rows of no expert become zero. The backward pass runs
it on (dy, Wᵀ, q, Aᵀ) for dx.
"""

import triton
import triton.language as tl

from lorasb_kernels.ops.dropout import keep_threshold
from lorasb_kernels.ops.precision import dot_precision
from lorasb_kernels.ops.triton.experts.segments import (
    first_tile,
    most_tiles,
    segment_of_tile,
    segments_block,
)
from lorasb_kernels.ops.triton.launching import launch
from lorasb_kernels.ops.triton.parts import (
    GROUP_M,
    grouped_tile,
    in_units,
    keep_mask,
    launch_guard,
)
from lorasb_kernels.ops.triton.tiles import EXPAND_BLOCK_R, architecture, expand_tile

# Of the sizes and strides that follow E; see `in_units`.
UNITS = [f"{name}_UNIT" for name in ("N", "K", "R", "XM", "WN", "WK", "FN", "FR")]


@triton.jit(do_not_specialize=["M"])
def experts_expand_kernel(
    x_ptr,
    weight_ptr,
    p_ptr,
    factor_ptr,
    bias_ptr,
    y_ptr,
    offsets_ptr,
    seed_ptr,
    M,
    E,
    N,
    K,
    r,
    stride_xm,
    stride_wn,
    stride_wk,
    stride_fn,
    stride_fr,
    stride_we,
    stride_fe,
    keep_scale,
    threshold,
    N_UNIT: tl.constexpr,
    K_UNIT: tl.constexpr,
    R_UNIT: tl.constexpr,
    XM_UNIT: tl.constexpr,
    WN_UNIT: tl.constexpr,
    WK_UNIT: tl.constexpr,
    FN_UNIT: tl.constexpr,
    FR_UNIT: tl.constexpr,
    BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    N, K, r = N * N_UNIT, K * K_UNIT, r * R_UNIT
    stride_xm, stride_wn, stride_wk = stride_xm * XM_UNIT, stride_wn * WN_UNIT, stride_wk * WK_UNIT
    stride_fn, stride_fr = stride_fn * FN_UNIT, stride_fr * FR_UNIT
    row_tiles = M // BLOCK_M + E + 1  # of E + 1 segments, as `most_tiles`
    tile, column_tile = grouped_tile(tl.program_id(0), row_tiles, tl.cdiv(N, BLOCK_N), GROUP_M)
    expert, start, end = segment_of_tile(offsets_ptr, tile, M, E, BLOCK_M, SEGMENTS)
    first_row = start + (tile - first_tile(start, expert, BLOCK_M)) * BLOCK_M
    if first_row >= end:
        return
    rows = first_row.to(tl.int64) + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    columns = column_tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    row_mask = (rows < end)[:, None]
    column_mask = (columns < N)[None, :]
    y_ptrs = y_ptr + rows[:, None] * N + columns[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if expert == E:
        tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=row_mask & column_mask)
        return
    weight_ptr += expert.to(tl.int64) * stride_we
    factor_ptr += expert.to(tl.int64) * stride_fe

    # The rank comes first, so the mask is applied while the accumulator holds nothing else.
    for k in range(0, r, BLOCK_R):
        ranks = k + tl.arange(0, BLOCK_R)
        p_ptrs = p_ptr + rows[:, None] * r + ranks[None, :]
        p = tl.load(p_ptrs, mask=row_mask & (ranks < r)[None, :], other=0.0)
        factor_ptrs = (
            factor_ptr + columns[None, :] * stride_fn + ranks.to(tl.int64)[:, None] * stride_fr
        )
        factor = tl.load(factor_ptrs, mask=(ranks < r)[:, None] & column_mask, other=0.0)
        acc = tl.dot(p, factor, acc, input_precision=PRECISION)
    if DROPOUT:
        keep = keep_mask(tl.load(seed_ptr), rows, columns, N, threshold)
        acc = tl.where(keep, acc * keep_scale, 0.0)

    ks = tl.arange(0, BLOCK_K).to(tl.int64)
    x_ptrs = x_ptr + rows[:, None] * stride_xm + ks[None, :]
    weight_ptrs = weight_ptr + columns[None, :] * stride_wn + ks[:, None] * stride_wk
    for k in range(0, K, BLOCK_K):
        in_row = k + tl.arange(0, BLOCK_K) < K
        x = tl.load(x_ptrs, mask=row_mask & in_row[None, :], other=0.0)
        weight = tl.load(weight_ptrs, mask=in_row[:, None] & column_mask, other=0.0)
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K * tl.cast(stride_wk, tl.int64)
    if BIAS:
        bias_ptrs = bias_ptr + expert.to(tl.int64) * N + columns
        bias = tl.load(bias_ptrs, mask=columns < N, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=row_mask & column_mask)


def experts_expand(x, weight, p, factor, bias, offsets, dropout, seed):
    """Returns y [M, N] in the dtype of `x`.

    Args:
        x: [M, K], last dimension contiguous.
        weight: [E, N, K], any strides.
        p: [M, r], contiguous; rows of no expert are not read.
        factor: [E, N, r] or [1, N, r], any strides.
        bias: [E, N] or None.
        offsets: int32 [E], contiguous.
        dropout, seed: of the mask on p factorᵀ.
    """
    (M, K), (E, N, _), r = x.shape, weight.shape, p.shape[1]
    y = x.new_empty((M, N))
    if M == 0:
        return y
    tile = expand_tile(architecture(x.device), x.dtype, dropout > 0)
    row_tiles = most_tiles(M, E + 1, tile.BLOCK_M)
    strides = (x.stride(0), *weight.stride()[1:], *factor.stride()[1:])
    in_parts, units = zip(*map(in_units, (N, K, r, *strides)), strict=True)
    of_expert = factor.stride(0) if factor.shape[0] > 1 else 0
    constants = {
        **dict(zip(UNITS, units, strict=True)),
        "BIAS": bias is not None,
        "DROPOUT": dropout > 0,
        "SEGMENTS": segments_block(E),
        "BLOCK_R": EXPAND_BLOCK_R,
        "GROUP_M": GROUP_M,
        "PRECISION": dot_precision(x.dtype),
        **tile.launch_options(),
    }
    bias = None if bias is None else bias.contiguous()
    pointers = (x, weight, p, factor, bias, y, offsets, seed)
    numbers = (M, E, *in_parts, weight.stride(0), of_expert)
    drops = (1 / (1 - dropout), keep_threshold(dropout))
    blocks = row_tiles * triton.cdiv(N, tile.BLOCK_N)
    with launch_guard(x):
        launch(experts_expand_kernel, blocks, pointers, (*numbers, *drops), constants)
    return y


__all__ = ["experts_expand", "experts_expand_kernel"]
