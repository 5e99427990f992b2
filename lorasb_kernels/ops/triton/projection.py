"""The kernel shared by `shrink` and `core_backward`: project onto the rank, apply the core.

    h = drop(x) Aᵀ          [M, r]
    p = s · h Rᵀ            [M, r]

`shrink` runs it on (x, A, R). `core_backward` runs it on (dy, Bᵀ, Rᵀ), where it yields
g = dy B and q = s · g R: the same single pass over one big operand.

Reads x once (M·n elements); A is read from L2 by every row tile. Writes h and p.
2·M·r·(n + r) flops, about r for each byte in 16 bits: memory bound up to ranks of 100 to 300.

* A row tile keeps all of `h` on chip as a tuple of [BLOCK_M, BLOCK_R] accumulators. A rank of 96
  costs 96 (three tiles of 32); a single power-of-two tile would cost 128.
* The core reads `h` from those accumulators, before it is rounded, and `R` in fp32.
* With few rows the columns of x are split over blocks. Each stores its partial `h`; the last block
  to arrive adds the partials in the order of their index and finishes. The order of arrival decides
  which block adds, not the order of the sum: the same bits on every run, in one launch.
* Layers that read the same x (`shrink_group`) run in one launch. A block serves one layer: a wider
  one would read A as often, since that depends on BLOCK_M alone, and leave fewer rows to the same
  registers. x comes from device memory once, as the blocks of a row tile run side by side, and no
  core is padded with the zeros of a block diagonal.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lorasb_kernels.ops.dropout import keep_threshold
from lorasb_kernels.ops.precision import dot_precision
from lorasb_kernels.ops.triton.launching import launch
from lorasb_kernels.ops.triton.parts import (
    arrives_last,
    in_units,
    keep_mask,
    launch_guard,
    sum_partials,
)
from lorasb_kernels.ops.triton.projection_tiles import column_splits, projection_tile
from lorasb_kernels.ops.triton.tiles import architecture, multiprocessors, rank_tiles

UNITS = ("N_UNIT", "R_UNIT", "XM_UNIT", "AR_UNIT", "AN_UNIT")  # see `in_units`
MAX_LAYERS = 3  # of one launch; the largest sets of siblings are q, k and v


@triton.jit(do_not_specialize=["M", "splits", "steps_per_split"])
def projection_kernel(
    x_ptr,
    a_ptr,
    r_ptr,
    a_second_ptr,
    r_second_ptr,
    a_third_ptr,
    r_third_ptr,
    h_ptr,
    p_ptr,
    partial_ptr,
    arrived_ptr,
    seed_ptr,
    M,
    n,
    r,
    stride_xm,
    stride_xn,
    stride_ar,
    stride_an,
    stride_rj,
    stride_ri,
    splits,
    steps_per_split,
    scaling,
    keep_scale,
    threshold,
    N_UNIT: tl.constexpr,
    R_UNIT: tl.constexpr,
    XM_UNIT: tl.constexpr,
    AR_UNIT: tl.constexpr,
    AN_UNIT: tl.constexpr,
    DROPOUT: tl.constexpr,
    SPLIT: tl.constexpr,
    LAYERS: tl.constexpr,
    RANK_TILES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n, r = n * N_UNIT, r * R_UNIT
    stride_xm, stride_ar, stride_an = stride_xm * XM_UNIT, stride_ar * AR_UNIT, stride_an * AN_UNIT
    # The layers of a row tile run side by side: the later ones find x in L2.
    layer = tl.program_id(0) % LAYERS
    row_tile = tl.program_id(0) // LAYERS // splits
    split = tl.program_id(0) // LAYERS % splits
    if LAYERS > 1:
        a_ptr = tl.where(layer == 1, a_second_ptr, a_ptr)
        r_ptr = tl.where(layer == 1, r_second_ptr, r_ptr)
    if LAYERS > 2:
        a_ptr = tl.where(layer == 2, a_third_ptr, a_ptr)
        r_ptr = tl.where(layer == 2, r_third_ptr, r_ptr)
    first_row = row_tile.to(tl.int64) * BLOCK_M
    tile_rows = tl.arange(0, BLOCK_M)
    rows = first_row + tile_rows  # [BLOCK_M]
    row_mask = rows < M
    ranks = tl.arange(0, BLOCK_R)
    offsets_k = tl.arange(0, BLOCK_K)
    first = split * steps_per_split * BLOCK_K
    last = tl.minimum(first + steps_per_split * BLOCK_K, n)
    ks = (first + offsets_k).to(tl.int64)
    x_ptrs = x_ptr + rows[:, None] * stride_xm + ks[None, :] * stride_xn
    a_ptrs = a_ptr + ks[:, None] * stride_an + ranks.to(tl.int64)[None, :] * stride_ar
    if DROPOUT:
        seed = tl.load(seed_ptr)

    h = ()
    for _ in tl.static_range(RANK_TILES):
        h += (tl.zeros([BLOCK_M, BLOCK_R], tl.float32),)
    for k in range(first, last, BLOCK_K):
        columns = k + offsets_k
        in_row = columns < last
        x = tl.load(x_ptrs, mask=row_mask[:, None] & in_row[None, :], other=0.0)
        if DROPOUT:
            keep = keep_mask(seed, rows, columns, n, threshold)
            x = tl.where(keep, x, 0.0)
        summed = ()
        for i in tl.static_range(RANK_TILES):
            in_rank = ranks < r - i * BLOCK_R
            a = tl.load(
                a_ptrs + i * BLOCK_R * tl.cast(stride_ar, tl.int64),
                mask=in_row[:, None] & in_rank[None, :],
                other=0.0,
            )  # [BLOCK_K, BLOCK_R]
            summed += (tl.dot(x, a, h[i], input_precision=PRECISION),)
        h = summed
        x_ptrs += BLOCK_K * tl.cast(stride_xn, tl.int64)
        a_ptrs += BLOCK_K * tl.cast(stride_an, tl.int64)

    if SPLIT:
        width = RANK_TILES * BLOCK_R
        stride_split = tl.cast(M, tl.int64) * width
        partial_ptr += layer * splits * stride_split + first_row * width
        partial_ptrs = partial_ptr + (tile_rows[:, None] * width + ranks[None, :])
        for i in tl.static_range(RANK_TILES):
            ptrs = partial_ptrs + (split * stride_split + i * BLOCK_R)
            tl.store(ptrs, h[i], mask=row_mask[:, None])
        if not arrives_last(arrived_ptr + row_tile * LAYERS + layer, splits):
            return
        # Loads in flight cost registers, of which many rank tiles or a mask leave few.
        IN_FLIGHT: tl.constexpr = 2 if DROPOUT or RANK_TILES > 4 else 4
        h = ()
        for i in tl.static_range(RANK_TILES):
            tile_ptrs = partial_ptrs + i * BLOCK_R
            h += (sum_partials(tile_ptrs, stride_split, splits, row_mask, IN_FLIGHT),)

    finished = ()
    for i in tl.static_range(RANK_TILES):
        # Padding columns of A are zero, but 0 · Inf is NaN.
        in_rank = ranks < r - i * BLOCK_R
        column = tl.where(in_rank[None, :], h[i], 0.0)
        if DROPOUT:
            column *= keep_scale
        finished += (column,)
    out = tile_rows[:, None] * r + ranks[None, :]
    h_ptr += (tl.cast(layer, tl.int64) * M + first_row) * r
    p_ptr += (tl.cast(layer, tl.int64) * M + first_row) * r
    for i in tl.static_range(RANK_TILES):
        in_rank = ranks < r - i * BLOCK_R
        tl.store(
            h_ptr + out + i * BLOCK_R,
            finished[i].to(h_ptr.dtype.element_ty),
            mask=row_mask[:, None] & in_rank[None, :],
        )
    for j in tl.range(RANK_TILES, num_stages=1):
        out_ranks = j * BLOCK_R + ranks
        p = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for i in tl.static_range(RANK_TILES):
            in_ranks = i * BLOCK_R + ranks
            core = tl.load(
                r_ptr + in_ranks[:, None] * stride_ri + out_ranks[None, :] * stride_rj,
                mask=(in_ranks < r)[:, None] & (out_ranks < r)[None, :],
                other=0.0,
            )  # [BLOCK_R (in), BLOCK_R (out)]
            p = tl.dot(finished[i], core, p, input_precision=PRECISION)
        tl.store(
            p_ptr + out + j * BLOCK_R,
            (p * scaling).to(p_ptr.dtype.element_ty),
            mask=row_mask[:, None] & (out_ranks < r)[None, :],
        )


def project(
    x: torch.Tensor,
    a: torch.Tensor,
    core: torch.Tensor,
    scaling: float,
    dropout: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns h = drop(x) aᵀ and p = s · h coreᵀ, both [M, r] in the dtype of `x`.

    Args:
        x: [M, n], any strides; vectorized loads need a contiguous last dimension.
        a: [r, n], dtype of `x`, any strides.
        core: [r, r], fp32, any strides.
        scaling, dropout, seed: as in `shrink`.
    """
    h, p = x.new_empty((x.shape[0], a.shape[0])), x.new_empty((x.shape[0], a.shape[0]))
    _launch(x, [a], [core], h, p, scaling, dropout, seed)
    return h, p


def project_group(
    x: torch.Tensor, lora_As: list[torch.Tensor], lora_Rs: list[torch.Tensor], scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns h and p of several layers, both [G, M, r] in the dtype of `x`; as `shrink_group`.

    One launch for each three layers.
    """
    shape = (len(lora_As), x.shape[0], lora_As[0].shape[0])
    h, p = x.new_empty(shape), x.new_empty(shape)
    As, Rs = ([factor.contiguous() for factor in factors] for factors in (lora_As, lora_Rs))
    for first in range(0, len(As), MAX_LAYERS):
        layers = slice(first, first + MAX_LAYERS)
        _launch(x, As[layers], Rs[layers], h[layers], p[layers], scaling, 0.0, None)
    return h, p


def _launch(x, As, cores, h, p, scaling, dropout, seed) -> None:
    """Fills `h` and `p`, [layers, M, r]; the As have equal strides, and so do the cores."""
    M, layers = x.shape[0], len(As)
    if M == 0:
        return
    plan = _plan(
        architecture(x.device),
        multiprocessors(x.device),
        x.dtype,
        x.shape,
        x.stride(),
        As[0].shape[0],
        As[0].stride(),
        cores[0].stride(),
        layers,
        dropout > 0,
        dot_precision(x.dtype),
    )
    partial = arrived = None
    if plan.partial is not None:
        partial = torch.empty(plan.partial, dtype=torch.float32, device=x.device)
        # Allocated for each call: a counter shared by calls would not be safe across streams and
        # CUDA graphs.
        arrived = torch.zeros(plan.counters, dtype=torch.int32, device=x.device)
    factors = [factor for layer in zip(As, cores, strict=True) for factor in layer]
    missing = (None,) * (2 * (MAX_LAYERS - layers))
    pointers = (x, *factors, *missing, h, p, partial, arrived, seed)
    drops = (scaling, 1 / (1 - dropout), keep_threshold(dropout))
    with launch_guard(x):
        launch(projection_kernel, plan.blocks, pointers, plan.sizes + drops, plan.constants)


class _Plan(NamedTuple):
    """What a launch of the projection needs beside its tensors and the dropout."""

    blocks: int
    partial: tuple[int, ...] | None  # shape of the fp32 partial sums, if columns are split
    counters: int
    sizes: tuple[int, ...]
    constants: dict


@functools.lru_cache(maxsize=4096)
def _plan(
    arch, processors, dtype, x_shape, x_strides, r, a_strides, r_strides, layers, masked, precision
) -> _Plan:
    M, n = x_shape
    tile = projection_tile(arch, dtype, r, M, masked)
    block_r, tiles = rank_tiles(r)
    row_tiles = triton.cdiv(M, tile.BLOCK_M)
    splits, steps_per_split = column_splits(row_tiles * layers, n, r, tile, processors)
    in_parts = (n, r, x_strides[0], *a_strides)
    (n_units, r_units, *strides), units = zip(*map(in_units, in_parts), strict=True)
    xm_units, ar_units, an_units = strides
    return _Plan(
        blocks=row_tiles * splits * layers,
        partial=(layers, splits, M, tiles * block_r) if splits > 1 else None,
        counters=row_tiles * layers,
        sizes=(
            *(M, n_units, r_units, xm_units, x_strides[1], ar_units, an_units),
            *(*r_strides, splits, steps_per_split),
        ),
        constants={
            **dict(zip(UNITS, units, strict=True)),
            "DROPOUT": masked,
            "SPLIT": splits > 1,
            "LAYERS": layers,
            "RANK_TILES": tiles,
            "BLOCK_R": block_r,
            "PRECISION": precision,
            **tile.launch_options(),
        },
    )


__all__ = ["MAX_LAYERS", "project", "project_group", "projection_kernel"]
