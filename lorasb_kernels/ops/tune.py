"""Measures both routes of `expand` on this GPU and keeps the result; opt-in.

Each route is timed with CUDA events, the L2 cache flushed before each run, medians taken
(`triton.testing.do_bench`). The fused route is timed with every candidate tile that the
device has room for. The file written can be named by `LORASB_TUNING`, or shipped as
`lorasb_kernels/ops/tuned/<arch>.json`.
"""

import dataclasses
import datetime
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import triton

from lorasb_kernels.files import write_text
from lorasb_kernels.ops.dropout import new_seed
from lorasb_kernels.ops.expand.route import FORMAT, forget_tuning, load_tuning, shape_key
from lorasb_kernels.ops.expand.triton import fused_expand, two_call_expand
from lorasb_kernels.ops.tiles import EXPAND_CANDIDATES, architecture, expand_tile


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """A layer [m, n] at rank r on M tokens; `dropout_p` falls on the input gradient."""

    M: int
    m: int
    n: int
    r: int
    dropout_p: float = 0.0


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
        path: JSON file, written beside its place and renamed.
        dtype: of activations and weights.
        device: a CUDA device.
        progress: called with a line for each measurement.

    Returns:
        The new entries by shape key.

    Raises:
        RuntimeError: `device` is not a CUDA device.
        ValueError: `path` holds something else than measurements of this architecture.
    """
    device = torch.device(device)
    if device.type != "cuda":
        raise RuntimeError(f"device is {device}; expected a CUDA device: nothing else is timed")
    path, arch = Path(path), architecture(device)
    entries = dict(load_tuning(path, arch)) if path.exists() else {}
    if path.exists() and not entries:
        raise ValueError(f"path is {str(path)!r}, of another architecture; expected {arch}")
    measured = {}
    with torch.cuda.device(device):
        for layer in layers:
            for transposed in (False, True):
                key, entry = measure(layer, transposed, dtype, device)
                measured[key] = entry
                if progress is not None:
                    progress(f"{key}: {entry['route']}, {entry['microseconds']}")
    content = {
        "format": FORMAT,
        "arch": arch,
        "measured_on": {
            "device": torch.cuda.get_device_name(device),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "date": datetime.date.today().isoformat(),
        },
        "expand": {**entries, **measured},
    }
    write_text(path, json.dumps(content, indent=1) + "\n")
    forget_tuning()
    return measured


def measure(
    layer: LayerShape, transposed: bool, dtype: torch.dtype, device: torch.device
) -> tuple[str, dict]:
    """Times both routes for one product; returns its shape key and its entry.

    Args:
        layer: the shape.
        transposed: the input gradient `dy W + drop(q A)` if True, else the forward product.
        dtype, device: of the operands, which are random.
    """
    M, r = layer.M, layer.r
    N, K = (layer.n, layer.m) if transposed else (layer.m, layer.n)
    dropout_p = layer.dropout_p if transposed else 0.0
    x = torch.randn(M, K, dtype=dtype, device=device)
    p = torch.randn(M, r, dtype=dtype, device=device)
    if transposed:
        weight = torch.randn(K, N, dtype=dtype, device=device).T
        factor = torch.randn(r, N, dtype=dtype, device=device).T
    else:
        weight = torch.randn(N, K, dtype=dtype, device=device)
        factor = torch.randn(N, r, dtype=dtype, device=device)
    seed = new_seed(device) if dropout_p > 0 else None
    arguments = (x, weight, p, factor, None, dropout_p, seed)

    shipped = expand_tile(architecture(device), dtype, dropout_p > 0)
    two_call = _microseconds(lambda: two_call_expand(*arguments, shipped))
    fused = {}
    for tile in dict.fromkeys((shipped, *EXPAND_CANDIDATES[dtype.itemsize])):
        try:
            fused[tile] = _microseconds(lambda tile=tile: fused_expand(*arguments, tile))
        except triton.runtime.errors.OutOfResources:
            continue
    best = min(fused, key=fused.get)
    entry = {
        "route": "fused" if fused[best] < two_call else "two_call",
        "tile": dataclasses.asdict(best if fused[best] < two_call else shipped),
        "microseconds": {"fused": round(fused[best], 2), "two_call": round(two_call, 2)},
    }
    return shape_key(dtype, M, N, K, r, transposed, dropout_p > 0), entry


def _microseconds(function: Callable[[], torch.Tensor]) -> float:
    return 1000 * triton.testing.do_bench(function, return_mode="median")


__all__ = ["LayerShape", "measure", "tune"]
