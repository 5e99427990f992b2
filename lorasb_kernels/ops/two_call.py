"""The frozen product and the expansion as two library GEMMs, in the order that moves less data.

    y = p Bᵀ + bias, then y += x Wᵀ       the delta first
    y = x Wᵀ + bias, then y += p Bᵀ       the frozen product first

The GEMM over the rank is memory bound: it writes y [M, N], and if it comes second it also reads
y. The frozen GEMM is compute bound and reads y in its epilogue, behind its tensor-core work. So
the delta goes first, and in 16 bits y is rounded while it is small: half the error at
|delta| = |y| / 100. With a long contraction the epilogue's read costs the frozen GEMM about as
much as the traffic it saves: 4·M·N bytes are under 3 % of the product's time on an H100
(650 TFLOP/s, 2.9 TB/s assumed, not measured) from K = 16384 on, under 5 % from 8192 on, where the
frozen product goes first.

Both products follow torch's settings, as `nn.Linear` does: see `rounded_partial_sums` in
`ops/precision.py`.
"""

import torch
import torch.nn.functional as F

FROZEN_FIRST_FROM = 8192  # elements of the contraction


def two_call(
    x: torch.Tensor,
    weight: torch.Tensor,
    p: torch.Tensor,
    factor: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """`x Wᵀ + p · factorᵀ + bias`, [M, N]; arguments as for `expand`."""
    if x.shape[1] >= FROZEN_FIRST_FROM:
        return F.linear(x, weight, bias).addmm_(p, factor.t())
    return F.linear(p, factor, bias).addmm_(x, weight.t())


__all__ = ["FROZEN_FIRST_FROM", "two_call"]
