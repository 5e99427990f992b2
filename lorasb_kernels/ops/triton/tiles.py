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
    sm_100       227 KB              65536       148 (B200)           8000 GB/s
    sm_120        99 KB              65536       170 (RTX 5090)       1792 GB/s

Expand. A GEMM: the tile sets the flops per byte of shared-memory traffic. 128×128 with 8 warps
takes 64 accumulator registers per thread and 160 to 176 in all; with 4 warps it is at the limit of
255. Two stages of 128×64 + 128×64 in 16 bits are 64 KB, within sm_86's 99 KB, one block per SM.
sm_80 has room for a third. sm_90 reads operands of wgmma from shared memory, so the freed
registers allow a 128×256 tile: 192 KB in four stages.
A dropout mask costs about 60 registers of 64-bit arithmetic while the second term is masked:
64-row tiles there.

Expand with tensor maps (sm_90, 100, 120). No addresses and masks in registers: 98 for 128×128 with
8 warps, so that two blocks of three stages (112 KB each with the half tile on its way out) share a
multiprocessor of sm_90; up to 211 for 128×256, which reads a third less shared memory per flop and
fills it in four stages of 48 KB. sm_120 multiplies by mma.sync, from two buffers of 99 KB.
"""

import dataclasses
import functools

import torch

INTERPRETER = "interpreter"
# Ranks that a step of the expansion takes, in either kernel of it.
EXPAND_BLOCK_R = 32
# Row tiles that reuse a column tile of the other operand while it is in L2.
GROUP_M = 8
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
# The devices that the tables were made for.
MULTIPROCESSORS = {
    INTERPRETER: 8,
    "sm_80": 108,
    "sm_86": 84,
    "sm_89": 128,
    "sm_90": 132,
    "sm_100": 148,
    "sm_120": 170,
}
# Of a multiprocessor, and what of it a block takes beside its own (CUDA programming guide,
# technical specifications per compute capability).
SHARED_BYTES = {
    INTERPRETER: 100 << 10,
    "sm_80": 164 << 10,
    "sm_86": 100 << 10,
    "sm_89": 100 << 10,
    "sm_90": 228 << 10,
    "sm_100": 228 << 10,
    "sm_120": 100 << 10,
}
RESERVED_SHARED = 1 << 10


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
    """`"sm_86"` and so on, of the nearest table at or below the device's capability."""
    if device.type != "cuda":
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    known = [arch for arch in ARCHITECTURES if int(arch[3:]) <= 10 * major + minor]
    return known[-1]


def gradient_tile(arch: str, dtype: torch.dtype) -> GradientTile:
    """The tile of the gradient kernel."""
    return GRADIENT_TILES[arch][dtype.itemsize]


def expand_tile(arch: str, dtype: torch.dtype, dropout: bool) -> ExpandTile:
    """The tile of the expand kernel if none has been measured."""
    tiles = MASKED_EXPAND_TILES if dropout else EXPAND_TILES
    return tiles[arch][dtype.itemsize]


def descriptor_candidates(arch: str, dtype: torch.dtype, dropout: bool) -> tuple[ExpandTile, ...]:
    """The tiles to measure for `expand` by tensor maps; none if the device has no TMA."""
    table = MASKED_DESCRIPTOR_CANDIDATES if dropout else DESCRIPTOR_CANDIDATES
    return table[arch][dtype.itemsize] if arch in table else ()


def row_splits(M: int, tile: GradientTile) -> tuple[int, int]:
    """How many blocks share a tile of dR, and how many rows each takes.

    At least eight steps per block and at most 32 blocks: the last one reads as many partials.
    Depends only on M.
    """
    steps = -(-M // tile.BLOCK_M)
    splits = max(1, min(32, steps // 8))
    steps_per_split = -(-steps // splits)
    return -(-steps // steps_per_split), steps_per_split * tile.BLOCK_M


def operand_bytes(tile: ExpandTile, dtype: torch.dtype, arch: str) -> int:
    """Shared memory of the operands' stages in a block of `expand`.

    Where the tensor cores read registers, the last of the stages is in registers only.
    """
    buffers = tile.num_stages - (arch not in ("sm_90", "sm_100"))
    return buffers * (tile.BLOCK_M + tile.BLOCK_N) * tile.BLOCK_K * dtype.itemsize


def resident_blocks(tile: ExpandTile, dtype: torch.dtype, arch: str, multiprocessors: int) -> int:
    """How many blocks of `expand` by tensor maps a device holds: by its shared memory."""
    # On its way out is half of the result, from tensor memory up to all of it.
    result = tile.BLOCK_M * tile.BLOCK_N * dtype.itemsize // (1 if arch == "sm_100" else 2)
    barriers = 1024  # at most
    block = operand_bytes(tile, dtype, arch) + result + barriers + RESERVED_SHARED
    return multiprocessors * max(1, SHARED_BYTES[arch] // block)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a device."""
    if device.type != "cuda":
        return MULTIPROCESSORS[INTERPRETER]
    return torch.cuda.get_device_properties(device).multi_processor_count


def by_itemsize(half, single):
    return {2: half, 4: single}


_GRADIENT = by_itemsize(
    GradientTile(BLOCK_M=64, num_warps=4, num_stages=4),
    GradientTile(BLOCK_M=32, num_warps=4, num_stages=3),
)
_INTERPRETER_GRADIENT = GradientTile(BLOCK_M=16, num_warps=4, num_stages=2)
GRADIENT_TILES = {
    INTERPRETER: by_itemsize(_INTERPRETER_GRADIENT, _INTERPRETER_GRADIENT),
    **dict.fromkeys(ARCHITECTURES, _GRADIENT),
}

_INTERPRETER_EXPAND = ExpandTile(BLOCK_M=32, BLOCK_N=32, BLOCK_K=64, num_warps=4, num_stages=2)
_SINGLE_EXPAND = ExpandTile(BLOCK_M=128, BLOCK_N=64, BLOCK_K=32, num_warps=8, num_stages=3)
EXPAND_TILES = {
    INTERPRETER: by_itemsize(_INTERPRETER_EXPAND, _INTERPRETER_EXPAND),
    "sm_80": by_itemsize(ExpandTile(8, 4, 128, 128, 64), _SINGLE_EXPAND),
    "sm_86": by_itemsize(ExpandTile(8, 3, 128, 128, 64), _SINGLE_EXPAND),
    "sm_89": by_itemsize(ExpandTile(8, 3, 128, 128, 64), _SINGLE_EXPAND),
    "sm_90": by_itemsize(ExpandTile(8, 4, 128, 256, 64), _SINGLE_EXPAND),
    "sm_100": by_itemsize(ExpandTile(8, 4, 128, 256, 64), _SINGLE_EXPAND),
    "sm_120": by_itemsize(ExpandTile(8, 3, 128, 128, 64), _SINGLE_EXPAND),
}
_MASKED_EXPAND = by_itemsize(ExpandTile(8, 3, 64, 128, 64), _SINGLE_EXPAND)
MASKED_EXPAND_TILES = {
    INTERPRETER: EXPAND_TILES[INTERPRETER],
    **dict.fromkeys(ARCHITECTURES, _MASKED_EXPAND),
}

# What is timed against each other, without those that do not fit on the device; a first measurement
# takes the first few that fit (`route_measuring.py`): different shapes of tile come first.
EXPAND_CANDIDATES = by_itemsize(
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
_SINGLE_DESCRIPTOR = (ExpandTile(8, 3, 128, 128, 32), ExpandTile(8, 3, 128, 64, 32))
_HOPPER_DESCRIPTOR = by_itemsize(
    (
        ExpandTile(8, 4, 128, 256, 64),
        ExpandTile(8, 4, 256, 128, 64),
        ExpandTile(8, 3, 128, 128, 64),
        ExpandTile(8, 3, 128, 128, 128),
    ),
    _SINGLE_DESCRIPTOR,
)
# The result leaves tensor memory through more of shared memory.
_BLACKWELL_DESCRIPTOR = by_itemsize(
    (
        ExpandTile(8, 3, 128, 256, 64),
        ExpandTile(8, 4, 256, 128, 64),
        ExpandTile(8, 3, 128, 128, 64),
    ),
    _SINGLE_DESCRIPTOR,
)
_MASKED_LARGE_DESCRIPTOR = by_itemsize(
    (ExpandTile(8, 4, 64, 128, 64), ExpandTile(8, 3, 64, 128, 64)),
    (ExpandTile(8, 3, 64, 128, 32), ExpandTile(8, 3, 128, 64, 32)),
)
_SMALL_DESCRIPTOR = by_itemsize(
    (ExpandTile(8, 3, 128, 128, 64), ExpandTile(8, 5, 128, 128, 32), ExpandTile(4, 3, 128, 64, 64)),
    (ExpandTile(8, 3, 128, 64, 32),),
)
_MASKED_SMALL_DESCRIPTOR = by_itemsize(
    (ExpandTile(8, 3, 64, 128, 64),),
    (ExpandTile(8, 3, 64, 64, 32),),
)
# The architectures with tensor maps.
DESCRIPTOR_CANDIDATES = {
    "sm_90": _HOPPER_DESCRIPTOR,
    "sm_100": _BLACKWELL_DESCRIPTOR,
    "sm_120": _SMALL_DESCRIPTOR,
}
MASKED_DESCRIPTOR_CANDIDATES = {
    "sm_90": _MASKED_LARGE_DESCRIPTOR,
    "sm_100": _MASKED_LARGE_DESCRIPTOR,
    "sm_120": _MASKED_SMALL_DESCRIPTOR,
}

__all__ = [
    "ARCHITECTURES",
    "EXPAND_BLOCK_R",
    "EXPAND_CANDIDATES",
    "GROUP_M",
    "INTERPRETER",
    "MULTIPROCESSORS",
    "RESERVED_SHARED",
    "SHARED_BYTES",
    "ExpandTile",
    "GradientTile",
    "architecture",
    "by_itemsize",
    "descriptor_candidates",
    "expand_tile",
    "gradient_tile",
    "multiprocessors",
    "operand_bytes",
    "rank_tiles",
    "resident_blocks",
    "row_splits",
]
