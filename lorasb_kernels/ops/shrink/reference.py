"""Shrink and core in plain PyTorch."""

import torch

from lorasb_kernels.ops.dropout import keep_mask
from lorasb_kernels.ops.precision import autocast_disabled


@autocast_disabled
def shrink(x, lora_A, lora_R, scaling, dropout_p, seed):
    if dropout_p > 0:
        mask = keep_mask(*x.shape, dropout_p, seed)
        x = torch.where(mask, x * (1 / (1 - dropout_p)), 0)
    h = x @ lora_A.T
    p = scaling * (h.to(lora_R.dtype) @ lora_R.T)
    return h, p.to(x.dtype)


__all__ = ["shrink"]
