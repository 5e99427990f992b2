"""The Triton implementations of the operations: kernels, their launchers and their tiles.

`IMPLEMENTATIONS` names the function that computes each operation, as `file.function`. Nothing is
imported until an operation runs, so that the package works where Triton is not installed.
"""

import importlib
import os
from collections.abc import Callable

IMPLEMENTATIONS = {
    "shrink": "projection.project",
    "shrink_group": "projection.project_group",
    "expand": "expand.expand",
    "core_backward": "core_backward.core_backward",
    "factor_gradient": "factor_gradient.factor_gradient",
    "sign_accumulate": "weight_gradient.sign_accumulate",
    "sign_gradient": "weight_gradient.sign_gradient",
    "pack_signs": "pack_signs.pack_signs",
    "sign_matmul": "sign_matmul.sign_matmul",
}


def interpreting() -> bool:
    """True when Triton kernels run in Triton's interpreter (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def implementation(operation: str) -> Callable:
    """The Triton implementation of an operation, imported."""
    file, function = IMPLEMENTATIONS[operation].split(".")
    return getattr(importlib.import_module(f"{__name__}.{file}"), function)


__all__ = ["IMPLEMENTATIONS", "implementation", "interpreting"]
