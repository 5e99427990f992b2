"""Packed signs of a weight gradient in plain PyTorch."""

from lorasb_kernels.ops.bitplanes import signs_of
from lorasb_kernels.ops.precision import autocast_disabled
from lorasb_kernels.ops.token_rows import accumulator_dtype


@autocast_disabled
def sign_gradient(grad_output, x, row_weight):
    dy = grad_output.to(accumulator_dtype(x))
    if row_weight is not None:
        dy = dy * row_weight[:, None]
    return signs_of(dy.T @ x.to(dy.dtype))


__all__ = ["sign_gradient"]
