"""Packed signs of an accumulator in plain PyTorch."""

from lorasb_kernels.ops.bitplanes import signs_of


def pack_signs(acc):
    return signs_of(acc)


__all__ = ["pack_signs"]
