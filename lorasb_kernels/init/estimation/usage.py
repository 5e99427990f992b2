"""How a model uses its linear layers, found by running it once.

An adapter works if the model calls its layer, with gradients on. Two forward passes, in eval and in
training mode, find layers of which that is not so:

* a layer whose weight is read past it: attention that passes the weights of its projections to one
  function, fused kernels that take the weight of the output projection. Every function of torch
  that is called while the layer itself is not running is looked through for its weight;
* a layer that is called with gradients off only, such as the indexer of a sparse attention.

Nothing is trained or computed backward, no activations are kept, and the model is unchanged. What
only happens with other inputs, on another device or in generation is not seen, nor is a read
through a copy of the weight that was made before.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lorasb_kernels.init.estimation.frozen_eval import estimation_mode, replaced_forward
from lorasb_kernels.init.estimation.tiny_batch import tiny_batch

GRADIENTS_OFF = "the model runs it with gradients off"
WEIGHT_READ = "the model reads its weight past the layer"

# Functions that take a tensor as the model of a new one and use nothing of its values.
_BY_EXAMPLE = ("type_as", "to", "expand_as", "view_as", "reshape_as")


def unusable_layers(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batch: Any = None,
    loss_fn: Callable | None = None,
) -> dict[str, str]:
    """Why adapters of some of `layers` would have no effect; the others are not listed.

    Empty if the model cannot be run.

    Args:
        model: the model.
        layers: linear layers of it by name.
        batch: what `loss_fn` takes, without it the inputs of the model; None for a tiny random
            batch, if the model's configuration says how one looks.
        loss_fn: runs the model on `batch`.
    """
    if batch is None:
        loss_fn = None
        try:
            batch = tiny_batch(model)
        except (AttributeError, ValueError):  # a configuration of another form
            return {}
        if batch is None:
            return {}
    calls, off = _Calls(layers), set()
    with estimation_mode(model), calls.recorded():
        if _runs(model, batch, loss_fn):
            off = calls.without_gradients - calls.with_gradients
        with _training(model):
            _runs(model, batch, loss_fn)
    reasons = dict.fromkeys(off, GRADIENTS_OFF) | dict.fromkeys(calls.read, WEIGHT_READ)
    return {name: reasons[name] for name in layers if name in reasons}


def _runs(model: nn.Module, batch: Any, loss_fn: Callable | None) -> bool:
    """Runs the model on the batch; False if it fails, which it may, as training will tell."""
    try:
        if loss_fn is not None:
            loss_fn(model, batch)
        else:
            device = next(model.parameters()).device
            inputs = pytree.tree_map_only(torch.Tensor, lambda x: x.to(device), dict(batch))
            model(**inputs)
    except Exception:  # whatever the model makes of this batch
        return False
    return True


class _Calls(TorchFunctionMode):
    """Records the calls of `layers`, and the reads of their weights by anything else."""

    def __init__(self, layers: Mapping[str, nn.Module]):
        super().__init__()
        self.layers = layers
        self.names = {id(layer.weight): name for name, layer in layers.items()}
        self.with_gradients: set[str] = set()
        self.without_gradients: set[str] = set()
        self.read: set[str] = set()
        self._running: list[str] = []

    @contextmanager
    def recorded(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name, layer in self.layers.items():
                forward = partial(self._forward, name, layer.forward)
                stack.enter_context(replaced_forward(layer, forward))
            stack.enter_context(self)
            yield

    def _forward(self, name: str, forward: Callable, *args, **kwargs):
        (self.with_gradients if torch.is_grad_enabled() else self.without_gradients).add(name)
        self._running.append(name)
        try:
            return forward(*args, **kwargs)
        finally:
            self._running.pop()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        for tensor in pytree.tree_leaves((args, kwargs)):
            name = self.names.get(id(tensor))
            if name is None or name in self._running:
                continue
            if _uses_values(function, tensor, args, result):
                self.read.add(name)
        return result


def _uses_values(function: Callable, tensor: torch.Tensor, args: tuple, result: Any) -> bool:
    """Whether the result is made of the values of `tensor`, not of its shape, dtype or device."""
    name = getattr(function, "__name__", "")
    if name == "data_ptr":
        return True
    if name.startswith("new_") or name.endswith("_like"):
        return False
    if name in _BY_EXAMPLE and args and args[0] is not tensor:
        return False
    return any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(result))


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Every module in training mode, that was in eval mode."""
    for module in model.modules():
        module.training = True
    try:
        yield
    finally:
        for module in model.modules():
            module.training = False


__all__ = ["GRADIENTS_OFF", "WEIGHT_READ", "unusable_layers"]
