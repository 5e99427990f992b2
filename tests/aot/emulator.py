"""Runs the Triton launchers on CPU tensors with the PTX that they compile to for sm_86.

`ptxcheck` executes PTX on the CPU and reports what a GPU does not: accesses out of bounds,
shared-memory races, reads of memory that nobody wrote. The launchers run as they are; only
the kernel objects are replaced, and the device they believe to be on.
"""

import contextlib
import math
import os
import sys
from pathlib import Path

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from lorasb_kernels.ops.triton import (
    core_backward,
    expand,
    expand_descriptor,
    factor_gradient,
    pack_signs,
    projection,
    sign_matmul,
    weight_gradient,
)

ARCH = "sm_86"
CHECKS = {"check_races": True, "check_uninit": True, "check_overlap": True}
_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def ptxcheck_folder() -> Path | None:
    """Where `ptxcheck` is: `PTXCHECK_PATH`, or beside the checkout; None if nowhere."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "tools" / "ptxcheck"
    folder = Path(os.environ.get("PTXCHECK_PATH", beside))
    return folder if (folder / "ptxcheck").is_dir() else None


class EmulatedKernel:
    """Stands in for a jitted kernel: `kernel[grid](...)` compiles, then runs in the emulator."""

    def __init__(self, function, log: list, options: dict):
        self.function, self.log, self.options = function, log, options
        self.arg_names = function.arg_names

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            from bench.kernel_resources.report import compile_kernel
            from ptxcheck.triton_front import TritonKernel

            values = dict(zip(self.arg_names, arguments, strict=False))
            types = {name: _type_of(value) for name, value in values.items()}
            compiled = compile_kernel(self.function, types, constants, ARCH)
            runtime = [part for value in values.values() for part in _runtime_parts(value)]
            kernel = TritonKernel(compiled, [None] * len(runtime), {})
            self.log.append(kernel(grid, *runtime, **self.options))

        return launch


def _type_of(value):
    if isinstance(value, TensorDescriptor):
        rows, columns = value.block_shape
        return f"tensordesc<{_TYPES[value.base.dtype][1:]}[{rows},{columns}]>"
    return _TYPES[value.dtype] if isinstance(value, torch.Tensor) else value


def _runtime_parts(value) -> list:
    """What a launch passes for an argument: nothing for a constant.

    Below sm_90 Triton turns a descriptor into base, shape, strides and how to load, then the
    shape and the strides of the descriptor itself.
    """
    if isinstance(value, TensorDescriptor):
        place = [*value.shape, *value.strides]
        return [value.base, *place, value.padding == "nan", value.round_f32_to_tf32, *place]
    if value is None or (not isinstance(value, torch.Tensor) and value == 1):
        return []
    return [value]


@contextlib.contextmanager
def emulated(multiprocessors: int = 8, **options):
    """Within, Triton's launchers run emulated sm_86 code; yields the launches' statistics.

    Args:
        multiprocessors: of the device, which decides how far columns are split.
        options: of the emulator, over the defaults of checking everything.
    """
    log: list = []
    options = {**CHECKS, **options}
    kernels = {
        projection: "projection_kernel",
        core_backward: "gradient_kernel",
        expand: "expand_kernel",
        factor_gradient: "factor_gradient_kernel",
        expand_descriptor: "expand_descriptor_kernel",
        pack_signs: "pack_signs_kernel",
        weight_gradient: "weight_gradient_kernel",
        sign_matmul: "sign_matmul_kernel",
    }
    with contextlib.ExitStack() as stack:
        for module, name in kernels.items():
            _replace(stack, module, name, EmulatedKernel(getattr(module, name), log, options))
        for module in (projection, core_backward, weight_gradient, pack_signs, sign_matmul):
            _replace(stack, module, "architecture", lambda device: ARCH)
        _replace(stack, factor_gradient, "architecture", lambda device: ARCH)
        _replace(stack, factor_gradient, "multiprocessors", lambda device: multiprocessors)
        _replace(stack, projection, "multiprocessors", lambda device: multiprocessors)
        _replace(stack, sign_matmul, "multiprocessors", lambda device: multiprocessors)
        yield log


def _replace(stack: contextlib.ExitStack, module, name: str, value) -> None:
    stack.callback(setattr, module, name, getattr(module, name))
    setattr(module, name, value)


def read_bytes(log: list) -> int:
    return sum(stats.global_read_bytes for stats in log)


def write_bytes(log: list) -> int:
    return sum(stats.global_write_bytes for stats in log)


def close(measured: float, expected: float) -> bool:
    """Within 5 %, the tolerance of the byte budgets."""
    return math.isclose(measured, expected, rel_tol=0.05)


folder = ptxcheck_folder()
if folder is not None:
    sys.path.insert(0, str(folder))
