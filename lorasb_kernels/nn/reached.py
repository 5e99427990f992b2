"""Which adapted layers training reaches, by the gradients of their factors.

Before each step of an optimizer the layers of a model are looked through, as long as some of them
never had a gradient. A layer without one, while others have theirs, is not called by the model, or
its output has no part in the loss: `reached` is False then, and `merge` refuses it.

Seen are the steps of optimizers of `torch.optim` and their subclasses whose gradients are in
`.grad`. A copy of the model is not watched.
"""

import functools
import warnings
import weakref
from collections.abc import Mapping

from torch.optim.optimizer import register_optimizer_step_pre_hook

from lorasb_kernels.nn.adapted import AdaptedLinear


class UnreachedLayerWarning(UserWarning):
    """The first step of training had no gradient for some adapted layers."""


def watch_training(layers: Mapping[str, AdaptedLinear]) -> None:
    """Sets `reached` of `layers`, those of one model, at the steps of its optimizer.

    The first step warns of those that it does not reach.
    """
    _hook_once()
    _watches.append(_Watch(layers))


_watches: list["_Watch"] = []


@functools.cache
def _hook_once() -> None:
    # Never removed: hooks of all optimizers may not change while they run.
    register_optimizer_step_pre_hook(_before_step)


def _before_step(*_) -> None:
    if _watches:
        _watches[:] = [watch for watch in _watches if watch.goes_on()]


class _Watch:
    def __init__(self, layers: Mapping[str, AdaptedLinear]):
        self.pending = {name: weakref.ref(layer) for name, layer in layers.items()}
        self.count = len(layers)

    def goes_on(self) -> bool:
        """Looks for gradients; False if there is nothing left to look for."""
        layers = {
            name: layer for name, held in self.pending.items() if (layer := held()) is not None
        }
        missing = [name for name, layer in layers.items() if not _has_gradient(layer)]
        first = len(self.pending) == self.count
        if first and len(missing) == len(layers):
            return bool(layers)  # a step of another model; this one may be gone, or half collected
        for name, layer in layers.items():
            layer.reached = name not in missing
        self.pending = {name: self.pending[name] for name in missing}
        if missing and first:
            warnings.warn(
                f"{len(missing)} of {self.count} adapted layers had no gradient in the first step "
                f"of training, such as {missing[0]}: the model does not call them, or the loss "
                "does not depend on them. Unless other batches reach them, their adapters have "
                "no effect, and merging refuses them",
                UnreachedLayerWarning,
                stacklevel=2,
            )
        return bool(missing)


def _has_gradient(layer: AdaptedLinear) -> bool:
    return any(getattr(layer, name).grad is not None for name in layer.trained)


__all__ = ["UnreachedLayerWarning", "watch_training"]
