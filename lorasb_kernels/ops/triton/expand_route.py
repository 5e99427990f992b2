"""Which route `expand` takes on a GPU, with which tile, and why.

    two_call           cuBLAS twice, see `ops/two_call.py`                      `expand.py`
    fused              one GEMM whose contraction is extended over the rank   `expand.py`
    fused_descriptor   the same, its tiles moved by TMA; sm_90                `expand_descriptor.py`

Where the routes have been measured, the fastest one that the operands allow is taken; elsewhere the
rule below decides. Measurements are in JSON files, one per architecture: first the file that the
environment variable `LORASB_TUNING` names, which `lorasb tune` writes, then the files shipped in
`lorasb_kernels/ops/tuned/`. Nothing is measured unless asked, so the bits of a result do not
change by themselves.

The rule: `two_call`. A fused tile that was never timed on the device may lose more than the fusion
saves. In Triton's interpreter, which has no cuBLAS: `fused`.
"""

import dataclasses
import functools
import json
import os
from pathlib import Path

import torch

from lorasb_kernels.ops.triton.route_rule import unmeasured_route
from lorasb_kernels.ops.triton.tiles import (
    INTERPRETER,
    ExpandTile,
    architecture,
    expand_tile,
    rank_tiles,
)

FORMAT = 2
ROUTES = ("two_call", "fused", "fused_descriptor")
SHIPPED = Path(__file__).resolve().parent.parent / "tuned"


@dataclasses.dataclass(frozen=True)
class Route:
    """A choice: `name` is one of `ROUTES`, `tile` that of the Triton kernel."""

    name: str
    tile: ExpandTile
    reason: str


def shape_key(dtype: torch.dtype, M: int, N: int, K: int, r: int, transposed: bool, dropout: bool):
    """The shapes that share a measurement: M rounded up to a power of two, r to its tiles.

    `transposed` says that the weight is a transposed view, as for the input gradient.
    """
    width, tiles = rank_tiles(r)
    rows = 1 << max(M - 1, 0).bit_length()
    name = str(dtype).removeprefix("torch.")
    return (
        f"{name} M<={rows} N={N} K={K} r<={width * tiles} "
        f"weight={'transposed' if transposed else 'plain'} dropout={'yes' if dropout else 'no'}"
    )


def choose_route(
    x: torch.Tensor, weight: torch.Tensor, p: torch.Tensor, factor: torch.Tensor, dropout: bool
) -> Route:
    """The route for `expand` of these operands, with or without dropout."""
    transposed = weight.stride(1) != 1
    (M, K), N, r = x.shape, weight.shape[0], p.shape[1]
    shape = (architecture(x.device), x.dtype, M, N, K, r, transposed, dropout)
    route = plan_route(*shape)
    if route.name == "fused_descriptor":
        aligned = x.stride(1) == 1 and describable(x, weight, p, factor)
        route = plan_route(*shape, aligned=aligned)
    return route


def describable(*matrices: torch.Tensor) -> bool:
    """Whether CUDA can describe every matrix by a tensor map.

    One dimension is contiguous, the base and the stride of the other are multiples of 16 bytes.
    """
    for matrix in matrices:
        unit, stride = sorted(matrix.stride())
        if unit != 1 or stride * matrix.itemsize % 16 or matrix.data_ptr() % 16:
            return False
    return True


@functools.lru_cache(maxsize=4096)
def plan_route(
    arch: str,
    dtype: torch.dtype,
    M: int,
    N: int,
    K: int,
    r: int,
    transposed: bool,
    dropout: bool,
    aligned: bool = True,
) -> Route:
    """`choose_route` from the sizes only, as if all matrices were contiguous.

    Args:
        arch: `"sm_86"` and so on.
        dtype, M, N, K, r: of the operands.
        transposed, dropout: as for `shape_key`.
        aligned: False if an operand is not `describable`.
    """
    tile = expand_tile(arch, dtype, dropout)
    if arch == INTERPRETER:
        return Route("fused", tile, "Triton's interpreter runs the kernel")
    key = shape_key(dtype, M, N, K, r, transposed, dropout)
    for path in _tuning_files(arch):
        measured_on, entries = read_tuning(path)
        if measured_on != arch or key not in entries:
            continue
        measured = entries[key]
        times = ", ".join(f"{name} {measured[name]['microseconds']:.1f} µs" for name in measured)
        reason = f"measured ({path.name}): {times}"
        aligned = aligned and all(size * dtype.itemsize % 16 == 0 for size in (N, K, r))
        if "fused_descriptor" in measured and not aligned:
            measured = {name: measured[name] for name in measured if name != "fused_descriptor"}
            reason += "; fused_descriptor needs rows at multiples of 16 bytes"
        fastest = min(measured, key=lambda name: measured[name]["microseconds"])
        return Route(fastest, ExpandTile(**measured[fastest]["tile"]), reason)
    rule = unmeasured_route(arch, dtype, M, N, K, r, transposed, dropout, aligned)
    return Route(rule.name, rule.tile, f"not measured on {arch} for {key}: {rule.reason}")


def _tuning_files(arch: str) -> list[Path]:
    named = os.environ.get("LORASB_TUNING")
    shipped = SHIPPED / f"{arch}.json"
    return ([Path(named)] if named else []) + ([shipped] if shipped.exists() else [])


@functools.cache
def read_tuning(path: Path) -> tuple[str, dict[str, dict]]:
    """The architecture of a tuning file, and the time and tile of each route by shape key.

    Raises:
        FileNotFoundError, ValueError: naming the file and what is wrong with it.
    """
    if not path.exists():
        raise FileNotFoundError(f"LORASB_TUNING is {str(path)!r}; expected an existing file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format is {content['format']}; expected {FORMAT}")
        for key, measured in content["expand"].items():
            for name, entry in measured.items():
                if name not in ROUTES:
                    raise ValueError(f"a route of {key!r} is {name!r}; expected one of {ROUTES}")
                ExpandTile(**entry["tile"])
                float(entry["microseconds"])
            if not {"two_call", "fused"} <= measured.keys():
                raise ValueError(f"{key!r} has {list(measured)}; expected two_call and fused")
        return content["arch"], content["expand"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a tuning file: {error!r}") from error


def forget_tuning() -> None:
    """The next choice reads the tuning files again."""
    read_tuning.cache_clear()
    plan_route.cache_clear()


__all__ = [
    "FORMAT",
    "ROUTES",
    "Route",
    "choose_route",
    "describable",
    "forget_tuning",
    "plan_route",
    "read_tuning",
    "shape_key",
]
