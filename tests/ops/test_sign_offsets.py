"""Tokens far apart in memory: the kernels' offsets are 64-bit."""

import pytest
import torch

from lorasb_kernels.functional import sign_accumulate_, sign_gradient
from tests.ops.operands import far_memory, normal

STRIDE, TOKENS, M, N = (
    2**30 + 8,
    3,
    5,
    40,
)  # the stride fits in 32 bits, the third token's offset not


@pytest.mark.parametrize("far", ["dy", "x"])
def test_offsets_beyond_32_bits(far, backend, device):
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GB of device memory")
    near = {
        "dy": normal(TOKENS, M, dtype=torch.float16, device=device),
        "x": normal(TOKENS, N, dtype=torch.float16, device=device, seed=1),
    }
    memory = far_memory(2 * STRIDE + N, torch.float16, device)
    spread = memory.as_strided(near[far].shape, (STRIDE, 1)).copy_(near[far])
    apart = {**near, far: spread}

    def results(dy, x):
        acc = sign_accumulate_(torch.zeros(M, N, device=device), dy, x, backend=backend)
        return acc, *sign_gradient(dy, x, backend=backend)

    for one, other in zip(results(**apart), results(**near), strict=True):
        torch.testing.assert_close(one, other)
