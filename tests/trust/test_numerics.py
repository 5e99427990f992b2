"""Every operation keeps the numerical contract on drawn operands.

Sizes, ranks, strides, scalings, dropout and leading dimensions are drawn, and so are the size
of the numbers (1e-20 to 1e20) and the places of NaN, infinities and denormals; `judging` states
the criteria. On a GPU the same tests run there.
"""

import json

import pytest

from tests.aot.process import run_compiling
from tests.ops.conftest import DTYPES, ON_GPU
from tests.trust.conftest import amounts
from tests.trust.operators import OPERATORS, SINGLE
from tests.trust.worst import poisoned_memory, worst_of


def assert_passes(worst: dict) -> None:
    assert worst["fault"] is None
    assert worst["contract"] <= 1
    assert worst["elements"] <= 1


@amounts(3, 200)
@pytest.mark.parametrize(
    ("operator", "dtype"),
    [(op, name) for op in OPERATORS for name in (["float32"] if op in SINGLE else DTYPES)],
    indirect=["dtype"],
)
def test_the_contract(operator, backend, dtype, device, cases):
    if backend == "reference" or ON_GPU:
        cases *= 3
    with poisoned_memory():
        worst = worst_of(operator, dtype, backend, device, cases)
    assert worst.cases >= cases
    assert_passes(vars(worst))


@pytest.mark.parametrize(
    "operator",
    [op if op == "lorasb_linear" else pytest.param(op, marks=pytest.mark.slow) for op in OPERATORS],
)
def test_the_contract_of_the_code_for_a_gpu(operator):
    """In bf16, which Triton's interpreter cannot multiply, compiled for sm_86 and emulated."""
    dtype = "float32" if operator in SINGLE else "bfloat16"
    options = ("--emulated", "--cases", "5")
    assert_passes(
        json.loads(run_compiling("tests.trust.worst", dtype, "triton", operator, *options))
    )
