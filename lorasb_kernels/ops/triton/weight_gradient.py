"""The kernel shared by `sign_accumulate` and `sign_gradient`: the gradient of a weight.

    G = (w ⊙ dy)ᵀ x         [m, n], over all tokens of a call

`sign_accumulate` adds G to an fp32 accumulator, `sign_gradient` stores the signs of G as bits.

A GEMM over the tokens: the contraction dimension of both operands is the outermost, and dy is
transposed while loading. A block sums its tile in fp32 registers over all tokens, in their order:
the same bits on every run. Reads dy and x, each once as long as L2 holds the tiles of a group;
2·M·m·n flops. From about 500 tokens on it is bound by the tensor cores.

With row weights the products are fp32: rounding w·dy to 16 bits would change the gradient. dy and x
are then converted to fp32 in registers and multiplied in three tf32 terms; x is exact in tf32 and
has no low part. That costs up to six times the multiplications of the unweighted product, so
weights that are the same for a whole call should be put into the loss.
"""

import torch
import triton
import triton.language as tl

from lorasb_kernels.ops.bitplanes import words
from lorasb_kernels.ops.precision import dot_precision
from lorasb_kernels.ops.triton.bitplanes import store_signs
from lorasb_kernels.ops.triton.parts import GROUP_M, grouped_tile, launch_guard
from lorasb_kernels.ops.triton.sign_tiles import weight_gradient_tile
from lorasb_kernels.ops.triton.tiles import architecture


@triton.jit(do_not_specialize=["tokens"])
def weight_gradient_kernel(
    acc_ptr,
    positive_ptr,
    negative_ptr,
    dy_ptr,
    x_ptr,
    weight_ptr,
    tokens,
    m,
    n,
    stride_acc,
    stride_dy,
    stride_x,
    SIGNS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    row_tile, column_tile = grouped_tile(tl.program_id(0), tiles[0], tiles[1], GROUP_M)
    rows = row_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    token = tl.arange(0, BLOCK_K)
    # Loaded transposed: Triton pipelines these loads only if the transpose is in the pointers.
    dy_ptrs = dy_ptr + token.to(tl.int64)[None, :] * stride_dy + rows[:, None]
    x_ptrs = x_ptr + token.to(tl.int64)[:, None] * stride_x + columns[None, :]
    gradient = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, tokens, BLOCK_K):
        there = start + token < tokens
        dy = tl.load(dy_ptrs, mask=(rows < m)[:, None] & there[None, :], other=0.0)
        x = tl.load(x_ptrs, mask=there[:, None] & (columns < n)[None, :], other=0.0)
        if WEIGHTED:
            weight = tl.load(weight_ptr + start + token, mask=there, other=0.0)
            dy = dy.to(tl.float32) * weight[None, :]
            x = x.to(tl.float32)
        gradient = tl.dot(dy, x, gradient, input_precision=PRECISION)
        dy_ptrs += BLOCK_K * tl.cast(stride_dy, tl.int64)
        x_ptrs += BLOCK_K * tl.cast(stride_x, tl.int64)

    if SIGNS:
        store_signs(positive_ptr, negative_ptr, gradient, rows, column_tile, m, n, BLOCK_M, BLOCK_N)
    else:
        acc_ptrs = acc_ptr + rows[:, None] * stride_acc + columns[None, :]
        mask = (rows < m)[:, None] & (columns < n)[None, :]
        tl.store(acc_ptrs, tl.load(acc_ptrs, mask=mask) + gradient, mask=mask)


def sum_tokens(
    dy: torch.Tensor,
    x: torch.Tensor,
    row_weight: torch.Tensor | None,
    *,
    acc: torch.Tensor | None = None,
    planes: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Adds G to `acc`, or stores its signs in `planes`; exactly one of them must be given.

    Args:
        dy: [M, m], last dimension contiguous.
        x: [M, n], dtype of `dy`, last dimension contiguous.
        row_weight: [M] in fp32, or None for 1 each.
        acc: [m, n] in fp32, last dimension contiguous.
        planes: positive and negative, int32 [m, ceil(n/32)] each, contiguous.
    """
    (tokens, n), m = x.shape, dy.shape[1]
    product_dtype = x.dtype if row_weight is None else torch.float32
    tile = weight_gradient_tile(architecture(x.device), product_dtype)
    positive, negative = planes or (None, None)
    with launch_guard(x):
        weight_gradient_kernel[(triton.cdiv(m, tile.BLOCK_M) * triton.cdiv(n, tile.BLOCK_N),)](
            acc,
            positive,
            negative,
            dy,
            x,
            row_weight,
            tokens,
            m,
            n,
            0 if acc is None else acc.stride(0),
            dy.stride(0),
            x.stride(0),
            SIGNS=planes is not None,
            WEIGHTED=row_weight is not None,
            GROUP_M=GROUP_M,
            PRECISION=dot_precision(product_dtype),
            **tile.launch_options(),
        )


def sign_accumulate(acc, grad_output, x, row_weight):
    """`acc += (w ⊙ dy)ᵀ x`: every block adds its tile to `acc` once, 8·m·n bytes per call."""
    if x.shape[0] > 0:
        sum_tokens(grad_output, x, row_weight, acc=acc)


def sign_gradient(grad_output, x, row_weight):
    """The planes of sign((w ⊙ dy)ᵀ x): 32 columns are packed into a word in registers."""
    shape = (grad_output.shape[1], words(x.shape[1]))
    positive, negative = (torch.empty(shape, dtype=torch.int32, device=x.device) for _ in range(2))
    sum_tokens(grad_output, x, row_weight, planes=(positive, negative))
    return positive, negative


__all__ = ["sign_accumulate", "sign_gradient", "sum_tokens", "weight_gradient_kernel"]
