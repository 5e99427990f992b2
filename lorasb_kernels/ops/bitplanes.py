"""Sign matrices as two bit planes, 2 bits per element.

A plane of an [m, n] matrix is int32 [m, ceil(n/32)]; bit j of word k, counted from the
least significant, is column 32k + j (the order of a warp's ballot). Bits past the last
column are 0.

    positive  negative   element
       1         0         +1
       0         1         −1
       0         0          0
       1         1         not finite

An element that is NaN or infinite sets both bits, so it is never mistaken for a sign.
"""

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

WORD = 32

# Elements processed at a time: 4 MB of fp32, which stays in cache for a product; 512 KB, of which
# several temporaries stay in cache.
UNPACKED_AT_ONCE = 1 << 20
PACKED_AT_ONCE = 1 << 17

_GATHER = 0x0102040810204080  # moves bit 0 of byte i of an int64 to bit 56 + i, without carries


def words(columns: int) -> int:
    """Words in a row of `columns` elements."""
    return -(-columns // WORD)


def check_planes(positive: torch.Tensor, negative: torch.Tensor, columns: int) -> None:
    """Raises unless the two are planes of a matrix with `columns` columns."""
    for name, plane in (("positive", positive), ("negative", negative)):
        if not isinstance(plane, torch.Tensor):
            raise TypeError(f"{name} is a {type(plane).__name__}; expected a torch.Tensor")
        if plane.dtype != torch.int32:
            raise TypeError(f"{name} has dtype {plane.dtype}; expected int32 bit planes")
    if columns < 1:
        raise ValueError(f"columns is {columns}; expected at least 1")
    if positive.dim() != 2 or positive.shape[1] != words(columns):
        raise ValueError(
            f"positive has shape {tuple(positive.shape)}; "
            f"expected [m, {words(columns)}] for {columns} columns"
        )
    if negative.shape != positive.shape:
        raise ValueError(
            f"negative has shape {tuple(negative.shape)}; "
            f"expected {tuple(positive.shape)}, that of positive"
        )
    if negative.device != positive.device:
        raise ValueError(
            f"negative is on {negative.device}; expected {positive.device}, where positive is"
        )


def pack(bits: torch.Tensor) -> torch.Tensor:
    """bool [m, n] to one plane, int32 [m, words(n)]."""
    padded = F.pad(bits, (0, -bits.shape[1] % WORD))
    groups = padded.view(torch.int64)  # eight elements, one per byte
    return (groups * _GATHER >> 56).to(torch.uint8).view(torch.int32)


def signs_of(acc: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two planes of the signs of `acc` [m, n].

    Computed by arithmetic: comparisons cost several times as much on the CPU.
    """
    m, n = acc.shape
    positive = torch.empty((m, words(n)), dtype=torch.int32, device=acc.device)
    negative = torch.empty_like(positive)
    for rows in panels(m, n, PACKED_AT_ONCE):
        panel = acc[rows]
        nothing = panel - panel  # 0, or NaN where the element is not finite
        positive[rows] = pack((panel.clamp(min=0) + nothing).bool())
        negative[rows] = pack((panel.clamp(max=0) + nothing).bool())
    return positive, negative


@functools.cache
def _elements_of_byte_pair(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """[65536, 8]: the elements that a byte of each plane holds, 2 MB in fp32."""
    pair = torch.arange(1 << 16, device=device)[:, None]
    bit = torch.arange(8, device=device)
    positive, negative = pair >> bit & 1, pair >> (bit + 8) & 1
    elements = (positive - negative).to(dtype)
    return elements.masked_fill_((positive & negative).bool(), torch.nan)


def unpack(
    positive: torch.Tensor,
    negative: torch.Tensor,
    columns: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """[m, columns] of +1, −1, 0, and NaN where both bits are set, in a floating-point dtype.

    One table row gives eight elements, which is several times as fast as shifting bits.
    """
    low = positive.contiguous().view(torch.uint8).to(torch.int32)
    high = negative.contiguous().view(torch.uint8).to(torch.int32)
    pairs = (low | high << 8).view(-1)
    elements = _elements_of_byte_pair(positive.device, dtype).index_select(0, pairs)
    return elements.view(positive.shape[0], positive.shape[1] * WORD)[:, :columns]


def panels(rows: int, columns: int, elements: int) -> Iterator[slice]:
    """Slices of rows, each of at most `elements` elements or of one row."""
    height = max(1, elements // columns)
    for start in range(0, rows, height):
        yield slice(start, start + height)


__all__ = ["WORD", "check_planes", "pack", "panels", "signs_of", "unpack", "words"]
