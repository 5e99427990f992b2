"""Backward of the core on the GPU: one pass over `dy`, then one small product.

    g  = dy B               [M, r]   projection kernel, on (dy, Bᵀ, Rᵀ)
    q  = s · g R            [M, r]   the same launch
    dR = s · gᵀ h           [r, r]   gradient kernel, below

The gradient kernel sums over the tokens. Blocks take consecutive rows and store a partial
sum; the one that arrives last adds them in the order of their index. The number of partials
depends only on M, so the same inputs give the same bits.

Reads g and h, M·r elements each, ceil(r / BLOCK_R) times, from L2 after the first time;
writes dR; 2·M·r² flops. Between the two kernels `g` is rounded to the dtype of `dy`, as `h` is.

Partial r×r sums in the first kernel would save writing and reading `g`, but cost r²/BLOCK_M fp32
numbers per row: more than `g` from a rank of 64 on, and many times more at 512.
"""

import torch
import triton
import triton.language as tl

from lorasb_kernels.ops.precision import dot_precision
from lorasb_kernels.ops.triton.launching import launch
from lorasb_kernels.ops.triton.parts import arrives_last, launch_guard
from lorasb_kernels.ops.triton.projection import project
from lorasb_kernels.ops.triton.tiles import architecture, gradient_tile, rank_tiles, row_splits


@triton.jit(do_not_specialize=["M", "splits", "rows_per_split"])
def gradient_kernel(
    g_ptr,
    h_ptr,
    dR_ptr,
    partial_ptr,
    arrived_ptr,
    M,
    r,
    splits,
    rows_per_split,
    scaling,
    SPLIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    rank_tiles = tl.cdiv(r, BLOCK_R)
    out = (tile // rank_tiles) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R], rows of dR
    in_ = (tile % rank_tiles) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R], columns of dR
    first = split.to(tl.int64) * rows_per_split
    last = tl.minimum(first + rows_per_split, M)
    rows = first + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    # Loaded transposed: Triton pipelines these loads only if the transpose is in the pointers.
    g_ptrs = g_ptr + rows[None, :] * r + out[:, None]
    h_ptrs = h_ptr + rows[:, None] * r + in_[None, :]

    acc = tl.zeros([BLOCK_R, BLOCK_R], tl.float32)
    for _ in range(0, rows_per_split, BLOCK_M):
        in_split = rows < last
        g = tl.load(g_ptrs, mask=(out < r)[:, None] & in_split[None, :], other=0.0)
        h = tl.load(h_ptrs, mask=in_split[:, None] & (in_ < r)[None, :], other=0.0)
        acc = tl.dot(g, h, acc, input_precision=PRECISION)
        rows += BLOCK_M
        g_ptrs += BLOCK_M * r
        h_ptrs += BLOCK_M * r

    offsets = out[:, None] * r + in_[None, :]
    mask = (out < r)[:, None] & (in_ < r)[None, :]
    if SPLIT:
        tl.store(partial_ptr + split * r * r + offsets, acc, mask=mask)
        if not arrives_last(arrived_ptr + tile, splits):
            return
        acc = tl.zeros([BLOCK_R, BLOCK_R], tl.float32)
        for other in range(splits):
            partial_ptrs = partial_ptr + other * r * r + offsets
            acc += tl.load(partial_ptrs, mask=mask, other=0.0, cache_modifier=".cg")
    tl.store(dR_ptr + offsets, acc * scaling, mask=mask)


def rank_gradient(g: torch.Tensor, h: torch.Tensor, scaling: float) -> torch.Tensor:
    """Returns dR = s · gᵀ h, [r, r] in fp32, of two contiguous [M, r] tensors."""
    M, r = g.shape
    if M == 0:
        return torch.zeros((r, r), dtype=torch.float32, device=g.device)
    dR = torch.empty((r, r), dtype=torch.float32, device=g.device)
    tile = gradient_tile(architecture(g.device), g.dtype)
    block_r, tiles = rank_tiles(r)
    splits, rows_per_split = row_splits(M, tile)
    partial = arrived = None
    if splits > 1:
        partial = torch.empty((splits, r, r), dtype=torch.float32, device=g.device)
        arrived = torch.zeros(tiles * tiles, dtype=torch.int32, device=g.device)
    constants = {
        "SPLIT": splits > 1,
        "BLOCK_R": block_r,
        "PRECISION": dot_precision(g.dtype),
        **tile.launch_options(),
    }
    pointers, numbers = (g, h, dR, partial, arrived), (M, r, splits, rows_per_split, scaling)
    with launch_guard(g):
        launch(gradient_kernel, tiles * tiles * splits, pointers, numbers, constants)
    return dR


def core_backward(dy, h, lora_B, lora_R, scaling):
    g, q = project(dy, lora_B.T, lora_R.T, scaling, 0.0, None)
    return q, rank_gradient(g, h.contiguous(), scaling)


__all__ = ["core_backward", "gradient_kernel", "rank_gradient"]
