"""The `lorasb` operator namespace: one schema, one operator per backend.

Triton and CUDA implementations of an operation carry separate operator names
(`lorasb::shrink_triton`, `lorasb::shrink_cuda`) that share a schema and a fake.
Schemas are defined here in Python, so `torch.compile` and `opcheck` see all of
them even where a backend is not installed; the implementation of a Triton
operator is imported at its first call and the CUDA extension registers its own.
"""

import importlib
from collections.abc import Callable

import torch

library = torch.library.Library("lorasb", "DEF")

BACKENDS = ("reference", "triton", "cuda")


class BackendOperator:
    """One operation with an operator `lorasb::<name>_<backend>` for each backend.

    Args:
        name: operation name, also the name of its folder in `lorasb_kernels.ops`.
        schema: argument and return part of the schema, `(Tensor x, ...) -> Tensor`.
        fake: shape function with the operator's signature.
        package: the operation's package; `reference.py` and `triton.py` in it
            each hold a function called `name`.
    """

    def __init__(self, name: str, schema: str, fake: Callable, package: str):
        self.name = name
        self.package = package
        for backend in BACKENDS:
            operator = f"{name}_{backend}"
            library.define(f"{operator}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
            torch.library.register_fake(f"lorasb::{operator}", fake, lib=library)
            if backend != "cuda":
                library.impl(operator, self._deferred(backend), "CompositeExplicitAutograd")

    def _deferred(self, backend: str) -> Callable:
        def implementation(*args, **kwargs):
            module = importlib.import_module(f".{backend}", self.package)
            return getattr(module, self.name)(*args, **kwargs)

        return implementation

    def __call__(self, backend: str, *args):
        """Runs the operator of `backend`, a name that `resolve_backend` returned."""
        return getattr(torch.ops.lorasb, f"{self.name}_{backend}")(*args)


__all__ = ["BACKENDS", "BackendOperator", "library"]
