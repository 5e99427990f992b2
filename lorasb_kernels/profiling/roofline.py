"""The roofline: the least time in which a device could run an operation.

A launch takes at least the longer of its bytes over the memory bandwidth and its flops over the
matrix rate (Williams, Waterman, Patterson 2009); launches one after another take the sum.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from lorasb_kernels.hardware.gpus import Gpu
from lorasb_kernels.profiling.costs import Cost
from lorasb_kernels.utils.timing import interleave, median


@dataclass(frozen=True)
class Ceilings:
    """Limits of a device.

    Args:
        bandwidth: bytes per second, counting bytes read and bytes written.
        rate: flops per second of a matrix product in the dtype in question.
        source: `"measured"`, or the datasheet they are from.
    """

    bandwidth: float
    rate: float
    source: str

    def floor(self, launches: Iterable[Cost]) -> float:
        """Least seconds for launches that run one after another."""
        return sum(max(cost.bytes / self.bandwidth, cost.flops / self.rate) for cost in launches)

    def bound(self, cost: Cost) -> str:
        """What limits one launch: `"memory"` or `"compute"`."""
        by_memory = cost.bytes / self.bandwidth >= cost.flops / self.rate
        return "memory" if by_memory else "compute"


def datasheet_ceilings(gpu: Gpu, dtype: str) -> Ceilings:
    """The ceilings from the datasheet of `gpu`."""
    return Ceilings(gpu.bandwidth, gpu.rate(dtype), f"datasheet: {gpu.source}")


def measure_ceilings(device: torch.device, dtype: torch.dtype, *, tiny: bool = False) -> Ceilings:
    """Measures a copy and a square matrix product on `device`.

    Args:
        device: where.
        dtype: of the product's operands.
        tiny: small operands, to test the code and not the device.
    """
    elements, side = (1 << 18, 128) if tiny else (1 << 28, 8192)
    if device.type == "cpu" and not tiny:
        elements, side = 1 << 24, 1024
    source = torch.randn(elements // 4, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    calls = {
        "copy": lambda _: target.copy_(source),
        "product": lambda _: torch.mm(a, b, out=product),
    }
    samples = interleave(calls, device, rounds=3 if tiny else 10)
    return Ceilings(
        bandwidth=2 * source.nbytes / median(samples["copy"]),
        rate=2 * side**3 / median(samples["product"]),
        source="measured",
    )


__all__ = ["Ceilings", "datasheet_ceilings", "measure_ceilings"]
