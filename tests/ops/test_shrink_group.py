"""`shrink_group`: h and p of several layers on one x, on every backend."""

import math

import pytest
import torch

from lorasb_kernels.ops.shrink import shrink
from lorasb_kernels.ops.shrink_group import shrink_group
from tests.ops.operands import check, normal, same_bits

SCALING = 0.75


def operands(M, n, r, layers, dtype, device):
    x = normal(M, n, dtype=dtype, device=device)
    lora_As = [
        normal(r, n, dtype=dtype, device=device, seed=i) / math.sqrt(n) for i in range(layers)
    ]
    lora_Rs = [
        normal(r, r, dtype=torch.float32, device=device, seed=9 + i) / math.sqrt(r)
        for i in range(layers)
    ]
    return x, lora_As, lora_Rs


# One launch of a kernel takes three layers; few rows with many columns are split over blocks.
@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("M", "n", "r"), [(0, 40, 8), (1, 300, 16), (21, 70, 25), (40, 192, 96), (5, 210, 200)]
)
def test_values(M, n, r, layers, backend, dtype, device):
    """Each layer within the contract of `shrink`, and nothing of a neighbour in it."""
    x, lora_As, lora_Rs = operands(M, n, r, layers, dtype, device)
    together = shrink_group(x, lora_As, lora_Rs, SCALING, backend)
    assert len(together) == layers
    again = shrink_group(x, lora_As, lora_Rs, SCALING, backend)
    for found, repeated, lora_A, lora_R in zip(together, again, lora_As, lora_Rs, strict=True):

        def one_of_the_group(*_, found=found):
            return found

        one_of_the_group.__name__ = "shrink"
        h, p = check(one_of_the_group, backend, x, lora_A, lora_R, SCALING, 0.0, None)
        assert h.shape == p.shape == (M, r)
        assert h.is_contiguous()
        assert p.is_contiguous()
        assert all(map(same_bits, found, repeated))


def test_strides(backend, dtype, device):
    M, n, r = 21, 70, 25
    x, lora_As, lora_Rs = operands(2 * M, n + 6, r, 2, dtype, device)
    rows_and_columns = x[::2, 5:-1]
    lora_As = [lora_As[0][:, :n].T.contiguous().T, lora_As[1][:, 3:-3]]
    lora_Rs = [lora_Rs[0].T, lora_Rs[1]]
    found = shrink_group(rows_and_columns, lora_As, lora_Rs, SCALING, backend)
    for layer, lora_A, lora_R in zip(found, lora_As, lora_Rs, strict=True):
        alone = shrink(rows_and_columns, lora_A, lora_R, SCALING, 0.0, None, backend)
        for ours, expected in zip(layer, alone, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-2)


def test_a_layer_that_is_not_finite_keeps_to_itself(backend, device):
    x, lora_As, lora_Rs = operands(5, 40, 4, 3, torch.float16, device)
    lora_As[1][2] = math.inf
    lora_Rs[1][0, 0] = math.nan
    first, second, third = shrink_group(x, lora_As, lora_Rs, SCALING, backend)
    assert all(out.isfinite().all() for layer in (first, third) for out in layer)
    assert not any(out.isfinite().all() for out in second)
