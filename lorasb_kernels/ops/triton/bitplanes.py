"""Tiles of bit planes in Triton kernels: packing signs into words and expanding them."""

import triton
import triton.language as tl


@triton.jit
def finite_max():
    """The largest finite fp32 number."""
    return 3.4028234663852886e38


@triton.jit
def pack_words(bits, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """bool [BLOCK_M, BLOCK_N] → int32 [BLOCK_M, BLOCK_N // 32]; a sum of distinct bits."""
    grouped = tl.reshape(bits.to(tl.int32), [BLOCK_M, BLOCK_N // 32, 32])
    return tl.sum(grouped << tl.arange(0, 32)[None, None, :], axis=2)


@triton.jit
def store_signs(
    positive_ptr,
    negative_ptr,
    acc,
    rows,
    column_tile,
    m,
    n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Packs the tile `acc` [BLOCK_M, BLOCK_N] of an [m, n] matrix and stores its words.

    Elements past the matrix may hold anything: a padding column of zeros times NaN is NaN.
    """
    inside = (column_tile * BLOCK_N + tl.arange(0, BLOCK_N) < n)[None, :]
    broken = ~(tl.abs(acc) <= finite_max())
    positive = pack_words(((acc > 0) | broken) & inside, BLOCK_M, BLOCK_N)
    negative = pack_words(((acc < 0) | broken) & inside, BLOCK_M, BLOCK_N)
    row_words = tl.cdiv(n, 32)
    word = column_tile * (BLOCK_N // 32) + tl.arange(0, BLOCK_N // 32)
    offsets = rows[:, None] * row_words + word[None, :]
    mask = (rows < m)[:, None] & (word < row_words)[None, :]
    tl.store(positive_ptr + offsets, positive, mask=mask)
    tl.store(negative_ptr + offsets, negative, mask=mask)


@triton.jit
def expand_words(
    positive, negative, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr
):
    """Words [ROWS, COLUMNS // 32] of both planes → ±1, 0 or NaN, [ROWS, COLUMNS] in DTYPE."""
    bit = tl.arange(0, 32)[None, None, :]
    plus = (positive[:, :, None] >> bit) & 1  # [ROWS, COLUMNS // 32, 32]
    minus = (negative[:, :, None] >> bit) & 1
    signs = tl.where(plus + minus == 2, float("nan"), (plus - minus).to(tl.float32))
    return tl.reshape(signs.to(DTYPE), [ROWS, COLUMNS])


__all__ = ["expand_words", "store_signs"]
