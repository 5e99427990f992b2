"""Loads the compiled CUDA extension, once, at its first use.

The library registers `lorasb::*_cuda` kernels and nothing else. When it is missing
or fails to load, the reason is kept and given by whoever asks for `backend="cuda"`.
"""

import functools
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


__all__ = ["obstacle"]
