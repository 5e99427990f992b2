"""Predicted time of the launches of an adapted layer, limit by limit, for every route. 16 bits.

The kernels are predicted from the counts of their compiled code, the vendor's GEMMs by
`hardware/gemm.py`. What one launch leaves for the next is read from L2 if half of L2 holds it.
"""

import functools
import math
from dataclasses import dataclass

import torch

from lorasb_kernels.hardware.counts import Counts, counts_of
from lorasb_kernels.hardware.gemm import gemm
from lorasb_kernels.hardware.gpus import Gpu
from lorasb_kernels.hardware.limits import MMA_SYNC_ON_HOPPER, Limits, Part, Work, limits
from lorasb_kernels.ops.triton.projection_tiles import column_splits, projection_tile
from lorasb_kernels.ops.triton.route_rule import (
    fused_limits,
    fused_tiles,
    two_call_limits,
    unmeasured_route,
)
from lorasb_kernels.ops.triton.tiles import gradient_tile, rank_tiles, row_splits

DTYPE = torch.bfloat16
E = DTYPE.itemsize
# How many layers one launch of the projection serves, and partial sums in flight (`projection.py`).
GROUP = 3
PARTIALS_IN_FLIGHT = 4
# A persistent GEMM with two pairs of operands, against the vendor's own of the same size. Assumed.
DUAL_OVERHEAD = 1.01


@dataclass(frozen=True)
class Launch:
    """One launch: what runs, in which tile (empty for the vendor's), and its limits."""

    name: str
    tile: str
    limits: Limits


def tables_of(gpu: Gpu) -> str:
    """The architecture whose tiles and counts stand for a GPU's: sm_120 was not counted."""
    return "sm_89" if gpu.arch == "sm_120" else gpu.arch


def memset(gpu: Gpu) -> Launch:
    """Zeroing a few counters."""
    return Launch("memset", "", Limits(latency=gpu.rates.latency, launch=gpu.rates.launch))


def elementwise(gpu: Gpu, bytes_: float) -> Launch:
    """A pass that moves `bytes_` to and from device memory."""
    moved = bytes_ / gpu.rates.bandwidth
    return Launch("add", "", Limits(moved, latency=gpu.rates.latency, launch=gpu.rates.launch))


@functools.lru_cache(maxsize=4096)
def projection(gpu: Gpu, M: int, n: int, r: int, layers: int = 1) -> tuple[Launch, ...]:
    """`shrink` of up to three layers on one input; and the memset of its counters, if split."""
    arch = tables_of(gpu)
    tile = projection_tile(arch, DTYPE, r, M, False)
    width, tiles = rank_tiles(r)
    padded = width * tiles
    row_tiles = math.ceil(M / tile.BLOCK_M)
    splits, steps = column_splits(row_tiles * layers, n, r, tile, gpu.multiprocessors)
    counts = _projection_counts(arch, padded, splits > 1, layers, tile)
    products = [loop for loop in counts.loops if loop.flops]
    sums = [loop for loop in counts.loops if not loop.flops]
    blocks = row_tiles * splits * layers
    finishing = 1 / splits  # the last of the blocks that share a row tile
    parts = [Part(products[0], steps), Part(counts.once, 1)]
    parts += [Part(scaled(loop, finishing * tiles), 1) for loop in products[1:]]
    parts += [Part(scaled(loop, finishing * splits / PARTIALS_IN_FLIGHT), 1) for loop in sums]
    out = 2 * M * r * layers * E
    partials = 4 * M * padded * splits * layers if splits > 1 else 0
    work = Work(
        blocks=blocks,
        resident=counts.blocks,
        warps=tile.num_warps,
        parts=tuple(parts),
        in_flight=tile.num_stages - 1,
        memory_bytes=E * (M * n + layers * r * n) + 4 * r * r * layers + out,
        l2_bytes=blocks * steps * tile.BLOCK_K * (tile.BLOCK_M + padded) * E + out + 2 * partials,
        tensor_share=_tensor_share(gpu, counts),
        turns=2 + (1 + math.ceil(splits / PARTIALS_IN_FLIGHT) if splits > 1 else 0),
    )
    launch = Launch("projection", str(tile), limits(work, gpu))
    return (memset(gpu), launch) if splits > 1 else (launch,)


@functools.lru_cache(maxsize=4096)
def rank_gradient(gpu: Gpu, M: int, r: int) -> tuple[Launch, ...]:
    """dR = s·gᵀh and the memset of its counters; g and h are in L2 where half of it holds them."""
    arch = tables_of(gpu)
    tile = gradient_tile(arch, DTYPE)
    width, tiles = rank_tiles(r)
    splits, rows = row_splits(M, tile)
    counts = counts_of(arch, "gradient", f"width={width}", tile)
    products = [loop for loop in counts.loops if loop.flops]
    sums = [loop for loop in counts.loops if not loop.flops]
    read = 2 * M * r * E
    blocks = tiles * tiles * splits
    parts = [Part(products[0], math.ceil(rows / tile.BLOCK_M)), Part(counts.once, 1)]
    parts += [Part(scaled(loop, 1 / 4), 1) for loop in sums]  # unrolled: one of the loops runs
    work = Work(
        blocks=blocks,
        resident=counts.blocks,
        warps=tile.num_warps,
        parts=tuple(parts),
        in_flight=tile.num_stages - 1,
        memory_bytes=(0 if read <= gpu.l2_bytes / 2 else read) + 4 * r * r,
        l2_bytes=tiles * read + 8 * splits * r * r,
        tensor_share=_tensor_share(gpu, counts),
        turns=2 + (1 + splits // 4 if splits > 1 else 0),
    )
    launch = Launch("gradient", str(tile), limits(work, gpu))
    return (memset(gpu), launch) if splits > 1 else (launch,)


def scaled(demand, share: float):
    """A share of a demand, or several."""
    return type(demand)(demand.flops * share, demand.slots * share, demand.bytes * share)


def _projection_counts(arch: str, padded: int, split: bool, layers: int, tile) -> Counts:
    """Of the case as `bench.kernel_resources.report` names it; else of the nearest one."""
    cases = [f"r={padded}" + (", split" if split else "")]
    if layers == GROUP:
        cases.insert(0, f"{cases[0]}, {layers} layers")
    for case in (*cases, f"r={padded}, split", f"r={padded}, split, tall", f"r={padded}"):
        for name in (case, f"{case}, tall"):
            counts = counts_of(arch, "projection", name, tile)
            if counts is not None:
                return counts
    raise LookupError(f"the projection at rank {padded} was not counted on {arch} in tile {tile}")


def _tensor_share(gpu: Gpu, counts: Counts) -> float:
    return MMA_SYNC_ON_HOPPER if gpu.arch == "sm_90" and not counts.wgmma else 1.0


def fused(gpu: Gpu, M: int, N: int, K: int, r: int, transposed: bool, name: str) -> list[Launch]:
    """A fused route in every tile that was counted, the fastest first."""
    arch = tables_of(gpu)
    found = []
    for route, tiles in fused_tiles(arch, DTYPE, arch == "sm_90"):
        for tile in tiles if route == name else ():
            predicted = fused_limits(gpu, arch, M, N, K, r, transposed, name, tile)
            if predicted is not None:
                found.append(Launch(name, str(tile), predicted))
    return sorted(found, key=lambda launch: launch.limits.total)


@functools.lru_cache(maxsize=65536)
def expand(gpu: Gpu, M: int, N: int, K: int, r: int, transposed: bool, route: str) -> Launch:
    """The frozen product with the adapter by a route of `ROUTES`."""
    if route in ("frozen first", "delta first", "two_call"):
        first = {"frozen first": True, "delta first": False, "two_call": None}[route]
        return Launch(route, "", two_call_limits(gpu, M, N, K, r, first))
    if route == "rule":
        rule = unmeasured_route(tables_of(gpu), DTYPE, M, N, K, r, transposed, False)
        return expand(gpu, M, N, K, r, transposed, rule.name)
    if route == "dual":
        one = gemm(gpu, M, N, K + r)
        slower = (DUAL_OVERHEAD - 1) * one.total
        return Launch("dual", "", Limits(**{**vars(one), "waves": one.waves + slower}))
    return fused(gpu, M, N, K, r, transposed, route)[0]


ROUTES = ("frozen first", "delta first", "two_call", "fused", "fused_descriptor", "dual", "rule")


def routes_of(gpu: Gpu) -> tuple[str, ...]:
    """The routes that a GPU has."""
    hopper = gpu.arch == "sm_90"
    return tuple(r for r in ROUTES if hopper or r not in ("fused_descriptor", "dual"))


__all__ = [
    "GROUP",
    "ROUTES",
    "Launch",
    "elementwise",
    "expand",
    "fused",
    "memset",
    "projection",
    "rank_gradient",
    "routes_of",
    "tables_of",
]
