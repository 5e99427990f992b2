"""Packed signs of an accumulator.

Reads 4·m·n bytes, writes m·n/4; no flops.
"""

import torch

from lorasb_kernels.ops.bitplanes import words
from lorasb_kernels.ops.dispatch import BackendOperator, resolve_backend


def _fake(acc):
    shape = (acc.shape[0], words(acc.shape[1]))
    return acc.new_empty(shape, dtype=torch.int32), acc.new_empty(shape, dtype=torch.int32)


def _flops(acc):
    return 0


_operator = BackendOperator(
    "pack_signs",
    "(Tensor acc) -> (Tensor positive, Tensor negative)",
    fake=_fake,
    flops=_flops,
)


def pack_signs(acc: torch.Tensor, *, backend: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the bit planes of the signs of `acc`; the sign of ±0 is 0.

    Args:
        acc: [m, n], fp32 (fp64 with the reference backend).
        backend: `"auto"`, `"reference"`, `"triton"` or `"cuda"`.

    Returns:
        positive, negative: int32 [m, ceil(n/32)] each; see `SignMatrix` for the layout.
        An element that is NaN or infinite sets its bit in both.

    Raises:
        TypeError: `acc` of the wrong type or dtype.
        ValueError: `acc` that is not a matrix, an unknown backend.
        RuntimeError: a named backend that cannot run here.
    """
    if not isinstance(acc, torch.Tensor):
        raise TypeError(f"acc is a {type(acc).__name__}; expected a torch.Tensor")
    if acc.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"acc has dtype {acc.dtype}; expected float32 or float64")
    if acc.dim() != 2 or acc.shape[1] < 1:
        raise ValueError(f"acc has shape {tuple(acc.shape)}; expected [m, n] with n >= 1")
    acc = acc.detach()
    if acc.stride(1) != 1:
        acc = acc.contiguous()
    return _operator(resolve_backend(backend, acc.device, acc.dtype), acc)


__all__ = ["pack_signs"]
