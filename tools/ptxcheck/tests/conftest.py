"""CUDA C++ sources are compiled once a session; tests that need nvcc skip without it."""

import pytest

import ptxcheck
from ptxcheck.nvcc import find_nvcc

from .sources import HERE


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: long; left out by -m 'not slow'")


@pytest.fixture(scope="session")
def cuda():
    """Function (file of this folder or source text, arch, flags) -> freshly loaded module."""
    if find_nvcc() is None:
        pytest.skip("nvcc was not found")
    texts = {}

    def load(source, arch=86, flags=()):
        key = source, arch, tuple(flags)
        if key not in texts:
            path = HERE / source if source.endswith(".cu") else source
            texts[key] = ptxcheck.nvcc_ptx(path, arch, flags)
        return ptxcheck.load(texts[key])

    return load
