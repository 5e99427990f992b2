"""Autocast must not reach inside an operator, whose dtypes its contract fixes."""

import functools
from collections.abc import Callable

import torch


def autocast_disabled(function: Callable) -> Callable:
    """Runs `function` with autocast off on the device of its first tensor argument."""

    @functools.wraps(function)
    def wrapper(first: torch.Tensor, *args):
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *args)

    return wrapper


__all__ = ["autocast_disabled"]
