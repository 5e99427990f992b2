"""Loads the compiled CUDA extension once, at first use.

The library registers `lorasb::*_cuda` kernels and nothing else. When it is missing or fails to
load, the reason is kept and raised when `backend="cuda"` is requested.
"""

import ctypes
import functools
import json
from pathlib import Path

import torch

_LIBRARY = Path(__file__).resolve().parent.parent / "_C.so"


@functools.cache
def obstacle() -> str | None:
    """Why the extension cannot be used; None once it is loaded."""
    if not _LIBRARY.exists():
        return "the CUDA extension is not built (install with a CUDA toolkit, or run `make ext`)"
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        return f"the CUDA extension failed to load: {error}"
    return None


def build_info() -> dict[str, str | None]:
    """Describes the CUDA extension of this installation; needs no GPU.

    Returns:
        A dict of strings. `extension` is the library's path, or None when it cannot be used; then
        `reason` says why. A loaded library also reports `architectures` (those it has code for, in
        the form of TORCH_CUDA_ARCH_LIST), `nvcc` and `compiler` (which built it) and
        `torch_target` (the oldest torch that can load it; 0x020a… is 2.10).
    """
    reason = obstacle()
    if reason is not None:
        return {"extension": None, "reason": reason}
    describe = ctypes.CDLL(str(_LIBRARY)).lorasb_build_info
    describe.restype = ctypes.c_char_p
    return {"extension": str(_LIBRARY), **json.loads(describe())}


__all__ = ["build_info", "obstacle"]
