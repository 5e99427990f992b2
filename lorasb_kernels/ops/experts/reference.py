"""The adapted experts in plain PyTorch, and the segments that they share.

Tokens are sorted by expert: those of expert e are the rows offsets[e−1] … offsets[e]. With
W [E, m, n], A [E, r, n], R [E, r, r] and B [E, m, r], for a token t of expert e:

    h[t] = x[t] A_eᵀ            p[t] = s · h[t] R_eᵀ        y[t] = x[t] W_eᵀ + p[t] B_eᵀ + bias_e
    g[t] = dy[t] B_e            q[t] = s · g[t] R_e         dx[t] = dy[t] W_e + q[t] A_e
    dR_e = s · Σ_{t of e} g[t]ᵀ h[t]

A and B may be [1, …], shared by all experts. Rows past the last offset belong to no expert
(expert parallelism leaves such rows): their y and dx are zero.

On the CPU a loop runs over the experts that have tokens. On CUDA nothing may wait for the offsets:
`torch._grouped_mm` where its own kernel runs, else a product over all rows for each expert. The
latter is slow, and runs only where Triton does not: float64, or a GPU before Ampere.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch

from lorasb_kernels.ops.dropout import keep_mask


def experts_shrink(x, lora_A, lora_R, offsets, scaling, dropout, seed):
    """h and p, both [M, r]; the core runs in the dtype of R, fp32."""
    if dropout > 0:
        mask = keep_mask(*x.shape, dropout, seed)
        x = torch.where(mask, x * (1 / (1 - dropout)), 0)
    h = grouped_product(x, lora_A.mT, offsets)
    p = grouped_product(h.to(lora_R.dtype), lora_R.mT, offsets).mul_(scaling)
    return h, p.to(h.dtype)


def experts_expand(x, weight, p, factor, bias, offsets, dropout, seed):
    """y = x W_eᵀ + drop(p factor_eᵀ) + bias_e [M, m]; backward calls it on transposes for dx."""
    y = grouped_product(x, weight.mT, offsets)
    delta = grouped_product(p, factor.mT, offsets)
    if dropout > 0:
        mask = keep_mask(*y.shape, dropout, seed)
        delta = torch.where(mask, delta * (1 / (1 - dropout)), 0)
    y += delta
    if bias is not None:
        of_no_expert = bias.new_zeros(1, bias.shape[1])
        y += torch.cat([bias, of_no_expert])[segment_of_rows(offsets, y.shape[0])]
    return y


def experts_core_backward(dy, h, lora_B, lora_R, offsets, scaling):
    """q [M, r] and dR [E, r, r], the latter summed and returned in the dtype of R."""
    g = grouped_product(dy, lora_B, offsets).to(lora_R.dtype)
    q = grouped_product(g, lora_R, offsets).mul_(scaling).to(dy.dtype)
    h, dR = h.to(g.dtype), torch.zeros_like(lora_R, memory_format=torch.contiguous_format)
    if g.device.type == "cpu":
        for expert, rows in _segments(offsets):
            torch.mm(g[rows].t(), h[rows], out=dR[expert])
    else:
        segments = segment_of_rows(offsets, g.shape[0])
        for expert in range(lora_R.shape[0]):
            own = (segments == expert)[:, None]  # of both: 0 · ∞ of another expert is NaN
            torch.mm(torch.where(own, g, 0).t(), torch.where(own, h, 0), out=dR[expert])
    return q, dR.mul_(scaling)


def segment_of_rows(offsets: torch.Tensor, M: int) -> torch.Tensor:
    """The expert of each of M rows, int64 [M]; E for rows past the last offset."""
    rows = torch.arange(M, dtype=offsets.dtype, device=offsets.device)
    return torch.searchsorted(offsets, rows, right=True)


def grouped_product(
    rows: torch.Tensor, matrices: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """rows[t] · matrices[e] [M, c] for the tokens t of expert e; zero past the last offset.

    Args:
        rows: [M, k].
        matrices: [E, k, c], or [1, k, c] shared by all experts; any strides.
        offsets: int32 [E], cumulative ends.
    """
    M = rows.shape[0]
    if rows.device.type == "cpu":
        out = rows.new_zeros(M, matrices.shape[2])
        shared = matrices.shape[0] == 1
        for expert, own in _segments(offsets):
            torch.mm(rows[own], matrices[0 if shared else expert], out=out[own])
        return out
    segments = segment_of_rows(offsets, M)
    if matrices.shape[0] == 1:
        out = rows @ matrices[0]
    elif _has_grouped_kernel(rows, matrices):
        out = torch._grouped_mm(rows, matrices, offs=offsets)
    else:
        out = rows.new_zeros(M, matrices.shape[2])
        for expert, matrix in enumerate(matrices):
            own = (segments == expert)[:, None]
            out = torch.where(own, rows @ matrix, out)
        return out
    return torch.where((segments < offsets.shape[0])[:, None], out, 0)


def _segments(offsets: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """The experts that have tokens, with their rows; offsets on the CPU."""
    for expert, (start, end) in enumerate(pairwise([0, *offsets.tolist()])):
        if start < end:
            yield expert, slice(start, end)


def _has_grouped_kernel(rows: torch.Tensor, matrices: torch.Tensor) -> bool:
    """Whether `torch._grouped_mm` runs its own kernel, which reads the offsets on the device.

    For other dtypes and GPUs it copies the offsets to the host and loops.
    """
    if rows.dtype != torch.bfloat16 or torch.cuda.get_device_capability(rows.device)[0] < 9:
        return False
    strides = (rows.stride(0), matrices.stride(0), max(matrices.stride()[1:]))
    unit = rows.stride(1) == min(matrices.stride()[1:]) == 1
    addresses = (rows.data_ptr(), matrices.data_ptr())
    return unit and all(s % 8 == 0 for s in strides) and all(a % 16 == 0 for a in addresses)


__all__ = [
    "experts_core_backward",
    "experts_expand",
    "experts_shrink",
    "grouped_product",
    "segment_of_rows",
]
