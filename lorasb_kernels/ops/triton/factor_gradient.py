"""The gradient of a trained factor on the GPU.

    out = leftᵀ drop(rows)        [r, k]

A block takes BLOCK_N columns of `rows` and a run of its rows, and keeps every rank of its part
of `out` on chip as a tuple of [BLOCK_R, BLOCK_N] accumulators: `rows`, the wide operand, is
read once whatever the rank, and its mask is computed once. `left` is read from L2 by each of the
k / BLOCK_N column tiles. It is loaded transposed: Triton pipelines
these loads only if the transpose is in the pointers.

With few column tiles multiprocessors would be idle, so the rows are split over blocks. Each block
stores its partial sum; the last block of a column tile to arrive adds them in the order of their
index: the same bits on every run, in one launch.
"""

import torch
import triton
import triton.language as tl

from lorasb_kernels.ops.dropout import keep_threshold
from lorasb_kernels.ops.precision import dot_precision
from lorasb_kernels.ops.triton.factor_tiles import factor_splits, factor_tile
from lorasb_kernels.ops.triton.launching import launch
from lorasb_kernels.ops.triton.parts import arrives_last, keep_mask, launch_guard
from lorasb_kernels.ops.triton.tiles import architecture, multiprocessors, rank_tiles


@triton.jit(do_not_specialize=["M", "splits", "rows_per_split"])
def factor_gradient_kernel(
    left_ptr,
    rows_ptr,
    out_ptr,
    partial_ptr,
    arrived_ptr,
    seed_ptr,
    M,
    k,
    r,
    stride_left,
    stride_rows,
    splits,
    rows_per_split,
    keep_scale,
    threshold,
    DROPOUT: tl.constexpr,
    SPLIT: tl.constexpr,
    RANK_TILES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    column_tile = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    in_row = columns < k
    ranks = tl.arange(0, BLOCK_R)
    first = split.to(tl.int64) * rows_per_split
    last = tl.minimum(first + rows_per_split, M)
    rows = first + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    left_ptrs = left_ptr + rows[None, :] * stride_left + ranks[:, None]
    rows_ptrs = rows_ptr + rows[:, None] * stride_rows + columns[None, :]
    if DROPOUT:
        seed = tl.load(seed_ptr)

    out = ()
    for _ in tl.static_range(RANK_TILES):
        out += (tl.zeros([BLOCK_R, BLOCK_N], tl.float32),)
    for _ in range(0, rows_per_split, BLOCK_M):
        there = rows < last
        x = tl.load(rows_ptrs, mask=there[:, None] & in_row[None, :], other=0.0)
        if DROPOUT:
            x = tl.where(keep_mask(seed, rows, columns, k, threshold), x, 0.0)
        summed = ()
        for i in tl.static_range(RANK_TILES):
            in_rank = ranks < r - i * BLOCK_R
            left = tl.load(
                left_ptrs + i * BLOCK_R, mask=in_rank[:, None] & there[None, :], other=0.0
            )  # [BLOCK_R, BLOCK_M]
            summed += (tl.dot(left, x, out[i], input_precision=PRECISION),)
        out = summed
        rows += BLOCK_M
        left_ptrs += BLOCK_M * tl.cast(stride_left, tl.int64)
        rows_ptrs += BLOCK_M * tl.cast(stride_rows, tl.int64)

    offsets = ranks.to(tl.int64)[:, None] * k + columns[None, :]
    stride_tile = tl.cast(k, tl.int64) * BLOCK_R
    if SPLIT:
        stride_split = tl.cast(k, tl.int64) * r
        for i in tl.static_range(RANK_TILES):
            mask = (ranks < r - i * BLOCK_R)[:, None] & in_row[None, :]
            ptrs = partial_ptr + split * stride_split + i * stride_tile + offsets
            tl.store(ptrs, out[i], mask=mask)
        if not arrives_last(arrived_ptr + column_tile, splits):
            return
    for i in tl.static_range(RANK_TILES):
        mask = (ranks < r - i * BLOCK_R)[:, None] & in_row[None, :]
        total = out[i]
        if SPLIT:
            total = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
            for other in range(splits):
                ptrs = partial_ptr + other * stride_split + i * stride_tile + offsets
                total += tl.load(ptrs, mask=mask, other=0.0, cache_modifier=".cg")
        if DROPOUT:
            total *= keep_scale
        tl.store(out_ptr + i * stride_tile + offsets, total, mask=mask)


def factor_gradient(left, rows, dropout, seed):
    (M, k), r = rows.shape, left.shape[1]
    out = torch.empty((r, k), dtype=torch.float32, device=rows.device)
    if M == 0:
        return out.zero_()
    tile = factor_tile(architecture(rows.device), rows.dtype, r, dropout > 0)
    block_r, tiles = rank_tiles(r)
    column_tiles = triton.cdiv(k, tile.BLOCK_N)
    splits, rows_per_split = factor_splits(column_tiles, M, r, tile, multiprocessors(rows.device))
    partial = arrived = None
    if splits > 1:
        partial = torch.empty((splits, r, k), dtype=torch.float32, device=rows.device)
        arrived = torch.zeros(column_tiles, dtype=torch.int32, device=rows.device)
    constants = {
        "DROPOUT": dropout > 0,
        "SPLIT": splits > 1,
        "RANK_TILES": tiles,
        "BLOCK_R": block_r,
        "PRECISION": dot_precision(rows.dtype),
        **tile.launch_options(),
    }
    pointers = (left, rows, out, partial, arrived, seed)
    sizes = (M, k, r, left.stride(0), rows.stride(0), splits, rows_per_split)
    drops = (1 / (1 - dropout), keep_threshold(dropout))
    with launch_guard(rows):
        launch(factor_gradient_kernel, column_tiles * splits, pointers, sizes + drops, constants)
    return out


__all__ = ["factor_gradient", "factor_gradient_kernel"]
