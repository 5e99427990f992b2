"""The operations as formulas in plain PyTorch, written from the mathematics alone: the oracle.

Nothing here comes from `lorasb_kernels.ops.reference`, which is tested against it like every other
backend. Only the dropout mask is the package's; tests/ops/test_lorasb_linear.py compares its bits
with the published generator.

A formula takes what happens wherever a tensor of the working dtype is stored (`rounded`) and
the operands of its operation. It is evaluated three times on the same operands:

    eager       in the working dtype: `rounded` casts to it
    exact       in float64 on the CPU: `rounded` does nothing
    magnitudes  in float64 on absolute values: the sum of the magnitudes that were added up
"""

import math

import numpy as np
import torch

from lorasb_kernels.ops.dropout import keep_mask


def eager(formula, dtype: torch.dtype, device: torch.device, *operands):
    """`formula` as eager PyTorch computes it in `dtype`; the contract compares with it."""
    return formula(lambda t: t.to(dtype), *_each(operands, lambda t: t.to(device)))


def exact(formula, *operands):
    """`formula` in float64 on the CPU: the oracle."""
    return formula(lambda t: t, *_each(operands, _widened))


def magnitudes(formula, *operands, floor: float = 0.0):
    """`formula` on absolute values; `floor` is added to whatever is stored.

    With the smallest normal number as floor, eps·magnitudes is at least the spacing of the
    numbers around 0.
    """
    return formula(lambda t: t + floor, *_each(operands, _magnitude, abs))


def _each(operand, of_tensor, of_number=lambda value: value):
    """`operand`, or the operands nested in it, changed by their kind."""
    if isinstance(operand, (tuple, list)):
        return type(operand)(_each(item, of_tensor, of_number) for item in operand)
    if isinstance(operand, torch.Tensor):
        return of_tensor(operand.detach())
    return of_number(operand) if isinstance(operand, float) else operand


def _widened(tensor):
    return tensor.cpu().double() if tensor.is_floating_point() else tensor.cpu()


def _magnitude(tensor):
    return _widened(tensor).abs() if tensor.is_floating_point() else tensor.cpu()


def drop(x, dropout, seed):
    """x where the mask of the seed keeps it, divided by the share that is kept; 0 elsewhere."""
    if dropout == 0:
        return x
    return torch.where(keep_mask(*x.shape, dropout, seed), x * (1 / (1 - dropout)), 0)


def shrink(rounded, x, lora_A, lora_R, scaling, dropout, seed):
    """h = drop(x) Aᵀ and p = s · h Rᵀ."""
    h = rounded(drop(x, dropout, seed) @ lora_A.T)
    return h, rounded(scaling * (h.to(lora_R.dtype) @ lora_R.T))


def core_backward(rounded, dy, h, lora_B, lora_R, scaling):
    """q = s · (dy B) R and dR = s · (dy B)ᵀ h."""
    g = rounded(dy @ lora_B).to(lora_R.dtype)
    return rounded(scaling * (g @ lora_R)), scaling * (g.T @ h.to(lora_R.dtype))


def expand(rounded, x, weight, p, factor, bias, dropout, seed):
    """x Wᵀ + drop(p factorᵀ) + bias."""
    y = x @ weight.T if bias is None else x @ weight.T + bias
    return (rounded(rounded(y) + drop(p @ factor.T, dropout, seed)),)


def lorasb_linear(
    rounded, x, weight, lora_A, lora_R, lora_B, bias, dy, scaling, dropout=0.0, seed=None
):
    """Output, input gradient and gradient of R of one adapted layer; x and dy are matrices."""
    h, p = shrink(rounded, x, lora_A, lora_R, scaling, dropout, seed)
    (y,) = expand(rounded, x, weight, p, lora_B, bias, 0.0, None)
    q, dR = core_backward(rounded, dy, h, lora_B, lora_R, scaling)
    (dx,) = expand(rounded, dy, weight.T, q, lora_A.T, None, dropout, seed)
    return y, dx, dR


def lorasb_group(rounded, x, layers, scaling, dropout, seeds):
    """Outputs, the summed input gradient and the gradients of R of layers that read one x."""
    results = [
        lorasb_linear(rounded, x, *layer, scaling, dropout, seed)
        for layer, seed in zip(layers, seeds, strict=True)
    ]
    ys, dxs, dRs = zip(*results, strict=True)
    dx = dxs[0]
    for other in dxs[1:]:
        dx = rounded(dx + other)
    return (*ys, dx, *dRs)


def factor_gradient(rounded, left, rows, dropout, seed):
    """leftᵀ drop(rows), summed in fp32; the sum of what is kept is scaled."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    kept = rows.to(dtype)
    if dropout > 0:
        kept = torch.where(keep_mask(*rows.shape, dropout, seed), kept, 0)
    return (rounded(rounded(left.to(dtype).T @ kept) * (1 / (1 - dropout))),)


def lora(rounded, x, weight, lora_A, lora_B, bias, dy, scaling, dropout=0.0, seed=None):
    """Output and gradients of x, A and B of one layer without a core: R is the identity."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    A, B = rounded(lora_A), rounded(lora_B)
    core = torch.eye(A.shape[0], dtype=dtype, device=A.device)
    _, p = shrink(rounded, x, A, core, scaling, dropout, seed)
    (y,) = expand(rounded, x, weight, p, B, bias, 0.0, None)
    _, q = shrink(rounded, dy, B.T, core, scaling, 0.0, None)
    (dx,) = expand(rounded, dy, weight.T, q, A.T, None, dropout, seed)
    (dA,) = factor_gradient(lambda t: t, q, x, dropout, seed)
    (dB,) = factor_gradient(lambda t: t, p, dy, 0.0, None)
    return y, dx, dA, dB.T


def sign_accumulate(rounded, acc, grad_output, x, row_weight):
    """acc + (w ⊙ dy)ᵀ x, summed in fp32."""
    dy = grad_output.to(acc.dtype)
    if row_weight is not None:
        dy = dy * row_weight[:, None]
    return (rounded(acc + dy.T @ x.to(acc.dtype)),)


def sign_matmul(rounded, signs, dense):
    """S Z for a dense S of ±1 and 0."""
    return (rounded(signs @ dense),)


def sign_planes(acc) -> tuple[torch.Tensor, torch.Tensor]:
    """The bits that are set where acc is positive and where it is negative; both where neither.

    int32 [m, ceil(n / 32)] on the CPU; bit j of word k is column 32k + j.
    """
    acc = acc.cpu()
    not_finite = ~acc.isfinite()
    planes = []
    for bits in ((acc > 0) | not_finite, (acc < 0) | not_finite):
        words = math.ceil(acc.shape[1] / 32)
        padded = np.zeros((acc.shape[0], 32 * words), dtype=bool)
        padded[:, : acc.shape[1]] = bits.numpy()
        packed = np.packbits(padded, axis=1, bitorder="little")
        planes.append(torch.from_numpy(packed.view("<i4").reshape(-1, words).astype(np.int32)))
    return planes[0], planes[1]
