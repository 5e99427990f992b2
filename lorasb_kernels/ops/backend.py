"""Which backend runs an operation, and why.

`reference` runs everywhere. `triton` needs an NVIDIA GPU of compute capability 8.0
or newer, or `TRITON_INTERPRET=1`. `cuda` needs the compiled extension and such a GPU.
A backend that is named and cannot run raises; only `auto` chooses.
"""

import functools
import importlib
import os

import torch

from lorasb_kernels.ops import extension
from lorasb_kernels.ops.registry import BACKENDS

MIN_CAPABILITY = (8, 0)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def interpreting() -> bool:
    """True when Triton kernels run in Triton's interpreter (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def _triton_obstacle() -> str | None:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return None


def _gpu_obstacle(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"the tensors are on {device}, not on a CUDA device"
    index = torch.cuda.current_device() if device.index is None else device.index
    capability = _capability(index)
    if capability < MIN_CAPABILITY:
        return f"compute capability {capability} is below {MIN_CAPABILITY}"
    return None


def obstacle(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `backend` cannot run on `device` in `dtype`; None when it can."""
    if backend == "reference":
        return None
    if dtype not in DTYPES:
        return f"it supports float16, bfloat16 and float32, not {dtype}"
    if backend == "triton":
        return _triton_obstacle() or (None if interpreting() else _gpu_obstacle(device))
    return extension.obstacle() or _gpu_obstacle(device)


def resolve_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Returns the backend that runs: `backend` itself, or the choice of `auto`.

    Args:
        backend: `"auto"`, `"reference"`, `"triton"` or `"cuda"`.
        device: device of the operands.
        dtype: dtype of the operands.

    Raises:
        ValueError: unknown name.
        RuntimeError: a named backend that cannot run here, with the reason.
    """
    if backend == "auto":
        return choose_backend(device, dtype)[0]
    if backend not in BACKENDS:
        expected = ", ".join(repr(name) for name in ("auto", *BACKENDS))
        raise ValueError(f"backend is {backend!r}; expected one of {expected}")
    reason = obstacle(backend, device, dtype)
    if reason is not None:
        raise RuntimeError(f"backend={backend!r} cannot run: {reason}")
    return backend


# A constant to torch.compile, which cannot trace the probing of devices and imports. This is
# what torch.compiler.assume_constant_result sets, without importing the compiler for it.
resolve_backend._dynamo_marked_constant = True


def choose_backend(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The backend that `auto` takes, and the reason for it.

    Triton is preferred on a GPU; the CUDA extension stands in where Triton cannot
    run. On the CPU the reference is the fast path, also under the interpreter.
    """
    if device.type != "cuda":
        return "reference", f"tensors are on {device}"
    passed_over = []
    for backend in ("triton", "cuda"):
        reason = obstacle(backend, device, dtype)
        if reason is None:
            return backend, "; ".join([*passed_over, f"{backend} runs on {device}"])
        passed_over.append(f"{backend}: {reason}")
    return "reference", "; ".join(passed_over)


__all__ = ["DTYPES", "choose_backend", "interpreting", "obstacle", "resolve_backend"]
