"""What the tests of routes share: a device that does not exist, and times that nobody measured."""

import torch

from lorasb_kernels.ops.layer_shape import LayerShape
from lorasb_kernels.ops.triton.route_files import DeviceFile, Measured, Timed, file_path
from lorasb_kernels.ops.triton.tiles import ExpandTile
from lorasb_kernels.ops.tune import random_operands

CPU = torch.device("cpu")
TILE = ExpandTile(num_warps=4, num_stages=3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32)
MEASURED_ON = {"device": "NVIDIA RTX A6000", "driver": "1.2", "torch": "2.13"}


def entry(rows: int = 8000, **microseconds: float) -> Measured:
    """A measurement in which every route took TILE."""
    routes = {name: Timed(time, TILE) for name, time in microseconds.items()}
    return Measured("2026-01-02", rows, routes)


def device_file(arch: str = "sm_86") -> DeviceFile:
    """The file of a device in the cache folder of the environment."""
    return DeviceFile(file_path(MEASURED_ON), arch, MEASURED_ON)


def operands(M: int = 20, transposed: bool = False, dropout: float = 0.0) -> tuple:
    """Of `expand`, for a layer of 24 outputs and 40 inputs at rank 4, in fp32 on the CPU."""
    return random_operands(LayerShape(M, 24, 40, 4, dropout), transposed, torch.float32, CPU)


class StubTimer:
    """A timer that runs every candidate once and tells times in which one route wins."""

    def __init__(self, winner: str):
        self.winner, self.calls = winner, 0

    def __call__(self, calls, device):
        self.calls += 1
        assert all(call(0).isfinite().all() for call in calls.values())
        return {key: [1e-6 if key[0] == self.winner else 2e-6] * 3 for key in calls}
