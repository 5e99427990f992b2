"""Frozen product and expansion on the GPU, by one of three routes.

    y = x Wᵀ + drop(p Bᵀ) + bias          [M, N]

fused: one GEMM whose contraction is extended over the rank. Reads x, W, p, B, writes y, once each
as long as L2 holds the tiles of a group; 2·M·N·(K + r) flops into one accumulator.
two calls: cuBLAS twice, in the order of `ops/two_call.py`. Writes y once more and reads it once
(4·M·N bytes in 16 bits), but uses the fastest GEMM: a fused GEMM that is 7 % slower loses what the
fusion saves. With dropout the first call is the kernel below without its frozen product, since the
mask must be applied before the sum.
fused with tensor maps: `expand_descriptor.py`.

`choose_route` says which one runs, with which tile and why.
"""

import torch
import triton
import triton.language as tl

from lorasb_kernels.ops.dropout import keep_threshold
from lorasb_kernels.ops.precision import dot_precision
from lorasb_kernels.ops.triton.expand_descriptor import descriptor_expand
from lorasb_kernels.ops.triton.expand_dual import dual_expand
from lorasb_kernels.ops.triton.expand_route import choose_route
from lorasb_kernels.ops.triton.parts import (
    GROUP_M,
    grouped_tile,
    in_units,
    keep_mask,
    launch_guard,
)
from lorasb_kernels.ops.triton.tiles import EXPAND_BLOCK_R, ExpandTile
from lorasb_kernels.ops.two_call import two_call

# Of the sizes and strides that follow M; see `in_units`.
UNITS = [f"{name}_UNIT" for name in ("N", "K", "R", "XM", "WN", "WK", "FN", "FR")]


@triton.jit(do_not_specialize=["M"])
def expand_kernel(
    x_ptr,
    weight_ptr,
    p_ptr,
    factor_ptr,
    bias_ptr,
    y_ptr,
    seed_ptr,
    M,
    N,
    K,
    r,
    stride_xm,
    stride_wn,
    stride_wk,
    stride_fn,
    stride_fr,
    stride_xk,
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
    FROZEN_PRODUCT: tl.constexpr,
    BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
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
    tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    row_tile, column_tile = grouped_tile(tl.program_id(0), tiles[0], tiles[1], GROUP_M)
    rows = row_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    columns = column_tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    row_mask = (rows < M)[:, None]
    column_mask = (columns < N)[None, :]

    # The rank comes first, so the mask is applied while the accumulator holds nothing else.
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
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

    y_ptrs = y_ptr + rows[:, None] * N + columns[None, :]
    if FROZEN_PRODUCT:
        ks = tl.arange(0, BLOCK_K).to(tl.int64)
        x_ptrs = x_ptr + rows[:, None] * stride_xm + ks[None, :] * stride_xk
        weight_ptrs = weight_ptr + columns[None, :] * stride_wn + ks[:, None] * stride_wk
        for k in range(0, K, BLOCK_K):
            in_row = k + tl.arange(0, BLOCK_K) < K
            x = tl.load(x_ptrs, mask=row_mask & in_row[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=in_row[:, None] & column_mask, other=0.0)
            acc = tl.dot(x, weight, acc, input_precision=PRECISION)
            x_ptrs += BLOCK_K * tl.cast(stride_xk, tl.int64)
            weight_ptrs += BLOCK_K * tl.cast(stride_wk, tl.int64)
    if BIAS:
        bias = tl.load(bias_ptr + columns, mask=columns < N, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=row_mask & column_mask)


def fused_expand(x, weight, p, factor, bias, dropout, seed, tile: ExpandTile) -> torch.Tensor:
    """`expand` in one launch."""
    y = x.new_empty((x.shape[0], weight.shape[0]))
    _launch(x, weight, p, factor, bias, y, dropout, seed, tile, frozen_product=True)
    return y


def two_call_expand(x, weight, p, factor, bias, dropout, seed, tile: ExpandTile) -> torch.Tensor:
    """`expand` as two products; with dropout the first is the kernel's, in `tile`."""
    if dropout == 0:
        return two_call(x, weight, p, factor, bias)
    y = x.new_empty((x.shape[0], weight.shape[0]))
    _launch(None, None, p, factor, bias, y, dropout, seed, tile, frozen_product=False)
    return y.addmm_(x, weight.T)


def _launch(x, weight, p, factor, bias, y, dropout, seed, tile, frozen_product):
    M, N = y.shape
    if M == 0:
        return
    tiles = triton.cdiv(M, tile.BLOCK_M) * triton.cdiv(N, tile.BLOCK_N)
    (xm, xk), weight_strides = (0, 0), (0, 0)
    if frozen_product:
        (xm, xk), weight_strides = x.stride(), weight.stride()
    sizes = (N, x.shape[1] if frozen_product else 0, p.shape[1])
    numbers, units = zip(
        *map(in_units, (*sizes, xm, *weight_strides, *factor.stride())), strict=True
    )
    with launch_guard(y):
        expand_kernel[(tiles,)](
            x,
            weight,
            p,
            factor,
            None if bias is None else bias.contiguous(),
            y,
            seed,
            M,
            *numbers,
            xk,
            1 / (1 - dropout),
            keep_threshold(dropout),
            **dict(zip(UNITS, units, strict=True)),
            FROZEN_PRODUCT=frozen_product,
            BIAS=bias is not None,
            DROPOUT=dropout > 0,
            BLOCK_R=EXPAND_BLOCK_R,
            GROUP_M=GROUP_M,
            PRECISION=dot_precision(y.dtype),
            **tile.launch_options(),
        )


RUN = {
    "two_call": two_call_expand,
    "fused": fused_expand,
    "fused_descriptor": descriptor_expand,
    "dual": dual_expand,
}


def expand(x, weight, p, factor, bias, dropout, seed):
    p = p.contiguous()
    route = choose_route(x, weight, p, factor, bias, dropout, seed, RUN)
    return RUN[route.name](x, weight, p, factor, bias, dropout, seed, route.tile)


__all__ = ["RUN", "UNITS", "expand", "expand_kernel", "fused_expand", "two_call_expand"]
