"""The peak memory of a piece of work: on the GPU, or of the process (Linux)."""

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from pathlib import Path

import torch


class PeakMemory:
    """`bytes`, set when the block of `peak_memory` ends; None if it is unknown."""

    bytes: int | None = None


@contextlib.contextmanager
def peak_memory() -> Iterator[PeakMemory]:
    """Measures the block: with a GPU, the peak that torch allocated on it; otherwise the peak
    resident memory of the process beyond what it held before."""
    peak = PeakMemory()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated()
        return
    held = reset_peak()
    yield peak
    peak.bytes = None if held is None else peak_since_reset() - held


def peak_since_reset() -> int:
    """Highest resident set, in bytes, since `reset_peak`."""
    status = Path("/proc/self/status").read_text()
    return next(
        int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")
    )


def reset_peak() -> int | None:
    """Resets the peak to the current resident set and returns that, in bytes; None if the system
    does not support this."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return peak_since_reset()


__all__ = ["PeakMemory", "peak_memory", "peak_since_reset", "reset_peak"]
