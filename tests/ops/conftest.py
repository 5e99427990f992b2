"""What every operator test shares: the backends, a device, dtypes, poisoned memory.

Without a GPU the Triton kernels run in Triton's interpreter, on small shapes. With one, the
same tests run on it, bf16 and larger shapes included, and the CUDA extension joins if built.
"""

import pytest
import torch

from lorasb_kernels.ops.dispatch import obstacle
from lorasb_kernels.ops.limits import BACKENDS

ON_GPU = torch.cuda.is_available()
DTYPES = ["float32", "float16", "bfloat16"]


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture(params=BACKENDS)
def backend(request, device) -> str:
    reason = obstacle(request.param, device, torch.float32)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture(params=DTYPES)
def dtype(request, backend) -> torch.dtype:
    if request.param == "bfloat16" and backend == "triton" and not ON_GPU:
        pytest.skip("Triton's interpreter multiplies bf16 wrongly; the PTX tests cover it")
    return getattr(torch, request.param)


PARTIAL_SUMS = {
    torch.float16: "allow_fp16_reduced_precision_reduction",
    torch.bfloat16: "allow_bf16_reduced_precision_reduction",
}


@pytest.fixture(autouse=True)
def partial_sums_in_single_precision():
    """The settings that the contract is stated for; see `rounded_partial_sums`."""
    gemm = torch.backends.cuda.matmul
    before = {name: getattr(gemm, name) for name in PARTIAL_SUMS.values()}
    for name in before:
        setattr(gemm, name, False)
    yield
    for name, value in before.items():
        setattr(gemm, name, value)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """`torch.empty` returns NaN, so an element that a kernel does not write is detected."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
