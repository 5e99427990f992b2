"""Tile sizes of the projection by architecture, and how its columns are split over blocks.

Projection. Memory bound: what counts is bytes of x in flight. By Little's law (latency about
0.8 µs) a multiprocessor needs 7 KB in flight on an A6000, 15 KB on an A100, 20 KB on an H100.
A stage of 64 rows × 64 columns of 16 bits is 8 KB. On sm_80 to 89 three stages are two buffers,
and the next copy starts after the products of a step; two blocks per multiprocessor keep 16 KB in
flight. sm_90 has room for 128 columns, or 128 rows.
The accumulators of a row tile, BLOCK_M · r fp32 numbers,
share the register file with two operands, so they get at most 128 registers per thread:
BLOCK_M decreases from 64 to 32 as the rank grows to 512. fp32 operands are twice as wide and
three tf32 products keep a high and a low part of each: half the tile.
"""

import dataclasses
import functools

import torch

from lorasb_kernels.ops.triton.tiles import INTERPRETER, Tile, by_itemsize, rank_tiles

# Steps of the projection that fit into the latency of its first loads, about.
LATENCY = 2
# Rows from which on the projection takes a taller tile, which reads A half as often from L2.
MANY_ROWS = 2048


@dataclasses.dataclass(frozen=True)
class ProjectionTile(Tile):
    """A block takes BLOCK_M rows and reads them BLOCK_K columns at a time.

    `blocks_per_sm` of them fit on a multiprocessor, as compiled.
    """

    BLOCK_M: int
    BLOCK_K: int
    blocks_per_sm: int = 1

    def launch_options(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        options = super().launch_options()
        del options["blocks_per_sm"]
        return options


def projection_tile(arch: str, dtype: torch.dtype, r: int, M: int, dropout: bool) -> ProjectionTile:
    """The tile of the projection kernel for a rank; each row of the table has a largest rank."""
    padded = rank_tiles(r)[0] * rank_tiles(r)[1]
    table = PROJECTION_TILES[arch][dtype.itemsize]
    if M >= MANY_ROWS:
        table = table | TALL_PROJECTION_TILES.get(arch, {}).get(dtype.itemsize, {})
    if dropout:
        table = table | MASKED_PROJECTION_TILES.get(arch, {}).get(dtype.itemsize, {})
    for largest in sorted(table):
        if padded <= largest:
            return table[largest]
    raise ValueError(f"r is {r}; expected at most {largest}")


@functools.lru_cache(maxsize=4096)
def column_splits(
    row_tiles: int, n: int, r: int, tile: ProjectionTile, multiprocessors: int
) -> tuple[int, int]:
    """How many blocks share a row tile of the projection, and how many steps each takes.

    The cheapest of all, in steps of BLOCK_K columns: the blocks run in waves of as many as fit on
    the device; a wave takes the steps of one block and `LATENCY` more; then the last block of a
    row tile reads the fp32 partials of all, at the rate at which a step reads x and A. Depends
    only on the shape and the device.
    """
    steps = -(-n // tile.BLOCK_K)
    resident = multiprocessors * tile.blocks_per_sm
    partial = 2 * r * tile.BLOCK_M / (tile.BLOCK_K * (tile.BLOCK_M + r))  # fp32 beside 16 bits

    if row_tiles >= resident:  # the rows alone fill the device
        return 1, steps

    def cost(splits: int) -> float:
        waves = -(-row_tiles * splits // resident)
        finish = LATENCY + splits * partial if splits > 1 else 0
        return waves * (-(-steps // splits) + LATENCY) + finish

    splits = min(range(1, max(1, steps // 2) + 1), key=cost)
    steps_per_split = -(-steps // splits)
    return -(-steps // steps_per_split), steps_per_split


def _ampere_projection(num_stages: int, widest_warps: int):
    """sm_80 has shared memory for one stage more than sm_86 and sm_89.

    `widest_warps` is how many warps hold rank 256 in 16 bits and 512 in fp32 without a spill,
    found by compiling.
    """
    return by_itemsize(
        {
            32: ProjectionTile(
                BLOCK_M=64, BLOCK_K=64, num_warps=4, num_stages=num_stages + 1, blocks_per_sm=2
            ),
            64: ProjectionTile(
                BLOCK_M=64, BLOCK_K=64, num_warps=8, num_stages=num_stages + 1, blocks_per_sm=2
            ),
            # With several rank tiles Triton lays all warps along the rows, 16 each: 8 warps would
            # compute every product of 64 rows twice.
            128: ProjectionTile(
                BLOCK_M=64, BLOCK_K=64, num_warps=4, num_stages=num_stages, blocks_per_sm=2
            ),
            160: ProjectionTile(BLOCK_M=64, BLOCK_K=64, num_warps=4, num_stages=num_stages),
            192: ProjectionTile(BLOCK_M=32, BLOCK_K=64, num_warps=8, num_stages=num_stages),
            # Seven tiles of 32: the core's operands would spill with 32 rows. 16 rows of x
            # are 16 bytes per thread for 4 warps.
            224: ProjectionTile(BLOCK_M=16, BLOCK_K=64, num_warps=4, num_stages=num_stages),
            256: ProjectionTile(BLOCK_M=32, BLOCK_K=64, num_warps=widest_warps, num_stages=3),
            448: ProjectionTile(BLOCK_M=32, BLOCK_K=32, num_warps=8, num_stages=3),
            512: ProjectionTile(BLOCK_M=16, BLOCK_K=64, num_warps=4, num_stages=2),
        },
        # Up to rank 256 as many warps as leave 16 bytes of a step of x for each thread.
        {
            16: ProjectionTile(BLOCK_M=32, BLOCK_K=32, num_warps=4, num_stages=num_stages),
            64: ProjectionTile(BLOCK_M=32, BLOCK_K=32, num_warps=8, num_stages=num_stages),
            160: ProjectionTile(BLOCK_M=16, BLOCK_K=32, num_warps=4, num_stages=num_stages),
            192: ProjectionTile(BLOCK_M=32, BLOCK_K=32, num_warps=8, num_stages=3),
            256: ProjectionTile(BLOCK_M=16, BLOCK_K=32, num_warps=4, num_stages=2),
            448: ProjectionTile(BLOCK_M=16, BLOCK_K=16, num_warps=8, num_stages=2),
            512: ProjectionTile(BLOCK_M=16, BLOCK_K=16, num_warps=widest_warps, num_stages=2),
        },
    )


_HOPPER_PROJECTION = by_itemsize(
    {
        32: ProjectionTile(BLOCK_M=64, BLOCK_K=128, num_warps=4, num_stages=4, blocks_per_sm=2),
        128: ProjectionTile(BLOCK_M=64, BLOCK_K=128, num_warps=4, num_stages=4),
        256: ProjectionTile(BLOCK_M=64, BLOCK_K=64, num_warps=8, num_stages=4),
        384: ProjectionTile(BLOCK_M=32, BLOCK_K=64, num_warps=4, num_stages=3),
        512: ProjectionTile(BLOCK_M=32, BLOCK_K=64, num_warps=8, num_stages=3),
    },
    {
        **_ampere_projection(num_stages=3, widest_warps=8)[4],
        512: ProjectionTile(BLOCK_M=16, BLOCK_K=16, num_warps=4, num_stages=2),
        448: ProjectionTile(BLOCK_M=16, BLOCK_K=16, num_warps=4, num_stages=2),
    },
)
# Half as many row tiles read A, which bounds the kernel on sm_90; two blocks a multiprocessor up to
# rank 96.
TALL_PROJECTION_TILES = {
    "sm_90": {
        2: {
            32: ProjectionTile(BLOCK_M=64, BLOCK_K=128, num_warps=4, num_stages=4, blocks_per_sm=2),
            96: ProjectionTile(BLOCK_M=128, BLOCK_K=64, num_warps=8, num_stages=4, blocks_per_sm=2),
            128: ProjectionTile(BLOCK_M=128, BLOCK_K=64, num_warps=8, num_stages=4),
        }
    }
}
# Where the mask's 64-bit arithmetic would spill beside the accumulators of the tiles above.
_MASKED_AMPERE_PROJECTION = {
    2: {
        96: ProjectionTile(BLOCK_M=64, BLOCK_K=64, num_warps=4, num_stages=3, blocks_per_sm=2),
        128: ProjectionTile(BLOCK_M=32, BLOCK_K=64, num_warps=4, num_stages=3, blocks_per_sm=2),
        160: ProjectionTile(BLOCK_M=32, BLOCK_K=64, num_warps=8, num_stages=3),
        448: ProjectionTile(BLOCK_M=16, BLOCK_K=64, num_warps=8, num_stages=2),
        512: ProjectionTile(BLOCK_M=16, BLOCK_K=64, num_warps=8, num_stages=2),
    }
}
# With 64 rows wgmma reads the masked x from registers that Triton rewrites for the next step, so
# ptxas waits behind every product. 32 rows take mma.sync, and two to four blocks a multiprocessor.
_MASKED_HOPPER_PROJECTION = {
    2: {
        **dict.fromkeys((32, 64), ProjectionTile(4, 4, 32, 64, blocks_per_sm=4)),
        **dict.fromkeys((96, 128), ProjectionTile(4, 4, 32, 64, blocks_per_sm=2)),
        256: ProjectionTile(BLOCK_M=32, BLOCK_K=64, num_warps=8, num_stages=4),
        384: ProjectionTile(BLOCK_M=32, BLOCK_K=64, num_warps=8, num_stages=3),
    }
}
# Where sm_100 and sm_120 would spill a few bytes in the tiles of sm_90 and sm_89.
_BLACKWELL_PROJECTION = {
    **_HOPPER_PROJECTION,
    2: {
        **_HOPPER_PROJECTION[2],
        224: _HOPPER_PROJECTION[2][256],
        256: _HOPPER_PROJECTION[2][384],
    },
}
_MASKED_BLACKWELL_PROJECTION = {
    2: {
        32: ProjectionTile(BLOCK_M=64, BLOCK_K=64, num_warps=4, num_stages=4, blocks_per_sm=2),
        64: ProjectionTile(BLOCK_M=64, BLOCK_K=64, num_warps=8, num_stages=4, blocks_per_sm=2),
        128: ProjectionTile(BLOCK_M=64, BLOCK_K=64, num_warps=8, num_stages=4),
        224: _HOPPER_PROJECTION[2][256],
        **dict.fromkeys((256, 384), ProjectionTile(8, 3, BLOCK_M=32, BLOCK_K=64)),
        512: ProjectionTile(BLOCK_M=16, BLOCK_K=64, num_warps=8, num_stages=2),
    }
}
_WORKSTATION_PROJECTION = {
    **_ampere_projection(num_stages=3, widest_warps=4),
    2: {
        **_ampere_projection(num_stages=3, widest_warps=4)[2],
        96: ProjectionTile(BLOCK_M=64, BLOCK_K=64, num_warps=4, num_stages=3, blocks_per_sm=2),
        128: ProjectionTile(BLOCK_M=32, BLOCK_K=64, num_warps=4, num_stages=3, blocks_per_sm=2),
        320: ProjectionTile(BLOCK_M=32, BLOCK_K=32, num_warps=8, num_stages=3),
        384: ProjectionTile(BLOCK_M=16, BLOCK_K=64, num_warps=8, num_stages=2),
    },
}
_MASKED_WORKSTATION_PROJECTION = {
    2: {
        **_MASKED_AMPERE_PROJECTION[2],
        32: _WORKSTATION_PROJECTION[2][64],
        96: _MASKED_AMPERE_PROJECTION[2][128],
        320: _MASKED_AMPERE_PROJECTION[2][448],
    }
}
MASKED_PROJECTION_TILES = {
    **dict.fromkeys(("sm_80", "sm_86", "sm_89"), _MASKED_AMPERE_PROJECTION),
    "sm_90": _MASKED_HOPPER_PROJECTION,
    "sm_100": _MASKED_BLACKWELL_PROJECTION,
    "sm_120": _MASKED_WORKSTATION_PROJECTION,
}
_INTERPRETER_PROJECTION = {512: ProjectionTile(BLOCK_M=16, BLOCK_K=32, num_warps=4, num_stages=2)}
PROJECTION_TILES = {
    INTERPRETER: by_itemsize(_INTERPRETER_PROJECTION, _INTERPRETER_PROJECTION),
    "sm_80": _ampere_projection(num_stages=4, widest_warps=8),
    "sm_86": _ampere_projection(num_stages=3, widest_warps=4),
    "sm_89": _ampere_projection(num_stages=3, widest_warps=4),
    "sm_90": _HOPPER_PROJECTION,
    "sm_100": _BLACKWELL_PROJECTION,
    "sm_120": _WORKSTATION_PROJECTION,
}

__all__ = ["ProjectionTile", "column_splits", "projection_tile"]
