"""The frozen product and the expansion as two library calls: `linear`, then `addmm_`."""

import torch
import torch.nn.functional as F

from lorasb_kernels.ops.dropout import keep_mask
from lorasb_kernels.ops.precision import autocast_disabled


@autocast_disabled
def expand(x, weight, p, factor, bias, dropout_p, seed):
    y = F.linear(x, weight, bias)
    if dropout_p == 0:
        return y.addmm_(p, factor.T)
    mask = keep_mask(*y.shape, dropout_p, seed)
    return y.add_(torch.where(mask, (p @ factor.T) * (1 / (1 - dropout_p)), 0))


__all__ = ["expand"]
