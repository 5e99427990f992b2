"""What hypothesis draws: sizes, and the values, scale, special elements and layout of operands."""

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

SPECIAL = (math.nan, math.inf, -math.inf, -0.0, 0.0)
# Powers of ten that leave room for a product of two operands; fp16 ends at 6.5e4 and 6e-8.
POWERS = {torch.float16: (-7, 4), torch.bfloat16: (-20, 20), torch.float32: (-20, 20)}

# Larger fp32 numbers are infinite to tensor cores, and so to products of three tf32 terms.
LARGEST_TF32 = (2 - 2.0**-10) * 2.0**127


@dataclass(frozen=True)
class Fill:
    """How one operand is made.

    `power`: its elements are of size 10^power; `kind`: normal numbers, all 0, one constant,
    or `rows`, each row of another size; `special`: elements set to NaN, ±Inf, −0, a denormal
    or the largest number, by position; `layout`: how it lies in memory.
    """

    power: int = 0
    kind: str = "normal"
    special: tuple[tuple[float, float | str], ...] = ()
    layout: str = "contiguous"


def fills(
    dtype: torch.dtype,
    layouts: tuple[str, ...] = ("contiguous",),
    plain: bool = False,
    largest: bool = True,
):
    """Fills of an operand; `plain` ones are finite and of size 1, `largest` ones may overflow."""
    layout = st.sampled_from(layouts)
    if plain:
        return st.builds(Fill, layout=layout)
    # Half of the operands are of size 1, or nearly every product would leave the range.
    power = st.just(0) | st.integers(*POWERS[dtype])
    kind = st.sampled_from(("normal", "normal", "normal", "zero", "constant", "rows"))
    element = st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.sampled_from((*SPECIAL, "denormal", *(["largest"] if largest else []))),
    )
    special = st.just(()) | st.lists(element, max_size=3).map(tuple)
    return st.builds(Fill, power, kind, special, layout)


def sizes(largest: int = 140):
    """Numbers of rows or features: 1, odd and round ones, around the edges of tiles."""
    edges = [size for size in (1, 2, 7, 16, 17, 31, 32, 33, 63, 64, 65, 96, 128) if size <= largest]
    return st.sampled_from(edges) | st.integers(1, largest)


def rows(largest: int = 70):
    """Tokens: also none."""
    return st.sampled_from((0, 1, 2, 16, 33)) | st.integers(0, largest)


def ranks(largest: int = 70):
    """1, the papers' ranks, around the edges of rank tiles."""
    edges = [r for r in (1, 3, 8, 16, 20, 24, 25, 31, 32, 33, 64, 96, 128, 200) if r <= largest]
    return st.sampled_from(edges) | st.integers(1, largest)


def scalings():
    """s: of either sign, whole and not, small and large."""
    return st.sampled_from((1.0, 0.75, -2.0, 0.0, 1e-3, 64.0)) | st.floats(-10, 10)


def dropouts():
    return st.sampled_from((0.0, 0.0, 0.1, 0.5, 0.99))


def make(
    fill: Fill, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int
) -> torch.Tensor:
    """The operand that `fill` describes; the same numbers on every device."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    if fill.kind == "zero":
        values.zero_()
    elif fill.kind == "constant":
        values.fill_(1.0)
    elif fill.kind == "rows" and shape:
        low, high = POWERS[dtype]
        count = shape[0] if len(shape) > 1 else 1
        powers = torch.randint(low // 2, high // 2 + 1, (count,), generator=generator)
        values *= (10.0 ** powers.double()).view(count, *[1] * (len(shape) - 1))
    values = (values * 10.0**fill.power).to(dtype)
    flat = values.view(-1)
    for position, value in fill.special:
        if flat.numel():
            flat[int(position * flat.numel())] = _number(value, dtype)
    return lay_out(values.to(device), fill.layout)


def _number(value: float | str, dtype: torch.dtype) -> float:
    limits = torch.finfo(dtype)
    largest = LARGEST_TF32 if dtype == torch.float32 else limits.max
    named = {"denormal": limits.smallest_normal / 8, "largest": largest}
    return named.get(value, value)


def lay_out(values: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values: `contiguous`, `padded` (in a wider buffer of NaN), `transposed` (the
    first of two dimensions is contiguous) or `stepped` (every other row and column).

    In bf16 on the CPU the gaps are 0: there torch's own product reads past the end of strided
    rows and multiplies what it finds by 0, so that NaN beside a view reaches the result.
    """
    gap = 0.0 if (values.dtype, values.device.type) == (torch.bfloat16, "cpu") else math.nan
    if layout == "contiguous" or values.dim() < 2:
        return values
    if layout == "transposed":
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "padded":
        buffer = values.new_full((*values.shape[:-1], values.shape[-1] + 5), gap)
        view = buffer[..., 3:-2]
    else:
        shape = [2 * size for size in values.shape[-2:]]
        buffer = values.new_full((*values.shape[:-2], *shape), gap)
        view = buffer[..., ::2, ::2]
    return view.copy_(values)
