"""Which route `expand` takes on a GPU, with which tile, and why.

Measured where it has been measured, a stated rule elsewhere. Measurements are kept in JSON
files of one architecture each: those shipped in `lorasb_kernels/ops/tuned/`, and before
them the file that the environment variable `LORASB_TUNING` names, which `lorasb tune`
writes. Nothing is measured unless asked, so the bits of a result do not change by themselves.

The rule: two calls. A tile that was never timed on the device may lose more than the fusion
saves; the vendor's GEMM does not. Triton's interpreter has no vendor's GEMM: fused.
"""

import dataclasses
import functools
import json
import os
from pathlib import Path

import torch

from lorasb_kernels.ops.tiles import (
    INTERPRETER,
    ExpandTile,
    architecture,
    expand_tile,
    rank_tiles,
)

FORMAT = 1
ROUTES = ("fused", "two_call")
SHIPPED = Path(__file__).resolve().parent.parent / "tuned"


@dataclasses.dataclass(frozen=True)
class Route:
    """A choice: `name` is `"fused"` or `"two_call"`, `tile` that of the Triton kernel."""

    name: str
    tile: ExpandTile
    reason: str


def shape_key(dtype: torch.dtype, M: int, N: int, K: int, r: int, transposed: bool, dropout: bool):
    """The bucket a measurement speaks for: M up to a power of two, the rank to its tiles.

    `transposed` says that the weight is a transposed view, as for the input gradient.
    """
    width, tiles = rank_tiles(r)
    rows = 1 << max(M - 1, 0).bit_length()
    name = str(dtype).removeprefix("torch.")
    return (
        f"{name} M<={rows} N={N} K={K} r<={width * tiles} "
        f"weight={'transposed' if transposed else 'plain'} dropout={'yes' if dropout else 'no'}"
    )


def choose_route(x: torch.Tensor, weight: torch.Tensor, r: int, dropout: bool) -> Route:
    """The route for `expand(x [M, K], weight [N, K], …)` at rank r, with or without dropout."""
    transposed = weight.stride(1) != 1
    M, (N, K) = x.shape[0], weight.shape
    return plan_route(architecture(x.device), x.dtype, M, N, K, r, transposed, dropout)


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
) -> Route:
    """`choose_route` from numbers alone; `arch` is `"sm_86"` and so on."""
    tile = expand_tile(arch, dtype, dropout)
    if arch == INTERPRETER:
        return Route("fused", tile, "Triton's interpreter runs the kernel")
    key = shape_key(dtype, M, N, K, r, transposed, dropout)
    for path in _tuning_files(arch):
        found = load_tuning(path, arch).get(key)
        if found is not None:
            tile = ExpandTile(**found["tile"])
            times = ", ".join(f"{name} {found['microseconds'][name]:.1f} µs" for name in ROUTES)
            return Route(found["route"], tile, f"measured ({path.name}): {times}")
    return Route("two_call", tile, f"not measured on {arch} for {key}: the vendor's GEMM is safe")


def _tuning_files(arch: str) -> list[Path]:
    named = os.environ.get("LORASB_TUNING")
    shipped = SHIPPED / f"{arch}.json"
    return ([Path(named)] if named else []) + ([shipped] if shipped.exists() else [])


@functools.cache
def load_tuning(path: Path, arch: str) -> dict[str, dict]:
    """The measurements of a tuning file by shape key; empty if it speaks of another device.

    Raises:
        FileNotFoundError, ValueError: naming the file and what is wrong with it.
    """
    if not path.exists():
        raise FileNotFoundError(f"LORASB_TUNING is {str(path)!r}; expected an existing file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format is {content['format']}; expected {FORMAT}")
        for key, entry in content["expand"].items():
            if entry["route"] not in ROUTES:
                raise ValueError(
                    f"route of {key!r} is {entry['route']!r}; expected one of {ROUTES}"
                )
            ExpandTile(**entry["tile"])
        return content["expand"] if content["arch"] == arch else {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a tuning file: {error!r}") from error


def forget_tuning() -> None:
    """Reads the tuning files anew at the next choice."""
    load_tuning.cache_clear()
    plan_route.cache_clear()


__all__ = [
    "FORMAT",
    "ROUTES",
    "Route",
    "choose_route",
    "forget_tuning",
    "load_tuning",
    "plan_route",
    "shape_key",
]
