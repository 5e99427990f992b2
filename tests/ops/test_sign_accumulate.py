"""`sign_accumulate_`: values, weights, any split of the tokens; bad input of both sign sums."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasb_kernels.functional import pack_signs, sign_accumulate_, sign_gradient
from lorasb_kernels.ops.bitplanes import unpack
from tests.contract import assert_within_contract
from tests.ops.operands import eager, normal, oracle, same_bits

# tokens, m, n
SHAPES = [(0, 5, 33), (1, 1, 1), (7, 20, 31), (33, 65, 70), (70, 40, 130), (129, 33, 64)]


def operands(tokens, m, n, dtype, device, weighted):
    dy = normal(tokens, m, dtype=dtype, device=device)
    x = normal(tokens, n, dtype=dtype, device=device, seed=1)
    weight = normal(tokens, dtype=torch.float32, device=device, seed=2) if weighted else None
    return dy, x, weight


def exact(dy, x, weight):
    """The gradient in float64 and a bound on the rounding of any fp32 sum of its terms."""
    dy, x = dy.double().cpu(), x.double().cpu()
    if weight is not None:
        dy = dy * weight.double().cpu()[:, None]
    terms = dy.abs().T @ x.abs()
    return dy.T @ x, terms * (2.0**-22 * (len(x) + 8) ** 0.5 + 2.0**-21)


def clear_signs(planes, dy, x, weight):
    """Asserts the signs wherever the sum is larger than rounding; returns how many are."""
    gradient, rounding = exact(dy, x, weight)
    clear = gradient.abs() > rounding
    signs = unpack(*(plane.cpu() for plane in planes), x.shape[1]).double()
    assert torch.equal(signs[clear], gradient.sign()[clear])
    return int(clear.sum())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("tokens", "m", "n"), SHAPES)
def test_accumulated_values(tokens, m, n, weighted, backend, dtype, device):
    dy, x, weight = operands(tokens, m, n, dtype, device, weighted)
    start = normal(m, n, dtype=torch.float32, device=device, seed=3)
    acc = start.clone()
    assert sign_accumulate_(acc, dy, x, weight, backend=backend) is acc
    (yardstick,) = eager("sign_accumulate", start, dy, x, weight)
    assert_within_contract(acc, yardstick, *oracle("sign_accumulate", start, dy, x, weight))
    again = start.clone()
    assert same_bits(sign_accumulate_(again, dy, x, weight, backend=backend), acc)


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_any_split_of_the_tokens_gives_the_same_signs(data):
    """Reference backend; `test_split_on_every_backend` has one split on each."""
    tokens = data.draw(st.integers(1, 60))
    m, n = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 40))
    cuts = sorted(data.draw(st.lists(st.integers(0, tokens), max_size=5)))
    weighted = data.draw(st.booleans())
    _check_split(tokens, m, n, cuts, weighted, "reference", torch.device("cpu"))


@pytest.mark.parametrize("cuts", [[], [1], [16, 17, 17, 40], list(range(1, 50, 7))])
def test_split_on_every_backend(cuts, backend, device):
    _check_split(50, 20, 37, cuts, False, backend, device)


def _check_split(tokens, m, n, cuts, weighted, backend, device):
    dy, x, weight = operands(tokens, m, n, torch.float32, device, weighted)
    sums = []
    for _ in range(2):
        acc = torch.zeros(m, n, device=device)
        for first, last in zip([0, *cuts], [*cuts, tokens], strict=True):
            part = slice(first, last)
            part_weight = None if weight is None else weight[part]
            sign_accumulate_(acc, dy[part], x[part], part_weight, backend=backend)
        sums.append(acc)
    assert same_bits(*sums), "the same split gives the same bits"
    clear_signs(pack_signs(sums[0], backend=backend), dy, x, weight)


def test_weights_make_every_sample_count_as_they_say(backend, device):
    """Weights fold in exactly: 0 removes a token, 2 counts it twice."""
    dy, x, _ = operands(40, 12, 20, torch.float16, device, False)
    weight = torch.ones(40, device=device)
    weight[::3], weight[1::3] = 0.0, 2.0
    kept = torch.cat([torch.arange(1, 40, 3)] * 2 + [torch.arange(2, 40, 3)])
    weighted = sign_accumulate_(torch.zeros(12, 20, device=device), dy, x, weight, backend=backend)
    repeated = torch.zeros(12, 20, device=device)
    sign_accumulate_(repeated, dy[kept], x[kept], backend=backend)
    torch.testing.assert_close(weighted, repeated, rtol=1e-5, atol=1e-5)


def test_small_weights_are_not_rounded_to_sixteen_bits(backend, device):
    """1 + 2⁻¹² is 1 in fp16 and bf16; two tokens that differ only by it must not cancel."""
    dy = torch.ones(2, 3, dtype=torch.float16, device=device)
    x = torch.tensor([[1.0] * 5, [-1.0] * 5], dtype=torch.float16, device=device)
    weight = torch.tensor([1 + 2**-12, 1.0], device=device)
    acc = sign_accumulate_(torch.zeros(3, 5, device=device), dy, x, weight, backend=backend)
    assert torch.equal(acc, torch.full_like(acc, 2**-12))


def test_strides_and_leading_dimensions(backend, device):
    """A batch of sequences, a padded accumulator, transposed and sliced operands."""
    dy, x, weight = operands(24, 20, 37, torch.float32, device, True)
    wide = torch.full((20, 50), math.nan, device=device)
    wide[:, 3:40] = 0
    dy_far = torch.stack([dy, dy], 1).flatten(1)[:, :20].view(4, 6, 20)
    sign_accumulate_(
        wide[:, 3:40], dy_far, x.T.contiguous().T.view(4, 6, 37), weight.view(4, 6), backend=backend
    )
    expected = torch.zeros(20, 37, device=device)
    sign_accumulate_(expected, dy, x, weight, backend=backend)
    assert same_bits(wide[:, 3:40].contiguous(), expected)
    assert wide[:, :3].isnan().all(), "columns beside the accumulator are left alone"
    assert wide[:, 40:].isnan().all()


def test_autocast_does_not_reach_the_sum(device):
    dy, x, _ = operands(30, 8, 9, torch.float32, device, False)
    plain = sign_accumulate_(torch.zeros(8, 9, device=device), dy, x)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        cast = sign_accumulate_(torch.zeros(8, 9, device=device), dy, x)
    assert same_bits(plain, cast)


def test_float64_runs_on_the_reference():
    dy, x, weight = operands(9, 4, 5, torch.float64, torch.device("cpu"), True)
    acc = sign_accumulate_(torch.zeros(4, 5, dtype=torch.float64), dy, x, weight.double())
    assert torch.allclose(acc, (dy * weight.double()[:, None]).T @ x, rtol=1e-14)
    with pytest.raises(RuntimeError, match="float64"):
        sign_gradient(dy, x, backend="triton")


def _bad(**changes):
    arguments = {
        "acc": torch.zeros(3, 4),
        "grad_output": torch.zeros(5, 3),
        "x": torch.zeros(5, 4),
        "row_weight": torch.zeros(5),
    }
    return {**arguments, **changes}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (_bad(acc=torch.zeros(4, 3)), ValueError, r"acc has shape \(4, 3\); expected \(3, 4\)"),
        (_bad(acc=torch.zeros(3, 4).half()), TypeError, "acc has dtype torch.float16"),
        (_bad(acc=torch.zeros(4, 3).T), ValueError, "acc has strides"),
        (_bad(acc=torch.zeros(3, 4, requires_grad=True)), ValueError, "acc requires grad"),
        (_bad(acc=None), TypeError, "acc is a NoneType"),
        (_bad(x=torch.zeros(6, 4)), ValueError, r"grad_output has shape \(5, 3\)"),
        (_bad(x=torch.zeros(5, 4).half()), TypeError, "grad_output has dtype torch.float32"),
        (_bad(x=torch.zeros(5, 4).long()), TypeError, "x has dtype torch.int64"),
        (_bad(x=torch.tensor(1.0)), ValueError, r"x has shape \(\)"),
        (_bad(row_weight=torch.zeros(4)), ValueError, r"row_weight has shape \(4,\)"),
        (_bad(row_weight=torch.zeros(5).half()), TypeError, "row_weight has dtype"),
        (_bad(row_weight=[1.0]), TypeError, "row_weight is a list"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(arguments, error, message):
    with pytest.raises(error, match=message):
        sign_accumulate_(**arguments)
    if "acc" not in message:
        assert not arguments["acc"].any()
        del arguments["acc"]
        with pytest.raises(error, match=message):
            sign_gradient(**arguments)


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend is 'fast'"):
        sign_accumulate_(**_bad(), backend="fast")
