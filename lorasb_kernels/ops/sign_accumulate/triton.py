"""Gradient accumulation on the GPU: `acc += (w ⊙ dy)ᵀ x`, in one launch.

Every block sums its tile over all tokens in registers, then adds it to `acc` once: 8·m·n bytes
of accumulator a call, see `weight_gradient.py`.
"""

from lorasb_kernels.ops.weight_gradient import sum_tokens


def sign_accumulate(acc, grad_output, x, row_weight):
    if x.shape[0] > 0:
        sum_tokens(grad_output, x, row_weight, acc=acc)


__all__ = ["sign_accumulate"]
