"""Launching a kernel that was compiled before, past the search for it.

`kernel[grid](...)` finds out in every launch how Triton would specialize the kernel for these
arguments, and looks the compiled kernel up by text that it makes of that: three quarters of what a
launch costs the host. Here compiled kernels are kept by what the specialization depends on, and
launched as Triton's tutorial on the fused softmax does, `compiled[grid](*arguments)`.

Triton specializes on the dtype of a pointer and on whether it is a multiple of 16 bytes; on an
integer's width and, unless it is exempt (`do_not_specialize`), on whether it is 1 or a multiple
of 16. Only launches with aligned pointers are kept. Settings of Triton that change what is compiled
(`TRITON_DEBUG`) are those of the first launch.
"""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import NamedTuple

import torch
from triton.runtime import JITFunction

_LIMIT = 1024  # compiled kernels that are kept of one kernel; then all are looked up anew


class _Kept(NamedTuple):
    """A kernel, which of its numbers it is specialized on, and what was compiled of it."""

    kernel: JITFunction  # alive, so that its id is not used again
    specialized: Callable  # takes these out of the numbers
    exempt: list[int]  # places of the integers whose width alone counts
    constants: int  # constexprs, which a compiled kernel does not read
    compiled: dict[tuple, Callable]


_kernels: dict[int, _Kept] = {}


def launch(
    kernel: JITFunction,
    blocks: int,
    pointers: Sequence[torch.Tensor | None],
    numbers: Sequence[int | float],
    constants: dict,
) -> None:
    """`kernel[(blocks,)](*pointers, *numbers, **constants)`.

    Args:
        kernel: its parameters are the pointers, the numbers and then the constexprs.
        blocks: of the launch, on the current device and stream.
        pointers: tensors, or None; the first is a tensor.
        numbers: a parameter gets integers always, or floats always.
        constants: constexprs and launch options by name, in one order for each kernel.
    """
    address = 0
    for pointer in pointers:
        if pointer is not None:
            address |= pointer.data_ptr()
    if address % 16 or not isinstance(kernel, JITFunction):  # Triton's interpreter has another type
        kernel[(blocks,)](*pointers, *numbers, **constants)
        return
    kept = _kernels.get(id(kernel)) or _keep(kernel, len(pointers), numbers)
    key = (
        pointers[0].device,
        tuple([pointer if pointer is None else pointer.dtype for pointer in pointers]),
        kept.specialized(numbers),
        max([numbers[i] for i in kept.exempt], default=0) < 2**31,
        tuple(constants.values()),
    )
    compiled = kept.compiled.get(key)
    if compiled is not None:
        compiled[(blocks, 1, 1)](*pointers, *numbers, *(None,) * kept.constants)
        return
    if len(kept.compiled) >= _LIMIT:
        kept.compiled.clear()
    kept.compiled[key] = kernel[(blocks,)](*pointers, *numbers, **constants)


def _keep(kernel: JITFunction, first: int, numbers: Sequence[int | float]) -> _Kept:
    """`numbers` are the parameters of the kernel from `first` on."""
    specialized, exempt = [], []
    for i, number in enumerate(numbers):
        if isinstance(number, int):
            (exempt if kernel.params[first + i].do_not_specialize else specialized).append(i)
    constants = len(kernel.params) - first - len(numbers)
    kept = _Kept(kernel, itemgetter(*specialized), exempt, constants, {})
    _kernels[id(kernel)] = kept
    return kept


__all__ = ["launch"]
