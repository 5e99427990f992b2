"""Gradient accumulation on the GPU: `acc += (w ⊙ dy)ᵀ x`.

One launch: every block sums its tile over all tokens in registers, then adds it to `acc`
once. Reads dy and x, each once as far as L2 holds the tiles of a group, reads and writes acc
(8·m·n bytes); 2·M·m·n flops. From M of about 500 tokens on it is bound by the tensor cores.
"""

import triton
import triton.language as tl

from lorasb_kernels.ops.kernel_parts import launch_guard
from lorasb_kernels.ops.weight_gradient import gradient_tile, launch_options


@triton.jit
def sign_accumulate_kernel(
    acc_ptr,
    dy_ptr,
    x_ptr,
    weight_ptr,
    tokens,
    m,
    n,
    stride_acc,
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
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    acc_ptrs = acc_ptr + rows[:, None] * stride_acc + columns[None, :]
    mask = (rows < m)[:, None] & (columns < n)[None, :]
    tl.store(acc_ptrs, tl.load(acc_ptrs, mask=mask) + product, mask=mask)


def sign_accumulate(acc, grad_output, x, row_weight):
    tokens, n = x.shape
    m = grad_output.shape[1]
    if tokens == 0:
        return
    grid, constants = launch_options(grad_output, x, row_weight is not None)
    with launch_guard(x):
        sign_accumulate_kernel[grid](
            acc,
            grad_output,
            x,
            row_weight,
            tokens,
            m,
            n,
            acc.stride(0),
            grad_output.stride(0),
            x.stride(0),
            **constants,
        )


__all__ = ["sign_accumulate", "sign_accumulate_kernel"]
