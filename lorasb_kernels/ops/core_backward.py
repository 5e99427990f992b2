"""Backward of the core: from the output gradient to the r×r gradient, in one pass over `dy`.

    g  = dy B               [M, r]   (stays on chip)
    q  = s · g R            [M, r]
    dR = s · gᵀ h           [r, r]   = s·Bᵀ (dyᵀx) Aᵀ without the m×n gradient

Reads dy once (M·m elements), h, B and R; writes q and dR; 2·M·r·(m + 2r) flops.
Memory bound. dR is summed in a fixed order: the same inputs give the same bits.
"""

import torch

from lorasb_kernels.ops.dispatch import BackendOperator


def _fake(dy, h, lora_B, lora_R, scaling):
    return torch.empty_like(h), torch.empty_like(lora_R)


def _flops(dy, h, *_):
    (M, m), (_, r) = dy, h
    return 2 * M * r * (m + 2 * r)


_operator = BackendOperator(
    "core_backward",
    "(Tensor dy, Tensor h, Tensor lora_B, Tensor lora_R, float scaling) -> (Tensor q, Tensor dR)",
    fake=_fake,
    flops=_flops,
)


def core_backward(
    dy: torch.Tensor,
    h: torch.Tensor,
    lora_B: torch.Tensor,
    lora_R: torch.Tensor,
    scaling: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `q` [M, r] in the dtype of `dy` and `dR` [r, r] in fp32.

    Args:
        dy: [M, m], fp16, bf16 or fp32, last dimension contiguous.
        h: [M, r], saved by `shrink`, contiguous, dtype of `dy`.
        lora_B: [m, r], dtype of `dy`.
        lora_R: [r, r], fp32.
        scaling: s.
        backend: a backend that `resolve_backend` returned.
    """
    return _operator(backend, dy, h, lora_B, lora_R, scaling)


__all__ = ["core_backward"]
