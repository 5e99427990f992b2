"""Shrink and core on the GPU: the projection kernel, run on (x, A, R)."""

from lorasb_kernels.ops.projection import project


def shrink(x, lora_A, lora_R, scaling, dropout_p, seed):
    return project(x, lora_A, lora_R, scaling, dropout_p, seed)


__all__ = ["shrink"]
