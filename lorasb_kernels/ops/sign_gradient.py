"""Packed signs of the weight gradient of all tokens, in one shot.

    sign((w ⊙ dy)ᵀ x)        [m, n], 2 bits per element

Reads dy and x, writes m·n/4 bytes; 2·M·m·n flops. The fp32 sum stays in registers.
Compared with accumulating this saves 8·m·n bytes of traffic per call and 4·m·n bytes of memory.
"""

import torch

from lorasb_kernels.ops.bitplanes import words
from lorasb_kernels.ops.dispatch import BackendOperator, resolve_backend
from lorasb_kernels.ops.token_rows import token_rows


def _fake(grad_output, x, row_weight):
    shape = (grad_output.shape[1], words(x.shape[1]))
    return x.new_empty(shape, dtype=torch.int32), x.new_empty(shape, dtype=torch.int32)


def _flops(grad_output, x, *_):
    (M, m), (_, n) = grad_output, x
    return 2 * M * m * n


_operator = BackendOperator(
    "sign_gradient",
    "(Tensor grad_output, Tensor x, Tensor? row_weight) -> (Tensor positive, Tensor negative)",
    fake=_fake,
    flops=_flops,
)


def sign_gradient(
    grad_output: torch.Tensor,
    x: torch.Tensor,
    row_weight: torch.Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the bit planes of the signs of `(row_weight ⊙ grad_output)ᵀ x`.

    Args:
        grad_output: dy, [..., m], fp16, bf16 or fp32 (fp64 with the reference backend).
        x: [..., n], leading dimensions and dtype of `grad_output`.
        row_weight: [...], the leading dimensions, fp32 (fp64 with fp64 operands): the
            weight of each token; None for 1 each.
        backend: `"auto"`, `"reference"`, `"triton"` or `"cuda"`.

    Returns:
        positive, negative: int32 [m, ceil(n/32)] each; see `SignMatrix` for the layout.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that do not fit, tensors on different devices, an unknown backend.
        RuntimeError: a named backend that cannot run here.
    """
    grad_output, x, row_weight = token_rows(grad_output, x, row_weight)
    backend = resolve_backend(backend, x.device, x.dtype)
    return _operator(backend, grad_output, x, row_weight)


__all__ = ["sign_gradient"]
