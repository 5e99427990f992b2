"""Holds the performance model against this GPU: each kernel timed in a CUDA graph of its own."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F

from lorasb_kernels.hardware.gemm import gemm
from lorasb_kernels.hardware.gpus import Gpu
from lorasb_kernels.ops.shrink import shrink
from lorasb_kernels.ops.triton.core_backward import rank_gradient
from lorasb_kernels.ops.triton.expand import RUN
from lorasb_kernels.ops.triton.route_rule import fused_limits, fused_tiles
from lorasb_kernels.ops.triton.tiles import ExpandTile
from lorasb_kernels.ops.two_call import two_call
from lorasb_kernels.profiling import layer_time
from lorasb_kernels.profiling.fit import Case, error_table, fit
from lorasb_kernels.profiling.shapes import Layer
from lorasb_kernels.utils.timing import Call, captured, copies_past_cache, interleave, median

Timed = Mapping[str, float]


def in_graphs(calls: Mapping[str, Call], copies: int, device: torch.device) -> Timed:
    """Seconds of each call in a CUDA graph: medians of interleaved bursts."""
    graphs = {name: captured(call, copies, device) for name, call in calls.items()}
    samples = interleave(graphs, device, rounds=10)
    return {name: median(values) for name, values in samples.items()}


def check_model(
    gpu: Gpu,
    layers: Sequence[Layer],
    tokens: Sequence[int],
    r: int,
    dtype: torch.dtype,
    device: torch.device,
    timer: Callable[[Mapping[str, Call], int, torch.device], Timed] = in_graphs,
) -> str:
    """Measures the kernels of some layers, fits the rates, and tabulates the errors.

    Args:
        gpu: the device, with published rates.
        layers: the shapes.
        tokens: the numbers of rows.
        r: rank.
        dtype: 16 bits.
        device: where.
        timer: seconds of calls by name; each takes an index that rotates over `copies` operands.
    """
    cases = []
    for layer in layers:
        for M in tokens:
            calls, predictions = {}, {}
            copies = copies_past_cache(2 * (M * layer.n + layer.m * layer.n), device)
            for name, call, predict in kernel_calls(gpu, layer, M, r, dtype, device, copies):
                calls[name], predictions[name] = call, predict
            seconds = timer(calls, copies, device)
            cases += [
                Case(f"{name} {layer.m}×{layer.n} M {M}", predictions[name], seconds[name])
                for name in calls
            ]
    return error_table(gpu, fit(gpu, cases), cases)


def kernel_calls(
    gpu: Gpu,
    layer: Layer,
    M: int,
    r: int,
    dtype: torch.dtype,
    device: torch.device,
    copies: int,
) -> Iterator[tuple[str, Call, Callable[[Gpu], float]]]:
    """The forward kernels of a layer: name, call, and prediction for a GPU."""
    n, m = layer.n, layer.m
    draw = partial(torch.randn, device=device, dtype=dtype)
    xs, weights = [[draw(*s) for _ in range(copies)] for s in ((M, n), (m, n))]
    p, A, B = draw(M, r), draw(r, n), draw(m, r)
    R = torch.randn(r, r, device=device)

    def on_copies(run: Callable[[torch.Tensor, torch.Tensor], object]) -> Call:
        return lambda i: run(xs[i % copies], weights[i % copies])

    yield "GEMM", on_copies(F.linear), lambda gpu: gemm(gpu, M, m, n).total
    yield (
        "two_call",
        on_copies(lambda x, weight: two_call(x, weight, p, B, None)),
        lambda gpu: layer_time.expand(gpu, M, m, n, r, False, "two_call").limits.total,
    )
    yield (
        "shrink",
        on_copies(lambda x, _: shrink(x, A, R, 1.0, 0.0, None, "triton")),
        lambda gpu: _total(layer_time.projection(gpu, M, n, r)),
    )
    yield (
        "dR",
        lambda _: rank_gradient(p, p, 1.0),
        lambda gpu: _total(layer_time.rank_gradient(gpu, M, r)),
    )
    arch = layer_time.tables_of(gpu)
    described = arch == "sm_90" and not any(size % 8 for size in (n, m, r))
    for route, tiles in fused_tiles(arch, dtype, described):
        predictions = {
            tile: partial(_fused, arch=arch, sizes=(M, m, n, r), route=route, tile=tile)
            for tile in tiles
            if fused_limits(gpu, arch, M, m, n, r, False, route, tile) is not None
        }
        tile = min(predictions, key=lambda tile: predictions[tile](gpu))
        run = partial(_run_fused, route, p=p, factor=B, tile=tile)
        yield f"{route} {tile}", on_copies(run), predictions[tile]


def _total(launches: Sequence[layer_time.Launch]) -> float:
    return sum(launch.limits.total for launch in launches)


def _fused(gpu: Gpu, arch: str, sizes: tuple, route: str, tile: ExpandTile) -> float:
    return fused_limits(gpu, arch, *sizes, False, route, tile).total


def _run_fused(route: str, x, weight, p, factor, tile: ExpandTile) -> torch.Tensor:
    return RUN[route](x, weight, p, factor, None, 0.0, None, tile)


__all__ = ["check_model", "in_graphs", "kernel_calls"]
