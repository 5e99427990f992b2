"""The layout of bit planes, and packing on every backend."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasb_kernels.functional import pack_signs
from lorasb_kernels.ops.bitplanes import pack, unpack, words
from tests import formulas
from tests.ops.operands import normal

SHAPES = [(1, 1), (3, 31), (5, 32), (7, 33), (1, 300), (70, 97), (64, 256), (300, 700)]


def test_bit_j_of_word_k_is_column_32k_plus_j():
    for column in (0, 1, 7, 8, 31, 32, 40):
        acc = torch.zeros(2, 41)
        acc[1, column] = 3.0
        positive, negative = pack_signs(acc)
        assert positive.shape == (2, 2)
        assert not negative.any()
        assert not positive[0].any()
        word = int(positive[1, column // 32]) & 0xFFFFFFFF
        assert word == 1 << column % 32
        assert not positive[1, 1 - column // 32]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 140), st.integers(0, 2**32))
def test_packing_loses_nothing(m, n, seed):
    g = torch.Generator().manual_seed(seed)
    signs = torch.randint(-1, 2, (m, n), generator=g).float()
    positive, negative = pack_signs(signs)
    assert torch.equal(unpack(positive, negative, n), signs)
    assert torch.equal(pack(signs > 0), positive)
    assert positive.shape == (m, words(n))
    for plane in (positive, negative):
        bits = unpack(plane, torch.zeros_like(plane), words(n) * 32)
        assert not bits[:, n:].any(), "padding bits are 0"


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_packed_bits(m, n, backend, device):
    acc = normal(m, n, dtype=torch.float32, device=device)
    acc[:, ::7] = 0
    acc[0, -1] = math.nan
    acc[-1, 0] = -math.inf
    expected = formulas.sign_planes(acc)
    strided = torch.full((m, n + 5), math.nan, device=device)
    strided[:, 2 : n + 2] = acc
    for matrix in (acc, strided[:, 2 : n + 2], acc.T.contiguous().T):
        for plane, wanted in zip(pack_signs(matrix, backend=backend), expected, strict=True):
            assert torch.equal(plane.cpu(), wanted)


def test_values_without_a_sign(backend, device):
    """±0 is 0; a non-finite element sets both bits; the smallest numbers keep their sign."""
    tiny = 2.0**-149
    values = [0.0, -0.0, math.nan, math.inf, -math.inf, 1.0, -1.0, tiny, -tiny, 3.4e38, -3.4e38]
    acc = torch.tensor([values], device=device)
    positive, negative = pack_signs(acc, backend=backend)
    assert f"{int(positive):011b}"[::-1] == "00111101010"
    assert f"{int(negative):011b}"[::-1] == "00111010101"


def test_no_rows(backend, device):
    assert pack_signs(torch.empty(0, 40, device=device), backend=backend)[0].shape == (0, 2)


@pytest.mark.parametrize(
    ("acc", "error", "message"),
    [
        ([[1.0]], TypeError, "acc is a list"),
        (torch.ones(2, 3, dtype=torch.float16), TypeError, "acc has dtype torch.float16"),
        (torch.ones(3), ValueError, r"acc has shape \(3,\)"),
        (torch.ones(3, 0), ValueError, r"acc has shape \(3, 0\)"),
    ],
)
def test_bad_input_is_named(acc, error, message):
    with pytest.raises(error, match=message):
        pack_signs(acc)
