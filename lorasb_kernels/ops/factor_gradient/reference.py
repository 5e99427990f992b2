"""The gradient of a trained factor in plain PyTorch."""

import torch

from lorasb_kernels.ops.dropout import keep_mask
from lorasb_kernels.ops.precision import autocast_disabled


@autocast_disabled
def factor_gradient(left, rows, dropout_p, seed):
    dtype = torch.promote_types(rows.dtype, torch.float32)
    left, rows = left.to(dtype), rows.to(dtype)
    if dropout_p > 0:
        rows = torch.where(keep_mask(*rows.shape, dropout_p, seed), rows, 0)
        return (left.T @ rows).mul_(1 / (1 - dropout_p))
    return left.T @ rows


__all__ = ["factor_gradient"]
