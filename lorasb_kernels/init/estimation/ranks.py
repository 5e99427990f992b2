"""Data-parallel ranks: they sum their gradients, and they fail or fall back together."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from lorasb_kernels.init.estimation.memory import is_out_of_memory


class FallBack(Exception):
    """A strategy cannot continue; the message gives the reason."""


def parallel() -> bool:
    """True when `torch.distributed` runs with more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_(tensor: torch.Tensor) -> torch.Tensor:
    """Sums `tensor` over the ranks, in place."""
    if parallel():
        dist.all_reduce(tensor)
    return tensor


def minimum(value: float, device: torch.device) -> float:
    """The smallest `value` of any rank."""
    return -_maximum(-value, device)


@contextmanager
def in_step(device: torch.device) -> Iterator[None]:
    """On every rank raises the most severe error of any rank, so that none waits for another.

    Running out of memory counts as `FallBack`.

    Args:
        device: of the tensors that the ranks exchange.

    Raises:
        FallBack: this rank or another fell back, and none failed.
        RuntimeError: another rank failed.
    """
    error = None
    try:
        yield
    except FallBack as reason:
        error = reason
    except Exception as reason:
        error = FallBack(f"out of memory: {reason}") if is_out_of_memory(reason) else reason
    severity = 0 if error is None else 1 if isinstance(error, FallBack) else 2
    worst = _maximum(severity, device)
    if severity and severity == worst:
        raise error
    if worst == 1:
        raise FallBack("another rank fell back")
    if worst == 2:
        raise RuntimeError("estimation failed on another rank; see its error")


def _maximum(value: float, device: torch.device) -> float:
    if not parallel():
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.item()


__all__ = ["FallBack", "in_step", "minimum", "parallel", "sum_"]
