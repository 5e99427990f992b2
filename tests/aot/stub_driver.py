"""A Triton driver without a GPU: kernels are compiled for sm_86 and launches are noted, not run.

For what a launch is on the host: which compiled kernel, how often it is looked up, with what.
"""

from types import SimpleNamespace
from typing import NamedTuple

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime import driver


class Launch(NamedTuple):
    """A launch: the kernel's name and its loaded function, the grid, what the kernel is passed."""

    name: str
    function: object
    grid: tuple[int, int, int]
    arguments: list


launches: list[Launch] = []


class Launcher:
    """What a compiled kernel is launched with."""

    def __init__(self, src, metadata):
        self.name = metadata.name
        self.passed = [kind != "constexpr" for kind in src.signature.values()]

    def __call__(self, *arguments):
        # Grid, stream, function, packed metadata, launch metadata, two hooks.
        (x, y, z, _, function, *_), arguments = arguments[:9], arguments[9:]
        passed = [a for a, is_passed in zip(arguments, self.passed, strict=True) if is_passed]
        launches.append(Launch(self.name, function, (x, y, z), passed))


class Driver(CudaDriver):
    """The least that a launch asks a driver for."""

    def __init__(self):
        self.launcher_cls = Launcher
        self.utils = SimpleNamespace(
            load_binary=lambda name, binary, shared, device: (object(), object(), 0, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 101376},
        )
        self.get_current_stream = lambda device: 0
        self.get_current_device = lambda: 0

    def get_current_target(self):
        return GPUTarget("cuda", 86, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")


def install() -> None:
    """Makes it the driver of this process."""
    driver.set_active(Driver())
