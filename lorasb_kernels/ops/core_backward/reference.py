"""Backward of the core in plain PyTorch."""

from lorasb_kernels.ops.precision import autocast_disabled


@autocast_disabled
def core_backward(dy, h, lora_B, lora_R, scaling):
    g = (dy @ lora_B).to(lora_R.dtype)
    q = scaling * (g @ lora_R)
    dR = scaling * (g.T @ h.to(lora_R.dtype))
    return q.to(dy.dtype), dR


__all__ = ["core_backward"]
