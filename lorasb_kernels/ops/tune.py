"""Measures the routes of `expand` for many shapes beforehand, and keeps what it found.

The same measurement as `auto` makes at the first use of a shape (`ops/triton/route_measuring.py`),
on random operands: for runs that must not spend a second on it, and for those that may not measure,
as in a CUDA graph or under `torch.compile`.
"""

from collections.abc import Callable, Iterable

import torch

from lorasb_kernels.ops import extension
from lorasb_kernels.ops.dropout import new_seed
from lorasb_kernels.ops.layer_shape import LayerShape
from lorasb_kernels.ops.measuring import tuning_mode
from lorasb_kernels.ops.triton.expand import RUN
from lorasb_kernels.ops.triton.expand_dual import has_dual
from lorasb_kernels.ops.triton.expand_route import forget_routes
from lorasb_kernels.ops.triton.route_decision import shape_of, takes_tensor_maps
from lorasb_kernels.ops.triton.route_files import DeviceFile, Measured, device_file, say_once
from lorasb_kernels.ops.triton.route_measuring import Timer, bursts, candidates, measure


def tune(
    layers: Iterable[LayerShape],
    *,
    siblings: Iterable[LayerShape] = (),
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    all_tiles: bool = False,
    kept: DeviceFile | None = None,
    timer: Timer = bursts,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Measured]:
    """Measures the forward product and the input gradient of every layer.

    Args:
        layers: the shapes.
        siblings: of the first of several layers on one input, at the sum of their ranks: the input
            gradient that they compute together. There is no forward product of that rank.
        dtype: of activations and weights.
        device: a CUDA device.
        all_tiles: time every tile that fits instead of the first few of each route.
        kept: where to keep the measurements; default: the file of the device, which `auto` reads.
        timer: seconds of each call, see `route_measuring.bursts`.
        progress: called with a line for each product.

    A product for which there is no memory is left out, and named at the end with how many there
    are: by `progress`, or in the log. So is one of whose routes one has no memory, as a choice
    among the others would be kept for good.

    Returns:
        The new entries by shape key. What the file has already is not measured again, unless all
        tiles are asked for or `LORASB_TUNE` is `now`.

    Raises:
        RuntimeError: `device` is not a CUDA device.
        ValueError: `LORASB_TUNE` is `off`, or unknown.
    """
    device = torch.device(device)
    if tuning_mode() == "off":
        raise ValueError("LORASB_TUNE is 'off'; expected 'once' or 'now' to measure")
    if kept is None:
        if device.type != "cuda":
            raise RuntimeError(f"device is {device}; expected a CUDA device: nothing else is timed")
        kept = device_file(device)
    extension.obstacle()  # loads it: one of the routes is its kernel
    say = progress or (lambda line: None)
    anew = all_tiles or tuning_mode() == "now"
    new: dict[str, Measured] = {}
    without_memory: list[str] = []
    products = [(layer, transposed) for layer in layers for transposed in (False, True)]
    for layer, transposed in [*products, *((layer, True) for layer in siblings)]:
        key = _key(layer, transposed, dtype)
        if key in new or key in without_memory:
            continue
        if not anew and key in kept.read():
            say(f"{key}: measured before")
            continue
        try:
            found = _measured(layer, transposed, dtype, device, kept.arch, all_tiles, timer)
        except torch.OutOfMemoryError:
            without_memory.append(key)
        else:
            # Kept at once, so that an interrupted run has lost nothing.
            new |= kept.add({key: found}, replace=anew)
            times = {name: timed.microseconds for name, timed in new[key].routes.items()}
            say(f"{key}: {min(times, key=times.get)}, microseconds {times}")
            continue
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what the product that failed has left
    if without_memory:
        tried = len(new) + len(without_memory)
        (progress or say_once)(
            f"not measured, out of memory: {len(without_memory)} of {tried} products: "
            f"{', '.join(without_memory)}"
        )
    forget_routes()
    return new


def _key(layer: LayerShape, transposed: bool, dtype: torch.dtype) -> str:
    """The class of a product; takes no memory."""
    x, weight, p, _, _, dropout, _ = random_operands(layer, transposed, dtype, torch.device("meta"))
    return shape_of(x, weight, p, dropout).key


def _measured(
    layer: LayerShape,
    transposed: bool,
    dtype: torch.dtype,
    device: torch.device,
    arch: str,
    all_tiles: bool,
    timer: Timer,
) -> Measured:
    operands = random_operands(layer, transposed, dtype, device)
    x, weight, p, factor, _, dropout, _ = operands
    described = takes_tensor_maps(x, weight, p, factor)
    dual = described and has_dual(device, dtype)
    tried = candidates(arch, dtype, dropout > 0, described, dual, all_tiles)
    return measure(operands, RUN, tried, timer)


def random_operands(
    layer: LayerShape, transposed: bool, dtype: torch.dtype, device: torch.device
) -> tuple:
    """Operands of `expand` for a layer.

    Args:
        layer: the shape.
        transposed: those of the input gradient `dy W + drop(q A)` if True, else of the forward
            product.
        dtype, device: of the operands.
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
    return x, weight, p, factor, None, dropout, new_seed(device) if dropout > 0 else None


__all__ = ["random_operands", "tune"]
