"""Packed signs of a weight gradient on the GPU, in one launch.

    sign((w ⊙ dy)ᵀ x)        [m, n], 2 bits an element

A tile of the gradient is summed over all tokens in registers and leaves them as bits: 32
columns are packed into a word by a reduction. Reads dy and x, each once as far as L2 holds
the tiles of a group, writes m·n/4 bytes; 2·M·m·n flops.
"""

import torch
import triton
import triton.language as tl

from lorasb_kernels.ops.bitplane_tiles import store_signs
from lorasb_kernels.ops.bitplanes import words
from lorasb_kernels.ops.kernel_parts import launch_guard
from lorasb_kernels.ops.weight_gradient import gradient_tile, launch_options


@triton.jit
def sign_gradient_kernel(
    positive_ptr,
    negative_ptr,
    dy_ptr,
    x_ptr,
    weight_ptr,
    tokens,
    m,
    n,
    stride_dy,
    stride_x,
    WEIGHTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    product, rows, column_tile = gradient_tile(
        dy_ptr,
        x_ptr,
        weight_ptr,
        tokens,
        m,
        n,
        stride_dy,
        stride_x,
        WEIGHTED,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        GROUP_M,
        PRECISION,
    )
    store_signs(positive_ptr, negative_ptr, product, rows, column_tile, m, n, BLOCK_M, BLOCK_N)


def sign_gradient(grad_output, x, row_weight):
    tokens, n = x.shape
    m = grad_output.shape[1]
    positive, negative = (
        torch.empty((m, words(n)), dtype=torch.int32, device=x.device) for _ in range(2)
    )
    grid, constants = launch_options(grad_output, x, row_weight is not None)
    with launch_guard(x):
        sign_gradient_kernel[grid](
            positive,
            negative,
            grad_output,
            x,
            row_weight,
            tokens,
            m,
            n,
            grad_output.stride(0),
            x.stride(0),
            **constants,
        )
    return positive, negative


__all__ = ["sign_gradient", "sign_gradient_kernel"]
