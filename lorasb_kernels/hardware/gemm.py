"""The vendor's GEMM, whose code is not known: the best of usual tiles, with ideal instructions.

    y [M, N] = x [M, K] · w [K, N], or y += x w

A tile's multiprocessor runs at the sustained rate of the tensor cores, which was taken from the
vendor's own best case. What the model adds is what shapes do: tiles that do not fill the device,
contractions split over blocks, traffic of L2 and device memory, and the first loads.
"""

import dataclasses
import functools
import math

from lorasb_kernels.hardware.counts import Demand
from lorasb_kernels.hardware.gpus import Gpu
from lorasb_kernels.hardware.limits import Limits, Part, Work, limits

# Rows, columns, and how many fit on a multiprocessor; the tiles of CUTLASS's profiler by default.
TILES = ((256, 128, 1), (128, 256, 1), (128, 128, 1), (128, 64, 2), (64, 128, 2), (64, 64, 3))
STEP = 64  # of the contraction
IN_FLIGHT = 3
WARPS = 8
# Instructions that a warp executes once; assumed: as many as this library's own GEMM.
ONCE = 800
SPLITS = (1, 2, 4, 8, 16)


@functools.lru_cache(maxsize=8192)
def gemm(
    gpu: Gpu,
    M: int,
    N: int,
    K: int,
    *,
    adds: bool = False,
    resident_inputs: float = 0.0,
    resident_output: bool = False,
    itemsize: int = 2,
) -> Limits:
    """The limits of a product of 16-bit operands.

    Args:
        gpu: where.
        M, N, K: rows, columns, contraction.
        adds: whether y is read and added to.
        resident_inputs: bytes of the inputs that are in L2 already.
        resident_output: whether the y that is added to may still be in L2.
        itemsize: bytes of an element.
    """
    found = []
    for rows, columns, resident in TILES:
        for splits in SPLITS:
            steps = math.ceil(K / STEP)
            if splits > steps:
                continue
            work = _work(gpu, (M, N, K), (rows, columns), resident, splits, adds, itemsize)
            saved = resident_inputs + (M * N * itemsize if adds and resident_output else 0)
            found.append(
                limits(dataclasses.replace(work, memory_bytes=work.memory_bytes - saved), gpu)
            )
    return min(found, key=lambda limit: limit.total)


def _work(gpu, sizes, tile, resident, splits, adds, itemsize) -> Work:
    (M, N, K), (rows, columns) = sizes, tile
    row_tiles, column_tiles = math.ceil(M / rows), math.ceil(N / columns)
    steps = math.ceil(math.ceil(K / STEP) / splits)
    blocks = row_tiles * column_tiles * splits
    written = M * N * itemsize * (2 if adds else 1)
    # Partial sums in fp32, written by every block and read by one.
    partials = 2 * 4 * M * N * splits if splits > 1 else 0
    reads = blocks * (rows + columns) * steps * STEP * itemsize
    inputs = operand_traffic(gpu, sizes, tile, resident * gpu.multiprocessors // splits, itemsize)
    return Work(
        blocks=blocks,
        resident=resident,
        warps=WARPS,
        parts=(Part(Demand(2 * rows * columns * STEP), steps), Part(Demand(0, ONCE * WARPS), 1)),
        in_flight=IN_FLIGHT,
        memory_bytes=inputs + written,
        l2_bytes=reads + written + partials,
        stalls=False,
        turns=2 + adds + 2 * (splits > 1),
    )


def operand_traffic(
    gpu: Gpu,
    sizes: tuple[int, int, int],
    tile: tuple[int, int],
    together: int,
    itemsize: int,
    down: int | None = None,
) -> float:
    """Bytes of x and w from device memory when `together` tiles of the output run at once.

    They are `down` tiles high, by default as near to a square as the output allows, and read their
    rows of x and columns of w once. An operand that fits half of L2 is read once altogether.
    """
    (M, N, K), (rows, columns) = sizes, tile
    row_tiles, column_tiles = math.ceil(M / rows), math.ceil(N / columns)
    down = min(row_tiles, down or max(1, round(math.sqrt(together * columns / rows))))
    across = min(column_tiles, max(1, together // down))
    x, w = M * K * itemsize, N * K * itemsize
    again_x = 1 if x <= gpu.l2_bytes / 2 else math.ceil(column_tiles / across)
    again_w = 1 if w <= gpu.l2_bytes / 2 else math.ceil(row_tiles / down)
    return x * again_x + w * again_w


__all__ = ["TILES", "gemm", "operand_traffic"]
