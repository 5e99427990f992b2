"""The main loop of `sign_accumulate` and `sign_gradient`: a tile of (w ⊙ dy)ᵀ x.

A GEMM over the tokens: both operands lie with their contraction dimension outermost, dy is
turned on its way to the tensor cores. fp32 accumulator, in registers over all tokens, summed
in the order of the tokens: the same bits on every run.

With row weights the products are fp32: w·dy rounded to 16 bits would be another gradient. dy
and x are then widened in registers and multiplied in three tf32 terms; x, exact in tf32, has
no low part. That costs up to six times the multiplications of the unweighted product, so
weights that are the same for a whole call belong into the loss.
"""

import torch
import triton
import triton.language as tl

from lorasb_kernels.ops.kernel_parts import GROUP_M, grouped_tile
from lorasb_kernels.ops.precision import dot_precision
from lorasb_kernels.ops.sign_tiles import weight_gradient_tile
from lorasb_kernels.ops.tiles import architecture


@triton.jit
def gradient_tile(
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
    """Returns the program's tile of the gradient, its rows [BLOCK_M] and its column tile."""
    row_tile, column_tile = grouped_tile(tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP_M)
    rows = row_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    token = tl.arange(0, BLOCK_K)
    # dy is loaded turned, not turned after loading: only so does Triton keep its loads in flight.
    dy_ptrs = dy_ptr + token.to(tl.int64)[None, :] * stride_dy + rows[:, None]
    x_ptrs = x_ptr + token.to(tl.int64)[:, None] * stride_x + columns[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, tokens, BLOCK_K):
        there = start + token < tokens
        dy = tl.load(dy_ptrs, mask=(rows < m)[:, None] & there[None, :], other=0.0)
        x = tl.load(x_ptrs, mask=there[:, None] & (columns < n)[None, :], other=0.0)
        if WEIGHTED:
            weight = tl.load(weight_ptr + start + token, mask=there, other=0.0)
            dy = dy.to(tl.float32) * weight[None, :]
            x = x.to(tl.float32)
        acc = tl.dot(dy, x, acc, input_precision=PRECISION)
        dy_ptrs += BLOCK_K * tl.cast(stride_dy, tl.int64)
        x_ptrs += BLOCK_K * tl.cast(stride_x, tl.int64)
    return acc, rows, column_tile


def launch_options(
    grad_output: torch.Tensor, x: torch.Tensor, weighted: bool
) -> tuple[tuple[int], dict[str, object]]:
    """Grid and constants of a kernel built on `gradient_tile`."""
    product_dtype = torch.float32 if weighted else x.dtype
    tile = weight_gradient_tile(architecture(x.device), product_dtype)
    blocks = triton.cdiv(grad_output.shape[1], tile.BLOCK_M) * triton.cdiv(x.shape[1], tile.BLOCK_N)
    constants = {
        "WEIGHTED": weighted,
        "GROUP_M": GROUP_M,
        "PRECISION": dot_precision(product_dtype),
        **tile.launch_options(),
    }
    return (blocks,), constants


__all__ = ["gradient_tile", "launch_options"]
