"""`factor_gradient`: leftᵀ drop(rows) in fp32, on every backend."""

import math

import pytest
import torch

from lorasb_kernels.ops.dropout import keep_mask
from lorasb_kernels.ops.factor_gradient import factor_gradient
from tests.ops.operands import SHAPES, check, dropout_seed, normal, same_bits

# CUDA's kernel has none, and `lorasb_linear` refuses it there.
WITH_DROPOUT = pytest.mark.parametrize("backend", ["reference", "triton"], indirect=True)


def operands(M, k, r, dtype, device):
    return (
        normal(M, r, dtype=dtype, device=device),
        normal(M, k, dtype=dtype, device=device, seed=1),
    )


@pytest.mark.parametrize(("M", "k", "r"), SHAPES)
def test_values(M, k, r, backend, dtype, device):
    (out,) = check(factor_gradient, backend, *operands(M, k, r, dtype, device), 0.0, None)
    assert out.shape == (r, k)
    assert out.dtype == torch.float32
    assert M > 0 or not out.any()


@WITH_DROPOUT
@pytest.mark.parametrize(("M", "k", "r"), [(7, 20, 3), (33, 130, 24), (150, 40, 96)])
def test_values_under_dropout(M, k, r, backend, dtype, device):
    seed = dropout_seed(device)
    check(factor_gradient, backend, *operands(M, k, r, dtype, device), 0.3, seed)


@WITH_DROPOUT
def test_the_mask_is_exactly_that_of_the_seed(backend, device):
    M, k = 16, 50
    left, rows = torch.eye(M, device=device), torch.ones(M, k, device=device)
    out = factor_gradient(left, rows, 0.4, dropout_seed(device), backend)
    assert torch.equal(out != 0, keep_mask(M, k, 0.4, dropout_seed(device)))


@pytest.mark.parametrize(("M", "r"), [(700, 5), (3300, 100)])
def test_many_rows_are_summed_in_parts(M, r, backend, device):
    """Several blocks per tile of the columns, in the interpreter too."""
    check(factor_gradient, backend, *operands(M, 24, r, torch.float32, device), 0.0, None)


def test_strides(backend, dtype, device):
    left, rows = operands(42, 76, 40, dtype, device)
    arguments = (left[::2, 15:], rows[::2, 5:-1], 0.0, None)
    (out,) = check(factor_gradient, backend, *arguments)
    contiguous = (left[::2, 15:].contiguous(), rows[::2, 5:-1].contiguous(), 0.0, None)
    assert same_bits(out, factor_gradient(*contiguous, backend))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_input_shows_where_it_belongs(bad, backend, device):
    left, rows = operands(20, 70, 25, torch.float16, device)
    clean = factor_gradient(left, rows, 0.0, None, backend)
    rows[3, 69] = bad
    out = factor_gradient(left, rows, 0.0, None, backend)
    assert not out[:, 69].isfinite().any()
    assert torch.equal(out[:, :69], clean[:, :69])
    rows[3, 69], left[4, 24] = 1.0, bad
    out = factor_gradient(left, rows, 0.0, None, backend)
    assert not out[24].isfinite().any()
    assert out[:24].isfinite().all()
