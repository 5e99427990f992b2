"""Decides the route of `expand` for a class of shapes: by a file, a measurement or the rule.

The first of these that covers the class decides, by the fastest route that it holds:

1. the file that `LORASB_TUNING` names;
2. what was measured on this device before, in the user's cache folder;
3. the file of the architecture in `lorasb_kernels/ops/tuned/`;
4. a measurement, made now and kept in 2, where one may be made (`ops/measuring.py`);
5. the rule, `route_rule.py`.
"""

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import torch

from lorasb_kernels.ops.measuring import tuning_mode, why_not_measured
from lorasb_kernels.ops.triton.agreement import agreed
from lorasb_kernels.ops.triton.expand_dual import dual_is_loaded, has_dual
from lorasb_kernels.ops.triton.route_files import (
    SHIPPED,
    DeviceFile,
    Measured,
    named_file,
    read_named,
    say_once,
)
from lorasb_kernels.ops.triton.route_measuring import Runs, Timer, bursts, candidates, measure
from lorasb_kernels.ops.triton.route_rule import unmeasured_route
from lorasb_kernels.ops.triton.tiles import ExpandTile, rank_tiles

BY_TENSOR_MAP = ("fused_descriptor", "dual")  # routes that need `takes_tensor_maps`


class Shape(NamedTuple):
    """The sizes of `expand` that decide its route.

    Args:
        dtype: of the operands.
        rows: M, rounded up to a power of two.
        N, K, r: outputs, contraction and rank.
        transposed: the weight is a transposed view, as for the input gradient.
        dropout: there is a mask.
    """

    dtype: torch.dtype
    rows: int
    N: int
    K: int
    r: int
    transposed: bool
    dropout: bool

    @property
    def key(self) -> str:
        """In files; ranks that fill the same tiles share it, if tensor maps describe p alike."""
        width, tiles = rank_tiles(self.r)
        described = self.r * self.dtype.itemsize % 16 == 0
        return (
            f"{str(self.dtype).removeprefix('torch.')} M<={self.rows} N={self.N} K={self.K} "
            f"r<={width * tiles}{'' if described else ' unaligned'} "
            f"weight={'transposed' if self.transposed else 'plain'} "
            f"dropout={'yes' if self.dropout else 'no'}"
        )


@dataclasses.dataclass(frozen=True)
class Route:
    """A choice: `name` is one of `route_files.ROUTES`, `tile` that of the Triton kernel.

    `otherwise` is the choice for operands that no tensor map describes, if `name` needs one.
    """

    name: str
    tile: ExpandTile
    reason: str
    otherwise: "Route | None" = None


def rounded_rows(M: int) -> int:
    """M rounded up to a power of two."""
    return 1 << max(M - 1, 0).bit_length()


def shape_of(x, weight, p, dropout: float) -> Shape:
    """The class of the operands of `expand`."""
    M, K = x.shape
    transposed = weight.stride(1) != 1
    return Shape(x.dtype, rounded_rows(M), weight.shape[0], K, p.shape[1], transposed, dropout > 0)


def describable(*matrices: torch.Tensor) -> bool:
    """Whether CUDA can describe every matrix by a tensor map.

    One dimension is contiguous, the base and the stride of the other are multiples of 16 bytes.
    """
    for matrix in matrices:
        unit, stride = sorted(matrix.stride())
        if unit != 1 or stride * matrix.itemsize % 16 or matrix.data_ptr() % 16:
            return False
    return True


def takes_tensor_maps(x, weight, p, factor) -> bool:
    """Whether `expand` of these operands can run by tensor maps, its result included."""
    whole = x.stride(1) == 1 and weight.shape[0] * x.itemsize % 16 == 0
    return whole and describable(x, weight, p, factor)


def decide(
    operands: tuple, runs: Runs, kept: DeviceFile, timer: Timer = bursts, store=None
) -> Route:
    """The route for operands; measures it if no file covers it and nothing forbids it.

    Args:
        operands: x, weight, p, factor, bias, dropout and seed, as `expand` takes them.
        runs: the routes by name.
        kept: what was measured on this device.
        timer: see `route_measuring.bursts`.
        store: what the processes of a distributed run share, or None; see `agreed`.

    Raises:
        FileNotFoundError, ValueError: an environment variable or the file it names is unusable.
    """
    x, weight, p, factor, _, dropout, _ = operands
    shape = shape_of(x, weight, p, dropout)
    obstacle = why_not_measured()
    if obstacle is not None:
        return planned(shape, kept.arch, kept, obstacle)
    named = _named(shape, kept.arch)
    if named is not None:
        return _fastest(*named)
    anew = tuning_mode() == "now"

    def answer() -> str:
        found = None if anew else _kept_or_shipped(shape, kept.arch, kept)
        if found is None:
            say_once(
                f"timing the routes of the frozen product on {kept.measured_on['device']}, once "
                f"for each class of shapes; kept in {kept.path} (LORASB_TUNE=off: never)"
            )
            described = takes_tensor_maps(x, weight, p, factor)
            # No GPU has run it yet, and a kernel that hangs cannot be left out: only when asked.
            dual = anew and described and has_dual(x.device, shape.dtype)
            tried = candidates(kept.arch, shape.dtype, shape.dropout, described, dual)
            new = {shape.key: measure(operands, runs, tried, timer)}
            found = kept.add(new, replace=anew)[shape.key], kept.path.name
        return json.dumps([found[0].to_json(), found[1]])

    topic = f"{json.dumps(kept.measured_on, sort_keys=True)} {shape.key}"
    try:
        entry, source = json.loads(agreed(topic, answer, store))
    except RuntimeError as error:  # no memory for one more output, or another process failed
        say_once(f"the route of {shape.key} is not measured: {error}")
        return _by_rule(shape, kept.arch, "measuring it failed")
    return _fastest(Measured.from_json(entry), source)


def planned(shape: Shape, arch: str, kept: DeviceFile | None, why: str) -> Route:
    """The route of a class that is not measured now.

    Args:
        shape: the class.
        arch: `"sm_86"` and so on.
        kept: what was measured on this device; None for any device of the architecture.
        why: why it is not measured.

    Raises:
        FileNotFoundError, ValueError: as for `decide`.
    """
    found = _named(shape, arch) or _kept_or_shipped(shape, arch, kept)
    return _by_rule(shape, arch, why) if found is None else _fastest(*found)


def _named(shape: Shape, arch: str) -> tuple[Measured, str] | None:
    """What the file that the user named says of a class, and its name."""
    path = named_file()
    return None if path is None else _in_file(path, shape, arch)


def _kept_or_shipped(
    shape: Shape, arch: str, kept: DeviceFile | None
) -> tuple[Measured, str] | None:
    if kept is not None and tuning_mode() != "off":
        entry = kept.read().get(shape.key)
        if entry is not None:
            return entry, kept.path.name
    shipped = SHIPPED / f"{arch}.json"
    return _in_file(shipped, shape, arch) if shipped.exists() else None


def _in_file(path: Path, shape: Shape, arch: str) -> tuple[Measured, str] | None:
    content = read_named(path)
    if content.arch != arch or shape.key not in content.expand:
        return None
    return content.expand[shape.key], path.name


def _fastest(entry: Measured, source: str) -> Route:
    times = ", ".join(f"{name} {timed.microseconds:.1f} µs" for name, timed in entry.routes.items())
    reason = f"measured on {entry.date} at M = {entry.rows} ({source}): {times}"
    there = [name for name in entry.routes if name != "dual" or dual_is_loaded()]
    order = sorted(there, key=lambda name: entry.routes[name].microseconds)
    if len(there) < len(entry.routes):
        reason += "; dual needs the CUDA extension"
    otherwise = None
    if order[0] in BY_TENSOR_MAP:
        plain = next(name for name in order if name not in BY_TENSOR_MAP)
        why = f"{reason}; {order[0]} needs rows at multiples of 16 bytes"
        otherwise = Route(plain, entry.routes[plain].tile, why)
    return Route(order[0], entry.routes[order[0]].tile, reason, otherwise)


def _by_rule(shape: Shape, arch: str, why: str) -> Route:
    dtype, sizes = shape.dtype, shape[1:]
    route, plain = (unmeasured_route(arch, dtype, *sizes, aligned) for aligned in (True, False))
    reason = f"{why}; by the rule: {{}}"
    otherwise = None
    if route.name in BY_TENSOR_MAP:
        otherwise = Route(plain.name, plain.tile, reason.format(plain.reason))
    return Route(route.name, route.tile, reason.format(route.reason), otherwise)


__all__ = [
    "Route",
    "Shape",
    "decide",
    "describable",
    "planned",
    "rounded_rows",
    "shape_of",
    "takes_tensor_maps",
]
