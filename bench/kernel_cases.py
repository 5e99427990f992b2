"""The operations alone: their operands, the least they need, and their implementations."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from lorasb_kernels.functional import pack_signs, sign_accumulate_, sign_gradient, sign_matmul
from lorasb_kernels.ops.core_backward import core_backward
from lorasb_kernels.ops.dispatch import obstacle
from lorasb_kernels.ops.expand import expand
from lorasb_kernels.ops.limits import BACKENDS
from lorasb_kernels.ops.shrink import shrink
from lorasb_kernels.ops.triton.expand_dual import has_dual
from lorasb_kernels.ops.triton.route_files import ROUTES
from lorasb_kernels.ops.triton.tiles import (
    ExpandTile,
    architecture,
    descriptor_candidates,
    expand_tile,
)
from lorasb_kernels.profiling import costs
from lorasb_kernels.profiling.costs import Cost

Draw = Callable[..., torch.Tensor]
Prepare = Callable[[Draw], Callable[[], object]]
DTYPE = torch.bfloat16
COLUMNS = 144  # of the dense factor of a ±1 product: r = 96 and an oversampling of half


@dataclass(frozen=True)
class KernelCase:
    """One operation at one size: [M, n] in, [M, m] out, rank r."""

    op: str
    M: int
    n: int
    m: int
    r: int

    @property
    def shape(self) -> str:
        return f"{self.m}x{self.n}"

    def __str__(self) -> str:
        return f"{self.op}-{self.shape}-M{self.M}-r{self.r}"

    def cost(self) -> Cost:
        """The bytes and flops it needs."""
        M, n, m, r, e = self.M, self.n, self.m, self.r, DTYPE.itemsize
        return {
            "shrink": lambda: costs.shrink(M, n, r, e),
            "core_backward": lambda: costs.core_backward(M, m, r, e),
            "expand": lambda: costs.expand(M, n, m, r, e),
            "expand_dx": lambda: costs.expand(M, m, n, r, e),
            "sign_accumulate": lambda: costs.sign_accumulate(M, m, n, e),
            "sign_gradient": lambda: costs.sign_gradient(M, m, n, e),
            "pack_signs": lambda: costs.pack_signs(m, n),
            "sign_matmul": lambda: costs.sign_matmul(m, n, COLUMNS),
            "sign_matmul_transposed": lambda: costs.sign_matmul(m, n, COLUMNS),
        }[self.op]()

    def prepare(self, implementation: str, draw: Draw) -> Callable[[], object]:
        """Draws operands; returns the call that `implementation` makes on them."""
        return PREPARE[self.op](self, implementation, draw)


def _core(draw: Draw, r: int) -> torch.Tensor:
    return draw(r, r, dtype=torch.float32)


def _shrink(case: KernelCase, backend: str, draw: Draw):
    x, A, R = draw(case.M, case.n), draw(case.r, case.n), _core(draw, case.r)
    return lambda: shrink(x, A, R, 1.0, 0.0, None, backend)


def _core_backward(case: KernelCase, backend: str, draw: Draw):
    dy, h = draw(case.M, case.m), draw(case.M, case.r)
    B, R = draw(case.m, case.r), _core(draw, case.r)
    return lambda: core_backward(dy, h, B, R, 1.0, backend)


def _expand(case: KernelCase, implementation: str, draw: Draw, transposed: bool = False):
    weight, p = draw(case.m, case.n), draw(case.M, case.r)
    if transposed:
        x, weight, factor = draw(case.M, case.m), weight.T, draw(case.r, case.n).T
    else:
        x, factor = draw(case.M, case.n), draw(case.m, case.r)
    backend, _, route = implementation.partition(" ")
    if not route:
        return lambda: expand(x, weight, p, factor, None, 0.0, None, backend)
    run = importlib.import_module("lorasb_kernels.ops.triton.expand").RUN[route]
    tile = _tiles(route, x.device)[0]
    return lambda: run(x, weight, p, factor, None, 0.0, None, tile)


def _tiles(route: str, device: torch.device) -> tuple[ExpandTile, ...]:
    """The tile of a route that has not been measured; none if the device cannot run it."""
    arch = architecture(device)
    if route == "fused_descriptor":
        return descriptor_candidates(arch, DTYPE, dropout=False)[:1]
    if route == "dual" and not has_dual(device, DTYPE):
        return ()
    return (expand_tile(arch, DTYPE, dropout=False),)


def _sign_accumulate(case: KernelCase, backend: str, draw: Draw):
    acc = torch.zeros_like(draw(case.m, case.n, dtype=torch.float32))
    dy, x = draw(case.M, case.m), draw(case.M, case.n)
    return lambda: sign_accumulate_(acc, dy, x, backend=backend)


def _sign_gradient(case: KernelCase, backend: str, draw: Draw):
    dy, x = draw(case.M, case.m), draw(case.M, case.n)
    return lambda: sign_gradient(dy, x, backend=backend)


def _pack_signs(case: KernelCase, backend: str, draw: Draw):
    acc = draw(case.m, case.n, dtype=torch.float32)
    return lambda: pack_signs(acc, backend=backend)


def _sign_matmul(case: KernelCase, backend: str, draw: Draw, transpose: bool = False):
    planes = pack_signs(draw(case.m, case.n, dtype=torch.float32), backend="reference")
    dense = draw(case.m if transpose else case.n, COLUMNS, dtype=torch.float32)
    return lambda: sign_matmul(*planes, dense, case.n, transpose, backend=backend)


PREPARE = {
    "shrink": _shrink,
    "core_backward": _core_backward,
    "expand": _expand,
    "expand_dx": partial(_expand, transposed=True),
    "sign_accumulate": _sign_accumulate,
    "sign_gradient": _sign_gradient,
    "pack_signs": _pack_signs,
    "sign_matmul": _sign_matmul,
    "sign_matmul_transposed": partial(_sign_matmul, transpose=True),
}
ADAPTER_OPS = ("shrink", "core_backward", "expand", "expand_dx")
SIGN_OPS = tuple(op for op in PREPARE if op not in ADAPTER_OPS)


def implementations(op: str) -> tuple[str, ...]:
    """The implementations of an operation: the backends, and for expand each of Triton's routes.

    The reference runs in eager PyTorch, so it is cuBLAS on a GPU.
    """
    routes = ROUTES if op.startswith("expand") else ()
    return (*BACKENDS, *(f"triton {route}" for route in routes))


def why_not(implementation: str, device: torch.device) -> str | None:
    """Why an implementation cannot run on `device`; None when it can."""
    backend, _, route = implementation.partition(" ")
    reason = obstacle(backend, device, DTYPE)
    if reason is None and route and not _tiles(route, device):
        reason = "it is for Hopper (dual: with the CUDA extension)"
    return reason


def cases(grid: str) -> list[KernelCase]:
    """The cases of a grid."""
    if grid == "tiny":
        return [KernelCase(op, 16, 48, 64, 8) for op in PREPARE]
    if grid == "full":
        return [
            KernelCase(op, M, n, m, r)
            for op in PREPARE
            for n, m in ((4096, 4096), (4096, 14336), (14336, 4096), (1024, 1024))
            for M in (256, 512, 2048, 4096, 8192, 16384)
            for r in ((8, 24, 32, 64, 96, 128, 256) if op in ADAPTER_OPS else (0,))
        ]
    found = [KernelCase(op, 8192, 4096, 4096, 96) for op in ADAPTER_OPS]
    found += [KernelCase(op, 8192, 4096, 4096, 0) for op in SIGN_OPS]
    found += [KernelCase(op, M, 4096, 4096, 96) for M in (512, 4096, 16384) for op in ADAPTER_OPS]
    found += [KernelCase(op, 8192, 4096, 4096, r) for r in (32, 64, 128) for op in ADAPTER_OPS]
    found += [KernelCase(op, 8192, 4096, 14336, 96) for op in ADAPTER_OPS]
    return found


__all__ = ["DTYPE", "KernelCase", "cases", "implementations", "why_not"]
