"""How much memory there is, and how much the accumulators take."""

import ctypes
import functools
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from lorasb_kernels.linear_layers import matrix_shape


def accumulator_bytes(layer: nn.Module) -> int:
    """Bytes of the gradient accumulator of `layer`: 4 per element, 8 for fp64 weights."""
    size = 8 if layer.weight.dtype == torch.float64 else 4
    m, n = matrix_shape(layer)
    return size * m * n


def free_memory(device: torch.device) -> int | None:
    """Bytes that may still be allocated on `device`; None if it is not known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    if device.type == "cpu":
        return min(_host_limits(), default=None)
    return None


def _host_limits() -> Iterable[int]:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                yield int(line.split()[1]) * 1024
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        yield max(0, int(text) - int(used.read_text()))


def release_free_memory(device: torch.device) -> None:
    """Returns free pages of the heap to the system, on the CPU with glibc.

    glibc by itself keeps tens of megabytes, and the free space between live tensors.
    """
    if device.type == "cpu":
        _malloc_trim()(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int]:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # not glibc
        return lambda pad: 0


def is_out_of_memory(error: BaseException) -> bool:
    """True for a failed allocation on a GPU or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


__all__ = ["accumulator_bytes", "free_memory", "is_out_of_memory", "release_free_memory"]
