"""The performance model as tables: rates, the limits of each launch, a block's multiple.

All of them are predictions, for 16-bit operands, and say so; readable at 100 columns.
"""

from collections.abc import Iterator, Sequence

from lorasb_kernels.hardware.gemm import gemm
from lorasb_kernels.hardware.gpus import RATES, Gpu
from lorasb_kernels.hardware.limits import LIMITS
from lorasb_kernels.profiling.block_time import multiple, training_tokens_per_second
from lorasb_kernels.profiling.layer_time import (
    Launch,
    expand,
    fused,
    memset,
    projection,
    rank_gradient,
    routes_of,
)
from lorasb_kernels.profiling.shapes import Layer, Preset
from lorasb_kernels.profiling.vendor_estimate import installed, vendor_estimate
from lorasb_kernels.utils.tables import markdown_table

TOKENS = (256, 512, 1024, 2048, 4096, 8192, 16384)
UNITS = {
    "tensor": (1e-12, "TFLOP/s"),
    "bandwidth": (1e-9, "GB/s"),
    "l2": (1e-9, "GB/s"),
    "latency": (1e6, "µs"),
    "launch": (1e6, "µs"),
    "stall": (1, "clocks"),
}
LIMITS_TEXT = (
    "Time of each limit in µs. The longest of mem, l2, mma (tensor cores), issue and smem (shared\n"
    "memory) is the floor; waves, latency and the gap to the next launch come on top."
)
MULTIPLES_TEXT = (
    "Time of the block's linear layers, forward and backward in a CUDA graph, over the frozen\n"
    "block's. `+g`: siblings grouped (`share_inputs`); `rule`: as unmeasured shapes run."
)
SHORT = {"memory": "mem", "tensor": "mma", "shared": "smem", "latency": "lat.", "launch": "gap"}


def rates_table(gpu: Gpu) -> str:
    """The assumed rates of a GPU with their sources."""
    sources = (*gpu.rates_source, "assumed: loads, products and barriers of other sources")
    rows = []
    for name, source in zip(RATES, sources, strict=True):
        factor, unit = UNITS[name]
        rows.append((name, f"{getattr(gpu.rates, name) * factor:.4g} {unit}", source))
    return markdown_table(("rate", gpu.key, "source"), rows)


def launches(gpu: Gpu, layer: Layer, M: int, r: int, every_tile: bool) -> Iterator[Launch]:
    """The launches of a layer's forward and backward, each route with its best tile or with all."""
    m, n = layer.m, layer.n
    yield Launch("memset, for each split kernel", "", memset(gpu).limits)
    yield _named(projection(gpu, M, n, r)[-1], "shrink")
    yield _named(projection(gpu, M, m, r)[-1], "core backward")
    yield _named(rank_gradient(gpu, M, r)[-1], "dR")
    for way, N, K, transposed in (("y", m, n, False), ("dx", n, m, True)):
        yield Launch(f"{way}: frozen GEMM alone", "", gemm(gpu, M, N, K))
        for route in routes_of(gpu):
            if route in ("fused", "fused_descriptor"):
                tiles = fused(gpu, M, N, K, r, transposed, route)
                for launch in tiles if every_tile else tiles[:1]:
                    yield _named(launch, f"{way}: {_short(route)}")
            elif route not in ("two_call", "rule"):
                yield _named(expand(gpu, M, N, K, r, transposed, route), f"{way}: {route}")


def _short(route: str) -> str:
    return route.replace("fused_descriptor", "fused TMA")


def _named(launch: Launch, name: str) -> Launch:
    return Launch(name, launch.tile, launch.limits)


def limits_table(gpu: Gpu, layer: Layer, M: int, r: int, every_tile: bool = False) -> str:
    """The time of each limit of every launch of a layer, in microseconds."""
    rows = []
    for launch in launches(gpu, layer, M, r, every_tile):
        limits = launch.limits
        tile = launch.tile.replace(" warps, ", "w").replace(" stages", "s").replace(", ", " ")
        times = [_microseconds(getattr(limits, name)) for name in LIMITS]
        rows.append((f"{launch.name} {tile}".strip(), *times, _microseconds(limits.total)))
    header = (f"{layer.name} {layer.m}×{layer.n}, M {M}, r {r}", *(SHORT.get(n, n) for n in LIMITS))
    return markdown_table((*header, "total"), rows)


def vendor_table(gpu: Gpu, layers: Sequence[Layer], M: int) -> str:
    """The model's GEMMs beside NVIDIA's estimate of them, in microseconds."""
    rows = []
    for layer in layers:
        for way, N, K in (("y", layer.m, layer.n), ("dx", layer.n, layer.m)):
            pair = (gemm(gpu, M, N, K).total, vendor_estimate(gpu, M, N, K))
            rows.append((f"{layer.name} {way}: {M}×{N}×{K}", *map(_microseconds, pair)))
    return markdown_table(("GEMM alone", "model", "nvidia-matmul-heuristics"), rows)


def _microseconds(value: float) -> str:
    return f"{1e6 * value:.1f}" if value < 99.95e-6 else f"{1e6 * value:.0f}"


def multiples_table(
    gpu: Gpu, groups: Sequence[Sequence[Layer]], r: int, tokens: Sequence[int] = TOKENS
) -> str:
    """The block's time over the frozen block's by route; `+g`: siblings grouped."""
    ways = [(route, grouped) for route in routes_of(gpu) for grouped in (False, True)]
    if all(len(group) == 1 for group in groups):
        ways = [way for way in ways if not way[1]]
    rows = [
        (
            _short(route) + (" +g" if grouped else ""),
            *(f"{multiple(gpu, groups, M, r, route, grouped):.3f}" for M in tokens),
        )
        for route, grouped in ways
    ]
    return markdown_table((f"{gpu.key}, r = {r}; M =", *map(str, tokens)), rows)


def training_table(
    models: Sequence[Preset], gpus: Sequence[Gpu], M: int, r: int, sequence: int
) -> str:
    """Tokens per second of training steps, without and with gradient checkpointing."""
    rows = []
    for model in models:
        for again, name in ((False, model.key), (True, f"{model.key}, checkpointed")):
            rates = (
                training_tokens_per_second(
                    model, gpu, r=r, tokens=M, sequence=sequence, recompute=again
                )
                for gpu in gpus
            )
            rows.append((name, *(f"{rate:.0f}" for rate in rates)))
    header = (f"tokens/s, r = {r}, {sequence} tokens a row", *(gpu.key for gpu in gpus))
    return markdown_table(header, rows)


def model_report(
    gpu: Gpu,
    model: Preset,
    M: int,
    r: int,
    every_tile: bool = False,
) -> str:
    """What `lorasb profile --gpu` prints below the roofline."""
    shapes: dict[tuple[int, int], Layer] = {}
    for layer in model.layers:
        shapes.setdefault((layer.n, layer.m), layer)
    return "\n\n".join(
        [
            f"PREDICTION by the performance model: {gpu.device_name},\n"
            "16 bits, kernels counted from their compiled code. Rates assumed:",
            rates_table(gpu),
            LIMITS_TEXT,
            *(limits_table(gpu, layer, M, r, every_tile) for layer in shapes.values()),
            *([vendor_table(gpu, list(shapes.values()), M)] if installed() else []),
            MULTIPLES_TEXT,
            multiples_table(gpu, model.groups, r),
            "A training step, all linear layers adapted by the rule's routes, rows of 512 tokens:",
            training_table([model], [gpu], M, r, 512),
        ]
    )


__all__ = [
    "TOKENS",
    "launches",
    "limits_table",
    "model_report",
    "multiples_table",
    "rates_table",
    "training_table",
    "vendor_table",
]
