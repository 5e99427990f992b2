"""The dropout bits in Triton against exact integers, at large indices of a large matrix."""

import pytest
import torch
import triton
import triton.language as tl

from lorasb_kernels.ops.dropout import keep_threshold, random_bits
from lorasb_kernels.ops.triton.parts import keep_mask
from tests.ops.operands import SEED

ROWS, COLUMNS = 8, 16


@triton.jit
def mask_kernel(
    mask_ptr, seed_ptr, first_row, row_length, threshold, R: tl.constexpr, C: tl.constexpr
):
    rows = tl.cast(first_row, tl.int64) + tl.arange(0, R)
    columns = tl.arange(0, C)
    mask = keep_mask(tl.load(seed_ptr), rows, columns, row_length, threshold)
    offsets = tl.arange(0, R)[:, None] * C + columns[None, :]
    tl.store(mask_ptr + offsets, mask.to(tl.int8))


def squares(counter: int, key: int) -> int:
    """Widynski's squares32, in Python integers."""
    word = 2**64 - 1
    x = y = counter * key & word
    z = y + key & word
    for add in (y, z, y):
        x = x * x + add & word
        x = x >> 32 | x << 32 & word
    return (x * x + z & word) >> 32


def key_of(seed: int) -> int:
    """The finalizer of SplitMix64, made odd, in Python integers."""
    word = 2**64 - 1
    z = seed + 0x9E3779B97F4A7C15 & word
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & word
    z = (z ^ z >> 27) * 0x94D049BB133111EB & word
    return z ^ z >> 31 | 1


@pytest.mark.parametrize("p", [0.1, 0.5, 0.999999])
@pytest.mark.parametrize("first_row", [0, 2**19, 2**31 - 4, 2**40])
def test_mask_far_out(first_row, p, device):
    row_length = 14336
    mask = torch.empty(ROWS, COLUMNS, dtype=torch.int8, device=device)
    seed = torch.tensor([SEED], device=device)
    mask_kernel[(1,)](mask, seed, first_row, row_length, keep_threshold(p), R=ROWS, C=COLUMNS)
    expected = [
        [
            squares((first_row + i) * row_length + j, key_of(SEED)) >= keep_threshold(p)
            for j in range(COLUMNS)
        ]
        for i in range(ROWS)
    ]
    assert mask.bool().tolist() == expected


def test_the_reference_bits_are_those_of_the_paper(device):
    bits = random_bits(3, 5, torch.tensor([SEED], device=device))
    expected = [[squares(5 * i + j, key_of(SEED)) for j in range(5)] for i in range(3)]
    assert bits.tolist() == expected
