"""Project each expert's tokens onto its rank and apply its core.

    h[t] = drop(x[t]) A_eᵀ      [M, r]
    p[t] = s · h[t] R_eᵀ        [M, r]

The forward pass runs it on (x, A, R), the backward pass on (dy, Bᵀ, Rᵀ), where it yields g and q.
The block of a row tile is that of `ops/triton/projection.py`, with the tile's expert looked up
first and no split over the columns. Reads x once (M·n elements), A and R of an expert from device
memory once if it has tokens; writes h and p; 2·M·r·(n + r) flops. Rows of no expert are not
written.
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
from lorasb_kernels.ops.triton.parts import in_units, keep_mask, launch_guard
from lorasb_kernels.ops.triton.projection_tiles import projection_tile
from lorasb_kernels.ops.triton.tiles import architecture, rank_tiles

UNITS = ("N_UNIT", "R_UNIT", "XM_UNIT", "AR_UNIT", "AN_UNIT")  # see `in_units`


@triton.jit(do_not_specialize=["M"])
def experts_projection_kernel(
    x_ptr,
    a_ptr,
    r_ptr,
    h_ptr,
    p_ptr,
    offsets_ptr,
    seed_ptr,
    M,
    E,
    n,
    r,
    stride_xm,
    stride_ar,
    stride_an,
    stride_ae,
    stride_re,
    stride_rj,
    stride_ri,
    scaling,
    keep_scale,
    threshold,
    N_UNIT: tl.constexpr,
    R_UNIT: tl.constexpr,
    XM_UNIT: tl.constexpr,
    AR_UNIT: tl.constexpr,
    AN_UNIT: tl.constexpr,
    DROPOUT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    RANK_TILES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n, r = n * N_UNIT, r * R_UNIT
    stride_xm, stride_ar, stride_an = stride_xm * XM_UNIT, stride_ar * AR_UNIT, stride_an * AN_UNIT
    tile = tl.program_id(0)
    expert, start, end = segment_of_tile(offsets_ptr, tile, M, E, BLOCK_M, SEGMENTS)
    first_row = start + (tile - first_tile(start, expert, BLOCK_M)) * BLOCK_M
    if (first_row >= end) | (expert == E):
        return
    rows = first_row.to(tl.int64) + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    row_mask = rows < end
    ranks = tl.arange(0, BLOCK_R)
    offsets_k = tl.arange(0, BLOCK_K)
    ks = offsets_k.to(tl.int64)
    a_ptr += expert.to(tl.int64) * stride_ae
    r_ptr += expert.to(tl.int64) * stride_re
    x_ptrs = x_ptr + rows[:, None] * stride_xm + ks[None, :]
    a_ptrs = a_ptr + ks[:, None] * stride_an + ranks.to(tl.int64)[None, :] * stride_ar
    if DROPOUT:
        seed = tl.load(seed_ptr)

    h = ()
    for _ in tl.static_range(RANK_TILES):
        h += (tl.zeros([BLOCK_M, BLOCK_R], tl.float32),)
    for k in range(0, n, BLOCK_K):
        columns = k + offsets_k
        in_row = columns < n
        x = tl.load(x_ptrs, mask=row_mask[:, None] & in_row[None, :], other=0.0)
        if DROPOUT:
            keep = keep_mask(seed, rows, columns, n, threshold)
            x = tl.where(keep, x, 0.0)
        summed = ()
        for i in tl.static_range(RANK_TILES):
            in_rank = ranks < r - i * BLOCK_R
            a = tl.load(
                a_ptrs + i * BLOCK_R * tl.cast(stride_ar, tl.int64),
                mask=in_row[:, None] & in_rank[None, :],
                other=0.0,
            )  # [BLOCK_K, BLOCK_R]
            summed += (tl.dot(x, a, h[i], input_precision=PRECISION),)
        h = summed
        x_ptrs += BLOCK_K
        a_ptrs += BLOCK_K * tl.cast(stride_an, tl.int64)

    finished = ()
    for i in tl.static_range(RANK_TILES):
        # Padding columns of A are zero, but 0 · Inf is NaN.
        in_rank = ranks < r - i * BLOCK_R
        column = tl.where(in_rank[None, :], h[i], 0.0)
        if DROPOUT:
            column *= keep_scale
        finished += (column,)
    out = rows[:, None] * r + ranks[None, :]
    for i in tl.static_range(RANK_TILES):
        in_rank = ranks < r - i * BLOCK_R
        tl.store(
            h_ptr + out + i * BLOCK_R,
            finished[i].to(h_ptr.dtype.element_ty),
            mask=row_mask[:, None] & in_rank[None, :],
        )
    for j in tl.range(RANK_TILES, num_stages=1):
        out_ranks = j * BLOCK_R + ranks
        p = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for i in tl.static_range(RANK_TILES):
            in_ranks = i * BLOCK_R + ranks
            core = tl.load(
                r_ptr + in_ranks[:, None] * stride_ri + out_ranks[None, :] * stride_rj,
                mask=(in_ranks < r)[:, None] & (out_ranks < r)[None, :],
                other=0.0,
            )  # [BLOCK_R (in), BLOCK_R (out)]
            p = tl.dot(finished[i], core, p, input_precision=PRECISION)
        tl.store(
            p_ptr + out + j * BLOCK_R,
            (p * scaling).to(p_ptr.dtype.element_ty),
            mask=row_mask[:, None] & (out_ranks < r)[None, :],
        )


def experts_shrink(x, lora_A, lora_R, offsets, scaling, dropout, seed):
    """Returns h and p, both [M, r] in the dtype of `x`.

    Args:
        x: [M, n], last dimension contiguous.
        lora_A: [E, r, n] or [1, r, n], any strides.
        lora_R: [E, r, r], fp32, any strides.
        offsets: int32 [E], contiguous.
        scaling, dropout, seed: as in `shrink`.
    """
    (M, n), (E, r, _) = x.shape, lora_R.shape
    h, p = x.new_empty((M, r)), x.new_empty((M, r))
    if M == 0:
        return h, p
    tile = projection_tile(architecture(x.device), x.dtype, r, M, dropout > 0)
    block_r, tiles = rank_tiles(r)
    in_parts, units = zip(*map(in_units, (n, r, x.stride(0), *lora_A.stride()[1:])), strict=True)
    of_expert = lora_A.stride(0) if lora_A.shape[0] > 1 else 0
    numbers = (M, E, *in_parts, of_expert, *lora_R.stride())
    constants = {
        **dict(zip(UNITS, units, strict=True)),
        "DROPOUT": dropout > 0,
        "SEGMENTS": segments_block(E),
        "RANK_TILES": tiles,
        "BLOCK_R": block_r,
        "PRECISION": dot_precision(x.dtype),
        **tile.launch_options(),
    }
    drops = (scaling, 1 / (1 - dropout), keep_threshold(dropout))
    with launch_guard(x):
        launch(
            experts_projection_kernel,
            most_tiles(M, E, tile.BLOCK_M),
            (x, lora_A, lora_R, h, p, offsets, seed),
            (*numbers, *drops),
            constants,
        )
    return h, p


__all__ = ["experts_projection_kernel", "experts_shrink"]
