"""Parts of Triton kernels that more than one operation uses."""

import contextlib

import torch
import triton
import triton.language as tl


@triton.jit
def keep_mask(seed, rows, columns, row_length, threshold):
    """[rows, columns] of bool: the bits of `ops/dropout.py` against the threshold.

    Depends on the seed and the element's index in a matrix of `row_length` columns alone.
    """
    key = seed.to(tl.uint64, bitcast=True) | 1
    counter = rows.to(tl.uint64)[:, None] * tl.cast(row_length, tl.uint64)
    counter += columns.to(tl.uint64)[None, :]
    y = counter * key
    z = y + key
    x = y * y + y
    x = (x << 32) | (x >> 32)
    x = x * x + z
    x = (x << 32) | (x >> 32)
    x = x * x + y
    x = (x << 32) | (x >> 32)
    x = x * x + z
    return (x >> 32) >= tl.cast(threshold, tl.uint64)


@triton.jit
def arrives_last(counter_ptr, blocks):
    """True in the block that is the last of `blocks` to call this; the counter starts at zero.

    What any of the blocks stored to global memory before is visible to the last one after:
    the barrier orders the stores of all threads before the counter, which releases them.
    """
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel") == blocks - 1


def launch_guard(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's device current: Triton launches on the current device's stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


__all__ = ["arrives_last", "keep_mask", "launch_guard"]
