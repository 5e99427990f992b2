"""Shrink and core of several layers that read the same input, in one pass over `x`.

    hᵢ = x Aᵢᵀ          [M, r]        i = 1 … G
    pᵢ = s · hᵢ Rᵢᵀ     [M, r]

Reads x once (M·n elements; G times from L2), the Aᵢ and Rᵢ; writes the hᵢ and pᵢ;
2·M·G·r·(n + r) flops. What `shrink` computes layer by layer, without dropout: there each layer has
a mask of its own, and reads x for itself. The results of a layer are contiguous, and no core is
multiplied by another layer's zeros.
"""

from collections.abc import Sequence

import torch

from lorasb_kernels.ops.dispatch import BackendOperator


def _fake(x, lora_As, lora_Rs, scaling):
    shape = (len(lora_As), x.shape[0], lora_As[0].shape[0])
    return x.new_empty(shape), x.new_empty(shape)


def _flops(x, lora_As, *_):
    M, n = x
    return sum(2 * M * r * (n + r) for r, _ in lora_As)


_operator = BackendOperator(
    "shrink_group",
    "(Tensor x, Tensor[] lora_As, Tensor[] lora_Rs, float scaling) -> (Tensor h, Tensor p)",
    fake=_fake,
    flops=_flops,
)


def shrink_group(
    x: torch.Tensor,
    lora_As: Sequence[torch.Tensor],
    lora_Rs: Sequence[torch.Tensor],
    scaling: float,
    backend: str,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns hᵢ and pᵢ of each layer, [M, r] in the dtype of `x`.

    Args:
        x: [M, n], fp16, bf16 or fp32 (fp64 with the reference), last dimension contiguous.
        lora_As: G tensors [r, n], dtype of `x`.
        lora_Rs: G tensors [r, r], fp32 (fp64 with fp64 operands).
        scaling: s, common to the layers.
        backend: a backend that `resolve_backend` returned.
    """
    h, p = _operator(backend, x, lora_As, lora_Rs, scaling)
    return list(zip(h.unbind(), p.unbind(), strict=True))


__all__ = ["shrink_group"]
