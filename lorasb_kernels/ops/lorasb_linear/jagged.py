"""Nested tensors of jagged layout: their rows one after another, and the lengths of the parts."""

from typing import Any

import torch


def jagged_rows(x: Any) -> torch.Tensor:
    """The rows of all parts of the nested tensor `x` as one tensor.

    Raises:
        ValueError: another layout, or parts of different numbers of features.
    """
    if x.layout != torch.jagged or x._ragged_idx == x.dim() - 1:
        raise ValueError(
            f"x is nested with layout {x.layout}; expected layout torch.jagged, ragged in another "
            "dimension than the last"
        )
    return x.values()


def as_jagged(y: torch.Tensor, x: Any) -> torch.Tensor:
    """`y`, what a layer gave for `jagged_rows(x)`, with the parts of `x`."""
    return torch.nested.nested_tensor_from_jagged(
        y, offsets=x.offsets(), lengths=x.lengths(), jagged_dim=x._ragged_idx
    )


__all__ = ["as_jagged", "jagged_rows"]
