"""How gradients are estimated: what a caller may choose."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # settings are read without torch
    import torch
    from torch import nn

STRATEGIES = ("auto", "resident", "layerwise", "grouped")


@dataclass(frozen=True)
class EstimationOptions:
    """How the gradients of the target layers are summed over samples.

    Args:
        loss_fn: `loss_fn(model, batch)` returns per-sample losses [batch], or their mean
            as a scalar, which then counts as often as the batch has samples: the first
            dimension of its `labels`, else of its first tensor. None for
            `per_sample_loss`, which knows the usual transformers heads.
        strategy: `"resident"` keeps all accumulators, `"layerwise"` those of one block,
            `"grouped"` as many as `memory_budget` allows. `"auto"` takes `resident` if
            its accumulators fit in the budget, else `layerwise`. If `resident` runs
            out of memory, `layerwise` follows; if blocks cannot be run alone, `grouped`
            follows; a warning says so each time.
        memory_budget: bytes for accumulators and, on a GPU, stored block inputs; block inputs
            beyond it are kept in host memory. None for half of what is free on the layers'
            device. `resident` takes what it needs.

    Raises:
        TypeError: an option of the wrong type.
        ValueError: an unknown strategy.
    """

    loss_fn: "Callable[[nn.Module, Any], torch.Tensor] | None" = None
    strategy: str = "auto"
    memory_budget: int | None = None

    def __post_init__(self):
        if self.loss_fn is not None and not callable(self.loss_fn):
            raise TypeError(
                f"loss_fn is a {type(self.loss_fn).__name__}; expected a function or None"
            )
        if self.strategy not in STRATEGIES:
            expected = ", ".join(STRATEGIES)
            raise ValueError(f"strategy is {self.strategy!r}; expected one of {expected}")
        budget = self.memory_budget
        if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int)):
            raise TypeError(f"memory_budget is {budget!r}; expected a number of bytes or None")


__all__ = ["STRATEGIES", "EstimationOptions"]
