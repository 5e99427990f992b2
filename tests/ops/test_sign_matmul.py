"""Products with packed signs, both orientations, on every backend."""

import math

import pytest
import torch

from lorasb_kernels import SignMatrix
from lorasb_kernels.functional import sign_matmul
from lorasb_kernels.ops import reference
from tests.contract import assert_within_contract
from tests.ops.conftest import ON_GPU
from tests.ops.operands import normal, same_bits

# m, n, q
SHAPES = [(1, 1, 1), (3, 40, 5), (33, 31, 16), (70, 130, 20), (65, 64, 40), (20, 33, 170)]


def signs(m, n, device):
    matrix = normal(m, n, dtype=torch.float32, device=device)
    matrix[:, ::5] = 0
    return SignMatrix.from_dense(matrix, backend="reference")


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(("m", "n", "q"), SHAPES)
def test_values(m, n, q, transpose, backend, device):
    S = signs(m, n, device)
    S = S.T if transpose else S
    Z = normal(S.shape[1], q, dtype=torch.float32, device=device, seed=1)
    dense = S.to_dense()
    exact = dense.double().cpu() @ Z.double().cpu()
    product = S.matmul(Z, backend=backend)
    assert product.dtype == torch.float32
    assert_within_contract(product, dense @ Z, exact)
    assert same_bits(product, S.matmul(Z, backend=backend))


@pytest.mark.parametrize("transpose", [False, True])
def test_strides_of_the_dense_operand(transpose, backend, device):
    S = signs(50, 70, device)
    S = S.T if transpose else S
    Z = normal(S.shape[1], 12, dtype=torch.float32, device=device)
    product = S.matmul(Z, backend=backend)
    torch.testing.assert_close(S.matmul(Z.T.contiguous().T, backend=backend), product)
    padded = torch.full((S.shape[1], 30), math.nan, device=device)
    padded[:, 4:28:2] = Z
    torch.testing.assert_close(S.matmul(padded[:, 4:28:2], backend=backend), product)


@pytest.mark.parametrize("transpose", [False, True])
def test_non_finite_elements_show(transpose, backend, device):
    dense = normal(40, 70, dtype=torch.float32, device=device)
    dense[7, 68] = math.nan
    S = SignMatrix.from_dense(dense)
    S, row = (S.T, 68) if transpose else (S, 7)
    Z = normal(S.shape[1], 3, dtype=torch.float32, device=device)
    product = S.matmul(Z, backend=backend)
    assert product[row].isnan().all()
    assert product.isnan().sum() == 3
    Z[2, 1] = math.inf
    product = SignMatrix.from_dense(torch.ones(S.shape, device=device)).matmul(Z, backend=backend)
    assert not product[:, 1].isfinite().any()
    assert product[:, [0, 2]].isfinite().all()


def test_no_rows_and_no_columns(backend, device):
    S = SignMatrix.from_dense(torch.empty(0, 40, device=device))
    assert S.matmul(torch.ones(40, 3, device=device), backend=backend).shape == (0, 3)
    transposed = S.T.matmul(torch.ones(0, 3, device=device), backend=backend)
    assert torch.equal(transposed, torch.zeros(40, 3, device=device))
    assert signs(4, 40, device).matmul(torch.ones(40, 0, device=device)).shape == (4, 0)


@pytest.mark.skipif(ON_GPU, reason="the interpreter is off; a GPU runs its own bf16 terms")
@pytest.mark.parametrize("transpose", [False, True])
def test_three_terms_carry_the_dense_operand(transpose, monkeypatch, device):
    """The GPU's bf16 terms, tested in the interpreter with fp16: three terms give all of fp32."""
    kernels = pytest.importorskip("lorasb_kernels.ops.triton.sign_matmul")
    S = signs(40, 70, device)
    S = S.T if transpose else S
    Z = normal(S.shape[1], 5, dtype=torch.float32, device=device)
    exact = S.to_dense(torch.float64) @ Z.double()
    errors = []
    for terms in (1, 2, 3):
        monkeypatch.setattr(kernels, "_terms", lambda terms=terms: (kernels.tl.float16, terms))
        errors.append((S.matmul(Z, backend="triton") - exact).abs().max().item())
    assert errors[0] > 1e-3
    assert 1e-7 < errors[1] < errors[0]
    assert errors[2] <= 1e-5


@pytest.mark.parametrize("transpose", [False, True])
def test_the_reference_unpacks_a_panel_at_a_time(transpose, monkeypatch):
    monkeypatch.setattr(reference, "UNPACKED_AT_ONCE", 512)
    sizes = []
    unpack = reference.unpack

    def recorded(*arguments):
        dense = unpack(*arguments)
        sizes.append(dense.numel())
        return dense

    monkeypatch.setattr(reference, "unpack", recorded)
    S = signs(60, 100, torch.device("cpu"))
    S = S.T if transpose else S
    Z = normal(S.shape[1], 4, dtype=torch.float32, device=torch.device("cpu"))
    torch.testing.assert_close(S @ Z, S.to_dense() @ Z)
    assert len(sizes) == 12
    assert max(sizes) <= 512


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"positive": torch.zeros(3, 2)}, TypeError, "positive has dtype torch.float32"),
        ({"negative": torch.zeros(3, 3).int()}, ValueError, r"negative has shape \(3, 3\)"),
        ({"columns": 65}, ValueError, r"expected \[m, 3\] for 65 columns"),
        ({"columns": 0}, ValueError, "columns is 0"),
        ({"dense": torch.zeros(39, 5)}, ValueError, r"dense has shape \(39, 5\); expected \[40"),
        ({"dense": torch.zeros(40)}, ValueError, r"dense has shape \(40,\)"),
        ({"dense": torch.zeros(40, 5).half()}, TypeError, "dense has dtype torch.float16"),
        ({"dense": torch.zeros(40, 5), "transpose": True}, ValueError, r"expected \[3, q\]"),
        ({"dense": 1.0}, TypeError, "dense is a float"),
    ],
)
def test_bad_input_is_named(changes, error, message):
    planes = torch.zeros(3, 2, dtype=torch.int32)
    arguments = {
        "positive": planes,
        "negative": planes,
        "dense": torch.zeros(40, 5),
        "columns": 40,
        **changes,
    }
    with pytest.raises(error, match=message):
        sign_matmul(**arguments)
