"""The frozen product, extended by the low-rank term in the same contraction.

    y = x Wᵀ + drop(p Bᵀ) + bias          [M, N]

Forward uses it as written. The input gradient `dx = dy W + drop(q A)` is the same operation with
the transposed views `weight = W.T` and `factor = A.T`; there the dropout mask of the forward pass
applies to the second term.

Reads x, W, p, B; writes y once; 2·M·N·(K + r) flops.

The CUDA backend leaves the frozen product to cuBLAS on GPUs whose tensor cores have instructions of
their own for it (wgmma, tcgen05), which its kernel, an mma.sync product, does not use. Then the
kernel only writes the second term, and without dropout there is none: see `two_call.py`.
"""

import functools

import torch

from lorasb_kernels.ops.dispatch import BackendOperator
from lorasb_kernels.ops.precision import autocast_disabled
from lorasb_kernels.ops.two_call import two_call


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
    if backend == "cuda" and prefers_cublas(x.device):
        return _two_products(x, weight, p, factor, bias, dropout, seed)
    return _operator(backend, x, weight, p, factor, bias, dropout, seed)


@functools.cache
def prefers_cublas(device: torch.device) -> bool:
    """Whether mma.sync is slower than what cuBLAS uses: compute capability 9.x to 11.x."""
    if device.type != "cuda":
        return False
    return 9 <= torch.cuda.get_device_capability(device)[0] <= 11


# A constant to torch.compile, which cannot trace the probing of devices.
prefers_cublas._dynamo_marked_constant = True  # type: ignore[attr-defined]


@autocast_disabled
def _two_products(x, weight, p, factor, bias, dropout, seed):
    if dropout == 0:
        return two_call(x, weight, p, factor, bias)
    # Without columns of x and W the operator writes the second term and reads no y.
    y = _operator("cuda", x[:, :0], weight[:, :0], p, factor, bias, dropout, seed)
    return y.addmm_(x, weight.T)


__all__ = ["expand"]
