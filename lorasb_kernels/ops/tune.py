"""Measures the routes of `expand` on this GPU and saves the results; runs only when asked to.

Each route is timed with CUDA events, the L2 cache flushed before each run, medians taken
(`triton.testing.do_bench`). The fused routes are timed with every candidate tile that fits on
the device; a route keeps its fastest. The written file can be named by `LORASB_TUNING`, or shipped
as `lorasb_kernels/ops/tuned/<arch>.json`.
"""

import dataclasses
import datetime
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import triton

from lorasb_kernels.ops.dropout import new_seed
from lorasb_kernels.ops.layer_shape import LayerShape
from lorasb_kernels.ops.triton.expand import RUN
from lorasb_kernels.ops.triton.expand_route import (
    FORMAT,
    describable,
    forget_tuning,
    read_tuning,
    shape_key,
)
from lorasb_kernels.ops.triton.tiles import (
    EXPAND_CANDIDATES,
    ExpandTile,
    architecture,
    descriptor_candidates,
    expand_tile,
)
from lorasb_kernels.utils.files import write_text


def tune(
    layers: Iterable[LayerShape],
    path: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    progress: Callable[[str], None] | None = None,
) -> dict[str, dict]:
    """Measures the forward product and the input gradient of every layer; writes `path`.

    An existing file of the same architecture is extended. The process uses the new
    measurements from then on if `LORASB_TUNING` names the file.

    Args:
        layers: the shapes to measure.
        path: JSON file, replaced after each layer (temporary file in the same folder, renamed).
        dtype: of activations and weights.
        device: a CUDA device.
        progress: called with a line for each measurement.

    Returns:
        The new entries by shape key.

    Raises:
        RuntimeError: `device` is not a CUDA device.
        ValueError: `path` holds something other than measurements of this architecture.
    """
    device = torch.device(device)
    if device.type != "cuda":
        raise RuntimeError(f"device is {device}; expected a CUDA device: nothing else is timed")
    path, arch = Path(path), architecture(device)
    measured_on, entries = read_tuning(path) if path.exists() else (arch, {})
    if measured_on != arch:
        raise ValueError(f"path is {str(path)!r}, measured on {measured_on}; expected {arch}")
    content = {
        "format": FORMAT,
        "arch": arch,
        "measured_on": {
            "device": torch.cuda.get_device_name(device),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "date": datetime.date.today().isoformat(),
        },
        "expand": dict(entries),
    }
    measured = {}
    with torch.cuda.device(device):
        for layer in layers:
            for transposed in (False, True):
                key, entry = measure(layer, transposed, dtype, device)
                measured[key] = entry
                if progress is not None:
                    times = {name: route["microseconds"] for name, route in entry.items()}
                    progress(f"{key}: {min(times, key=times.get)}, microseconds {times}")
            # After each layer, so that an interrupted run keeps what it has measured.
            content["expand"].update(measured)
            write_text(path, json.dumps(content, indent=1) + "\n")
    forget_tuning()
    return measured


def measure(
    layer: LayerShape, transposed: bool, dtype: torch.dtype, device: torch.device
) -> tuple[str, dict]:
    """Times every route for one product; returns its shape key, and time and tile by route.

    Args:
        layer: the shape.
        transposed: the input gradient `dy W + drop(q A)` if True, else the forward product.
        dtype, device: of the operands, which are random.
    """
    M, r = layer.M, layer.r
    N, K = (layer.n, layer.m) if transposed else (layer.m, layer.n)
    dropout = layer.dropout if transposed else 0.0
    x = torch.randn(M, K, dtype=dtype, device=device)
    p = torch.randn(M, r, dtype=dtype, device=device)
    if transposed:
        weight = torch.randn(K, N, dtype=dtype, device=device).T
        factor = torch.randn(r, N, dtype=dtype, device=device).T
    else:
        weight = torch.randn(N, K, dtype=dtype, device=device)
        factor = torch.randn(N, r, dtype=dtype, device=device)
    seed = new_seed(device) if dropout > 0 else None
    arguments = (x, weight, p, factor, None, dropout, seed)

    arch, drops = architecture(device), dropout > 0
    shipped = expand_tile(arch, dtype, drops)
    described = describable(x, weight, p, factor) and N * dtype.itemsize % 16 == 0
    candidates = {
        "two_call": (shipped,),
        "fused": dict.fromkeys((shipped, *EXPAND_CANDIDATES[dtype.itemsize])),
        "fused_descriptor": descriptor_candidates(arch, dtype, drops) if described else (),
    }
    entry = {}
    for name, tiles in candidates.items():
        times = _times(lambda tile, run=RUN[name]: run(*arguments, tile), tiles)
        if times:
            best = min(times, key=times.get)
            entry[name] = {"microseconds": times[best], "tile": dataclasses.asdict(best)}
    return shape_key(dtype, M, N, K, r, transposed, drops), entry


def _times(
    run: Callable[[ExpandTile], torch.Tensor], tiles: Iterable[ExpandTile]
) -> dict[ExpandTile, float]:
    """Microseconds by tile; tiles that do not fit on the device are left out."""
    times = {}
    for tile in tiles:
        try:
            times[tile] = round(_microseconds(lambda tile=tile: run(tile)), 2)
        except triton.runtime.errors.OutOfResources:
            continue
    return times


def _microseconds(function: Callable[[], torch.Tensor]) -> float:
    return 1000 * triton.testing.do_bench(function, return_mode="median")


__all__ = ["measure", "tune"]
