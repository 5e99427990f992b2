"""`core_backward`: q = s · (dy B) R and dR = s · (dy B)ᵀ h, on every backend."""

import math

import pytest
import torch

from lorasb_kernels.ops.core_backward import core_backward
from tests.ops.operands import SHAPES, check, far_memory, normal

SCALING = 0.75


def operands(M, m, r, dtype, device):
    dy = normal(M, m, dtype=dtype, device=device)
    h = normal(M, r, dtype=dtype, device=device, seed=1)
    lora_B = normal(m, r, dtype=dtype, device=device, seed=2) / math.sqrt(m)
    lora_R = normal(r, r, dtype=torch.float32, device=device, seed=3) / math.sqrt(r)
    return dy, h, lora_B, lora_R


@pytest.mark.parametrize(("M", "m", "r"), SHAPES)
def test_values(M, m, r, backend, dtype, device):
    q, dR = check(core_backward, backend, *operands(M, m, r, dtype, device), SCALING)
    assert q.shape == (M, r)
    assert dR.dtype == torch.float32
    assert M > 0 or not dR.any()


def test_many_rows_are_summed_in_parts(backend, device):
    """300 rows: more than one block per tile of dR, in the interpreter too."""
    check(core_backward, backend, *operands(300, 24, 40, torch.float32, device), SCALING)


def test_strides(backend, dtype, device):
    M, m, r = 21, 70, 25
    dy, h, lora_B, lora_R = operands(2 * M, m + 6, r, dtype, device)
    transposed = lora_B[:m].T.contiguous().T
    check(core_backward, backend, dy[::2, 5:-1], h[::2], transposed, lora_R.T, SCALING)


def test_offsets_beyond_32_bits(backend, device):
    """Rows of dy and B 2³⁰ elements apart: the third is past 32 bits."""
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GB of device memory")
    stride, M, m, r = 2**30 + 8, 3, 3, 5
    memory = far_memory(2 * stride + m + r, torch.float16, device)
    dy, h, lora_B, lora_R = operands(M, m, r, torch.float16, device)
    far_dy = memory.as_strided((M, m), (stride, 1)).copy_(dy)
    far_B = memory[m:].as_strided((m, r), (stride, 1)).copy_(lora_B)
    far = core_backward(far_dy, h, far_B, lora_R, SCALING, backend)
    near = core_backward(dy, h, lora_B, lora_R, SCALING, backend)
    for one, other in zip(far, near, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_the_second_split_of_more_than_two_to_the_31_numbers(backend, device):
    """g and h are contiguous, so M·r must be that large: one tile of a dR of a very large rank."""
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GB of device memory")
    from lorasb_kernels.ops.triton.core_backward import gradient_kernel

    rows_per_split, r, width = 2**17, 2**14, 16
    M = rows_per_split + 3
    memory = far_memory(M * r, torch.float16, device)
    g, h = (memory[first:].as_strided((M, width), (r, 1)) for first in (0, width))
    for seed, rows in enumerate((g[:5], h[:5], g[-3:], h[-3:])):
        rows.copy_(normal(*rows.shape, dtype=torch.float16, device=device, seed=seed).round())
    partial = far_memory(2 * r * r, torch.float32, device)
    dR = torch.empty(width * r, dtype=torch.float32, device=device)
    arrived = torch.zeros(1, dtype=torch.int32, device=device)
    numbers = (M, r, 2, rows_per_split, SCALING)
    options = {"BLOCK_R": width, "BLOCK_M": 128 if device.type == "cuda" else 2048, "num_warps": 4}
    gradient_kernel[(2,)](
        memory,
        memory[width:],
        dR,
        partial,
        arrived,
        *numbers,
        SPLIT=True,
        PRECISION="tf32",
        **options,
    )
    expected = SCALING * (g[:5].float().T @ h[:5].float() + g[-3:].float().T @ h[-3:].float())
    assert torch.equal(dR.as_strided((width, width), (r, 1)), expected), "sums of whole numbers"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_input_shows(bad, backend, device):
    dy, h, lora_B, lora_R = operands(20, 150, 40, torch.float16, device)
    clean, _ = core_backward(dy, h, lora_B, lora_R, SCALING, backend)
    dy[2, 149] = bad
    q, dR = core_backward(dy, h, lora_B, lora_R, SCALING, backend)
    assert not q[2].isfinite().any()
    assert not dR.isfinite().any()
    q[2] = clean[2]
    assert torch.equal(q, clean)

    dy[2, 149] = 1.0
    h[3, 5] = bad
    _, dR = core_backward(dy, h, lora_B, lora_R, SCALING, backend)
    assert not dR[:, 5].isfinite().any()
    dR[:, 5] = 0
    assert dR.isfinite().all()
