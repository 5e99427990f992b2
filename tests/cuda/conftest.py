"""The extension is compiled once, for sm_86, if there is a CUDA toolkit."""

import pytest
import torch

from tests.cuda import simulator as simulation


@pytest.fixture(scope="session")
def toolkit():
    reason = simulation.build.obstacle()
    if reason:
        pytest.skip(reason)
    return simulation.build.toolkit()


@pytest.fixture(scope="session")
def loaded_simulator(toolkit):
    return simulation.Simulator()


@pytest.fixture
def simulator(loaded_simulator):
    """The extension on CPU tensors; `torch.empty`, outputs and scratch memory are NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield loaded_simulator
    torch.use_deterministic_algorithms(False)
