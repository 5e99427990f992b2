"""The operations that the passes of a layer are composed of, looked up once per pass.

An operation called by itself looks for what might observe it and goes through torch's dispatcher.
That costs the host as much as a small product, several times per layer. Where nothing observes
them, the implementations of a backend are called directly.
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from lorasb_kernels.ops import reference
from lorasb_kernels.ops.core_backward import core_backward
from lorasb_kernels.ops.dispatch import implementation
from lorasb_kernels.ops.expand import expand
from lorasb_kernels.ops.factor_gradient import factor_gradient
from lorasb_kernels.ops.limits import BACKENDS
from lorasb_kernels.ops.lorasb_linear.operands import core_or_identity
from lorasb_kernels.ops.shrink import shrink
from lorasb_kernels.ops.two_call import two_call


class Operations(NamedTuple):
    """The operations on one backend. The core `lora_R` may be None, for the identity."""

    shrink: Callable  # x, lora_A, lora_R, scaling, dropout, seed -> h, p
    expand: Callable  # x, weight, p, lora_B, bias -> y
    core_backward: Callable  # dy, h, lora_B, lora_R, scaling -> q, dR
    core_input_gradient: Callable  # dy, lora_B, lora_R, scaling -> q
    input_gradient: Callable  # dy, weight, q, lora_A, dropout, seed -> dx
    gradient_of_A: Callable  # q, x, dropout, seed -> dA
    gradient_of_B: Callable  # p, dy -> dB


def operations(backend: str, direct: bool) -> Operations:
    """The operations on a backend that `resolve_backend` returned.

    Args:
        backend: its name.
        direct: call the implementations; only where nothing observes operators (`is_observed`)
            and no operand is of a subclass of tensors.
    """
    return _direct(backend) if direct else _DISPATCHED[backend]


def _composed(
    shrink: Callable, expand: Callable, core_backward: Callable, factor_gradient: Callable
) -> Operations:
    """What a layer needs of a backend that has these four."""

    def shrink_with_core(x, lora_A, lora_R, *settings):
        return shrink(x, lora_A, core_or_identity(lora_R, lora_A, x.dtype), *settings)

    def expand_undropped(*operands):
        return expand(*operands, 0.0, None)

    def core_input_gradient(dy, lora_B, lora_R, scaling):
        core = None if lora_R is None else lora_R.t()
        return shrink_with_core(dy, lora_B.t(), core, scaling, 0.0, None)[1]

    def input_gradient(dy, weight, q, lora_A, dropout, seed):
        return expand(dy, weight.t(), q, lora_A.t(), None, dropout, seed)

    def gradient_of_B(p, dy):
        return factor_gradient(p, dy, 0.0, None).t()

    return Operations(
        shrink=shrink_with_core,
        expand=expand_undropped,
        core_backward=core_backward,
        core_input_gradient=core_input_gradient,
        input_gradient=input_gradient,
        gradient_of_A=factor_gradient,
        gradient_of_B=gradient_of_B,
    )


_DISPATCHED = {
    backend: _composed(
        *(
            partial(operation, backend=backend)
            for operation in (shrink, expand, core_backward, factor_gradient)
        )
    )
    for backend in BACKENDS
}


@functools.cache
def _direct(backend: str) -> Operations:
    if backend == "cuda":  # composes the gradient of a factor from another operation
        return _DISPATCHED[backend]
    if backend == "triton":
        names = ("shrink", "expand", "core_backward", "factor_gradient")
        return _composed(*(implementation(name, backend) for name in names))
    return Operations(
        shrink=reference.shrink,
        expand=two_call,
        core_backward=reference.core_backward,
        core_input_gradient=reference.core_input_gradient,
        input_gradient=reference.input_gradient,
        gradient_of_A=reference.factor_gradient,
        gradient_of_B=lambda p, dy: reference.factor_gradient(dy, p, 0.0, None),  # no transpose
    )


__all__ = ["Operations", "operations"]
