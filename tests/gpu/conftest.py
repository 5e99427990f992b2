"""Tests that need a CUDA device; elsewhere they are skipped with a message."""

import pytest
import torch

from lorasb_kernels.ops.dispatch import obstacle


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "tests/gpu/" in item.path.as_posix():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(params=["triton", "cuda"])
def backend(request, device) -> str:
    reason = obstacle(request.param, device, torch.bfloat16)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param
