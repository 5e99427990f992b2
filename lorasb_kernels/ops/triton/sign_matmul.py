"""Product of a packed sign matrix, or its transpose, with a dense fp32 one, on the GPU.

    S Z      [m, n]·[n, q] → [m, q]
    Sᵀ Z     [n, m]·[m, q] → [n, q]

A block expands a tile of S from its two bit planes to ±1 in registers, once for all columns of Z
that it has accumulators for. Reads m·n/4 bytes of planes and, from L2, Z once per block of rows;
writes the product; 2·m·n·q flops, each in three terms.

The three terms: ±1, 0 and NaN are exact in bfloat16, and an fp32 number is the sum of three
bfloat16 ones, high, middle and low, so three bfloat16 products summed in fp32 use every bit
of Z. With tf32 the same takes three products at half the rate (Triton's "tf32x3"), one of them with
the low part of S, which is zero.
"""

import torch
import triton
import triton.language as tl

from lorasb_kernels.ops.triton import interpreting
from lorasb_kernels.ops.triton.bitplanes import expand_words
from lorasb_kernels.ops.triton.parts import launch_guard
from lorasb_kernels.ops.triton.sign_tiles import sign_matmul_tile
from lorasb_kernels.ops.triton.tiles import architecture, multiprocessors


@triton.jit
def sign_matmul_kernel(
    positive_ptr,
    negative_ptr,
    dense_ptr,
    out_ptr,
    m,
    n,
    q,
    stride_dk,
    stride_dq,
    TRANSPOSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
    TERM: tl.constexpr,
    TERMS: tl.constexpr,
):
    out_rows = n if TRANSPOSE else m
    length = m if TRANSPOSE else n
    row_words = tl.cdiv(n, 32)
    row_tile = tl.program_id(0)
    first_column = tl.program_id(1) * (COLUMN_TILES * BLOCK_Q)
    rows = row_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    steps = tl.arange(0, BLOCK_K)
    columns = first_column + tl.arange(0, BLOCK_Q)  # [BLOCK_Q]
    dense_ptrs = (
        dense_ptr
        + steps.to(tl.int64)[:, None] * stride_dk
        + columns.to(tl.int64)[None, :] * stride_dq
    )

    acc = ()
    for _ in tl.static_range(COLUMN_TILES):
        acc += (tl.zeros([BLOCK_M, BLOCK_Q], tl.float32),)
    for start in range(0, length, BLOCK_K):
        if TRANSPOSE:
            stored_rows = start + steps
            word = row_tile * (BLOCK_M // 32) + tl.arange(0, BLOCK_M // 32)
            offsets = stored_rows.to(tl.int64)[:, None] * row_words + word[None, :]
            mask = (stored_rows < m)[:, None] & (word < row_words)[None, :]
        else:
            word = start // 32 + tl.arange(0, BLOCK_K // 32)
            offsets = rows[:, None] * row_words + word[None, :]
            mask = (rows < m)[:, None] & (word < row_words)[None, :]
        positive = tl.load(positive_ptr + offsets, mask=mask, other=0)
        negative = tl.load(negative_ptr + offsets, mask=mask, other=0)
        if TRANSPOSE:
            signs = tl.trans(expand_words(positive, negative, BLOCK_K, BLOCK_M, TERM))
        else:
            signs = expand_words(positive, negative, BLOCK_M, BLOCK_K, TERM)
        summed = ()
        for i in tl.static_range(COLUMN_TILES):
            inside = (start + steps < length)[:, None] & (columns < q - i * BLOCK_Q)[None, :]
            rest = tl.load(
                dense_ptrs + i * BLOCK_Q * tl.cast(stride_dq, tl.int64), mask=inside, other=0.0
            )  # [BLOCK_K, BLOCK_Q], fp32
            partial = acc[i]
            for _ in tl.static_range(TERMS):
                term = rest.to(TERM)
                partial = tl.dot(signs, term, partial, input_precision="ieee")
                rest -= term.to(tl.float32)
            summed += (partial,)
        acc = summed
        dense_ptrs += BLOCK_K * tl.cast(stride_dk, tl.int64)

    for i in tl.static_range(COLUMN_TILES):
        tl.store(
            out_ptr + rows[:, None] * q + (columns + i * BLOCK_Q)[None, :],
            acc[i],
            mask=(rows < out_rows)[:, None] & (columns < q - i * BLOCK_Q)[None, :],
        )


def _terms():
    """dtype and number of the terms of Z. The interpreter's numpy has no bfloat16."""
    return (tl.float32, 1) if interpreting() else (tl.bfloat16, 3)


def sign_matmul(positive, negative, dense, columns, transpose):
    m, q = positive.shape[0], dense.shape[1]
    rows = columns if transpose else m
    out = torch.empty((rows, q), dtype=torch.float32, device=dense.device)
    if out.numel() == 0:
        return out
    tile = sign_matmul_tile(architecture(dense.device), rows, q, multiprocessors(dense.device))
    grid = (triton.cdiv(rows, tile.BLOCK_M), triton.cdiv(q, tile.COLUMN_TILES * tile.BLOCK_Q))
    term, terms = _terms()
    with launch_guard(dense):
        sign_matmul_kernel[grid](
            positive,
            negative,
            dense,
            out,
            m,
            columns,
            q,
            *dense.stride(),
            TRANSPOSE=transpose,
            TERM=term,
            TERMS=terms,
            **tile.launch_options(),
        )
    return out


__all__ = ["sign_matmul", "sign_matmul_kernel"]
