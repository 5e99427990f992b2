"""Tile sizes of the sign kernels by architecture, and the reasons for them.

Not measured: reasoned as in `tiles.py`, and checked by ahead-of-time compilation.

Weight gradient (`sign_accumulate`, `sign_gradient`): a GEMM over the tokens. 128×128 with 8
warps takes 64 accumulator registers per thread; 64 tokens of both operands are 32 KB in 16 bits,
and two such steps in flight fit sm_86's 99 KB. fp32 products take three tf32 terms and keep a
high and a low part of both operands in registers: half the columns there.

Packing: memory bound, no reuse: 16 KB of the accumulator per block.

±1 product: a block expands a step of S once and multiplies it with up to 160 columns of Z, in
tiles of 32 (96 + 48, the width of a rank-96 range finder, costs 160). Their accumulators are
at most BLOCK_M·160 fp32 numbers, 80 registers per thread with 4 warps at BLOCK_M = 64. Above 128
columns 4 warps would spill on Ampere and Ada, so 8 are used. A step of Z is 32·160·4 = 20 KB; two
are in flight, and the memory a third would take leaves room for another block. Every block of rows
reads all of Z from L2, so blocks take 64 rows if that still gives each multiprocessor a block, and
on sm_90, whose wgmma takes 64; otherwise 32.
"""

import dataclasses

import torch

from lorasb_kernels.ops.triton.tiles import ARCHITECTURES, INTERPRETER, Tile

MAX_WIDTH = 160


@dataclasses.dataclass(frozen=True)
class WeightGradientTile(Tile):
    """A block makes BLOCK_M × BLOCK_N of the gradient, BLOCK_K tokens per step."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int


@dataclasses.dataclass(frozen=True)
class PackTile(Tile):
    """A block packs BLOCK_M × BLOCK_N elements."""

    BLOCK_M: int
    BLOCK_N: int


@dataclasses.dataclass(frozen=True)
class SignMatmulTile(Tile):
    """A block makes BLOCK_M rows, COLUMN_TILES · BLOCK_Q columns, BLOCK_K of S a step."""

    BLOCK_M: int
    BLOCK_K: int
    BLOCK_Q: int
    COLUMN_TILES: int


def weight_gradient_tile(arch: str, dtype: torch.dtype) -> WeightGradientTile:
    """The tile for products of operands of `dtype`."""
    return WEIGHT_GRADIENT_TILES[arch][dtype.itemsize]


def pack_tile(arch: str) -> PackTile:
    """The tile that packs an accumulator."""
    return _INTERPRETER_PACK if arch == INTERPRETER else _PACK


def sign_matmul_tile(arch: str, rows: int, q: int, multiprocessors: int) -> SignMatmulTile:
    """The tile for a product with `rows` rows and `q` columns."""
    width, tiles = column_tiles(q)
    if arch == INTERPRETER:
        return SignMatmulTile(4, 1, BLOCK_M=32, BLOCK_K=64, BLOCK_Q=width, COLUMN_TILES=tiles)
    tall = arch in ("sm_90", "sm_100") or rows >= 64 * multiprocessors
    return SignMatmulTile(
        num_warps=4 if arch in ("sm_90", "sm_100") or width * tiles <= 128 else 8,
        num_stages=2,
        BLOCK_M=64 if tall else 32,
        BLOCK_K=32,
        BLOCK_Q=width,
        COLUMN_TILES=tiles,
    )


def column_tiles(q: int) -> tuple[int, int]:
    """Width and number of the tiles of one block that hold up to `MAX_WIDTH` columns of q."""
    if q <= 16:
        return 16, 1
    blocks = -(-q // MAX_WIDTH)
    return 32, -(-q // (32 * blocks))


_INTERPRETER_WEIGHT_GRADIENT = WeightGradientTile(4, 1, BLOCK_M=32, BLOCK_N=64, BLOCK_K=32)
_SINGLE_WEIGHT_GRADIENT = WeightGradientTile(8, 3, BLOCK_M=128, BLOCK_N=64, BLOCK_K=32)
WEIGHT_GRADIENT_TILES = {
    INTERPRETER: {2: _INTERPRETER_WEIGHT_GRADIENT, 4: _INTERPRETER_WEIGHT_GRADIENT},
    **{
        arch: {2: WeightGradientTile(8, 3, 128, 128, 64), 4: _SINGLE_WEIGHT_GRADIENT}
        for arch in ARCHITECTURES
    },
}
_INTERPRETER_PACK = PackTile(4, 1, BLOCK_M=8, BLOCK_N=64)
_PACK = PackTile(4, 1, BLOCK_M=16, BLOCK_N=256)

__all__ = [
    "PackTile",
    "SignMatmulTile",
    "WeightGradientTile",
    "pack_tile",
    "sign_matmul_tile",
    "weight_gradient_tile",
]
