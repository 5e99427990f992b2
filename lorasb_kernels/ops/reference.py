"""The whole method in plain PyTorch: what every kernel of this package must compute.

The adapted layer, for M tokens, with W [m, n], bias [m], A [r, n] and B [m, r] frozen and
R [r, r] trained:

    h = x Aᵀ                    [M, r]    shrink
    p = s · h Rᵀ                [M, r]    shrink
    y = x Wᵀ + p Bᵀ + bias      [M, m]    expand

    g = dy B                    [M, r]    core_backward
    q = s · g R                 [M, r]    core_backward
    dR = s · gᵀ h               [r, r]    core_backward
    dx = dy W + q A             [M, n]    expand, on Wᵀ and Aᵀ

and, where A and B are trained instead of R (LoRA, LoRA-One), their gradients (factor_gradient).

The initialization of LoRA-SB needs the signs of the weight gradient over some samples: summed
over calls (sign_accumulate) and packed (pack_signs), or in one shot (sign_gradient); the truncated
SVD multiplies the packed signs (sign_matmul). The operations' files in this folder state
their shapes, bytes and flops; `triton/` and `csrc/` hold the kernels.
"""

import torch
import torch.nn.functional as F

from lorasb_kernels.ops.bitplanes import UNPACKED_AT_ONCE, panels, signs_of, unpack
from lorasb_kernels.ops.dropout import keep_mask
from lorasb_kernels.ops.token_rows import accumulator_dtype
from lorasb_kernels.ops.two_call import FROZEN_FIRST_FROM, two_call

# Tokens converted to fp32 at a time; this bounds the size of the copies of 16-bit operands.
CHUNK = 2048


def shrink(x, lora_A, lora_R, scaling, dropout, seed):
    """h = drop(x) Aᵀ [M, r] and p = s · h Rᵀ [M, r]; the core runs in the dtype of R, fp32.

    R may be None here, for the identity.
    """
    if dropout > 0:
        mask = keep_mask(*x.shape, dropout, seed)
        x = torch.where(mask, x * (1 / (1 - dropout)), 0)
    h = F.linear(x, lora_A)
    if lora_R is not None and lora_R.dtype == h.dtype and scaling == 1:
        return h, F.linear(h, lora_R)  # the same, in one call
    return h, _through_core(h, None if lora_R is None else lora_R.t(), scaling)


def shrink_group(x, lora_As, lora_Rs, scaling):
    """The h and p of several layers on one x, [G, M, r] each: those of `shrink`, layer by layer."""
    layers = [shrink(x, A, R, scaling, 0.0, None) for A, R in zip(lora_As, lora_Rs, strict=True)]
    return tuple(torch.stack(outputs) for outputs in zip(*layers, strict=True))


def expand(x, weight, p, factor, bias, dropout, seed):
    """y = x Wᵀ + drop(p Bᵀ) + bias [M, m]: the frozen product, and the expansion added in place.

    The backward pass computes dx = dy W + drop(q A) with it, on Wᵀ and Aᵀ.
    """
    if dropout == 0:
        return two_call(x, weight, p, factor, bias)
    y = F.linear(x, weight, bias)
    mask = keep_mask(*y.shape, dropout, seed)
    return y.add_(torch.where(mask, (p @ factor.T) * (1 / (1 - dropout)), 0))


def core_backward(dy, h, lora_B, lora_R, scaling):
    """q = s · g R [M, r] and dR = s · gᵀ h [r, r] from g = dy B, in the dtype of R."""
    g = torch.mm(dy, lora_B)
    if g.dtype != lora_R.dtype:
        g, h = g.to(lora_R.dtype), h.to(lora_R.dtype)
    q, dR = torch.mm(g, lora_R), torch.mm(g.t(), h)
    if scaling != 1:  # last: s · g alone may leave the range of its dtype where the results do not
        q.mul_(scaling)
        dR.mul_(scaling)
    return q if q.dtype == dy.dtype else q.to(dy.dtype), dR


def core_input_gradient(dy, lora_B, lora_R, scaling):
    """q = s · dy B R [M, r], as `core_backward`, where R is not trained or None."""
    return _through_core(torch.mm(dy, lora_B), lora_R, scaling)


def input_gradient(dy, weight, q, lora_A, dropout, seed):
    """dx = dy W + drop(q A) [M, n]: `expand` on Wᵀ and Aᵀ, without the views of them."""
    if dropout > 0:
        return expand(dy, weight.t(), q, lora_A.t(), None, dropout, seed)
    if dy.shape[1] >= FROZEN_FIRST_FROM:
        return torch.mm(dy, weight).addmm_(q, lora_A)
    return torch.mm(q, lora_A).addmm_(dy, weight)


def factor_gradient(left, rows, dropout, seed):
    """leftᵀ drop(rows): dA [r, n] from (q, x), or dB [m, r] transposed from (p, dy)."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    if rows.dtype != dtype:
        left, rows = left.to(dtype), rows.to(dtype)
    if dropout > 0:
        rows = torch.where(keep_mask(*rows.shape, dropout, seed), rows, 0)
        return torch.mm(left.t(), rows).mul_(1 / (1 - dropout))
    return torch.mm(left.t(), rows)


def _through_core(rows, core, scaling):
    """s · rows · core [M, r] in the dtype of `rows`, computed in that of the core."""
    # `to` costs a microsecond also where there is nothing to convert.
    if core is None:  # multiplied by as in the kernels: an infinity spreads over its row
        core = torch.eye(
            rows.shape[1],
            dtype=torch.promote_types(rows.dtype, torch.float32),
            device=rows.device,
        )
    convert = rows.dtype != core.dtype
    out = torch.mm(rows.to(core.dtype) if convert else rows, core)
    if scaling != 1:
        out.mul_(scaling)
    return out.to(rows.dtype) if convert else out


def sign_accumulate(acc, grad_output, x, row_weight):
    """acc += (w ⊙ dy)ᵀ x [m, n], in the dtype of the accumulator."""
    for start in range(0, x.shape[0], CHUNK):
        rows = slice(start, start + CHUNK)
        dy = grad_output[rows].to(acc.dtype)
        if row_weight is not None:
            dy = dy * row_weight[rows, None]
        acc.addmm_(dy.T, x[rows].to(acc.dtype))


def sign_gradient(grad_output, x, row_weight):
    """The bit planes of sign((w ⊙ dy)ᵀ x), [m, ceil(n/32)] each."""
    dy = grad_output.to(accumulator_dtype(x))
    if row_weight is not None:
        dy = dy * row_weight[:, None]
    return signs_of(dy.T @ x.to(dy.dtype))


def pack_signs(acc):
    """The bit planes of sign(acc)."""
    return signs_of(acc)


def sign_matmul(positive, negative, dense, columns, transpose):
    """S Z [m, q], or Sᵀ Z [n, q], from the planes of S, unpacking a panel of rows at a time."""
    m, q = positive.shape[0], dense.shape[1]
    out = dense.new_zeros(columns if transpose else m, q)
    for rows in panels(m, columns, UNPACKED_AT_ONCE):
        panel = unpack(positive[rows], negative[rows], columns)
        if transpose:
            out.addmm_(panel.T, dense[rows])
        else:
            out[rows] = panel @ dense
    return out


__all__ = [
    "core_backward",
    "core_input_gradient",
    "expand",
    "factor_gradient",
    "input_gradient",
    "pack_signs",
    "shrink",
    "shrink_group",
    "sign_accumulate",
    "sign_gradient",
    "sign_matmul",
]
