"""An adapter around a frozen layer that multiplies by itself, such as a quantized one.

    forward    y0      = frozen(x)                       the layer's own kernel
               h, p    = shrink(x, A, R)
               y       = y0 + p Bᵀ                       in place
    backward   q, dR   = core_backward(dy, h, B, R)
               dx      = expand(dy, Wᵀ, q, Aᵀ)           W dequantized for this product alone

Only h is kept for backward: neither x nor W. bitsandbytes and torchao dequantize W in their own
backward, too, so this one costs nothing more, and they may keep x, which this one never does.
"""

from collections.abc import Callable

import torch

from lorasb_kernels.ops.backend import resolve_backend
from lorasb_kernels.ops.core_backward import core_backward
from lorasb_kernels.ops.dropout import new_seed
from lorasb_kernels.ops.expand import expand
from lorasb_kernels.ops.lorasb_linear.checks import check_arguments
from lorasb_kernels.ops.shrink import shrink


class AroundFunction(torch.autograd.Function):
    """`apply(x, y, A, R, B, scaling, dropout_p, seed, backend, dense_weight)`; y is written to.

    x is [M, n] with a contiguous last dimension, y [M, m] the frozen layer's output.
    """

    @staticmethod
    def forward(ctx, x, y, lora_A, lora_R, lora_B, scaling, dropout_p, seed, backend, dense_weight):
        h, p = shrink(x, lora_A.to(x.dtype), lora_R, scaling, dropout_p, seed, backend)
        ctx.save_for_backward(h, lora_A, lora_R, lora_B, seed)
        ctx.scaling, ctx.dropout_p, ctx.backend = scaling, dropout_p, backend
        ctx.dense_weight = dense_weight
        return y.detach().addmm_(p, lora_B.to(x.dtype).T)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        h, lora_A, lora_R, lora_B, seed = ctx.saved_tensors
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        lora_A, lora_B = lora_A.to(dy.dtype), lora_B.to(dy.dtype)
        q, dR = core_backward(dy, h, lora_B, lora_R, ctx.scaling, ctx.backend)
        dx = None
        if ctx.needs_input_grad[0]:
            weight = ctx.dense_weight().to(dy.dtype)
            dx = expand(dy, weight.T, q, lora_A.T, None, ctx.dropout_p, seed, ctx.backend)
        return dx, None, None, dR if ctx.needs_input_grad[3] else None, *[None] * 6


def lorasb_around(
    x: torch.Tensor,
    frozen: Callable[[torch.Tensor], torch.Tensor],
    dense_weight: Callable[[], torch.Tensor],
    lora_A: torch.Tensor,
    lora_R: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str = "auto",
) -> torch.Tensor:
    """Adds a LoRA-SB adapter to a frozen linear layer that is given as a function.

    Computes `frozen(x) + s · drop(x) Aᵀ Rᵀ Bᵀ` for a layer whose weight is no plain tensor.
    Differentiable once, in `x` and `lora_R`. Keeps `drop(x) Aᵀ` (M·r elements) for backward.
    Under autocast `x` is cast to its dtype; A and B are rounded to the dtype of `x` inside.

    Args:
        x: [..., n], fp16, bf16 or fp32 (fp64 with the reference backend).
        frozen: maps [M, n] to [M, m], bias included; runs without gradients. Its output is
            written to.
        dense_weight: returns W [m, n] as a plain tensor, for `dx = dy W`; called in each
            backward pass that needs dx.
        lora_A, lora_B: [r, n] and [m, r], frozen, of any dtype.
        lora_R, scaling, dropout_p, training, backend: as in `lorasb_linear`.

    Returns:
        [..., m], dtype of `x`.

    Raises:
        TypeError, ValueError, RuntimeError: as `lorasb_linear`; ValueError for A or B that
            require grad.
    """
    device_type = x.device.type if isinstance(x, torch.Tensor) else "cpu"
    if torch.is_autocast_enabled(device_type):
        x = x.to(torch.get_autocast_dtype(device_type))
    # What the checks look at of A and B once cast, and of W: no elements.
    A, B, weight = (
        tensor.new_empty((), dtype=x.dtype).expand(shape)
        for tensor, shape in (
            (lora_A, lora_A.shape),
            (lora_B, lora_B.shape),
            (lora_B, (lora_B.shape[0], lora_A.shape[-1])),
        )
    )
    check_arguments(x, (weight,), (A,), (lora_R,), (B,), (None,), scaling, dropout_p)
    for name, factor in (("lora_A", lora_A), ("lora_B", lora_B)):
        if factor.requires_grad:
            raise ValueError(f"{name} requires grad; expected it frozen, only R is trained here")
    backend = resolve_backend(backend, x.device, x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    dropout_p = float(dropout_p) if training else 0.0
    seed = new_seed(x.device) if dropout_p > 0 else None
    with torch.no_grad():
        y = frozen(rows).to(x.dtype)
    y = AroundFunction.apply(
        rows, y, lora_A, lora_R, lora_B, float(scaling), dropout_p, seed, backend, dense_weight
    )
    return y.view(*x.shape[:-1], y.shape[-1])


__all__ = ["lorasb_around"]
