"""From a tile of rows to its expert, on the device: nothing waits for the offsets.

Tiles have ROWS rows and begin anew at each expert. Expert e, whose tokens are start … end, gets
the tiles from start // ROWS + e on. These are enough, since

    ceil((end − start) / ROWS) <= end // ROWS − start // ROWS + 1,

and they follow from the expert's own offset, with no sum over the experts before it. So M rows and
E experts take at most M // ROWS + E tiles, and a block finds its expert by counting the experts
that begin at or before its tile. Rows past the last offset are one more segment, number E.
"""

import triton
import triton.language as tl


@triton.jit
def first_tile(start, expert, ROWS: tl.constexpr):
    return start // ROWS + expert


@triton.jit
def segment_of_tile(offsets_ptr, tile, M, E, ROWS: tl.constexpr, SEGMENTS: tl.constexpr):
    """The expert of a tile, and its tokens' first row and end; E and the rest for no expert.

    Args:
        offsets_ptr: int32 [E], cumulative ends.
        tile: index of the tile.
        M: number of rows, of experts or not.
        ROWS: rows of a tile.
        SEGMENTS: a power of two above E.
    """
    experts = tl.arange(0, SEGMENTS)
    starts = tl.load(offsets_ptr + experts - 1, mask=(experts > 0) & (experts <= E), other=0)
    begun = (first_tile(starts, experts, ROWS) <= tile) & (experts <= E)
    expert = tl.sum(begun.to(tl.int32), 0) - 1
    start = tl.load(offsets_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets_ptr + expert, mask=expert < E, other=0)
    return expert, start, tl.where(expert < E, end, tl.cast(M, tl.int32))


def most_tiles(M: int, segments: int, rows: int) -> int:
    """A bound on the tiles of `rows` rows that M rows in `segments` segments take."""
    return M // rows + segments


def segments_block(E: int) -> int:
    """SEGMENTS for E experts."""
    return triton.next_power_of_2(E + 1)


__all__ = ["first_tile", "most_tiles", "segment_of_tile", "segments_block"]
