"""Tile sizes of the factor-gradient kernel by rank, and the reasons for them.

Not measured: reasoned as in `ops/triton/tiles.py`, and checked by ahead-of-time compilation.

The accumulators of a block, r · BLOCK_N fp32 numbers, get 64 registers per thread; BLOCK_N
decreases as the rank grows. A step is BLOCK_M · (BLOCK_N + r) elements of shared memory: 24 KB at
rank 64 in 16 bits, 40 KB at 256, and two of them fit in sm_86's 99 KB. It is 64 rows up to rank
256, so that every thread copies 16 bytes of each tile of `left`. All architectures use the same
tiles, except for one more stage on sm_90 above rank 128: below a rank of about 100 the kernel is
memory bound, and the bytes that two blocks per multiprocessor keep in flight cover the latency. A
dropout mask costs about 60 registers of 64-bit arithmetic, so tiles with one have half the columns.
"""

import dataclasses

import torch

from lorasb_kernels.ops.triton.tiles import INTERPRETER, Tile, rank_tiles

# A partial sum is written and read: 8·r bytes per column. A block reads 2 bytes per row and column
# in 16 bits. With 16·r rows the first is a quarter of the second.
LEAST_ROWS_A_RANK = 16


@dataclasses.dataclass(frozen=True)
class FactorTile(Tile):
    """A block makes BLOCK_N columns for every rank and reads BLOCK_M rows per step."""

    BLOCK_M: int
    BLOCK_N: int


# By the largest padded rank; first without a dropout mask, then with one.
_INTERPRETER = FactorTile(4, 2, BLOCK_M=16, BLOCK_N=32)
_HALF = {
    64: (FactorTile(4, 3, 64, 128), FactorTile(4, 3, 64, 64)),
    128: (FactorTile(8, 3, 64, 128), FactorTile(8, 3, 64, 64)),
    256: (FactorTile(8, 3, 64, 64), FactorTile(8, 3, 64, 32)),
    512: (FactorTile(8, 2, 32, 32), FactorTile(8, 2, 32, 32)),
}
# With three stages rank 160 spills on sm_90; its shared memory has room for a fourth.
_HOPPER_HALF = {**_HALF, 256: (FactorTile(8, 4, 64, 64), _HALF[256][1])}
# Where sm_100 and sm_120 would spill a few bytes.
_BLACKWELL_HALF = {
    **_HOPPER_HALF,
    64: (_HALF[128][0], _HALF[64][1]),
    224: (_HOPPER_HALF[256][0], _HALF[512][1]),
}
_WORKSTATION_HALF = {**_HALF, 64: _HALF[128]}
_SINGLE = {
    64: (FactorTile(4, 3, 32, 64), FactorTile(4, 3, 32, 32)),
    128: (FactorTile(8, 3, 32, 32), FactorTile(8, 3, 32, 32)),
    # 16 bytes per thread; rank tiles of 32 (160, 224) would spill with 4 warps, of 64 with 2.
    160: (FactorTile(2, 3, 16, 16), FactorTile(2, 3, 16, 16)),
    192: (FactorTile(4, 2, 32, 16), FactorTile(4, 2, 32, 16)),
    224: (FactorTile(2, 3, 16, 16), FactorTile(2, 3, 16, 16)),
    256: (FactorTile(4, 2, 32, 16), FactorTile(4, 2, 32, 16)),
    320: (FactorTile(4, 2, 16, 16), FactorTile(4, 2, 16, 16)),
    # Here two stages spill a few bytes, and three at 512.
    448: (FactorTile(4, 3, 16, 16), FactorTile(4, 3, 16, 16)),
    512: (FactorTile(4, 2, 16, 16), FactorTile(4, 2, 16, 16)),
}
_HALF_BY_ARCHITECTURE = {
    "sm_90": _HOPPER_HALF,
    "sm_100": _BLACKWELL_HALF,
    "sm_120": _WORKSTATION_HALF,
}


def factor_tile(arch: str, dtype: torch.dtype, r: int, dropout: bool) -> FactorTile:
    """The tile for a rank."""
    if arch == INTERPRETER:
        return _INTERPRETER
    width, tiles = rank_tiles(r)
    table = _SINGLE if dtype.itemsize == 4 else _HALF_BY_ARCHITECTURE.get(arch, _HALF)
    for largest, pair in sorted(table.items()):
        if width * tiles <= largest:
            return pair[dropout]
    raise ValueError(f"r is {r}; expected at most {largest}")


def factor_splits(
    column_tiles: int, M: int, r: int, tile: FactorTile, multiprocessors: int
) -> tuple[int, int]:
    """How many blocks share a tile of the columns, and how many rows each takes.

    Enough blocks to give every multiprocessor two, but each with at least four steps and enough
    rows that the partial sums stay small in comparison. Depends only on the shape and the device.
    """
    steps = -(-M // tile.BLOCK_M)
    least = max(4, -(-LEAST_ROWS_A_RANK * r // tile.BLOCK_M))
    splits = max(1, min(2 * multiprocessors // column_tiles, steps // least))
    steps_per_split = -(-steps // splits)
    return -(-steps // steps_per_split), steps_per_split * tile.BLOCK_M


__all__ = ["FactorTile", "factor_splits", "factor_tile"]
