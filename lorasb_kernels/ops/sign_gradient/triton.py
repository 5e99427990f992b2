"""Packed signs of a weight gradient on the GPU, in one launch.

    sign((w ⊙ dy)ᵀ x)        [m, n], 2 bits an element

A tile of the gradient is summed over all tokens in registers and leaves them as bits: 32
columns are packed into a word by a reduction. Writes m·n/4 bytes, see `weight_gradient.py`.
"""

import torch

from lorasb_kernels.ops.bitplanes import words
from lorasb_kernels.ops.weight_gradient import sum_tokens


def sign_gradient(grad_output, x, row_weight):
    shape = (grad_output.shape[1], words(x.shape[1]))
    positive, negative = (torch.empty(shape, dtype=torch.int32, device=x.device) for _ in range(2))
    sum_tokens(grad_output, x, row_weight, planes=(positive, negative))
    return positive, negative


__all__ = ["sign_gradient"]
