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


# The first driver of each major version of CUDA, in NVIDIA's numbers.
_FIRST_DRIVER = {12: "R525", 13: "R580"}


@functools.cache
def obstacle() -> str | None:
    """Why the extension cannot be used; None once it is loaded, also where there is no GPU."""
    if not _LIBRARY.exists():
        return "the CUDA extension is not built (install with a CUDA toolkit, or run `make ext`)"
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        return f"the CUDA extension failed to load: {error}"
    return driver_obstacle(ctypes.CDLL(str(_LIBRARY)))


def driver_obstacle(library: ctypes.CDLL) -> str | None:
    """Why the installed driver cannot run a loaded extension, whose CUDA runtime is built in."""
    driver, runtime = ctypes.c_int(), ctypes.c_int()
    library.lorasb_versions(ctypes.byref(driver), ctypes.byref(runtime))
    needed = runtime.value // 1000
    if driver.value == 0 or driver.value // 1000 >= needed:
        return None
    first = _FIRST_DRIVER.get(needed)
    return (
        f"the CUDA extension was built with CUDA {_version(runtime)} and needs a driver of CUDA "
        f"{needed}{f' ({first} or newer)' if first else ''}; the installed one supports CUDA "
        f"{_version(driver)}"
    )


def _version(number: ctypes.c_int) -> str:
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


@functools.cache
def device_obstacle(index: int) -> str | None:
    """Why the loaded extension has no kernels for a CUDA device; None when it has."""
    return kernel_obstacle(ctypes.CDLL(str(_LIBRARY)), index)


def kernel_obstacle(library: ctypes.CDLL, index: int) -> str | None:
    """As `device_obstacle`, of a loaded library."""
    library.lorasb_device_error.restype = ctypes.c_char_p
    error = library.lorasb_device_error(index)
    if error is None:
        return None
    return (
        f"the CUDA extension cannot run on cuda:{index} ({error.decode()}); it was built for "
        f"compute capability {_describe(library)['architectures']}"
    )


def _describe(library: ctypes.CDLL) -> dict[str, str]:
    library.lorasb_build_info.restype = ctypes.c_char_p
    return json.loads(library.lorasb_build_info())


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
    return {"extension": str(_LIBRARY), **_describe(ctypes.CDLL(str(_LIBRARY)))}


__all__ = ["build_info", "device_obstacle", "obstacle"]
