"""Which backend, route and tiles a layer would run with, and why."""

import dataclasses

import torch

from lorasb_kernels.ops.dispatch import choose_backend, resolve_backend
from lorasb_kernels.ops.layer_shape import LayerShape
from lorasb_kernels.ops.precision import rounded_partial_sums
from lorasb_kernels.ops.triton.expand_route import plan_route
from lorasb_kernels.ops.triton.factor_tiles import factor_splits, factor_tile
from lorasb_kernels.ops.triton.projection_tiles import column_splits, projection_tile
from lorasb_kernels.ops.triton.route_decision import Shape, rounded_rows
from lorasb_kernels.ops.triton.tiles import (
    ARCHITECTURES,
    MULTIPROCESSORS,
    Tile,
    architecture,
    gradient_tile,
    multiprocessors,
    rank_tiles,
    row_splits,
)
from lorasb_kernels.quantization import weight_dtype


@dataclasses.dataclass(frozen=True)
class Step:
    """One operation of a layer: what runs, and its tile (None: not a kernel of this library)."""

    operation: str
    runs: str
    tile: Tile | None
    reason: str

    def __str__(self) -> str:
        tile = "" if self.tile is None else f" [{self.tile}]"
        return f"{self.operation}: {self.runs}{tile} ({self.reason})"


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The backend, why it was chosen, and the steps of one forward and backward pass."""

    backend: str
    reason: str
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        head = f"backend {self.backend}: {self.reason}"
        return "\n".join([head, *(f"  {step}" for step in self.steps)])


def explain(
    layer_or_shape,
    *,
    tokens: int = 8192,
    backend: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    dropout: float | None = None,
    arch: str | None = None,
) -> Explanation:
    """Says how a layer runs: backend, route, tiles, splits, and the reason for each.

    Args:
        layer_or_shape: a `LoRASBLinear` or `LoRALinear`, or the shape `(m, n, r)` of the first.
        tokens: M, rows of the input.
        backend: default: the layer's, or `"auto"`.
        dtype: default: the weight's, or bf16.
        device: default: the weight's, or the current CUDA device, or the CPU.
        dropout: default: the layer's, or 0.
        arch: plan Triton's kernels for one of `tiles.ARCHITECTURES` (`"sm_80"`, …) instead of the
            device; no GPU is needed.

    Raises:
        TypeError, ValueError: naming the argument and what was expected.
        FileNotFoundError, ValueError: `LORASB_TUNING` names a file that does not exist or is none
            of measured routes; `LORASB_TUNE` is unknown.
        RuntimeError: a named backend that cannot run on the device.
    """
    if hasattr(layer_or_shape, "lora_R"):
        m, n = layer_or_shape.out_features, layer_or_shape.in_features
        r, trained = layer_or_shape.r, layer_or_shape.trained
        dtype = dtype or weight_dtype(layer_or_shape)
        device = device or layer_or_shape.lora_A.device
        backend = backend or layer_or_shape.backend
        dropout = layer_or_shape.dropout if dropout is None else dropout
    elif isinstance(layer_or_shape, tuple) and len(layer_or_shape) == 3:
        m, n, r = layer_or_shape
        trained = ("lora_R",)
    else:
        raise TypeError(f"layer_or_shape is {layer_or_shape!r}; expected a layer or (m, n, r)")
    shape = LayerShape(tokens, m, n, r, dropout or 0.0)
    dtype = dtype or torch.bfloat16
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    here = device if arch is None else None
    if arch is None:
        backend, reason = _backend(backend or "auto", device, dtype)
    elif arch in ARCHITECTURES:
        backend, reason = "triton", f"planned for {arch}"
    else:
        raise ValueError(f"arch is {arch!r}; expected one of {ARCHITECTURES}")
    steps: tuple[Step, ...] = ()
    if backend == "triton":
        sms = multiprocessors(device) if arch is None else MULTIPROCESSORS[arch]
        steps = _triton_steps(shape, dtype, arch or architecture(device), sms, trained, here)
    return Explanation(backend, reason, steps)


def _backend(backend: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    if backend == "auto":
        return choose_backend(device, dtype)
    return resolve_backend(backend, device, dtype), "asked for by name"


def _triton_steps(shape: LayerShape, dtype, arch, sms, trained, device) -> tuple[Step, ...]:
    M, m, n, r = shape.M, shape.m, shape.n, shape.r
    drops = shape.dropout > 0
    width, tiles = rank_tiles(r)
    partial = gradient_tile(arch, dtype)
    parts = row_splits(M, partial)[0]
    gradient = Step("dR", "gradient kernel", partial, f"rows summed in {parts} parts by {M} rows")

    def projection(operation: str, columns: int, masked: bool) -> Step:
        tile = projection_tile(arch, dtype, r, M, masked)
        row_tiles = -(-M // tile.BLOCK_M)
        splits, _ = column_splits(row_tiles, columns, r, tile, sms)
        reason = (
            f"rank {r} as {tiles} tiles of {width}; {row_tiles} row tiles on {sms} "
            f"multiprocessors, columns split {splits} ways"
        )
        return Step(operation, "projection kernel", tile, reason)

    def factor_gradient(operation: str, columns: int, masked: bool) -> Step:
        tile = factor_tile(arch, dtype, r, masked)
        parts = factor_splits(-(-columns // tile.BLOCK_N), M, r, tile, sms)[0]
        reason = f"rank {r} as {tiles} tiles of {width}; rows summed in {parts} parts by shape"
        return Step(operation, "factor gradient kernel", tile, reason)

    gradients = {
        "lora_R": gradient,
        "lora_A": factor_gradient("dA", n, drops),
        "lora_B": factor_gradient("dB", m, False),
    }

    def product(operation: str, N: int, K: int, transposed: bool, masked: bool) -> Step:
        sizes = Shape(dtype, rounded_rows(M), N, K, r, transposed, masked)
        route = plan_route(arch, sizes, device)
        tiled = route.name.startswith("fused") or (masked and route.name == "two_call")
        reason, setting = route.reason, rounded_partial_sums(dtype)
        if route.name == "two_call" and setting is not None:
            reason += f"; torch may round partial sums to 16 bits, as {setting} is True"
        return Step(operation, route.name, route.tile if tiled else None, reason)

    return (
        projection("shrink", n, drops),
        product("expand", m, n, transposed=False, masked=False),
        projection("core_backward" if "lora_R" in trained else "q", m, False),
        *(gradients[name] for name in trained),
        product("dx", n, m, transposed=True, masked=drops),
    )


__all__ = ["Explanation", "Step", "explain"]
