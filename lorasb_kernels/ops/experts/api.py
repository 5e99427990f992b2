"""The adapted experts of a mixture as a function: one call for all experts, differentiable once."""

import torch

from lorasb_kernels.ops.dropout import new_seed
from lorasb_kernels.ops.experts.checks import check_experts
from lorasb_kernels.ops.experts.operators import (
    experts_core_backward,
    experts_expand,
    experts_shrink,
    resolve_experts_backend,
)
from lorasb_kernels.ops.lorasb_linear.operands import as_rows
from lorasb_kernels.ops.precision import autocast_dtype


def experts_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    A: torch.Tensor,
    R: torch.Tensor,
    B: torch.Tensor,
    offsets: torch.Tensor,
    *,
    scaling: float = 1.0,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    is_transposed: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Applies E frozen linear layers with adapters to tokens sorted by expert.

    For a token t of expert e, `y[t] = x[t] W_eᵀ + s · drop(x[t]) A_eᵀ R_eᵀ B_eᵀ + bias_e`.
    Differentiable once, with respect to x and R; the rest is frozen. Only `drop(x) Aᵀ` (M·r
    elements) is kept for backward, and only if R requires grad. dR is summed in fp32 in a fixed
    order: the same inputs give the same bits. On CUDA nothing waits for the offsets.

    Reads W, A and B of the experts that have tokens, once a row tile; 2·M·(m·n + r·(m + n + r))
    flops. Under autocast x, W, A, B and bias are cast to its dtype.

    Args:
        x: [M, n], fp16, bf16, fp32 or fp64. The tokens of expert e are the rows
            offsets[e−1] … offsets[e]; rows past the last offset belong to no expert and get zeros
            in y and in the gradient of x.
        weight: [E, m, n], frozen, dtype of `x`, any strides; [E, n, m] if `is_transposed`.
        A: [E, r, n], or [1, r, n] shared by the experts; frozen, dtype of `x` or fp32.
        R: [E, r, r], fp32 (fp64 with fp64 operands).
        B: [E, m, r], or [1, m, r] shared by the experts; frozen, dtype of `x` or fp32.
        offsets: int32 [E], cumulative ends, on the device of `x`, as `torch._grouped_mm` takes
            them. Their values are checked on the CPU only.
        scaling: s, finite.
        bias: [E, m], frozen, dtype of `x`, or None.
        dropout_p: probability, in [0, 1), that an element of the adapter's input is zeroed; the
            rest are divided by 1 − p.
        seed: int64 [1] of the dropout mask, on the device of `x`; None for a fresh one.
        is_transposed: whether `weight` is [E, n, m].
        backend: `"auto"`, `"reference"` or `"triton"`.

    Returns:
        [M, m], dtype of `x`.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that do not fit, a rank outside 1 … 512, tensors on different devices, a
            frozen operand that requires grad, offsets on the CPU that decrease or are outside
            0 … M, a non-finite scaling, a dropout probability outside [0, 1), an unknown backend.
        RuntimeError: a named backend that cannot run here.
    """
    if all(isinstance(t, torch.Tensor) for t in (x, weight, A, B)):
        x, weight, A, B, bias = _autocast(x, weight, A, B, bias)
    check_experts(x, weight, A, R, B, offsets, scaling, bias, dropout_p, seed, is_transposed)
    backend = resolve_experts_backend(backend, x.device, x.dtype)
    if dropout_p == 0:
        seed = None
    elif seed is None:
        seed = new_seed(x.device)
    weight = weight.mT if is_transposed else weight
    A, B = A.to(x.dtype), B.to(x.dtype)
    settings = (float(scaling), float(dropout_p), seed, backend)
    operands = (as_rows(x), R, A, B, weight, bias, offsets.contiguous())
    return _ExpertsFunction.apply(*operands, *settings)


def _autocast(*operands):
    """The operands in the dtype of autocast, where that is on."""
    dtype = autocast_dtype(operands[0].device.type)
    if dtype is None:
        return operands
    return tuple(t.to(dtype) if isinstance(t, torch.Tensor) else t for t in operands)


class _ExpertsFunction(torch.autograd.Function):
    """All experts as one node that saves h, and it only if R trains."""

    @staticmethod
    def forward(ctx, x, R, A, B, weight, bias, offsets, scaling, dropout, seed, backend):
        h, p = experts_shrink(backend, x, A, R, offsets, scaling, dropout, seed)
        y = experts_expand(backend, x, weight, p, B, bias, offsets, 0.0, None)
        ctx.save_for_backward(
            h if ctx.needs_input_grad[1] else None, R, A, B, weight, offsets, seed
        )
        ctx.settings = (scaling, dropout, backend)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        h, R, A, B, weight, offsets, seed = ctx.saved_tensors
        trains_x, trains_R = ctx.needs_input_grad[:2]
        scaling, dropout, backend = ctx.settings
        dy, dx, dR = as_rows(dy), None, None
        if trains_R:
            q, dR = experts_core_backward(backend, dy, h, B, R, offsets, scaling)
        else:  # g and q have the form of h and p
            _, q = experts_shrink(backend, dy, B.mT, R.mT, offsets, scaling, 0.0, None)
        if trains_x:
            dx = experts_expand(backend, dy, weight.mT, q, A.mT, None, offsets, dropout, seed)
        return dx, dR, *(None,) * 9


__all__ = ["experts_linear"]
