"""What operators count under `torch.utils.flop_counter.FlopCounterMode`.

The counter cannot look into an operator: without a formula it counts nothing. As torch does for
its own products, a formula counts two for each multiplication.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder

import torch

Shape = Sequence[int]
_COUNTER = "torch.utils.flop_counter"
_formulas: dict[str, Callable[..., int]] = {}


def register_flops(operator: str, formula: Callable[..., int]) -> None:
    """Makes the counter count `formula` for each call of `lorasb::<operator>`.

    Args:
        operator: name of an operator that has been defined.
        formula: takes the operator's arguments, tensors as their shapes; returns the flops.
    """
    _formulas[operator] = formula
    if _COUNTER in sys.modules:
        _register(operator)
    elif not any(isinstance(finder, _RegisterOnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterOnImport())


def _register(operator: str) -> None:
    formula = _formulas[operator]
    counted = sys.modules[_COUNTER].register_flop_formula(getattr(torch.ops.lorasb, operator))
    counted(lambda *args, out_shape=None, **kwargs: formula(*args, **kwargs))
    # Adding to an input gradient in place; torch has a formula for addmm alone.
    if torch.ops.aten.addmm_ not in sys.modules[_COUNTER].flop_registry:
        sys.modules[_COUNTER].register_flop_formula(torch.ops.aten.addmm_)(_addmm)


def _addmm(into: Shape, left: Shape, right: Shape, **_) -> int:
    return 2 * left[0] * left[1] * right[1]


class _RegisterOnImport(MetaPathFinder):
    """Registers all formulas as soon as the counter is imported.

    Importing it here would import triton, which the reference must not; registering at an
    operator's first call would be too late for a counter that exists by then.
    """

    def find_spec(self, fullname, path=None, target=None):
        if fullname != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        execute = spec.loader.exec_module

        def execute_and_register(module):
            execute(module)
            for operator in _formulas:
                _register(operator)

        spec.loader.exec_module = execute_and_register
        return spec


__all__ = ["register_flops"]
