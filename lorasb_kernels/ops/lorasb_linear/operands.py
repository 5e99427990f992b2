"""The operands of a layer in the form that the operations take: cast, in rows, with a core."""

import torch

from lorasb_kernels.ops.lorasb_linear.frozen import FrozenLayer
from lorasb_kernels.ops.precision import autocast_dtype


def cast_input(x: torch.Tensor) -> torch.Tensor:
    """`x` in the dtype of autocast, where that is on."""
    dtype = autocast_dtype(x.device.type)
    return x if dtype is None else x.to(dtype)


def cast_layer(x: torch.Tensor, weight, lora_A, lora_B, bias):
    """The operands of a layer on `x` in the dtype of autocast, where that is on.

    A `FrozenLayer` casts for itself; an fp32 factor stays as it is and gets an fp32 gradient.
    """
    dtype = autocast_dtype(x.device.type)
    if dtype is None:
        return weight, lora_A, lora_B, bias
    if not isinstance(weight, FrozenLayer):
        weight = weight.to(dtype)
    lora_A, lora_B = (f if f.dtype == torch.float32 else f.to(dtype) for f in (lora_A, lora_B))
    return weight, lora_A, lora_B, None if bias is None else bias.to(dtype)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """`x` [..., n] as [M, n] with a contiguous last dimension."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def core_or_identity(lora_R: torch.Tensor | None, lora_A: torch.Tensor, dtype: torch.dtype):
    """R; for a layer without one the identity [r, r] in fp32 (fp64 with fp64 operands).

    Applied in registers it adds a share of r/n to the work of a memory-bound kernel, and every
    backend's kernels run LoRA unchanged.
    """
    if lora_R is not None:
        return lora_R
    dtype = torch.promote_types(dtype, torch.float32)
    return torch.eye(lora_A.shape[0], dtype=dtype, device=lora_A.device)


__all__ = ["as_rows", "cast_input", "cast_layer", "core_or_identity"]
