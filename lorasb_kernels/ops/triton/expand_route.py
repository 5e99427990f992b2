"""Which route `expand` takes on a GPU, with which tile, and why.

    two_call           cuBLAS twice, see `ops/two_call.py`                      `expand.py`
    fused              one GEMM whose contraction is extended over the rank   `expand.py`
    fused_descriptor   the same, its tiles moved by TMA; from sm_90 on        `expand_descriptor.py`
    dual               the CUDA extension's persistent kernel for Hopper      `expand_dual.py`

`route_decision.py` says how it is decided. A process decides once for a class of shapes, so the
bits of its results stay what they are, and files carry what was measured to later processes. In
Triton's interpreter, which has no cuBLAS: `fused`.
"""

import threading

import torch

from lorasb_kernels.ops.measuring import why_not_measured
from lorasb_kernels.ops.triton.agreement import group_store
from lorasb_kernels.ops.triton.route_decision import (
    Route,
    Shape,
    decide,
    planned,
    shape_of,
    takes_tensor_maps,
)
from lorasb_kernels.ops.triton.route_files import device_file, read_named
from lorasb_kernels.ops.triton.route_measuring import Runs
from lorasb_kernels.ops.triton.tiles import INTERPRETER, architecture, expand_tile

_DECIDED: dict[tuple[int, Shape], Route] = {}  # by index of the device
_DECIDING = threading.Lock()
# The same by the operands' own sizes, which cost less to compare than their class to find.
_SEEN: dict[tuple, Route] = {}
_LIMIT = 4096  # of sizes that are remembered


def choose_route(x, weight, p, factor, bias, dropout: float, seed, runs: Runs) -> Route:
    """The route for `expand` of these operands; `runs` are the routes by name.

    After the first call with operands of these sizes it costs a look-up and, for a route by tensor
    maps, a look at the strides.
    """
    sizes = (x.shape, x.dtype, x.get_device(), weight.shape, weight.stride(), p.shape, dropout > 0)
    route = _SEEN.get(sizes)
    if route is None:
        route = _decide((x, weight, p, factor, bias, dropout, seed), runs)
        if len(_SEEN) >= _LIMIT:
            _SEEN.clear()
        _SEEN[sizes] = route
    if route.otherwise is not None and not takes_tensor_maps(x, weight, p, factor):
        return route.otherwise
    return route


def _decide(operands: tuple, runs: Runs) -> Route:
    x, weight, p, _, _, dropout, _ = operands
    shape = shape_of(x, weight, p, dropout)
    arch = architecture(x.device)
    if arch == INTERPRETER:
        return _interpreted(shape)
    with _DECIDING:
        decided = _DECIDED.get((x.get_device(), shape))
        if decided is not None:
            return decided
        kept = device_file(x.device)
        if x.shape[0] == 0:
            return planned(shape, arch, kept, "no rows")
        route = decide(operands, runs, kept, store=group_store())
        _DECIDED[x.get_device(), shape] = route
        return route


def _interpreted(shape: Shape) -> Route:
    tile = expand_tile(INTERPRETER, shape.dtype, shape.dropout)
    return Route("fused", tile, "Triton's interpreter runs the kernel")


def plan_route(arch: str, shape: Shape, device: torch.device | None = None) -> Route:
    """The route of a class of shapes, without operands: nothing is measured.

    Args:
        arch: `"sm_86"` and so on.
        shape: the class.
        device: to heed what was decided and measured on it; None for any of the architecture.

    Raises:
        FileNotFoundError, ValueError: an environment variable or the file it names is unusable.
    """
    if arch == INTERPRETER:
        return _interpreted(shape)
    if device is None:
        route = planned(shape, arch, None, f"not measured on {arch}")
    else:
        index = torch.cuda.current_device() if device.index is None else device.index
        why = why_not_measured() or "not measured yet, but at its first use"
        decided = _DECIDED.get((index, shape))
        route = decided or planned(shape, arch, device_file(device), why)
    sizes = (shape.N, shape.K, shape.r)
    if all(size * shape.dtype.itemsize % 16 == 0 for size in sizes):
        return route
    return route.otherwise or route


def forget_routes() -> None:
    """The next choice reads the files again."""
    read_named.cache_clear()
    _DECIDED.clear()
    _SEEN.clear()


__all__ = ["choose_route", "forget_routes", "plan_route"]
