"""What counts as a linear layer: `nn.Linear` and transformers' Conv1D (GPT-2, OpenAI GPT).

Conv1D maps [..., n] to [..., m] like `nn.Linear`, but stores its weight as [n, m]. transformers is
not imported here, so it need not be installed.
"""

import sys
from typing import Any

from torch import nn


def is_linear(module: nn.Module | None) -> bool:
    """Whether `module` is an `nn.Linear`, of any subclass, or a Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module | None) -> bool:
    """Whether `module` is transformers' Conv1D."""
    utilities = sys.modules.get("transformers.pytorch_utils")
    return utilities is not None and isinstance(module, utilities.Conv1D)


def stores_transposed(layer: nn.Module) -> bool:
    """Whether a linear layer, adapted or not, stores its weight as [n, m]."""
    return getattr(layer, "transposed", False) or is_conv1d(layer)


def matrix_shape(layer: Any) -> tuple[int, int]:
    """m and n of a linear layer, adapted or not, that maps [..., n] to [..., m]."""
    if is_conv1d(layer):
        return layer.nf, layer.nx
    return layer.out_features, layer.in_features


__all__ = ["is_conv1d", "is_linear", "matrix_shape", "stores_transposed"]
