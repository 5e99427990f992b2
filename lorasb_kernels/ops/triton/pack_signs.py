"""Packed signs of an accumulator on the GPU.

Reads 4·m·n bytes, writes m·n/4: memory bound. A block reads whole cache lines of 256 columns
and packs 32 of them into a word by a reduction.
"""

import torch
import triton
import triton.language as tl

from lorasb_kernels.ops.bitplanes import words
from lorasb_kernels.ops.triton.bitplanes import store_signs
from lorasb_kernels.ops.triton.parts import launch_guard
from lorasb_kernels.ops.triton.sign_tiles import pack_tile
from lorasb_kernels.ops.triton.tiles import architecture


@triton.jit
def pack_signs_kernel(
    positive_ptr,
    negative_ptr,
    acc_ptr,
    m,
    n,
    stride_acc,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    column_tiles = tl.cdiv(n, BLOCK_N)
    row_tile = tl.program_id(0) // column_tiles
    column_tile = tl.program_id(0) % column_tiles
    rows = row_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask = (rows < m)[:, None] & (columns < n)[None, :]
    acc_ptrs = acc_ptr + rows[:, None] * stride_acc + columns[None, :]
    acc = tl.load(acc_ptrs, mask=mask, other=0.0)
    store_signs(positive_ptr, negative_ptr, acc, rows, column_tile, m, n, BLOCK_M, BLOCK_N)


def pack_signs(acc):
    m, n = acc.shape
    positive, negative = (
        torch.empty((m, words(n)), dtype=torch.int32, device=acc.device) for _ in range(2)
    )
    if m == 0:
        return positive, negative
    tile = pack_tile(architecture(acc.device))
    grid = (triton.cdiv(m, tile.BLOCK_M) * triton.cdiv(n, tile.BLOCK_N),)
    with launch_guard(acc):
        pack_signs_kernel[grid](
            positive, negative, acc, m, n, acc.stride(0), **tile.launch_options()
        )
    return positive, negative


__all__ = ["pack_signs", "pack_signs_kernel"]
