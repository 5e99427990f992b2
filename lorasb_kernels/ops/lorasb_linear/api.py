"""The adapted linear layer, `y = x (W + s·B·R·A)ᵀ + bias`, and its gradients.

Composed of three operations and differentiable in `x` and `lora_R`:

    forward    h, p  = shrink(x, A, R)            y  = expand(x, W, p, B, bias)
    backward   q, dR = core_backward(dy, h, B, R)  dx = expand(dy, Wᵀ, q, Aᵀ)

Only `h` (M·r elements) is kept for backward; `x` is not needed by either gradient.
"""

import torch

from lorasb_kernels.ops.backend import resolve_backend
from lorasb_kernels.ops.core_backward import core_backward
from lorasb_kernels.ops.dropout import new_seed
from lorasb_kernels.ops.expand import expand
from lorasb_kernels.ops.lorasb_linear.checks import check_arguments
from lorasb_kernels.ops.shrink import shrink


class _LoRASBLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_R, lora_B, bias, scaling, dropout_p, seed, backend):
        h, p = shrink(x, lora_A, lora_R, scaling, dropout_p, seed, backend)
        y = expand(x, weight, p, lora_B, bias, 0.0, None, backend)
        ctx.save_for_backward(h, weight, lora_A, lora_R, lora_B, seed)
        ctx.scaling, ctx.dropout_p, ctx.backend = scaling, dropout_p, backend
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        h, weight, lora_A, lora_R, lora_B, seed = ctx.saved_tensors
        if dy.stride(-1) != 1:
            dy = dy.contiguous()
        q, dR = core_backward(dy, h, lora_B, lora_R, ctx.scaling, ctx.backend)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = expand(dy, weight.T, q, lora_A.T, None, ctx.dropout_p, seed, ctx.backend)
        if not ctx.needs_input_grad[3]:
            dR = None
        return dx, None, None, dR, None, None, None, None, None, None


def lorasb_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_R: torch.Tensor,
    lora_B: torch.Tensor,
    bias: torch.Tensor | None = None,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str = "auto",
) -> torch.Tensor:
    """Applies a frozen linear layer with a LoRA-SB adapter (arXiv:2411.19557).

    Computes `x Wᵀ + s · drop(x) Aᵀ Rᵀ Bᵀ + bias`. Differentiable once, in `x` and
    `lora_R`; everything else is frozen. Under autocast the operands are cast to its
    dtype, `lora_R` excepted.

    Args:
        x: [..., n], fp16, bf16 or fp32 (fp64 with the reference backend).
        weight: [m, n], frozen, dtype of `x`.
        lora_A: [r, n], frozen, dtype of `x`.
        lora_R: [r, r], trained, fp32 (fp64 with fp64 operands).
        lora_B: [m, r], frozen, dtype of `x`.
        bias: [m], frozen, or None.
        scaling: s, finite.
        dropout_p: probability, in [0, 1), that an element of the adapter's input is
            zeroed; the rest are divided by 1 − p.
        training: dropout applies only when True.
        backend: `"auto"`, `"reference"`, `"triton"` or `"cuda"`.

    Returns:
        [..., m], dtype of `x`.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that do not fit, a rank outside 1 … 512, tensors on different
            devices, a frozen argument that requires grad, a non-finite scaling, dropout
            outside [0, 1), an unknown backend.
        RuntimeError: a named backend that cannot run here.
    """
    device_type = x.device.type if isinstance(x, torch.Tensor) else "cpu"
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        x, weight, lora_A, lora_B = (t.to(dtype) for t in (x, weight, lora_A, lora_B))
        bias = None if bias is None else bias.to(dtype)
    check_arguments(x, weight, lora_A, lora_R, lora_B, bias, scaling, dropout_p)
    backend = resolve_backend(backend, x.device, x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    dropout_p = float(dropout_p) if training else 0.0
    seed = new_seed(x.device) if dropout_p > 0 else None
    y = _LoRASBLinear.apply(
        rows, weight, lora_A, lora_R, lora_B, bias, float(scaling), dropout_p, seed, backend
    )
    return y.view(*x.shape[:-1], weight.shape[0])


__all__ = ["lorasb_linear"]
