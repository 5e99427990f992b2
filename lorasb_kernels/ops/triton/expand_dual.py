"""`expand` by the CUDA extension's kernel for Hopper (`csrc/hopper/`), as a route beside Triton's.

    y = x Wᵀ + drop(p Bᵀ) + bias          [M, N]

One persistent launch whose ring of stages is filled from (p, B), then from (x, W). It is reached as
the operator `lorasb::expand_cuda`, which has an implementation once the extension is loaded.
"""

import torch


def dual_is_loaded() -> bool:
    """Whether the operator has an implementation."""
    defined = hasattr(torch.ops.lorasb, "expand_cuda")
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return defined and has_kernel("lorasb::expand_cuda", "CUDA")


def has_dual(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel is there for a device and a dtype: compute capability 9.0, 16 bits."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    return hopper and dtype.itemsize == 2 and dual_is_loaded()


def dual_expand(x, weight, p, factor, bias, dropout, seed, tile) -> torch.Tensor:
    """`expand` in one launch of the extension, which has its own tiles: `tile` is not used."""
    return torch.ops.lorasb.expand_cuda(x, weight, p, factor, bias, dropout, seed)


__all__ = ["dual_expand", "dual_is_loaded", "has_dual"]
