"""The three operations on experts, as operators of torch, and the backend that runs them.

Each is `lorasb::<operation>_<backend>`, for the reference and for Triton: `torch.compile` traces
none of them, since the reference reads the offsets and Triton's launches are not torch's. Their
counts assume that every row belongs to an expert.
"""

import importlib
from collections.abc import Callable

import torch

from lorasb_kernels.ops.dispatch import choose_backend, library, resolve_backend
from lorasb_kernels.ops.experts import reference
from lorasb_kernels.ops.flops import register_flops
from lorasb_kernels.ops.precision import autocast_disabled

BACKENDS = ("reference", "triton")
_BACKEND_CHOICES = ("auto", *BACKENDS)


def resolve_experts_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """`backend`, or what `"auto"` chooses: Triton where it runs on a GPU, else the reference.

    Raises:
        ValueError: unknown name.
        RuntimeError: a named backend that cannot run here, with the reason.
    """
    if backend not in _BACKEND_CHOICES:
        expected = ", ".join(map(repr, _BACKEND_CHOICES))
        raise ValueError(f"backend is {backend!r}; expected one of {expected}")
    if backend == "auto":
        chosen, _ = choose_backend(device, dtype)
        return chosen if chosen in BACKENDS else "reference"
    return resolve_backend(backend, device, dtype)


resolve_experts_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _implementation(operation: str, backend: str) -> Callable:
    def run(*arguments):
        module = reference
        if backend == "triton":
            module = importlib.import_module("lorasb_kernels.ops.triton.experts")
        return getattr(module, operation)(*arguments)

    return autocast_disabled(run)


def _define(operation: str, schema: str, fake: Callable, flops: Callable[..., int]) -> Callable:
    """Defines the operators of an operation; returns a function that takes the backend first."""
    for backend in BACKENDS:
        name = f"{operation}_{backend}"
        library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"lorasb::{name}", fake, lib=library)
        register_flops(name, flops)
        library.impl(name, _implementation(operation, backend), "CompositeExplicitAutograd")

    def call(backend: str, *arguments):
        return getattr(torch.ops.lorasb, f"{operation}_{backend}")(*arguments)

    return call


def _shrink_fake(x, lora_A, lora_R, *_):
    shape = (x.shape[0], lora_R.shape[1])
    return x.new_empty(shape), x.new_empty(shape)


def _shrink_flops(x, lora_A, lora_R, *_):
    return 2 * x[0] * lora_R[1] * (x[1] + lora_R[1])


experts_shrink = _define(
    "experts_shrink",
    "(Tensor x, Tensor lora_A, Tensor lora_R, Tensor offsets, float scaling, float dropout,"
    " Tensor? seed) -> (Tensor h, Tensor p)",
    _shrink_fake,
    _shrink_flops,
)


def _expand_fake(x, weight, *_):
    return x.new_empty((x.shape[0], weight.shape[1]))


def _expand_flops(x, weight, p, *_):
    return 2 * x[0] * weight[1] * (x[1] + p[1])


experts_expand = _define(
    "experts_expand",
    "(Tensor x, Tensor weight, Tensor p, Tensor factor, Tensor? bias, Tensor offsets,"
    " float dropout, Tensor? seed) -> Tensor",
    _expand_fake,
    _expand_flops,
)


def _core_backward_fake(dy, h, lora_B, lora_R, *_):
    return torch.empty_like(h), torch.empty_like(lora_R, memory_format=torch.contiguous_format)


def _core_backward_flops(dy, h, *_):
    return 2 * dy[0] * h[1] * (dy[1] + 2 * h[1])


experts_core_backward = _define(
    "experts_core_backward",
    "(Tensor dy, Tensor h, Tensor lora_B, Tensor lora_R, Tensor offsets, float scaling)"
    " -> (Tensor q, Tensor dR)",
    _core_backward_fake,
    _core_backward_flops,
)

__all__ = [
    "BACKENDS",
    "experts_core_backward",
    "experts_expand",
    "experts_shrink",
    "resolve_experts_backend",
]
