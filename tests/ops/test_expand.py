"""`expand`: y = x Wᵀ + drop(p Bᵀ) + bias, on every backend and by both of Triton's routes."""

import math

import pytest
import torch

from lorasb_kernels.ops.dropout import keep_mask
from lorasb_kernels.ops.expand import expand
from lorasb_kernels.ops.shrink import shrink
from tests.ops.operands import SHAPES, check, dropout_seed, far_memory, normal

COLUMNS = {33: 5, 130: 70, 96: 64, 192: 100}


pytestmark = pytest.mark.parametrize(
    ("backend", "route"),
    [("reference", None), ("triton", "fused"), ("triton", "two_call"), ("cuda", None)],
    indirect=True,
)


@pytest.fixture
def route(request, backend, monkeypatch) -> str | None:
    """Makes Triton's `expand` take this route; the other backends have only one."""
    if request.param is None:
        return None
    from lorasb_kernels.ops.triton import expand as triton

    choose = triton.choose_route

    def forced(*arguments):
        choice = choose(*arguments)
        return type(choice)(request.param, choice.tile, "forced by a test")

    monkeypatch.setattr(triton, "choose_route", forced)
    return request.param


def operands(M, N, K, r, dtype, device):
    x = normal(M, K, dtype=dtype, device=device)
    weight = normal(N, K, dtype=dtype, device=device, seed=1) / math.sqrt(K)
    p = normal(M, r, dtype=dtype, device=device, seed=2)
    factor = normal(N, r, dtype=dtype, device=device, seed=3) / math.sqrt(r)
    return x, weight, p, factor


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("M", "K", "r"), SHAPES)
def test_values(M, K, r, dropout, backend, route, dtype, device):
    N = COLUMNS.get(K, K)
    bias = normal(N, dtype=dtype, device=device, seed=4)
    seed = dropout_seed(device) if dropout else None
    arguments = operands(M, N, K, r, dtype, device)
    (y,) = check(expand, backend, *arguments, bias, dropout, seed)
    assert y.shape == (M, N)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_transposed_views_as_for_the_input_gradient(dropout, backend, route, dtype, device):
    M, N, K, r = 33, 70, 96, 24
    x, weight, p, factor = operands(2 * M, N, K + 4, r, dtype, device)
    weight, factor = weight[:, :K].T.contiguous().T, factor.T.contiguous().T
    seed = dropout_seed(device) if dropout else None
    check(expand, backend, x[::2, 3:-1], weight, p[::2], factor, None, dropout, seed)


@pytest.mark.parametrize("transposed", [False, True])
def test_offsets_beyond_32_bits(transposed, backend, route, device):
    """Rows of x, weight and factor 2³⁰ elements apart: the third is past 32 bits."""
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GB of device memory")
    stride, N, K, r = 2**30 + 8, (40 if transposed else 3), (3 if transposed else 40), 3
    memory = far_memory(2 * stride + 120, torch.float16, device)
    near = operands(3, N, K, r, torch.float16, device)
    far = [*near]
    for index, column in ((0, 0), (1, 40), (3, 80)):
        matrix = near[index].T if transposed and index else near[index]
        rows = memory[column:].as_strided(matrix.shape, (stride, 1)).copy_(matrix)
        far[index] = rows.T if transposed and index else rows
    y = expand(*far, None, 0.0, None, backend)
    torch.testing.assert_close(y, expand(*near, None, 0.0, None, backend))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_input_shows(bad, backend, route, device):
    M, N, K, r = 20, 40, 70, 25
    arguments = operands(M, N, K, r, torch.float16, device)
    bias = normal(N, dtype=torch.float16, device=device)
    clean = expand(*arguments, bias, 0.0, None, backend)
    for position, index, place in (
        (0, (3, K - 1), (3, slice(None))),
        (1, (4, K - 1), (slice(None), 4)),
        (2, (5, r - 1), (5, slice(None))),
        (3, (6, r - 1), (slice(None), 6)),
        (4, (7,), (slice(None), 7)),
    ):
        spoiled = [tensor.clone() for tensor in (*arguments, bias)]
        spoiled[position][index] = bad
        y = expand(*spoiled, 0.0, None, backend)
        assert not y[place].isfinite().any()
        y[place] = clean[place]
        assert torch.equal(y, clean)


def test_the_mask_of_the_input_gradient_is_that_of_the_forward_pass(backend, route, device):
    M, n = 33, 70
    seed = dropout_seed(device)
    x = torch.zeros(M, 8, device=device)
    weight = torch.zeros(n, 8, device=device)
    ones = torch.ones(M, 1, device=device), torch.ones(n, 1, device=device)
    gradient = expand(x, weight, *ones, None, 0.4, seed, backend)
    identity = torch.eye(n, device=device)
    h, _ = shrink(torch.ones(M, n, device=device), identity, identity, 1.0, 0.4, seed, backend)
    assert torch.equal(gradient != 0, keep_mask(M, n, 0.4, seed))
    torch.testing.assert_close(gradient, h)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_statistics(p, backend, route, device):
    """As many kept as the probability says, neighbours independent, the mean preserved."""
    M, N = 128, 96
    seed = dropout_seed(device)
    x, weight = torch.zeros(M, 1, device=device), torch.zeros(N, 1, device=device)
    ones = torch.ones(M, 1, device=device), torch.ones(N, 1, device=device)
    y = expand(x, weight, *ones, None, p, seed, backend)
    kept = (y != 0).double()
    deviation = math.sqrt(p * (1 - p) / kept.numel())
    assert abs(kept.mean().item() - (1 - p)) < 5 * deviation
    assert abs(y.double().mean().item() - 1) < 5 * deviation / (1 - p)
    centred = kept - (1 - p)
    for shifted in (centred.roll(1, 0), centred.roll(1, 1)):
        assert abs((centred * shifted).mean().item()) < 5 * p * (1 - p) / math.sqrt(kept.numel())
