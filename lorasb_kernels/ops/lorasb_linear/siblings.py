"""Several adapted layers on one input: projected together, and one chain of input gradients.

For layers i = 1 … G:

    forward    hᵢ, pᵢ  = shrink_group(x, A₁ … A_G, R₁ … R_G)     one pass over x instead of G
               yᵢ      = expand(x, Wᵢ, pᵢ, Bᵢ, biasᵢ)
    backward   qᵢ, dRᵢ = core_backward(dyᵢ, hᵢ, Bᵢ, Rᵢ)
               dx      = expand(dy₁, W₁ᵀ, q̄, Āᵀ), then dx += dyᵢ Wᵢ in place

with q̄ and Ā the qᵢ and Aᵢ side by side: nothing of the size of x is written to be added later.

Each layer is an autograd node of its own, with its own saved tensors: backward may run through it
without the others, free it, recompute it or run again, as for any layer. They meet in one more
node, that of the common input, which saves nothing:

    x ── _InputGradient ─┬─ token₁ ── layer 1 ── y₁
                         └─ token₂ ── layer 2 ── y₂

A token has the shape of its layer's output and no memory: it stands for `x Wᵢᵀ`, whose gradient
is dyᵢ. Autograd passes the dyᵢ of the layers that took part in this backward pass to the common
input, after all of them; what else dx needs of a layer is kept under the number of the pass.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from lorasb_kernels.ops.dispatch import resolve_backend
from lorasb_kernels.ops.expand import expand
from lorasb_kernels.ops.lorasb_linear.autograd import LoRASBFunction
from lorasb_kernels.ops.lorasb_linear.checks import check_layer
from lorasb_kernels.ops.lorasb_linear.frozen import FrozenLayer, dense
from lorasb_kernels.ops.lorasb_linear.operands import (
    as_rows,
    cast_input,
    cast_layer,
    core_or_identity,
)
from lorasb_kernels.ops.shrink_group import shrink_group

# (q, weight, lora_A) of a layer, by the number of the backward pass and the layer's.
_Left = dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor | FrozenLayer, torch.Tensor]]


class CommonInput:
    """An input that several layers read, to be projected for all of them at the first output.

    `operands` prepares those of a layer, `output` applies it. Between the two calls for one layer
    and the first output nothing that was given here may change.

    Args:
        x: [..., n].
        lora_As: [r, n] each, of one rank r.
        lora_Rs: [r, r] each, fp32 (fp64 with fp64 operands), or None for the identity.
        sizes: the numbers of outputs of the layers.
        scaling: s, common to the layers.
        backend: `"auto"`, `"reference"`, `"triton"` or `"cuda"`.
    """

    def __init__(
        self,
        x: torch.Tensor,
        lora_As: Sequence[torch.Tensor],
        lora_Rs: Sequence[torch.Tensor | None],
        sizes: Sequence[int],
        scaling: float,
        backend: str,
    ):
        with torch.no_grad():
            self.rows = as_rows(cast_input(x.detach()))  # [M, n]
        self._factors = (lora_As, lora_Rs)
        self._sizes, self._scaling, self._backend = tuple(sizes), scaling, backend
        self._projected: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None
        self._tokens: tuple[torch.Tensor, ...] | None = None
        self._left: _Left = {}

    def operands(self, weight, lora_A, lora_R, lora_B, bias):
        """The operands of one layer as `output` takes them: cast under autocast, and checked.

        Raises:
            TypeError, ValueError, RuntimeError: what `lorasb_linear` raises.
        """
        weight, lora_A, lora_B, bias = cast_layer(self.rows, weight, lora_A, lora_B, bias)
        check_layer(self.rows, weight, lora_A, lora_R, lora_B, bias, self._scaling, 0.0)
        self._backend = resolve_backend(self._backend, self.rows.device, self.rows.dtype)
        return weight, lora_A, core_or_identity(lora_R, lora_A, self.rows.dtype), lora_B, bias

    def output(self, index: int, x, weight, lora_A, lora_R, lora_B, bias) -> torch.Tensor:
        """[..., m] of the layer `index`; called once for each layer.

        Args:
            index: the layer's place in the lists.
            x: the input again, to which the gradient flows.
            weight, lora_A, lora_R, lora_B, bias: of this layer, from `operands`.
        """
        if self._projected is None:
            self._projected = self._project()
        token = link = None
        if torch.is_grad_enabled() and x.requires_grad:
            if self._tokens is None:
                rows = as_rows(cast_input(x))
                self._tokens = _InputGradient.apply(rows, self._sizes, self._backend, self._left)
            token = self._tokens[index]
            link = _Link(index, self._left, token.grad_fn)
        y = LoRASBFunction.apply(
            self.rows,
            lora_A,
            lora_R,
            lora_B,
            weight,
            bias,
            float(self._scaling),
            0.0,
            None,
            self._backend,
            False,
            self._projected.pop(index),
            token,
            link,
        )
        return y.view(*x.shape[:-1], y.shape[-1])

    @torch.no_grad()
    def _project(self) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        dtype = self.rows.dtype
        As, Rs = self._factors
        cores = [core_or_identity(R, A, dtype) for A, R in zip(As, Rs, strict=True)]
        As = [A.to(dtype) for A in As]
        self._factors = ((), ())
        layers = shrink_group(self.rows, As, cores, float(self._scaling), self._backend)
        return dict(enumerate(layers))


class _InputGradient(torch.autograd.Function):
    """The node of the common input [M, n]: one token [M, mᵢ] for each layer."""

    @staticmethod
    def forward(ctx, x, sizes, backend, left):
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.left = backend, left
        return tuple(x.new_empty(()).expand(x.shape[0], size) for size in sizes)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *dys):
        task = torch._C._current_graph_task_id()
        parts = [
            (dy, *ctx.left.pop((task, index))) for index, dy in enumerate(dys) if dy is not None
        ]
        return input_gradient(parts, ctx.backend), None, None, None


class _Link(NamedTuple):
    """How a layer's node leaves for the common input's what dx needs of it."""

    index: int
    left: _Left
    common_input: torch.autograd.graph.Node

    def needed(self) -> bool:
        """Whether this backward pass goes on to the common input."""
        return torch._C._will_engine_execute_node(self.common_input)

    def leave(self, q: torch.Tensor, weight: torch.Tensor | FrozenLayer, lora_A: torch.Tensor):
        self.left[torch._C._current_graph_task_id(), self.index] = (q, weight, lora_A)


def input_gradient(parts, backend: str) -> torch.Tensor:
    """dx [M, n] = Σ (dyᵢ Wᵢ + qᵢ Aᵢ) over parts (dyᵢ, qᵢ, Wᵢ, Aᵢ), written once and added to."""
    dys, qs, weights, lora_As = zip(*parts, strict=True)
    first, *others = (
        (dy if dy.stride(-1) == 1 else dy.contiguous(), dense(weight, dy.dtype))
        for dy, weight in zip(dys, weights, strict=True)
    )
    As = [lora_A.to(dy.dtype) for lora_A, dy in zip(lora_As, dys, strict=True)]
    q, lora_A = (qs[0], As[0]) if not others else (torch.cat(qs, dim=1), torch.cat(As))
    dx = expand(first[0], first[1].T, q, lora_A.T, None, 0.0, None, backend)
    for dy, weight in others:
        dx.addmm_(dy, weight)
    return dx


__all__ = ["CommonInput"]
