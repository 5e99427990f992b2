"""Backward of the experts' cores: one pass over `dy`, then one small product for each expert.

    g[t] = dy[t] B_e, q[t] = s · g[t] R_e       [M, r]      projection kernel, on (dy, Bᵀ, Rᵀ)
    dR_e = s · Σ_{t of e} g[t]ᵀ h[t]            [E, r, r]   gradient kernel, below

A block sums up to CHUNK rows of one expert. An expert with more has several blocks: each stores its
partial sum, and the last to arrive adds them in the order of their rows, so the same inputs give
the same bits. An expert without tokens gets zeros. Reads g and h, M·r elements each,
ceil(r / BLOCK_R) times, from L2 after the first; writes dR; 2·M·r² flops.
"""

import torch
import triton
import triton.language as tl

from lorasb_kernels.ops.precision import dot_precision
from lorasb_kernels.ops.triton.experts.projection import experts_shrink
from lorasb_kernels.ops.triton.experts.segments import (
    first_tile,
    most_tiles,
    segment_of_tile,
    segments_block,
)
from lorasb_kernels.ops.triton.launching import launch
from lorasb_kernels.ops.triton.parts import arrives_last, launch_guard
from lorasb_kernels.ops.triton.tiles import architecture, gradient_tile, rank_tiles

STEPS = 8  # that a block takes at most, of BLOCK_M rows


@triton.jit(do_not_specialize=["M"])
def experts_gradient_kernel(
    g_ptr,
    h_ptr,
    dR_ptr,
    partial_ptr,
    arrived_ptr,
    offsets_ptr,
    M,
    E,
    r,
    scaling,
    SEGMENTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rank_tiles = tl.cdiv(r, BLOCK_R)
    tile = tl.program_id(0) % (rank_tiles * rank_tiles)
    chunk = tl.program_id(0) // (rank_tiles * rank_tiles)
    expert, start, end = segment_of_tile(offsets_ptr, chunk, M, E, CHUNK, SEGMENTS)
    first_chunk = first_tile(start, expert, CHUNK)
    chunks = tl.maximum(tl.cdiv(end - start, CHUNK), 1)  # one without tokens writes zeros
    if (chunk - first_chunk >= chunks) | (expert == E):
        return
    out = (tile // rank_tiles) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R], rows of dR
    in_ = (tile % rank_tiles) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R], columns of dR
    first = start + (chunk - first_chunk) * CHUNK
    last = tl.minimum(first + CHUNK, end)
    rows = first.to(tl.int64) + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    # Loaded transposed: Triton pipelines these loads only if the transpose is in the pointers.
    g_ptrs = g_ptr + rows[None, :] * r + out[:, None]
    h_ptrs = h_ptr + rows[:, None] * r + in_[None, :]

    acc = tl.zeros([BLOCK_R, BLOCK_R], tl.float32)
    for _ in range(first, last, BLOCK_M):
        in_chunk = rows < last
        g = tl.load(g_ptrs, mask=(out < r)[:, None] & in_chunk[None, :], other=0.0)
        h = tl.load(h_ptrs, mask=in_chunk[:, None] & (in_ < r)[None, :], other=0.0)
        acc = tl.dot(g, h, acc, input_precision=PRECISION)
        rows += BLOCK_M
        g_ptrs += BLOCK_M * r
        h_ptrs += BLOCK_M * r

    size = tl.cast(r, tl.int64) * r
    offsets = out[:, None] * r + in_[None, :]
    mask = (out < r)[:, None] & (in_ < r)[None, :]
    if chunks > 1:
        tl.store(partial_ptr + chunk * size + offsets, acc, mask=mask)
        if not arrives_last(arrived_ptr + expert * rank_tiles * rank_tiles + tile, chunks):
            return
        acc = tl.zeros([BLOCK_R, BLOCK_R], tl.float32)
        for other in range(first_chunk, first_chunk + chunks):
            partial_ptrs = partial_ptr + other * size + offsets
            acc += tl.load(partial_ptrs, mask=mask, other=0.0, cache_modifier=".cg")
    tl.store(dR_ptr + expert * size + offsets, acc * scaling, mask=mask)


def experts_rank_gradient(g, h, offsets, scaling) -> torch.Tensor:
    """Returns dR [E, r, r] in fp32 of two contiguous [M, r] tensors; offsets int32 [E]."""
    (M, r), E = g.shape, offsets.shape[0]
    tile = gradient_tile(architecture(g.device), g.dtype)
    block_r, tiles = rank_tiles(r)
    chunk = STEPS * tile.BLOCK_M
    chunks = most_tiles(M, E, chunk)
    dR = torch.empty((E, r, r), dtype=torch.float32, device=g.device)
    partial = torch.empty((chunks, r, r), dtype=torch.float32, device=g.device)
    arrived = torch.zeros(E * tiles * tiles, dtype=torch.int32, device=g.device)
    constants = {
        "SEGMENTS": segments_block(E),
        "CHUNK": chunk,
        "BLOCK_R": block_r,
        "PRECISION": dot_precision(g.dtype),
        **tile.launch_options(),
    }
    pointers, numbers = (g, h, dR, partial, arrived, offsets), (M, E, r, scaling)
    with launch_guard(g):
        launch(experts_gradient_kernel, chunks * tiles * tiles, pointers, numbers, constants)
    return dR


def experts_core_backward(dy, h, lora_B, lora_R, offsets, scaling):
    """Returns q [M, r] in the dtype of `dy` and dR [E, r, r] in fp32; as `core_backward`."""
    g, q = experts_shrink(dy, lora_B.mT, lora_R.mT, offsets, scaling, 0.0, None)
    return q, experts_rank_gradient(g, h.contiguous(), offsets, scaling)


__all__ = ["experts_core_backward", "experts_gradient_kernel", "experts_rank_gradient"]
