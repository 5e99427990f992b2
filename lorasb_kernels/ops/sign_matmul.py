"""Product of a packed sign matrix, or its transpose, with a dense one.

    S Z      [m, n]·[n, q] → [m, q]
    Sᵀ Z     [n, m]·[m, q] → [n, q]

Reads m·n/4 bytes of planes and Z, writes the product; 2·m·n·q flops. The dense sign
matrix, 16 times as large in fp32, is never formed as a whole.
"""

import torch

from lorasb_kernels.ops.bitplanes import check_planes
from lorasb_kernels.ops.dispatch import BackendOperator, resolve_backend


def _fake(positive, negative, dense, columns, transpose):
    return dense.new_empty(columns if transpose else positive.shape[0], dense.shape[1])


def _flops(positive, negative, dense, columns, *_):
    (m, _), (_, q) = positive, dense
    return 2 * m * columns * q


_operator = BackendOperator(
    "sign_matmul",
    "(Tensor positive, Tensor negative, Tensor dense, int columns, bool transpose) -> Tensor",
    fake=_fake,
    flops=_flops,
)


def sign_matmul(
    positive: torch.Tensor,
    negative: torch.Tensor,
    dense: torch.Tensor,
    columns: int,
    transpose: bool = False,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Returns S Z, or Sᵀ Z when `transpose`, in fp32.

    Args:
        positive, negative: bit planes of S [m, n], int32 [m, ceil(n/32)].
        dense: Z, fp32, [n, q], or [m, q] when `transpose`.
        columns: n.
        transpose: multiply by the transpose.
        backend: `"auto"`, `"reference"`, `"triton"` or `"cuda"`.

    Returns:
        fp32 [m, q], or [n, q] when `transpose`. An element of S with both bits set counts
        as NaN.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that do not fit, tensors on different devices, an unknown backend.
        RuntimeError: a named backend that cannot run here.
    """
    check_planes(positive, negative, columns)
    if not isinstance(dense, torch.Tensor):
        raise TypeError(f"dense is a {type(dense).__name__}; expected a torch.Tensor")
    if dense.dtype != torch.float32:
        raise TypeError(f"dense has dtype {dense.dtype}; expected float32")
    rows = positive.shape[0] if transpose else columns
    if dense.dim() != 2 or dense.shape[0] != rows:
        raise ValueError(f"dense has shape {tuple(dense.shape)}; expected [{rows}, q]")
    if dense.device != positive.device:
        raise ValueError(
            f"dense is on {dense.device}; expected {positive.device}, where positive is"
        )
    backend = resolve_backend(backend, dense.device, dense.dtype)
    positive, negative = positive.contiguous(), negative.contiguous()
    return _operator(backend, positive, negative, dense.detach(), columns, transpose)


__all__ = ["sign_matmul"]
