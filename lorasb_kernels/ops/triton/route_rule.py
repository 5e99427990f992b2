"""The route of a shape that nothing has measured: the performance model's, where it is clear.

A pure function of the sizes. Nothing is compiled or timed and no device is asked, so that every
process decides alike, also inside CUDA graphs, under `torch.compile` and in deterministic mode.

The model (`hardware/limits.py`) predicts the two calls as the vendor's GEMMs, and the fused kernels
in every tile from the counts of their compiled code. A fused kernel is taken if it is predicted to
be faster by more than `MARGIN`, which is about what the model errs on published GEMMs
(docs/performance_model.md). That is so where the contraction is short or there are few tokens: the
two calls write y once more and wait for one more launch. fp32 and dropout were not counted: two
calls.
"""

import functools
import math
from typing import NamedTuple

import torch

from lorasb_kernels.hardware.counts import counts_of
from lorasb_kernels.hardware.gemm import gemm, operand_traffic
from lorasb_kernels.hardware.gpus import GPUS, OF_ARCHITECTURE, Gpu
from lorasb_kernels.hardware.limits import (
    MMA_SYNC_ON_HOPPER,
    Limits,
    Part,
    Work,
    limits,
    total,
)
from lorasb_kernels.ops.triton.tiles import (
    EXPAND_BLOCK_R,
    EXPAND_CANDIDATES,
    GROUP_M,
    ExpandTile,
    descriptor_candidates,
    expand_tile,
    rank_tiles,
)
from lorasb_kernels.ops.two_call import FROZEN_FIRST_FROM

MARGIN = 0.10
ITEMSIZE = 2


class Rule(NamedTuple):
    """A route of `route_files.ROUTES`, the tile of its kernel, and why."""

    name: str
    tile: ExpandTile
    reason: str


@functools.lru_cache(maxsize=4096)
def unmeasured_route(
    arch: str,
    dtype: torch.dtype,
    M: int,
    N: int,
    K: int,
    r: int,
    transposed: bool,
    dropout: bool,
    aligned: bool = True,
) -> Rule:
    """The route of `expand` for M rows, N outputs, a contraction over K and rank r.

    The same for all shapes of a class, as `route_decision.Shape.key` has them: M counts as the next
    power of two, r as its tiles.

    Args:
        arch: `"sm_86"` and so on.
        dtype: of the operands.
        M, N, K, r: sizes.
        transposed: whether the weight is a transposed view, as for the input gradient.
        dropout: whether there is a mask.
        aligned: False if an operand cannot be described by a tensor map.
    """
    tile = expand_tile(arch, dtype, dropout)
    if dropout or dtype.itemsize != ITEMSIZE or min(M, N, K) < 1:
        return Rule("two_call", tile, "no prediction for fp32 or dropout")
    if arch not in OF_ARCHITECTURE:
        return Rule("two_call", tile, f"no kernel was counted on {arch}")
    gpu = GPUS[OF_ARCHITECTURE[arch]]
    M, r = 1 << (M - 1).bit_length(), math.prod(rank_tiles(r))
    two = two_call_limits(gpu, M, N, K, r).total
    found = {}
    for name, tiles in fused_tiles(arch, dtype, aligned and not any(s % 8 for s in (N, K, r))):
        for candidate in tiles:
            predicted = fused_limits(gpu, arch, M, N, K, r, transposed, name, candidate)
            if predicted is not None:
                found[name, candidate] = predicted.total
    if not found:
        return Rule("two_call", tile, "no fused kernel was counted")
    (name, fastest), fused = min(found.items(), key=lambda item: item[1])
    times = f"predicted for {gpu.key}: two_call {1e6 * two:.1f} µs, {name} {1e6 * fused:.1f} µs"
    if fused < (1 - MARGIN) * two:
        return Rule(name, fastest, times)
    return Rule("two_call", tile, f"{times}; a fused kernel must be {MARGIN:.0%} faster")


def fused_tiles(arch: str, dtype: torch.dtype, described: bool):
    """The fused routes with their tiles; `described` says that tensor maps fit the operands."""
    yield "fused", dict.fromkeys((expand_tile(arch, dtype, False), *EXPAND_CANDIDATES[ITEMSIZE]))
    if described:
        yield "fused_descriptor", descriptor_candidates(arch, dtype, False)


def two_call_limits(
    gpu: Gpu, M: int, N: int, K: int, r: int, frozen_first: bool | None = None
) -> Limits:
    """The limits of `two_call`: both products, in its order or the one asked for.

    p comes from L2, where the projection left it; so does y, if half of L2 holds it.
    """
    if frozen_first is None:
        frozen_first = K >= FROZEN_FIRST_FROM
    p = M * r * ITEMSIZE if M * r * ITEMSIZE <= gpu.l2_bytes / 2 else 0
    kept = gpu.l2_bytes / 2 >= M * N * ITEMSIZE
    frozen = gemm(gpu, M, N, K, adds=not frozen_first, resident_output=kept)
    delta = gemm(gpu, M, N, r, adds=frozen_first, resident_output=kept, resident_inputs=p)
    return total([frozen, delta])


def fused_limits(
    gpu: Gpu,
    arch: str,
    M: int,
    N: int,
    K: int,
    r: int,
    transposed: bool,
    name: str,
    tile: ExpandTile,
) -> Limits | None:
    """The limits of a fused route in a tile, for the kernel compiled for `arch`.

    Returns:
        None if the kernel was not counted in this tile.
    """
    kernel = {"fused": "expand", "fused_descriptor": "expand_descriptor"}[name]
    counts = counts_of(arch, kernel, "dx" if transposed else "forward", tile)
    if counts is None:
        return None
    rows, columns = tile.BLOCK_M, tile.BLOCK_N
    blocks = math.ceil(M / rows) * math.ceil(N / columns)
    # By tensor maps one loop runs over both, and its loads run ahead into the next tile.
    loops = [loop for loop in counts.loops if loop.flops]
    merged = len(loops) == 1
    rank_step = tile.BLOCK_K if merged else EXPAND_BLOCK_R
    steps = (math.ceil(r / rank_step), math.ceil(K / tile.BLOCK_K))
    depth = steps[0] * rank_step + steps[1] * tile.BLOCK_K
    rank_loop, main_loop = loops[0], loops[-1]
    read = operand_traffic(
        *(gpu, (M, N, K), (rows, columns), counts.blocks * gpu.multiprocessors, ITEMSIZE),
        down=GROUP_M,
    )
    written = M * N * ITEMSIZE
    work = Work(
        blocks=blocks,
        resident=counts.blocks,
        warps=tile.num_warps,
        parts=(Part(rank_loop, steps[0]), Part(main_loop, steps[1]), Part(counts.once, 1)),
        in_flight=tile.num_stages - 1,
        memory_bytes=read + written + N * r * ITEMSIZE,
        l2_bytes=blocks * (rows + columns) * depth * ITEMSIZE + written,
        tensor_share=MMA_SYNC_ON_HOPPER if arch == "sm_90" and not counts.wgmma else 1.0,
        turns=2 if merged else 3,  # two loops fill one after the other
    )
    return limits(work, gpu)


__all__ = ["MARGIN", "Rule", "fused_limits", "fused_tiles", "two_call_limits", "unmeasured_route"]
