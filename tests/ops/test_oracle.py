"""The oracle is independent of the references: a reference with a fault in it does not pass."""

import pytest
import torch

from lorasb_kernels.ops import reference
from lorasb_kernels.ops.core_backward import core_backward
from lorasb_kernels.ops.expand import expand
from lorasb_kernels.ops.factor_gradient import factor_gradient
from lorasb_kernels.ops.shrink import shrink
from tests.ops import test_core_backward, test_expand, test_factor_gradient, test_shrink
from tests.ops.conftest import DTYPES
from tests.ops.operands import check, dropout_seed

CPU = torch.device("cpu")
M, N, K, R = 21, 33, 40, 8
SEED = dropout_seed(CPU)


def arguments_of(operation: str, dtype: torch.dtype) -> tuple:
    if operation == "shrink":
        return *test_shrink.operands(M, K, R, dtype, CPU), 0.75, 0.3, SEED
    if operation == "core_backward":
        return *test_core_backward.operands(M, N, R, dtype, CPU), 0.75
    if operation == "expand":
        return *test_expand.operands(M, N, K, R, dtype, CPU), torch.ones(N, dtype=dtype), 0.3, SEED
    return *test_factor_gradient.operands(M, K, R, dtype, CPU), 0.3, SEED


def transposed_gradient(core_backward, *arguments):
    q, dR = core_backward(*arguments)
    return q, dR.T.contiguous()


# The true reference comes first, then the operation's arguments.
FAULTS = {
    ("shrink", "2·scaling"): lambda f, x, A, R, s, *rest: f(x, A, R, 2 * s, *rest),
    ("shrink", "R for Rᵀ"): lambda f, x, A, R, *rest: f(x, A, R.T, *rest),
    ("shrink", "no dropout"): lambda f, x, A, R, s, p, seed: f(x, A, R, s, 0.0, None),
    ("core_backward", "2·scaling"): lambda f, dy, h, B, R, s: f(dy, h, B, R, 2 * s),
    ("core_backward", "Rᵀ for R"): lambda f, dy, h, B, R, s: f(dy, h, B, R.T, s),
    ("core_backward", "dRᵀ for dR"): transposed_gradient,
    ("expand", "2·p"): lambda f, x, W, p, *rest: f(x, W, 2 * p, *rest),
    ("expand", "no bias"): lambda f, x, W, p, B, bias, *rest: f(x, W, p, B, None, *rest),
    ("expand", "no dropout"): lambda f, x, W, p, B, bias, *rest: f(x, W, p, B, bias, 0.0, None),
    ("factor_gradient", "no dropout"): lambda f, left, rows, *rest: f(left, rows, 0.0, None),
}
PUBLIC = {
    "shrink": shrink,
    "core_backward": core_backward,
    "expand": expand,
    "factor_gradient": factor_gradient,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("operation", "fault"), FAULTS)
def test_a_fault_in_the_reference_is_seen(operation, fault, dtype, monkeypatch):
    arguments = arguments_of(operation, getattr(torch, dtype))
    check(PUBLIC[operation], "reference", *arguments)
    true, broken = getattr(reference, operation), FAULTS[operation, fault]
    monkeypatch.setattr(reference, operation, lambda *operands: broken(true, *operands))
    with pytest.raises(AssertionError, match=r"relative error|max error|an element is off"):
        check(PUBLIC[operation], "reference", *arguments)
