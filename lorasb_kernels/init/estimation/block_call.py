"""One call of a block on one micro-batch: recorded first, replayed with gradients later."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.graph import get_gradient_edge
from torch.utils import _pytree as pytree

from lorasb_kernels.init.estimation.boundary_store import BoundaryStore, ChangedInPlace
from lorasb_kernels.init.estimation.ranks import FallBack

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.Size, slice)


class _Boundary(torch.autograd.Function):
    """Identity on a block's output; gradients stop here and are kept with the call."""

    @staticmethod
    def forward(ctx, output, root, call, index):
        ctx.call, ctx.index = call, index
        return output.detach()

    @staticmethod
    def backward(ctx, gradient):
        ctx.call.receive(ctx.index, gradient)
        return None, None, None, None


class BlockCall:
    """A block's inputs, how they depend on earlier calls, and its output gradients.

    Args:
        name: the block's name.
        forward: its forward.
        args, kwargs: what it is called with.
        store: keeps the input tensors.

    Raises:
        FallBack: an input that is neither a tensor nor a plain value, such as a cache, whose
            state may differ in a second call.
    """

    def __init__(
        self, name: str, forward: Callable, args: tuple, kwargs: dict, store: BoundaryStore
    ):
        self.name, self._forward = name, forward
        leaves, self._structure = pytree.tree_flatten((args, kwargs))
        self._refuse_objects("takes", leaves)
        self._inputs = [store.keep(x) if isinstance(x, torch.Tensor) else x for x in leaves]
        # Edges refer to the graph of earlier calls without keeping their data alive.
        self._edges = [
            get_gradient_edge(x) if isinstance(x, torch.Tensor) and x.requires_grad else None
            for x in leaves
        ]
        self._gradients: dict[int, torch.Tensor] = {}
        self._norms: dict[int, torch.Tensor] = {}

    def first_run(self, args: tuple, kwargs: dict) -> Any:
        """The block's outputs; those with gradients are detached from their history.

        The block's graph says which outputs have gradients, and ends with this call.
        """
        outputs, structure = pytree.tree_flatten(self._forward(*args, **kwargs))
        self._refuse_objects("returns", outputs)
        for index, output in enumerate(outputs):
            if isinstance(output, torch.Tensor) and output.requires_grad:
                self._norms[index] = _norm(output)
                root = torch.zeros((), device=output.device, requires_grad=True)
                outputs[index] = _Boundary.apply(output.detach(), root, self, index)
        return pytree.tree_unflatten(outputs, structure)

    def _refuse_objects(self, verb: str, leaves: list[Any]) -> None:
        for leaf in leaves:
            if not isinstance(leaf, (torch.Tensor, *_PLAIN)):
                raise FallBack(f"block {self.name} {verb} an object, a {type(leaf).__name__}")

    def receive(self, index: int, gradient: torch.Tensor) -> None:
        """Adds to the gradient of output `index`."""
        held = self._gradients.get(index)
        self._gradients[index] = gradient if held is None else held + gradient

    def prefetch(self) -> None:
        """Starts to copy inputs back from host memory."""
        for kept in self._inputs:
            if not isinstance(kept, _PLAIN):
                kept.prefetch()

    def replay(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Runs the block again, with gradients, and passes its input gradients on.

        Returns the norm of each output that has gradients, in the first run and in this one.
        """
        if not self._gradients:
            return []
        leaves = self._fetched_inputs()
        args, kwargs = pytree.tree_unflatten(leaves, self._structure)
        outputs = pytree.tree_leaves(self._forward(*args, **kwargs))
        indices = list(self._gradients)
        torch.autograd.backward(
            [outputs[index] for index in indices], [self._gradients[index] for index in indices]
        )
        passed_on = [
            (edge, leaf.grad)
            for edge, leaf in zip(self._edges, leaves, strict=True)
            if edge is not None and leaf.grad is not None
        ]
        if passed_on:
            torch.autograd.backward(*zip(*passed_on, strict=True), retain_graph=True)
        return [(norm, _norm(outputs[index])) for index, norm in self._norms.items()]

    def _fetched_inputs(self) -> list[Any]:
        try:
            return [
                kept if isinstance(kept, _PLAIN) else kept.get().requires_grad_(edge is not None)
                for kept, edge in zip(self._inputs, self._edges, strict=True)
            ]
        except ChangedInPlace:
            raise FallBack(f"an input of block {self.name} was changed in place") from None


def _norm(tensor: torch.Tensor) -> torch.Tensor:
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return torch.linalg.vector_norm(tensor.detach(), dtype=dtype)


__all__ = ["BlockCall"]
