"""The adapter as a change of the weight.

    W' = round(W + s·B·R·A)     product and sum in fp32 (fp64 with fp64 factors), one rounding

For LoRA without R.
"""

import torch

from lorasb_kernels.ops.precision import autocast_off


@torch.no_grad()
def plain_factors(
    lora_A: torch.Tensor, lora_R: torch.Tensor | None, lora_B: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A' = R·A [r, n] and B' = s·B [m, r], so that B'·A' = s·B·R·A, in fp32 (fp64).

    Args:
        lora_A: [r, n].
        lora_R: [r, r], or None for the identity.
        lora_B: [m, r].
        scaling: s.
    """
    master = torch.promote_types(lora_A.dtype, torch.float32)
    lora_A, lora_B = lora_A.to(master), lora_B.to(master)
    if lora_R is not None:
        with autocast_off(lora_A.device.type):
            lora_A = lora_R.to(master) @ lora_A
    return lora_A, scaling * lora_B


@torch.no_grad()
def delta_weight(
    lora_A: torch.Tensor, lora_R: torch.Tensor | None, lora_B: torch.Tensor, scaling: float
) -> torch.Tensor:
    """s·B·R·A [m, n], in fp32 (fp64); arguments as for `plain_factors`."""
    lora_A, lora_B = plain_factors(lora_A, lora_R, lora_B, scaling)
    with autocast_off(lora_A.device.type):
        return lora_B @ lora_A


@torch.no_grad()
def merged_weight(
    weight: torch.Tensor, delta: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """`weight + delta` [m, n], summed in the dtype of `delta` and rounded once.

    Args:
        weight: W, [m, n].
        delta: s·B·R·A, [m, n], fp32 or fp64.
        dtype: of the result; None for that of `weight`.
    """
    return (weight.to(delta.dtype) + delta).to(dtype or weight.dtype)


__all__ = ["delta_weight", "merged_weight", "plain_factors"]
