"""Times the routes of `expand` against each other on given operands.

Interleaved bursts (`utils/timing.py`), operands rotated past the L2 cache, medians. Triton keeps
what it compiled on disk, and most shapes share it, so the first shape takes seconds and the others
tenths of a second.
"""

import datetime
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch

from lorasb_kernels.ops.triton.route_files import Measured, Timed, say_once
from lorasb_kernels.ops.triton.tiles import (
    EXPAND_CANDIDATES,
    RESERVED_SHARED,
    SHARED_BYTES,
    ExpandTile,
    descriptor_candidates,
    expand_tile,
    operand_bytes,
)
from lorasb_kernels.utils.timing import Call, copies_past_cache, interleave, median

# Several numbers of seconds by candidate.
Timer = Callable[[Mapping[Hashable, Call], torch.device], Mapping[Hashable, Sequence[float]]]
Runs = Mapping[str, Callable[..., torch.Tensor]]
Candidates = Sequence[tuple[str, ExpandTile]]

# Share of the norm by which a result differs from that of the two calls if it is no rounding.
WRONG = 0.05
SHORT_LIST = 3  # tiles of a route that are tried unless all are asked for

bursts: Timer = functools.partial(interleave, rounds=5)


def candidates(
    arch: str,
    dtype: torch.dtype,
    dropout: bool,
    described: bool,
    dual: bool = False,
    all_tiles: bool = False,
) -> Candidates:
    """The routes and tiles to time, without those whose stages a block cannot hold.

    Args:
        arch: `"sm_86"` and so on.
        dtype: of the operands.
        dropout: whether there is a mask.
        described: whether tensor maps can describe the operands.
        dual: whether the CUDA extension's kernel for Hopper takes them.
        all_tiles: every tile instead of the first few of each route.
    """
    shipped = expand_tile(arch, dtype, dropout)
    fused = dict.fromkeys((shipped, *EXPAND_CANDIDATES[dtype.itemsize]))
    fitting = [tile for tile in fused if _fits(tile, arch, dtype)]
    by_tensor_map = descriptor_candidates(arch, dtype, dropout) if described else ()
    count = None if all_tiles else SHORT_LIST
    return [
        ("two_call", shipped),
        *(("fused", tile) for tile in fitting[:count]),
        *(("fused_descriptor", tile) for tile in by_tensor_map[:count]),
        *([("dual", shipped)] if dual else ()),
    ]


def _fits(tile: ExpandTile, arch: str, dtype: torch.dtype) -> bool:
    return operand_bytes(tile, dtype, arch) <= SHARED_BYTES[arch] - RESERVED_SHARED


def measure(operands: tuple, runs: Runs, tried: Candidates, timer: Timer = bursts) -> Measured:
    """Times candidates against each other.

    Args:
        operands: x, weight, p, factor, bias, dropout and seed, as `expand` takes them; unchanged.
        runs: the routes, called with the operands and a tile.
        tried: routes and tiles.
        timer: seconds of each call, see `bursts`.

    Returns:
        The fastest tile of each route that runs. A candidate that fails, or computes something
        else than `two_call`, is named and left out; one that needs more of a block than the
        device has is left out.

    Raises:
        torch.OutOfMemoryError: no room for a few more outputs.
        Exception: what `two_call` raised.
    """
    from triton.runtime.errors import OutOfResources  # planning a route needs no Triton

    device = operands[0].device
    tensors = [value for value in operands if isinstance(value, torch.Tensor)]
    count = copies_past_cache(sum(tensor.nbytes for tensor in tensors), device)
    copies = [operands, *(_copy(operands) for _ in range(count - 1))]
    calls: dict[Hashable, Call] = {}
    found: torch.Tensor | None = None
    expected: torch.Tensor | None = None
    for name, tile in tried:

        def call(i: int, run=runs[name], tile: ExpandTile = tile) -> torch.Tensor:
            return run(*copies[i % count], tile)

        try:
            found = call(0)  # compiles
        except OutOfResources:
            continue
        except Exception as error:
            if name == "two_call" or isinstance(error, torch.OutOfMemoryError):
                raise
            say_once(f"route {name} with {tile} does not run and is left out: {error}")
            continue
        if name == "two_call":
            expected = found
        elif expected is not None and not _equal_up_to_rounding(found, expected):
            say_once(f"route {name} with {tile} computes something else and is left out")
            continue
        calls[name, tile] = call
    del found, expected  # their memory, before the timing
    fastest: dict[str, Timed] = {}
    for (name, tile), samples in timer(calls, device).items():
        microseconds = round(1e6 * median(samples), 2)
        if name not in fastest or microseconds < fastest[name].microseconds:
            fastest[name] = Timed(microseconds, tile)
    return Measured(datetime.date.today().isoformat(), operands[0].shape[0], fastest)


def _equal_up_to_rounding(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """No test of accuracy, which tests/ has: a kernel that is wrong on this device must not win."""
    size = torch.linalg.vector_norm(expected, dtype=torch.float32)
    difference = torch.linalg.vector_norm(found - expected, dtype=torch.float32)
    return bool(difference <= WRONG * size) or not bool(size.isfinite())


def _copy(operands: tuple) -> tuple[Any, ...]:
    return tuple(value.clone() if isinstance(value, torch.Tensor) else value for value in operands)


__all__ = ["Candidates", "Runs", "Timer", "bursts", "candidates", "measure"]
