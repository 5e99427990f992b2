"""Operands and passes of adapted layers, for timing several ways to compute them.

A workload is one layer, or the layers of a block grouped by the input they read; each group
has its own input and each layer its own output gradient. A `Run` is one way to compute it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lorasb_kernels.nn.adapted import AdaptedLinear
from lorasb_kernels.nn.linear import LoRASBLinear
from lorasb_kernels.nn.shared_input import SharedInput
from lorasb_kernels.profiling.costs import WAYS, Cost
from lorasb_kernels.profiling.shapes import Layer
from lorasb_kernels.utils.timing import copies_past_cache


@dataclass(frozen=True)
class Operands:
    """One layer: weight [m, n], bias [m] or None, A [r, n], R [r, r] fp32, B [m, r], scaling."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    lora_A: torch.Tensor
    lora_R: torch.Tensor
    lora_B: torch.Tensor
    scaling: float


# From the operands of layers that read one input to the modules that compute them.
Build = Callable[[Sequence[Operands]], list[nn.Module]]


def frozen_layer(operands: Operands) -> nn.Linear:
    """`nn.Linear` over the frozen weight."""
    m, n = operands.weight.shape
    linear = nn.Linear(n, m, operands.bias is not None, device="meta")
    linear.weight = nn.Parameter(operands.weight, requires_grad=False)
    if operands.bias is not None:
        linear.bias = nn.Parameter(operands.bias, requires_grad=False)
    return linear


def adapted_layers(
    group: Sequence[Operands],
    backend: str = "auto",
    shared: bool = False,
    kind: type[AdaptedLinear] = LoRASBLinear,
) -> list[nn.Module]:
    """Adapted layers over the operands.

    Args:
        group: layers that read one input.
        backend: as for the layers.
        shared: compute them together.
        kind: `LoRASBLinear`, or `LoRALinear`, which has no core and trains A and B.
    """
    layers = []
    for operands in group:
        layer = kind.from_linear(
            frozen_layer(operands),
            operands.lora_A.shape[0],
            reset=False,
            scaling=operands.scaling,
            backend=backend,
        )
        for name, own in layer.factors().items():
            factor = getattr(operands, name).detach()
            if name in layer.trained:
                factor = nn.Parameter(factor.to(own.dtype, copy=True))
            setattr(layer, name, factor)
        layers.append(layer)
    if shared and len(layers) > 1:
        SharedInput(layers)  # which the layers hold
    return layers


@dataclass(frozen=True)
class Copy:
    """One set of operands: for each group its input, its layers and their output gradients."""

    inputs: list[torch.Tensor]
    groups: list[list[Operands]]
    dys: list[torch.Tensor]


class Workload:
    """Random operands for `groups` of layers at M tokens and rank r.

    Args:
        groups: layers by the input they read.
        M: tokens.
        r: rank, at most the least number of features.
        dtype: of everything but R, which is fp32 (fp64 with fp64).
        device: of the operands.
        bias: whether the layers have one.
        scaling: s of every layer.
        seed: of the draw.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[Layer]],
        M: int,
        r: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        bias: bool = False,
        scaling: float = 1.0,
        seed: int = 0,
    ):
        self.groups, self.M, self.r = groups, M, r
        self.dtype, self.device, self.bias, self.scaling = dtype, device, bias, scaling
        self._generator = torch.Generator(device).manual_seed(seed)
        first = self._draw()
        size = sum(tensor.nbytes for tensor in (*first.inputs, *first.dys))
        size += sum(layer.weight.nbytes for group in first.groups for layer in group)
        count = copies_past_cache(size, device)
        self.copies = [first, *(self._draw() for _ in range(count - 1))]

    def _normal(self, *shape: int, std: float = 1.0, dtype: torch.dtype | None = None):
        drawn = torch.randn(shape, generator=self._generator, device=self.device)
        return (drawn * std).to(dtype or self.dtype)

    def _draw(self) -> Copy:
        core = torch.promote_types(self.dtype, torch.float32)
        r = self.r
        groups = [
            [
                Operands(
                    weight=self._normal(m, n, std=n**-0.5),
                    bias=self._normal(m) if self.bias else None,
                    lora_A=self._normal(r, n, std=n**-0.5),
                    lora_R=self._normal(r, r, std=r**-0.5, dtype=core),
                    lora_B=self._normal(m, r, std=r**-0.5),
                    scaling=self.scaling,
                )
                for n, m in ((layer.n, layer.m) for layer in group)
            ]
            for group in self.groups
        ]
        inputs = [self._normal(self.M, group[0].n).requires_grad_() for group in self.groups]
        dys = [self._normal(self.M, layer.m) for group in self.groups for layer in group]
        return Copy(inputs, groups, dys)

    def launches(self, way: str, which: str) -> list[Cost]:
        """The launches of a pass computed in one of `costs.WAYS`."""
        size = self.dtype.itemsize
        return [
            cost
            for group in self.groups
            for layer in group
            for cost in WAYS[way](self.M, layer.n, layer.m, self.r, size).of(which)
        ]


class Siblings(nn.ModuleList):
    """The layers that read one input, which they share where they are a `SharedInput`."""

    def __init__(self, layers: list[nn.Module]):
        super().__init__(layers)
        shared_input = getattr(layers[0], "shared_input", None)
        if shared_input is not None:
            shared_input.attach(self)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The outputs in order."""
        return [layer(x) for layer in self]


class Run:
    """One way to compute a workload; `forward` and `both` are calls to time.

    Backward gives the gradients of all inputs and of whatever the modules train.
    """

    def __init__(self, build: Build, workload: Workload):
        self.copies = workload.copies
        self.modules = [[Siblings(build(group)) for group in copy.groups] for copy in self.copies]

    def forward(self, i: int) -> list[torch.Tensor]:
        """All outputs, in the order of the layers."""
        i %= len(self.copies)
        return [
            y
            for x, siblings in zip(self.copies[i].inputs, self.modules[i], strict=True)
            for y in siblings(x)
        ]

    def leaves(self, i: int) -> list[torch.Tensor]:
        """The tensors to differentiate: the inputs, then the trained parameters."""
        i %= len(self.copies)
        trained = [
            parameter
            for siblings in self.modules[i]
            for parameter in siblings.parameters()
            if parameter.requires_grad
        ]
        return [*self.copies[i].inputs, *trained]

    def both(self, i: int) -> tuple[torch.Tensor, ...]:
        """Forward and backward; returns the gradients."""
        dys = self.copies[i % len(self.copies)].dys
        return torch.autograd.grad(self.forward(i), self.leaves(i), dys)

    def saved_bytes(self) -> int:
        """Bytes that forward keeps for backward, including inputs, without weights and adapters."""
        constant = {
            tensor.untyped_storage().data_ptr()
            for siblings in self.modules[0]
            for tensor in (*siblings.parameters(), *siblings.buffers())
        }
        for operands in (layer for group in self.copies[0].groups for layer in group):
            tensors = (operands.weight, operands.lora_A, operands.lora_R, operands.lora_B)
            constant |= {tensor.untyped_storage().data_ptr() for tensor in tensors}
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in constant:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = self.forward(0)
        del outputs
        return sum(kept.values())


__all__ = ["Build", "Operands", "Run", "Workload", "adapted_layers", "frozen_layer"]
