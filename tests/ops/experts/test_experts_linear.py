"""`experts_linear`: values, gradients, what it keeps for backward, what it refuses."""

import pytest
import torch

from lorasb_kernels.functional import experts_linear
from lorasb_kernels.ops.dropout import keep_mask
from tests.contract import assert_within_contract
from tests.ops.experts.operands import SEGMENTS, formula, leaves, operands, widened
from tests.ops.operands import dropout_seed, same_bits

SCALING = 0.75


TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


def run(function, arguments, **settings):
    """Output and gradients of x and R for a fixed gradient of the output."""
    y = function(**arguments, scaling=SCALING, **settings)
    dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
    y.backward(dy.to(y.device, y.dtype))
    return y.detach(), arguments["x"].grad, arguments["R"].grad


@pytest.mark.parametrize("tokens", SEGMENTS.values(), ids=SEGMENTS)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_values_and_gradients_equal_the_formula(tokens, shared, is_transposed, backend, device):
    dtype = torch.float64 if backend == "reference" else torch.float32
    for bias in (False, True):
        settings = {"bias": bias, "shared": shared, "is_transposed": is_transposed}
        ours = operands(*tokens, dtype=dtype, device=device, **settings)
        exact = run(formula, widened(ours))
        for found, expected in zip(run(experts_linear, ours, backend=backend), exact, strict=True):
            assert found.dtype == dtype
            tolerance = TOLERANCE[dtype]
            torch.testing.assert_close(
                found.cpu().double(), expected, rtol=tolerance, atol=tolerance
            )


# m, n, r: round and odd numbers, one rank tile and several.
SIZES = [(80, 96, 24), (33, 70, 3), (17, 40, 96), (40, 24, 200)]


@pytest.mark.parametrize(("m", "n", "r"), SIZES)
def test_low_precision_is_within_the_contract_of_eager(m, n, r, dtype, backend, device):
    ours = operands([3, 0, 41, 9], 2, n=n, m=m, r=r, dtype=dtype, device=device, bias=True)
    plain, exact = leaves(ours), widened(ours)
    found = run(experts_linear, ours, backend=backend)
    results = [found, run(formula, plain), run(formula, exact)]
    for name, found, eager, ref in zip(("y", "dx", "dR"), *results, strict=True):
        assert found.dtype == (torch.float32 if name == "dR" else dtype)
        assert_within_contract(found, eager, ref, name=name)


def test_dropout_is_the_mask_of_the_seed(backend, device):
    ours = operands([5, 0, 38], 3, dtype=torch.float32, device=device)
    exact, seed = widened(ours), dropout_seed(device)
    mask = keep_mask(*exact["x"].shape, 0.3, seed).cpu()
    found = run(experts_linear, ours, dropout_p=0.3, seed=seed, backend=backend)
    dropped = exact["x"] * mask / (1 - 0.3)
    for a, b in zip(found, run(formula, exact, dropped=dropped), strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=2e-5, atol=2e-5)


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


def test_an_expert_is_not_touched_by_the_others(backend, device):
    """NaN in one expert's weights and tokens stays with its tokens and its dR."""
    ours = operands([4, 3, 0, 5], dtype=torch.float32, device=device)
    clean = run(experts_linear, leaves(ours), backend=backend)
    with torch.no_grad():
        for name in ("weight", "A", "B", "R"):
            ours[name][1:3] = float("nan")  # expert 2 has no tokens
        ours["x"][4:7] = float("inf")
    y, dx, dR = run(experts_linear, ours, backend=backend)
    others = [0, 1, 2, 3, 7, 8, 9, 10, 11]
    for found, expected in ((y, clean[0]), (dx, clean[1])):
        assert torch.equal(found[others], expected[others])
        assert not found[4:7].isfinite().any()
    assert torch.equal(dR[[0, 3]], clean[2][[0, 3]])
    assert not dR[2].any()


def test_the_same_bits_twice(dtype, backend, device):
    arguments = operands([30, 0, 150], dtype=dtype, device=device)
    first, second = (run(experts_linear, leaves(arguments), backend=backend) for _ in range(2))
    assert all(map(same_bits, first, second))


def test_one_expert_in_many_parts(backend, device):
    """More rows than one block of dR sums, beside experts with a part, none and a part more."""
    ours = operands([5, 0, 300, 128, 129], 7, r=40, dtype=torch.float32, device=device)
    exact = run(formula, widened(ours))
    for found, expected in zip(run(experts_linear, ours, backend=backend), exact, strict=True):
        torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-4, atol=1e-4)


def test_many_experts(backend, device):
    tokens = [(7 * e) % 5 for e in range(33)]
    ours = operands(tokens, dtype=torch.float32, device=device)
    exact = run(formula, widened(ours))
    for found, expected in zip(run(experts_linear, ours, backend=backend), exact, strict=True):
        torch.testing.assert_close(found.cpu().double(), expected, rtol=2e-5, atol=2e-5)


def test_strides(backend, device):
    """Every operand as a view: rows apart, transposed factors, sliced weights."""
    given = operands([5, 0, 38], 2, dtype=torch.float32, device=device)
    expected = run(experts_linear, leaves(given), backend=backend)
    views = dict(given)
    for name in ("weight", "A", "B", "R"):
        apart = torch.stack([given[name].detach()] * 2, dim=1)[:, 1]
        views[name] = apart.mT.contiguous().mT if name in "AB" else apart
    wide = torch.cat([given["x"].detach()] * 2, dim=1)[:, 24:].requires_grad_()
    views["x"], views["R"] = wide, views["R"].requires_grad_()
    y = experts_linear(**views, scaling=SCALING, backend=backend)
    dy = torch.linspace(-1, 1, y.numel(), device=device).view_as(y)
    found = y, *torch.autograd.grad(y, (views["x"], views["R"]), dy.T.contiguous().T)
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, plain)


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
    "backend": ({"backend": "cuda"}, ValueError, "'cuda'; expected one of 'auto', 'reference'"),
    "seed": ({"dropout_p": 0.1, "seed": torch.zeros(1)}, TypeError, "seed has dtype"),
}


@pytest.mark.parametrize(("change", "kind", "message"), WRONG.values(), ids=WRONG)
def test_errors_name_the_argument(change, kind, message):
    arguments = operands([1, 0, 6], dtype=torch.float32)
    with pytest.raises(kind, match=message):
        experts_linear(**(arguments | change))
