"""Shrink and core: from the input to the two [M, r] factors, in one pass over `x`.

    h = drop(x) Aᵀ          [M, r]
    p = s · h Rᵀ            [M, r]

Reads x once (M·n elements), A and R; writes h and p; 2·M·r·(n + r) flops. Memory bound.
`drop` zeroes an element with probability `dropout` and divides the rest by 1 − p.
The core runs in fp32 (or tf32 on tensor cores) from the fp32 `R`, before `h` is rounded.
"""

import torch

from lorasb_kernels.ops.dispatch import BackendOperator


def _fake(x, lora_A, lora_R, scaling, dropout, seed):
    shape = (x.shape[0], lora_A.shape[0])
    return x.new_empty(shape), x.new_empty(shape)


def _flops(x, lora_A, *_):
    (M, n), (r, _) = x, lora_A
    return 2 * M * r * (n + r)


_operator = BackendOperator(
    "shrink",
    "(Tensor x, Tensor lora_A, Tensor lora_R, float scaling, float dropout, Tensor? seed)"
    " -> (Tensor h, Tensor p)",
    fake=_fake,
    flops=_flops,
)


def shrink(
    x: torch.Tensor,
    lora_A: torch.Tensor,
    lora_R: torch.Tensor,
    scaling: float,
    dropout: float,
    seed: torch.Tensor | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `h` and `p`, both [M, r] in the dtype of `x`.

    Args:
        x: [M, n], fp16, bf16 or fp32, last dimension contiguous.
        lora_A: [r, n], dtype of `x`.
        lora_R: [r, r], fp32.
        scaling: s.
        dropout: probability that an element of `x` is dropped, in [0, 1).
        seed: int64 [1] on the device of `x`; None when `dropout` is 0.
        backend: a backend that `resolve_backend` returned.
    """
    return _operator(backend, x, lora_A, lora_R, scaling, dropout, seed)


__all__ = ["shrink"]
