"""Runs the Triton launchers on CPU tensors with the PTX that they compile to.

`ptxcheck` executes PTX on the CPU and reports what a GPU does not: accesses out of bounds,
shared-memory races, reads of memory that nobody wrote. The launchers run as they are; only
the kernel objects are replaced, and the device they believe to be on.
"""

import contextlib
import math
from collections.abc import Callable

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.kernel_resources.report import compile_kernel
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
from lorasb_kernels.ops.triton.experts import core_backward as experts_core_backward
from lorasb_kernels.ops.triton.experts import expand as experts_expand
from lorasb_kernels.ops.triton.experts import projection as experts_projection
from ptxcheck import TritonKernel, load

CHECKS = {"check_races": True, "check_uninit": True, "check_overlap": True}
_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class EmulatedKernel:
    """Stands in for a jitted kernel: `kernel[grid](...)` compiles, then runs in the emulator."""

    def __init__(self, function, arch: str, plant: Callable[[str], str] | None, log: list, options):
        self.function, self.arch, self.plant = function, arch, plant
        self.log, self.options = log, options
        self.arg_names = function.arg_names

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            values = dict(zip(self.arg_names, arguments, strict=False))
            types = {name: _type_of(value) for name, value in values.items()}
            compiled = compile_kernel(self.function, types, constants, self.arch)
            runtime = [
                value
                for value, parameter in zip(values.values(), self.function.params, strict=False)
                if _is_passed(value, parameter.do_not_specialize)
            ]
            kernel = TritonKernel(compiled, [None] * len(runtime), {})
            if self.plant is not None:
                kernel.module = load(self.plant(kernel.ptx))
            self.log.append(kernel(grid, *runtime, **self.options))

        return launch


def _type_of(value):
    if isinstance(value, TensorDescriptor):
        rows, columns = value.block_shape
        return f"tensordesc<{_TYPES[value.base.dtype][1:]}[{rows},{columns}]>"
    return _TYPES[value.dtype] if isinstance(value, torch.Tensor) else value


def _is_passed(value, as_it_is: bool) -> bool:
    """Whether a launch passes the argument: Triton makes a constant of None, and of 1 unless the
    parameter is exempt from specialization."""
    if isinstance(value, (torch.Tensor, TensorDescriptor)):
        return True
    return value is not None and (as_it_is or value != 1)


@contextlib.contextmanager
def emulated(
    arch: str = "sm_86",
    multiprocessors: int = 8,
    plant: Callable[[str], str] | None = None,
    **options,
):
    """Within, Triton's launchers run emulated code; yields the launches' statistics.

    Args:
        arch: which GPU the launchers believe to be on, and the kernels are compiled for.
        multiprocessors: of the device, which decides how far columns are split.
        plant: a change of each kernel's PTX before it runs.
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
        experts_projection: "experts_projection_kernel",
        experts_expand: "experts_expand_kernel",
        experts_core_backward: "experts_gradient_kernel",
    }
    with contextlib.ExitStack() as stack:
        for module, name in kernels.items():
            kernel = EmulatedKernel(getattr(module, name), arch, plant, log, options)
            _replace(stack, module, name, kernel)
        for module in (projection, core_backward, weight_gradient, pack_signs, sign_matmul):
            _replace(stack, module, "architecture", lambda device: arch)
        for module in (factor_gradient, expand_descriptor):
            _replace(stack, module, "architecture", lambda device: arch)
        for module in (experts_projection, experts_expand, experts_core_backward):
            _replace(stack, module, "architecture", lambda device: arch)
        for module in (factor_gradient, projection, sign_matmul, expand_descriptor):
            _replace(stack, module, "multiprocessors", lambda device: multiprocessors)
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
