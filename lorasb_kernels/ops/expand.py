"""The frozen product, extended by the low-rank term in the same contraction.

    y = x Wᵀ + drop(p Bᵀ) + bias          [M, N]

Forward uses it as written. The input gradient `dx = dy W + drop(q A)` is the same operation with
the transposed views `weight = W.T` and `factor = A.T`; there the dropout mask of the forward pass
applies to the second term.

Reads x, W, p, B; writes y once; 2·M·N·(K + r) flops.
"""

import torch

from lorasb_kernels.ops.dispatch import BackendOperator


def _fake(x, weight, p, factor, bias, dropout, seed):
    return x.new_empty((x.shape[0], weight.shape[0]))


def _flops(x, weight, p, *_):
    (M, K), (N, _), (_, r) = x, weight, p
    return 2 * M * N * (K + r)


_operator = BackendOperator(
    "expand",
    "(Tensor x, Tensor weight, Tensor p, Tensor factor, Tensor? bias, float dropout,"
    " Tensor? seed) -> Tensor",
    fake=_fake,
    flops=_flops,
)


def expand(
    x: torch.Tensor,
    weight: torch.Tensor,
    p: torch.Tensor,
    factor: torch.Tensor,
    bias: torch.Tensor | None,
    dropout: float,
    seed: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    """Returns `x Wᵀ + drop(p · factorᵀ) + bias`, [M, N] in the dtype of `x`.

    Args:
        x: [M, K], fp16, bf16 or fp32, last dimension contiguous.
        weight: [N, K], either dimension contiguous, dtype of `x`.
        p: [M, r], contiguous, dtype of `x`.
        factor: [N, r], either dimension contiguous, dtype of `x`.
        bias: [N] or None.
        dropout: probability that an element of the second term is dropped.
        seed: int64 [1] on the device of `x`; None when `dropout` is 0. The mask
            is that of an [M, N] tensor.
        backend: a backend that `resolve_backend` returned.
    """
    return _operator(backend, x, weight, p, factor, bias, dropout, seed)


__all__ = ["expand"]
