"""Pieces of Triton kernels that several operations use."""

import contextlib

import torch
import triton
import triton.language as tl

from lorasb_kernels.ops.triton.tiles import GROUP_M


@triton.jit
def grouped_tile(tile, row_tiles, column_tiles, GROUP_M: tl.constexpr):
    """Row and column of the tile-th tile: down GROUP_M row tiles, then the next column."""
    group = tile // (GROUP_M * column_tiles)
    group_rows = tl.minimum(row_tiles - group * GROUP_M, GROUP_M)
    within = tile % (GROUP_M * column_tiles)
    return group * GROUP_M + within % group_rows, within // group_rows


@triton.jit
def dropout_key(seed):
    """`key_of` in `ops/dropout.py`."""
    z = seed.to(tl.uint64, bitcast=True) + 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return (z ^ (z >> 31)) | 1


@triton.jit
def keep_mask(seed, rows, columns, row_length, threshold):
    """[rows, columns] of bool: the bits of `ops/dropout.py` against the threshold.

    Depends only on the seed and the element's index in a matrix of `row_length` columns.
    """
    key = dropout_key(seed)
    counter = rows.to(tl.uint64)[:, None] * tl.cast(row_length, tl.uint64)
    counter += columns.to(tl.uint64)[None, :]
    y = counter * key
    z = y + key
    x = y * y + y
    x = (x << 32) | (x >> 32)
    x = x * x + z
    x = (x << 32) | (x >> 32)
    x = x * x + y
    x = (x << 32) | (x >> 32)
    x = x * x + z
    return (x >> 32) >= tl.cast(threshold, tl.uint64)


@triton.jit
def arrives_last(counter_ptr, blocks):
    """True in the last of `blocks` blocks to call this; the counter starts at zero.

    Whatever the other blocks stored to global memory before the call is visible to the last block
    after it: the barrier orders the stores of all threads before the release of the counter.
    """
    # One thread counts for its block. Triton itself adds a barrier only if shared memory needs
    # one, which is not the case after a store without a change of layout.
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel") == blocks - 1


@triton.jit
def sum_partials(partial_ptrs, stride, count, row_mask, IN_FLIGHT: tl.constexpr):
    """The sum of `count` tiles that lie `stride` apart, in order, IN_FLIGHT loads at a time.

    Args:
        partial_ptrs: of the first tile, [rows, columns].
        row_mask: [rows], which rows there are.
    """
    total = tl.zeros(partial_ptrs.shape, tl.float32)
    for start in range(0, count, IN_FLIGHT):
        tiles = ()
        for i in tl.static_range(IN_FLIGHT):
            # Past L1, which does not see what other multiprocessors wrote.
            tiles += (
                tl.load(
                    partial_ptrs + (start + i) * stride,
                    mask=row_mask[:, None] & (start + i < count),
                    other=0.0,
                    cache_modifier=".cg",
                ),
            )
        for i in tl.static_range(IN_FLIGHT):
            total += tiles[i]
    return total


def in_units(size: int) -> tuple[int, int]:
    """`size` as (number, 8), or as (size, 1) if 8 does not divide it: the product is the size.

    Triton tells its compiler that an argument is a multiple of 16 and nothing of 8. With the factor
    8 as a constexpr, rows of any multiple of 8 elements are copied 16 bytes at a time.
    """
    return (size // 8, 8) if size % 8 == 0 else (size, 1)


def launch_guard(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's device current: Triton launches on the current device's stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


__all__ = [
    "GROUP_M",
    "arrives_last",
    "grouped_tile",
    "in_units",
    "keep_mask",
    "launch_guard",
    "sum_partials",
]
