"""Adds the weight gradient of some tokens to an fp32 accumulator.

    acc += (w ⊙ dy)ᵀ x       [m, n]

Reads dy, x and acc, writes acc: 8·m·n bytes of accumulator and M·(m + n) elements; 2·M·m·n flops.
Products and sums are fp32: dy is scaled by its row's weight in fp32 and not rounded to 16 bits
again.
"""

import torch

from lorasb_kernels.ops.dispatch import BackendOperator, resolve_backend
from lorasb_kernels.ops.token_rows import accumulator_dtype, token_rows


def _fake(acc, grad_output, x, row_weight):
    return None


def _flops(acc, grad_output, *_):
    (m, n), (M, _) = acc, grad_output
    return 2 * M * m * n


_operator = BackendOperator(
    "sign_accumulate",
    "(Tensor(a!) acc, Tensor grad_output, Tensor x, Tensor? row_weight) -> ()",
    fake=_fake,
    flops=_flops,
)


def sign_accumulate_(
    acc: torch.Tensor,
    grad_output: torch.Tensor,
    x: torch.Tensor,
    row_weight: torch.Tensor | None = None,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Adds `(row_weight ⊙ grad_output)ᵀ x` to `acc` in place and returns `acc`.

    Calls for successive chunks of tokens add up to the gradient of all of them. The sum is in fp32,
    so two ways of splitting the tokens agree up to rounding, and the same split gives the same
    bits.

    Args:
        acc: [m, n], fp32 (fp64 with fp64 operands), last dimension contiguous.
        grad_output: dy, [..., m], fp16, bf16 or fp32 (fp64 with the reference backend).
        x: [..., n], leading dimensions and dtype of `grad_output`.
        row_weight: [...], the leading dimensions, in the dtype of `acc`: the weight of
            each token; None for 1 each.
        backend: `"auto"`, `"reference"`, `"triton"` or `"cuda"`.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that do not fit, tensors on different devices, an accumulator
            whose last dimension is not contiguous, an unknown backend.
        RuntimeError: a named backend that cannot run here.
    """
    grad_output, x, row_weight = token_rows(grad_output, x, row_weight)
    _check_accumulator(acc, grad_output, x)
    backend = resolve_backend(backend, x.device, x.dtype)
    _operator(backend, acc, grad_output, x, row_weight)
    return acc


def _check_accumulator(acc: torch.Tensor, grad_output: torch.Tensor, x: torch.Tensor) -> None:
    if not isinstance(acc, torch.Tensor):
        raise TypeError(f"acc is a {type(acc).__name__}; expected a torch.Tensor")
    shape = (grad_output.shape[1], x.shape[1])
    if acc.shape != shape:
        raise ValueError(f"acc has shape {tuple(acc.shape)}; expected {shape}")
    if acc.dtype != accumulator_dtype(x):
        raise TypeError(f"acc has dtype {acc.dtype}; expected {accumulator_dtype(x)}")
    if acc.device != x.device:
        raise ValueError(f"acc is on {acc.device}; expected {x.device}, where x is")
    if acc.requires_grad:
        raise ValueError("acc requires grad; expected a plain buffer")
    if acc.stride(1) != 1:
        raise ValueError(f"acc has strides {acc.stride()}; expected a contiguous last dimension")


__all__ = ["sign_accumulate_"]
