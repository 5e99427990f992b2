"""The arithmetic of an operator: fixed by its contract, whatever autocast is set to."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
KERNEL_DTYPES = FLOAT_DTYPES[:3]  # only the reference runs float64


def autocast_off(device_type: str) -> AbstractContextManager:
    """Autocast off on a kind of device, also on one that has none (meta)."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast asks for on a kind of device; None where it is off."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def autocast_disabled(function: Callable) -> Callable:
    """Runs `function` with autocast off on the device of its first tensor argument."""

    @functools.wraps(function)
    def wrapper(first: torch.Tensor, *args):
        if not torch._C._is_any_autocast_enabled():
            return function(first, *args)
        with autocast_off(first.device.type):
            return function(first, *args)

    return wrapper


def dot_precision(dtype: torch.dtype) -> str:
    """Triton's `input_precision` for operands of `dtype`.

    fp32 operands take three tf32 products, about as exact as fp32, unless
    `torch.backends.cuda.matmul.allow_tf32` (or its successor `fp32_precision`) asks for
    plain tf32. With 16-bit operands it affects only the fp32 core, where tf32 carries
    more bits than the operands.
    """
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "tf32x3"
    return "tf32"


def rounded_partial_sums(dtype: torch.dtype) -> str | None:
    """The setting by which torch's GEMM may round partial sums to `dtype`; None if it may not.

    Where cuBLAS splits a long contraction over blocks (few rows, many columns), torch by default
    lets it add the parts in the dtype of 16-bit operands. Then `two_call` is as exact as
    `nn.Linear`, and may miss the contract, which is held against sums in fp32. Our own kernels add
    in fp32 whatever the setting, and nothing in this package changes it.
    """
    names = {torch.float16: "fp16", torch.bfloat16: "bf16"}
    if dtype not in names:
        return None
    setting = f"allow_{names[dtype]}_reduced_precision_reduction"
    # A name of `torch.backends.cuda.matmul`, which reads the first of the pair that torch keeps.
    return setting if getattr(torch.backends.cuda.matmul, setting) else None


__all__ = [
    "FLOAT_DTYPES",
    "KERNEL_DTYPES",
    "autocast_disabled",
    "autocast_dtype",
    "autocast_off",
    "dot_precision",
    "rounded_partial_sums",
]
