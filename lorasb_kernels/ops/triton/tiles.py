"""Tile sizes of the Triton kernels by architecture, and the reasons for them.

Not measured: reasoned from shared memory, registers and the bytes a block keeps in flight,
and checked by ahead-of-time compilation: no spill with Triton 3.7.1
(`docs/kernel_resources.md`); another version may allocate otherwise. What has been measured on
a device is kept in a file, see `ops/triton/route_decision.py`.

Limits per block and per multiprocessor:

            shared memory/block   registers/SM   SMs                  bandwidth
    sm_80        163 KB              65536       108 (A100)           1555 to 2039 GB/s
    sm_86         99 KB              65536        84 (RTX A6000)       768 GB/s
    sm_89         99 KB              65536       128 or more (Ada)    1008 GB/s (RTX 4090)
    sm_90        227 KB              65536       132 (H100)           3350 GB/s

Projection. Memory bound: what counts is bytes of x in flight. By Little's law (latency about
0.8 µs) a multiprocessor needs 7 KB in flight on an A6000, 15 KB on an A100, 20 KB on an H100.
A stage of 64 rows × 64 columns of 16 bits is 8 KB. On sm_80 to 89 three stages are two buffers,
and the next copy starts after the products of a step; two blocks per multiprocessor keep 16 KB in
flight. sm_90 has room for 128 columns, or 128 rows.
The accumulators of a row tile, BLOCK_M · r fp32 numbers,
share the register file with two operands, so they get at most 128 registers per thread:
BLOCK_M decreases from 64 to 32 as the rank grows to 512. fp32 operands are twice as wide and
three tf32 products keep a high and a low part of each: half the tile.

Expand. A GEMM: the tile sets the flops per byte of shared-memory traffic. 128×128 with 8 warps
takes 64 accumulator registers per thread and 170 to 186 in all; with 4 warps it is at the limit of
255. Two stages of 128×64 + 128×64 in 16 bits are 64 KB, within sm_86's 99 KB, one block per SM.
sm_80 has room for a third. sm_90 reads operands of wgmma from shared memory, so the freed
registers allow a 128×256 tile: 192 KB in four stages.
A dropout mask costs about 60 registers of 64-bit arithmetic while the second term is masked:
64-row tiles there.

Expand with tensor maps (sm_90 only). No addresses and masks in registers: 90 for 128×128 with 8
warps, so that two blocks of three stages (96 KB each) share a multiprocessor; 154 for 128×256,
which reads a third less shared memory per flop and fills it in four stages of 48 KB.
"""

import dataclasses
import functools

import torch

INTERPRETER = "interpreter"
# Steps of the projection that fit into the latency of its first loads, about.
LATENCY = 2
# Rows from which on the projection takes a taller tile, which reads A half as often from L2.
MANY_ROWS = 2048
# Ranks that a step of the expansion takes, in either kernel of it.
EXPAND_BLOCK_R = 32
# Row tiles that reuse a column tile of the other operand while it is in L2.
GROUP_M = 8
# The devices that the tables were made for.
MULTIPROCESSORS = {INTERPRETER: 8, "sm_80": 108, "sm_86": 84, "sm_89": 128, "sm_90": 132}


@dataclasses.dataclass(frozen=True)
class Tile:
    """Block sizes and launch options of one kernel."""

    num_warps: int
    num_stages: int

    def launch_options(self) -> dict[str, int]:
        """Keyword arguments of a launch: the fields by name."""
        return dict(vars(self))

    def __str__(self) -> str:
        options = self.launch_options()
        blocks = "×".join(str(v) for k, v in options.items() if k.startswith("BLOCK"))
        return f"{blocks}, {self.num_warps} warps, {self.num_stages} stages"


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


@dataclasses.dataclass(frozen=True)
class GradientTile(Tile):
    """A block reads BLOCK_M rows at a time."""

    BLOCK_M: int


@dataclasses.dataclass(frozen=True)
class ExpandTile(Tile):
    """A block makes a BLOCK_M × BLOCK_N tile of the output, BLOCK_K of the contraction a step."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int


def rank_tiles(r: int) -> tuple[int, int]:
    """Width and number of the tiles that hold a rank.

    Ranks are padded to 16, or to a multiple of 32 up to 256 and of 64 above: 24 costs 32,
    96 costs 96, 300 costs 320. Of the widths 64 and 32 it takes the wider one that pads no more.
    """
    if r <= 16:
        return 16, 1
    step = 32 if r <= 256 else 64
    padded = -(-r // step) * step
    width = 64 if padded % 64 == 0 else 32
    return width, padded // width


@functools.cache
def architecture(device: torch.device) -> str:
    """`"sm_86"` and so on, of the nearest table at or below the device's capability.

    Blackwell's workstation parts (12.x) have the 99 KB of shared memory of sm_89.
    """
    if device.type != "cuda":
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 12:
        return "sm_89"
    known = [arch for arch in ARCHITECTURES if int(arch[3:]) <= 10 * major + minor]
    return known[-1]


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


def gradient_tile(arch: str, dtype: torch.dtype) -> GradientTile:
    """The tile of the gradient kernel."""
    return GRADIENT_TILES[arch][dtype.itemsize]


def expand_tile(arch: str, dtype: torch.dtype, dropout: bool) -> ExpandTile:
    """The tile of the expand kernel if none has been measured."""
    tiles = MASKED_EXPAND_TILES if dropout else EXPAND_TILES
    return tiles[arch][dtype.itemsize]


def descriptor_candidates(arch: str, dtype: torch.dtype, dropout: bool) -> tuple[ExpandTile, ...]:
    """The tiles to measure for `expand` by tensor maps; none if the device has no TMA."""
    if arch != "sm_90":
        return ()
    return (MASKED_DESCRIPTOR_CANDIDATES if dropout else DESCRIPTOR_CANDIDATES)[dtype.itemsize]


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


def row_splits(M: int, tile: GradientTile) -> tuple[int, int]:
    """How many blocks share a tile of dR, and how many rows each takes.

    At least eight steps per block and at most 32 blocks: the last one reads as many partials.
    Depends only on M.
    """
    steps = -(-M // tile.BLOCK_M)
    splits = max(1, min(32, steps // 8))
    steps_per_split = -(-steps // splits)
    return -(-steps // steps_per_split), steps_per_split * tile.BLOCK_M


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a device."""
    if device.type != "cuda":
        return MULTIPROCESSORS[INTERPRETER]
    return torch.cuda.get_device_properties(device).multi_processor_count


def _by_itemsize(half, single):
    return {2: half, 4: single}


def _ampere_projection(num_stages: int, widest_warps: int):
    """sm_80 has shared memory for one stage more than sm_86 and sm_89.

    `widest_warps` is how many warps hold rank 256 in 16 bits and 512 in fp32 without a spill,
    found by compiling.
    """
    return _by_itemsize(
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


_HOPPER_PROJECTION = _by_itemsize(
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
_MASKED_HOPPER_PROJECTION = {
    2: {
        32: ProjectionTile(BLOCK_M=64, BLOCK_K=64, num_warps=4, num_stages=4, blocks_per_sm=2),
        64: ProjectionTile(BLOCK_M=64, BLOCK_K=64, num_warps=8, num_stages=4, blocks_per_sm=2),
        96: ProjectionTile(BLOCK_M=64, BLOCK_K=64, num_warps=8, num_stages=4),
        128: ProjectionTile(BLOCK_M=64, BLOCK_K=64, num_warps=8, num_stages=4),
        384: ProjectionTile(BLOCK_M=32, BLOCK_K=64, num_warps=8, num_stages=3),
    }
}
MASKED_PROJECTION_TILES = {
    **dict.fromkeys(("sm_80", "sm_86", "sm_89"), _MASKED_AMPERE_PROJECTION),
    "sm_90": _MASKED_HOPPER_PROJECTION,
}
_INTERPRETER_PROJECTION = {512: ProjectionTile(BLOCK_M=16, BLOCK_K=32, num_warps=4, num_stages=2)}
PROJECTION_TILES = {
    INTERPRETER: _by_itemsize(_INTERPRETER_PROJECTION, _INTERPRETER_PROJECTION),
    "sm_80": _ampere_projection(num_stages=4, widest_warps=8),
    "sm_86": _ampere_projection(num_stages=3, widest_warps=4),
    "sm_89": _ampere_projection(num_stages=3, widest_warps=4),
    "sm_90": _HOPPER_PROJECTION,
}
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90")

_GRADIENT = _by_itemsize(
    GradientTile(BLOCK_M=64, num_warps=4, num_stages=4),
    GradientTile(BLOCK_M=32, num_warps=4, num_stages=3),
)
_INTERPRETER_GRADIENT = GradientTile(BLOCK_M=16, num_warps=4, num_stages=2)
GRADIENT_TILES = {
    INTERPRETER: _by_itemsize(_INTERPRETER_GRADIENT, _INTERPRETER_GRADIENT),
    **dict.fromkeys(ARCHITECTURES, _GRADIENT),
}

_INTERPRETER_EXPAND = ExpandTile(BLOCK_M=32, BLOCK_N=32, BLOCK_K=64, num_warps=4, num_stages=2)
_SINGLE_EXPAND = ExpandTile(BLOCK_M=128, BLOCK_N=64, BLOCK_K=32, num_warps=8, num_stages=3)
EXPAND_TILES = {
    INTERPRETER: _by_itemsize(_INTERPRETER_EXPAND, _INTERPRETER_EXPAND),
    "sm_80": _by_itemsize(ExpandTile(8, 4, 128, 128, 64), _SINGLE_EXPAND),
    "sm_86": _by_itemsize(ExpandTile(8, 3, 128, 128, 64), _SINGLE_EXPAND),
    "sm_89": _by_itemsize(ExpandTile(8, 3, 128, 128, 64), _SINGLE_EXPAND),
    "sm_90": _by_itemsize(ExpandTile(8, 4, 128, 256, 64), _SINGLE_EXPAND),
}
_MASKED_EXPAND = _by_itemsize(ExpandTile(8, 3, 64, 128, 64), _SINGLE_EXPAND)
MASKED_EXPAND_TILES = {
    INTERPRETER: EXPAND_TILES[INTERPRETER],
    **dict.fromkeys(ARCHITECTURES, _MASKED_EXPAND),
}

# What is timed against each other, without those that do not fit on the device; a first measurement
# takes the first few that fit (`route_measuring.py`): different shapes of tile come first.
EXPAND_CANDIDATES = _by_itemsize(
    (
        ExpandTile(8, 3, 128, 128, 64),
        ExpandTile(4, 3, 64, 128, 64),
        ExpandTile(8, 4, 128, 128, 32),
        ExpandTile(8, 4, 128, 256, 64),
        ExpandTile(8, 3, 256, 128, 64),
        ExpandTile(4, 4, 64, 64, 64),
        ExpandTile(8, 4, 128, 128, 64),
        ExpandTile(8, 3, 64, 128, 64),
        ExpandTile(4, 4, 128, 64, 64),
    ),
    (
        ExpandTile(8, 3, 128, 64, 32),
        ExpandTile(4, 3, 64, 64, 32),
        ExpandTile(8, 3, 64, 128, 32),
        ExpandTile(4, 4, 64, 64, 16),
    ),
)
DESCRIPTOR_CANDIDATES = _by_itemsize(
    (
        ExpandTile(8, 4, 128, 256, 64),
        ExpandTile(8, 4, 256, 128, 64),
        ExpandTile(8, 3, 128, 128, 64),
        ExpandTile(8, 3, 128, 128, 128),
    ),
    (ExpandTile(8, 3, 128, 128, 32), ExpandTile(8, 3, 128, 64, 32)),
)
MASKED_DESCRIPTOR_CANDIDATES = _by_itemsize(
    (ExpandTile(8, 4, 64, 128, 64), ExpandTile(8, 3, 64, 128, 64)),
    (ExpandTile(8, 3, 64, 128, 32), ExpandTile(8, 3, 128, 64, 32)),
)

__all__ = [
    "ARCHITECTURES",
    "EXPAND_BLOCK_R",
    "EXPAND_CANDIDATES",
    "GROUP_M",
    "INTERPRETER",
    "MULTIPROCESSORS",
    "ExpandTile",
    "GradientTile",
    "ProjectionTile",
    "architecture",
    "column_splits",
    "descriptor_candidates",
    "expand_tile",
    "gradient_tile",
    "multiprocessors",
    "projection_tile",
    "rank_tiles",
    "row_splits",
]
