"""`shrink`: h = drop(x) Aᵀ and p = s · h Rᵀ, on every backend."""

import math

import pytest
import torch

from lorasb_kernels.ops.dropout import keep_mask
from lorasb_kernels.ops.shrink import shrink
from tests.ops.operands import SHAPES, check, dropout_seed, far_memory, normal, same_bits

SCALING = 0.75


def operands(M, n, r, dtype, device):
    x = normal(M, n, dtype=dtype, device=device)
    lora_A = normal(r, n, dtype=dtype, device=device, seed=1) / math.sqrt(n)
    lora_R = normal(r, r, dtype=torch.float32, device=device, seed=2) / math.sqrt(r)
    return x, lora_A, lora_R


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("M", "n", "r"), SHAPES)
def test_values(M, n, r, dropout, backend, dtype, device):
    seed = dropout_seed(device) if dropout else None
    h, p = check(shrink, backend, *operands(M, n, r, dtype, device), SCALING, dropout, seed)
    assert h.shape == p.shape == (M, r)


def test_strides(backend, dtype, device):
    M, n, r = 21, 70, 25
    x, lora_A, lora_R = operands(2 * M, n + 6, r, dtype, device)
    rows_and_columns = x[::2, 5:-1]
    transposed = lora_A[:, :n].T.contiguous().T
    check(shrink, backend, rows_and_columns, transposed, lora_R.T, SCALING, 0.0, None)


def test_offsets_beyond_32_bits(backend, device):
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GB of device memory")
    stride, n, r = (
        2**30 + 8,
        40,
        8,
    )  # the stride fits in 32 bits, the offset of the third row does not
    x = far_memory(2 * stride + n, torch.float16, device).as_strided((3, n), (stride, 1))
    small, lora_A, lora_R = operands(3, n, r, torch.float16, device)
    x.copy_(small)
    far = shrink(x, lora_A, lora_R, SCALING, 0.0, None, backend)
    near = shrink(small, lora_A, lora_R, SCALING, 0.0, None, backend)
    assert all(map(same_bits, far, near))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("M", "n", "r"), [(5, 40, 3), (20, 300, 40)])
def test_non_finite_input_shows_in_its_row_alone(M, n, r, bad, backend, device):
    x, lora_A, lora_R = operands(M, n, r, torch.float16, device)
    clean = shrink(x, lora_A, lora_R, SCALING, 0.0, None, backend)
    x[2, n - 1] = bad
    for out, before in zip(
        shrink(x, lora_A, lora_R, SCALING, 0.0, None, backend), clean, strict=True
    ):
        assert not out[2].isfinite().any()
        out[2] = before[2]
        assert torch.equal(out, before)


@pytest.mark.parametrize(("M", "n"), [(33, 48), (5, 300)])
def test_the_dropout_mask_is_that_of_the_seed(M, n, backend, device):
    x = torch.ones(M, n, device=device)
    seed = dropout_seed(device)
    identity = torch.eye(n, device=device)
    h, _ = shrink(x, identity, torch.eye(n, device=device), 1.0, 0.4, seed, backend)
    expected = keep_mask(M, n, 0.4, seed)
    assert torch.equal(h != 0, expected)
    torch.testing.assert_close(h[expected], torch.full_like(h[expected], 1 / 0.6))


def test_a_dropped_infinity_is_gone(backend, device):
    x, lora_A, lora_R = operands(3, 16, 4, torch.float32, device)
    seed = dropout_seed(device)
    x[~keep_mask(3, 16, 0.5, seed)] = math.inf
    h, p = shrink(x, lora_A, lora_R, SCALING, 0.5, seed, backend)
    assert h.isfinite().all()
    assert p.isfinite().all()


def test_an_infinity_stays_one(backend, device):
    """The padding of a rank tile, where A and R are zero, must not turn it into 0 · Inf = NaN."""
    x = torch.ones(3, 16, dtype=torch.float16, device=device)
    x[1, 2] = math.inf
    ones = torch.ones(5, 16, dtype=torch.float16, device=device)
    for out in shrink(x, ones, torch.ones(5, 5, device=device), SCALING, 0.0, None, backend):
        assert torch.equal(out[1], torch.full_like(out[1], math.inf))
        assert out[0].isfinite().all()
