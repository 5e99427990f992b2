"""`experts_linear`: values, gradients, what it keeps for backward, what it refuses."""

import pytest
import torch

from lorasb_kernels.functional import experts_linear
from lorasb_kernels.ops.dropout import keep_mask
from tests.contract import assert_within_contract
from tests.ops.experts.operands import SEGMENTS, formula, leaves, operands, widened
from tests.ops.operands import dropout_seed, same_bits

SCALING = 0.75


def run(function, arguments, **settings):
    """Output and gradients of x and R for a fixed gradient of the output."""
    y = function(**arguments, scaling=SCALING, **settings)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    return y.detach(), arguments["x"].grad, arguments["R"].grad


@pytest.mark.parametrize("tokens", SEGMENTS.values(), ids=SEGMENTS)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_values_and_gradients_equal_the_formula(tokens, shared, is_transposed):
    for bias in (False, True):
        ours = operands(*tokens, bias=bias, shared=shared, is_transposed=is_transposed)
        plain = leaves(ours)
        for found, expected in zip(run(experts_linear, ours), run(formula, plain), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_is_within_the_contract_of_eager(dtype):
    ours = operands([3, 0, 21, 9], 2, n=96, m=80, r=24, dtype=dtype, bias=True)
    plain, exact = leaves(ours), widened(ours)
    results = [run(experts_linear, ours), run(formula, plain), run(formula, exact)]
    for name, found, eager, ref in zip(("y", "dx", "dR"), *results, strict=True):
        assert found.dtype == (torch.float32 if name == "dR" else dtype)
        assert_within_contract(found, eager, ref, name=name)


def test_dropout_is_the_mask_of_the_seed():
    ours = operands([5, 0, 8], 3)
    plain, seed = leaves(ours), dropout_seed(ours["x"].device)
    mask = keep_mask(*plain["x"].shape, 0.3, seed)
    found = run(experts_linear, ours, dropout_p=0.3, seed=seed)
    dropped = plain["x"] * mask / (1 - 0.3)
    expected = run(formula, plain, dropped=dropped)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_seed_is_drawn_where_none_is_given():
    arguments = operands([6, 7])
    outputs = []
    for number in (1, 1, 2):
        torch.manual_seed(number)
        outputs.append(experts_linear(**arguments, dropout_p=0.5))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_gradcheck():
    arguments = operands([2, 0, 3], 1, n=5, m=4, r=2)
    x, R = arguments.pop("x"), arguments.pop("R")
    assert torch.autograd.gradcheck(lambda x, R: experts_linear(x=x, R=R, **arguments), (x, R))


def test_an_expert_is_not_touched_by_the_others():
    """NaN in one expert's weights and tokens stays with its tokens and its dR."""
    ours = operands([4, 3, 0, 5])
    clean = run(experts_linear, leaves(ours))
    with torch.no_grad():
        for name in ("weight", "A", "B", "R"):
            ours[name][1:3] = float("nan")  # expert 2 has no tokens
        ours["x"][4:7] = float("inf")
    y, dx, dR = run(experts_linear, ours)
    others = [0, 1, 2, 3, 7, 8, 9, 10, 11]
    for found, expected in ((y, clean[0]), (dx, clean[1])):
        assert torch.equal(found[others], expected[others])
        assert not found[4:7].isfinite().any()
    assert torch.equal(dR[[0, 3]], clean[2][[0, 3]])
    assert not dR[2].any()


def test_the_same_bits_twice():
    arguments = operands([30, 0, 41], dtype=torch.bfloat16)
    first, second = (run(experts_linear, leaves(arguments)) for _ in range(2))
    assert all(map(same_bits, first, second))


@pytest.mark.parametrize("trains_R", [True, False])
def test_keeps_h_and_no_activation_besides(trains_R):
    arguments = operands([5, 8], n=48, m=40, dtype=torch.bfloat16)
    arguments["R"].requires_grad_(trains_R)
    given = {t.data_ptr() for t in arguments.values() if isinstance(t, torch.Tensor)}
    kept = []

    def pack(tensor):
        if tensor.data_ptr() not in given:
            kept.append(tuple(tensor.shape))
        assert tensor.data_ptr() != arguments["x"].data_ptr()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = experts_linear(**arguments)
    y.sum().backward()
    assert kept == ([(13, 4)] if trains_R else [])
    assert (arguments["R"].grad is not None) == trains_R
    assert arguments["x"].grad is not None


def test_the_input_gradient_where_R_is_frozen():
    trained, frozen = operands([5, 0, 8]), operands([5, 0, 8])
    frozen["R"].requires_grad_(False)
    _, expected, _ = run(experts_linear, trained)
    _, dx, _ = run(experts_linear, frozen)
    torch.testing.assert_close(dx, expected, rtol=1e-12, atol=1e-12)


def test_autocast():
    arguments = operands([5, 8], dtype=torch.float32)
    half = {
        name: value.detach().bfloat16() if name in ("x", "weight", "A", "B") else value
        for name, value in arguments.items()
    }
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = experts_linear(**arguments)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, experts_linear(**half))
    assert arguments["x"].grad.dtype == arguments["R"].grad.dtype == torch.float32


def test_factors_in_single_precision():
    arguments = operands([5, 8], dtype=torch.bfloat16)
    wide = arguments | {name: arguments[name].float() for name in ("A", "B")}
    assert torch.equal(experts_linear(**wide), experts_linear(**arguments))


WRONG = {
    "x: no tensor": ({"x": [1.0]}, TypeError, "x is a list"),
    "x: dimensions": ({"x": torch.zeros(2, 5, 24)}, ValueError, r"x has shape \(2, 5, 24\)"),
    "x: columns": ({"x": torch.zeros(7, 23)}, ValueError, r"x has shape \(7, 23\); expected \[M"),
    "x: dtype": ({"x": torch.zeros(7, 24, dtype=torch.int64)}, TypeError, "x has dtype"),
    "weight: dimensions": ({"weight": torch.zeros(16, 24)}, ValueError, "weight has shape"),
    "weight: no expert": ({"weight": torch.zeros(0, 16, 24)}, ValueError, "expected E >= 1"),
    "weight: dtype": ({"weight": torch.zeros(3, 16, 24).half()}, TypeError, "weight has dtype"),
    "weight: orientation": ({"is_transposed": True}, ValueError, r"x has shape .* \[E, n, m\]"),
    "weight: trained": (
        {"weight": torch.zeros(3, 16, 24, requires_grad=True)},
        ValueError,
        "weight requires grad",
    ),
    "A: experts": ({"A": torch.zeros(2, 4, 24)}, ValueError, r"A has shape \(2, 4, 24\)"),
    "A: trained": ({"A": torch.zeros(3, 4, 24, requires_grad=True)}, ValueError, "A requires grad"),
    "B: outputs": ({"B": torch.zeros(3, 15, 4)}, ValueError, r"B has shape .*\(3, 16, 4\) or \(1,"),
    "R: square": ({"R": torch.zeros(3, 4, 5)}, ValueError, "R has shape"),
    "R: rank": ({"R": torch.zeros(3, 0, 0)}, ValueError, "R has rank 0; expected 1 <= r <= 512"),
    "R: dtype": ({"R": torch.zeros(3, 4, 4).half()}, TypeError, "R has dtype"),
    "bias: shape": ({"bias": torch.zeros(16)}, ValueError, r"bias has shape \(16,\)"),
    "offsets: dtype": ({"offsets": torch.tensor([1, 2, 7])}, TypeError, "offsets has dtype"),
    "offsets: number": ({"offsets": torch.tensor([0, 0, 1, 7]).int()}, ValueError, "offsets has s"),
    "offsets: descending": ({"offsets": torch.tensor([4, 2, 7]).int()}, ValueError, r"\[4, 2, 7\]"),
    "offsets: negative": ({"offsets": torch.tensor([-1, 2, 7]).int()}, ValueError, "offsets are"),
    "offsets: too many": ({"offsets": torch.tensor([1, 2, 8]).int()}, ValueError, "<= 7"),
    "offsets: device": (
        {"offsets": torch.zeros(3, dtype=torch.int32, device="meta")},
        ValueError,
        "offsets is on meta",
    ),
    "scaling": ({"scaling": float("nan")}, ValueError, "scaling is nan"),
    "scaling: type": ({"scaling": "1"}, TypeError, "scaling is a str"),
    "dropout_p": ({"dropout_p": 1.0}, ValueError, "dropout_p is 1.0"),
    "seed": ({"dropout_p": 0.1, "seed": torch.zeros(1)}, TypeError, "seed has dtype"),
}


@pytest.mark.parametrize(("change", "kind", "message"), WRONG.values(), ids=WRONG)
def test_errors_name_the_argument(change, kind, message):
    arguments = operands([1, 0, 6], dtype=torch.float32)
    with pytest.raises(kind, match=message):
        experts_linear(**(arguments | change))
