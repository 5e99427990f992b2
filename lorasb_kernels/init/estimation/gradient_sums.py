"""Summed weight gradients of chosen layers, without autograd computing any weight gradient.

A forward hook on each layer applies an identity, `_Tap`, to its output. The tap keeps the layer's
input x; in backward it receives dy, adds dyᵀx to the layer's accumulator and passes dy on. The
weights stay frozen, so autograd computes no parameter gradient.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from lorasb_kernels.linear_layers import matrix_shape
from lorasb_kernels.ops.sign_accumulate import sign_accumulate_


class _Tap(torch.autograd.Function):
    """Identity on `y`; `anchor` requires grad, so that backward always runs through it."""

    @staticmethod
    def forward(ctx, y, x, anchor, add):
        ctx.save_for_backward(x)
        ctx.add = add
        return y.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        ctx.add(dy, x)
        return dy, None, None, None


class GradientSums:
    """Accumulators Σ dyᵀx [m, n], fp32 (fp64 for fp64 layers), by layer name.

    Args:
        layers: the linear layers by name.
    """

    def __init__(self, layers: dict[str, nn.Module]):
        self.layers = layers
        self.called: set[str] = set()
        self.called_without_gradients: set[str] = set()
        self.reached: set[str] = set()
        self._sums: dict[str, torch.Tensor] = {}
        self._anchors: dict[torch.device, torch.Tensor] = {}

    def allocate(self, names: Iterable[str]) -> None:
        """Sets the accumulators of `names` to zero; a layer's first gradient also does this."""
        for name in names:
            weight = self.layers[name].weight
            dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
            shape = (self._rows(self.layers[name]), matrix_shape(self.layers[name])[1])
            self._sums[name] = torch.zeros(shape, dtype=dtype, device=weight.device)

    def _rows(self, layer: nn.Module) -> int:
        """Rows of a layer's accumulator."""
        return matrix_shape(layer)[0]

    def pop(self, name: str) -> torch.Tensor:
        """Returns the accumulator of `name` and drops its own reference to it."""
        if name not in self._sums:
            self.allocate([name])
        return self._sums.pop(name)

    def clear(self) -> None:
        """Drops every accumulator."""
        self._sums.clear()

    @contextmanager
    def attached(self, names: Iterable[str]) -> Iterator[None]:
        """Inside this context backward passes add the gradients of `names`."""
        handles = [
            self.layers[name].register_forward_hook(partial(self._lay_tap, name), with_kwargs=True)
            for name in names
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _lay_tap(self, name, layer, args, kwargs, y):
        self.called.add(name)
        if not torch.is_grad_enabled():
            self.called_without_gradients.add(name)
            return y
        (x,) = args or kwargs.values()
        if y.device not in self._anchors:
            self._anchors[y.device] = torch.zeros((), device=y.device, requires_grad=True)
        # Under autocast the layer multiplies by x in the dtype of y.
        x = x.detach().to(y.dtype)
        return _Tap.apply(y, x, self._anchors[y.device], partial(self._add, name))

    def _add(self, name: str, dy: torch.Tensor, x: torch.Tensor) -> None:
        self.reached.add(name)
        if name not in self._sums:
            self.allocate([name])
        sign_accumulate_(self._sums[name], dy, x)


__all__ = ["GradientSums"]
