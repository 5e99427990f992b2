"""Gradient accumulation in plain PyTorch."""

from lorasb_kernels.ops.precision import autocast_disabled

# Tokens widened to fp32 at a time: bounds the copies of 16-bit operands.
CHUNK = 2048


@autocast_disabled
def sign_accumulate(acc, grad_output, x, row_weight):
    for start in range(0, x.shape[0], CHUNK):
        rows = slice(start, start + CHUNK)
        dy = grad_output[rows].to(acc.dtype)
        if row_weight is not None:
            dy = dy * row_weight[rows, None]
        acc.addmm_(dy.T, x[rows].to(acc.dtype))


__all__ = ["sign_accumulate"]
