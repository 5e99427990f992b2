"""From an operation to the backend that runs it: the operators, which backend, and why.

The `lorasb` namespace holds one schema and one operator per backend: Triton and CUDA
implementations of an operation carry separate operator names (`lorasb::shrink_triton`,
`lorasb::shrink_cuda`) that share a schema and a fake. Schemas are defined here in Python, so
`torch.compile` and `opcheck` see all of them even where a backend is not installed; the
implementation of a Triton operator is imported at its first call and the CUDA extension registers
its own.

`reference` runs everywhere. `triton` needs an NVIDIA GPU of compute capability 8.0
or newer, or `TRITON_INTERPRET=1`. `cuda` needs the compiled extension and such a GPU.
A named backend that cannot run raises an error; only `auto` chooses.
"""

import functools
import importlib
from collections.abc import Callable

import torch
from torch.autograd import forward_ad

from lorasb_kernels.ops import extension, reference, triton
from lorasb_kernels.ops.flops import register_flops
from lorasb_kernels.ops.limits import BACKEND_CHOICES, BACKENDS
from lorasb_kernels.ops.measuring import calling_operator, running_operator
from lorasb_kernels.ops.precision import KERNEL_DTYPES, autocast_disabled
from lorasb_kernels.ops.triton import interpreting

MIN_CAPABILITY = (8, 0)


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def _triton_obstacle() -> str | None:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return None


def _index_of(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _gpu_obstacle(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"the tensors are on {device}, not on a CUDA device"
    capability = _capability(_index_of(device))
    if capability < MIN_CAPABILITY:
        return f"compute capability {capability} is below {MIN_CAPABILITY}"
    return None


def _interpreter_or_gpu_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    if not interpreting():
        return _gpu_obstacle(device)
    if dtype == torch.bfloat16:
        return "Triton's interpreter (TRITON_INTERPRET=1) multiplies bfloat16 wrongly"
    return None


def obstacle(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `backend` cannot run on `device` in `dtype`; None when it can."""
    if backend == "reference":
        return None
    if dtype not in KERNEL_DTYPES:
        return f"it supports float16, bfloat16 and float32, not {dtype}"
    if backend == "triton":
        reason = _triton_obstacle() or _interpreter_or_gpu_obstacle(device, dtype)
        if reason is None and device.type == "cuda":
            extension.obstacle()  # loads it: its kernel for Hopper is one of Triton's routes
        return reason
    reason = extension.obstacle() or _gpu_obstacle(device)
    return reason or extension.device_obstacle(_index_of(device))


def resolve_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Returns the backend that runs: `backend` itself, or the choice of `auto`.

    Args:
        backend: `"auto"`, `"reference"`, `"triton"` or `"cuda"`.
        device: device of the operands.
        dtype: dtype of the operands.

    Raises:
        ValueError: unknown name.
        RuntimeError: a named backend that cannot run here, with the reason.
    """
    if backend == "auto":
        return choose_backend(device, dtype)[0]
    if backend not in BACKENDS:
        expected = ", ".join(repr(name) for name in BACKEND_CHOICES)
        raise ValueError(f"backend is {backend!r}; expected one of {expected}")
    reason = obstacle(backend, device, dtype)
    if reason is not None:
        raise RuntimeError(f"backend={backend!r} cannot run: {reason}")
    return backend


# torch.compile treats the result as a constant, as it cannot trace the probing of devices and
# imports. torch.compiler.assume_constant_result sets the same attribute, but imports the compiler.
resolve_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose_backend(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The backend that `auto` takes, and the reason for it.

    On a GPU Triton is preferred, then the CUDA extension. On the CPU the reference is the fastest,
    also where Triton's interpreter could run.
    """
    if device.type != "cuda":
        return "reference", f"tensors are on {device}"
    passed_over: list[str] = []
    for backend in ("triton", "cuda"):
        reason = obstacle(backend, device, dtype)
        if reason is None:
            return backend, "; ".join([*passed_over, f"{backend} runs on {device}"])
        passed_over.append(f"{backend}: {reason}")
    return "reference", "; ".join(passed_over)


library = torch.library.Library("lorasb", "DEF")
PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)  # no subclass that sees operators


def implementation(operation: str, backend: str) -> Callable:
    """What computes an operation on `backend`: for calls that nothing observes (`is_observed`).

    It is called without torch's dispatcher, except for the CUDA extension's.
    """
    if backend == "triton":
        return triton.implementation(operation)
    if backend == "cuda":
        return getattr(torch.ops.lorasb, f"{operation}_cuda").default
    return getattr(reference, operation)


class BackendOperator:
    """One operation with an operator `lorasb::<name>_<backend>` for each backend.

    Args:
        name: operation name, also the name of its file in `lorasb_kernels.ops` and of its
            function in `reference.py`; `triton.IMPLEMENTATIONS` says where Triton's is.
        schema: argument and return part of the schema, `(Tensor x, ...) -> Tensor`.
        fake: shape function with the operator's signature.
        flops: what `FlopCounterMode` counts; takes the arguments, tensors as their shapes.
    """

    def __init__(self, name: str, schema: str, fake: Callable, flops: Callable[..., int]):
        self.name = name
        for backend in BACKENDS:
            operator = f"{name}_{backend}"
            library.define(f"{operator}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
            torch.library.register_fake(f"lorasb::{operator}", fake, lib=library)
            register_flops(operator, flops)
            if backend != "cuda":
                library.impl(operator, self._deferred(backend), "CompositeExplicitAutograd")

    def _deferred(self, backend: str) -> Callable:
        def run(*args):
            with running_operator():
                return implementation(self.name, backend)(*args)

        return autocast_disabled(run)

    def __call__(self, backend: str, *args):
        """Runs the operator of `backend`, a name that `resolve_backend` returned.

        Without torch's dispatcher where nothing would see the operator: its implementation is then
        called directly, which saves the host several microseconds per operation.
        """
        if torch.is_grad_enabled() or is_observed() or not all(map(_is_plain, args)):
            operator = getattr(torch.ops.lorasb, f"{self.name}_{backend}")
            if torch.compiler.is_compiling():
                return operator(*args)
            with calling_operator():
                return operator(*args)
        return implementation(self.name, backend)(*args)


def is_observed() -> bool:
    """Whether something beside the results of the operators counts, or changes them.

    That is a graph that is traced, a dispatch mode (fake tensors, the counting of FLOPs), a
    transform of functorch, forward-mode differentiation, or autocast, which is off in operators.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._is_any_autocast_enabled()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def _is_plain(argument) -> bool:
    return not isinstance(argument, torch.Tensor) or type(argument) in PLAIN_TENSORS


__all__ = [
    "PLAIN_TENSORS",
    "BackendOperator",
    "choose_backend",
    "implementation",
    "is_observed",
    "library",
    "obstacle",
    "resolve_backend",
]
