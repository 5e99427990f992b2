"""The backends of the experts' operations: the CUDA extension has no kernel for them."""

import pytest
import torch

from lorasb_kernels.ops.dispatch import obstacle
from lorasb_kernels.ops.experts.operators import BACKENDS


@pytest.fixture(params=BACKENDS)
def backend(request, device) -> str:
    reason = obstacle(request.param, device, torch.float32)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param
