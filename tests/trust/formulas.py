"""The operations as formulas in plain PyTorch, written from the mathematics alone.

Each formula is evaluated three times on the same operands (`rounded` is applied wherever a
tensor of the working dtype is stored):

    eager   in the working dtype: `rounded` casts to it
    exact   in float64: `rounded` does nothing
    terms   in float64 on absolute values: the sum of the magnitudes that were added up;
            `rounded` adds the smallest normal number, so that eps·terms never is less than
            the spacing of the numbers around 0
"""

import torch

EYE = None  # a mask that keeps everything


def drop(x, mask, dropout):
    return x if mask is EYE else torch.where(mask, x * (1 / (1 - dropout)), 0)


def shrink(rounded, x, lora_A, lora_R, scaling, mask, dropout):
    """h = drop(x) Aᵀ and p = s · h Rᵀ."""
    h = rounded(drop(x, mask, dropout) @ lora_A.T)
    return h, rounded(scaling * (h.to(lora_R.dtype) @ lora_R.T))


def core_backward(rounded, dy, h, lora_B, lora_R, scaling):
    """q = s · (dy B) R and dR = s · (dy B)ᵀ h."""
    g = rounded(dy @ lora_B).to(lora_R.dtype)
    return rounded(scaling * (g @ lora_R)), scaling * (g.T @ h.to(lora_R.dtype))


def expand(rounded, x, weight, p, factor, bias, mask, dropout):
    """x Wᵀ + drop(p factorᵀ) + bias."""
    y = x @ weight.T if bias is None else x @ weight.T + bias
    return (rounded(rounded(y) + drop(p @ factor.T, mask, dropout)),)


def lorasb_linear(rounded, x, weight, lora_A, lora_R, lora_B, bias, dy, scaling, mask, dropout):
    """Output, input gradient and gradient of R of one adapted layer; x and dy are matrices."""
    h, p = shrink(rounded, x, lora_A, lora_R, scaling, mask, dropout)
    (y,) = expand(rounded, x, weight, p, lora_B, bias, EYE, 0.0)
    q, dR = core_backward(rounded, dy, h, lora_B, lora_R, scaling)
    (dx,) = expand(rounded, dy, weight.T, q, lora_A.T, None, mask, dropout)
    return y, dx, dR


def lorasb_group(rounded, x, layers, scaling, mask, dropout):
    """Outputs, the summed input gradient and the gradients of R of layers that read one x."""
    results = [lorasb_linear(rounded, x, *layer, scaling, mask, dropout) for layer in layers]
    ys, dxs, dRs = zip(*results, strict=True)
    dx = dxs[0]
    for other in dxs[1:]:
        dx = rounded(dx + other)
    return (*ys, dx, *dRs)


def factor_gradient(rounded, left, rows, mask, dropout):
    """leftᵀ drop(rows), summed in fp32; the sum of what is kept is scaled."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    kept = rows.to(dtype) if mask is EYE else torch.where(mask, rows.to(dtype), 0)
    return (rounded(rounded(left.to(dtype).T @ kept) * (1 / (1 - dropout))),)


def lora(rounded, x, weight, lora_A, lora_B, bias, dy, scaling, mask, dropout):
    """Output and gradients of x, A and B of one layer without a core: R is the identity."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    A, B = rounded(lora_A), rounded(lora_B)
    core = torch.eye(A.shape[0], dtype=dtype, device=A.device)
    _, p = shrink(rounded, x, A, core, scaling, mask, dropout)
    (y,) = expand(rounded, x, weight, p, B, bias, EYE, 0.0)
    _, q = shrink(rounded, dy, B.T, core, scaling, EYE, 0.0)
    (dx,) = expand(rounded, dy, weight.T, q, A.T, None, mask, dropout)
    (dA,) = factor_gradient(lambda t: t, q, x, mask, dropout)
    (dB,) = factor_gradient(lambda t: t, p, dy, EYE, 0.0)
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
