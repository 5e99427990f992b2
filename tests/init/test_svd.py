"""Truncated SVD against float64: captured energy, orthogonality, determinism, bad input."""

import math

import pytest
import torch

from lorasb_kernels.init import SignMatrix, truncated_svd, truncated_svd_batch
from lorasb_kernels.init.svd import chebyshev, truncated
from lorasb_kernels.init.svd.orthonormal import cholesky_qr2, orthonormalize


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_signs(m, n, seed=1):
    """The hard case: a Marchenko–Pastur spectrum, flat at its upper edge."""
    return torch.randn(m, n, generator=generator(seed)).sign()


def gradient_signs(hidden=384, width=640, tokens=512):
    """Signs of the weight gradient of a hidden layer in a small classifier."""
    g = generator(2)
    x = torch.randn(tokens, width, generator=g) @ torch.randn(width, width, generator=g) / 16
    first = torch.randn(hidden, width, generator=g).div(16).requires_grad_()
    second = torch.randn(10, hidden, generator=g) / 16
    labels = torch.randint(10, (tokens,), generator=g)
    loss = torch.nn.functional.cross_entropy(torch.relu(x @ first.T) @ second.T, labels)
    return torch.autograd.grad(loss, first)[0].sign()


def low_rank_signs(m=300, n=420, rank=5):
    """Signs with repeated rows, hence of rank at most `rank`."""
    rows = random_signs(rank, n, seed=3)
    return rows[torch.randint(rank, (m,), generator=generator(4))]


def decaying(m=300, n=500):
    """Singular values 10^(−i/20): seven decades over the first 140."""
    g = generator(5)
    U, _ = torch.linalg.qr(torch.randn(m, m, generator=g, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(n, m, generator=g, dtype=torch.float64))
    return (U * 10 ** (-torch.arange(m) / 20) @ V.T).float()


CASES = {
    "random signs": (random_signs(300, 520), 12),
    "random signs, tall": (random_signs(520, 300), 12),
    "random signs, whole eigendecomposition": (random_signs(96, 200), 40),
    "signs of a gradient": (gradient_signs(), 16),
    "signs with zeros": (random_signs(300, 400) * (random_signs(300, 400, seed=9) > 0), 8),
    "rank 5 at r = 16": (low_rank_signs(), 16),
    "rank 1 at r = 4": (torch.ones(280, 300), 4),
    "flat: orthogonal up to scale": (torch.linalg.qr(random_signs(300, 300))[0], 8),
    "outliers on a flat bulk": (random_signs(400, 400) + 8 * low_rank_signs(400, 400, 3), 16),
    "strong outliers": (random_signs(400, 400) + 3000 * low_rank_signs(400, 400, 3), 16),
    "seven decades": (decaying(), 16),
    "r = min(m, n)": (random_signs(24, 40), 24),
    "r = 1": (random_signs(300, 320), 1),
    "one row": (random_signs(1, 50), 1),
}


def check(result, dense, r):
    """Captured energy measured from U and V in float64, not taken from S."""
    dense = dense.double()
    U, S, V = (t.double() for t in (result.U, result.S, result.V))
    m, n = dense.shape
    assert U.shape == (m, r)
    assert S.shape == (r,)
    assert V.shape == (n, r)
    identity = torch.eye(r, dtype=torch.float64)
    for basis in (U, V):
        assert torch.linalg.matrix_norm(basis.T @ basis - identity, ord=2) <= 1e-5
    exact = torch.linalg.svdvals(dense)[:r]
    best = exact.square().sum()
    assert (U.T @ dense).square().sum() >= 0.9999 * best
    assert (dense @ V).square().sum() >= 0.9999 * best
    assert torch.allclose(S.square().sum(), best, rtol=1.01e-4)
    assert S.le(exact * (1 + 1e-5) + 1e-6 * exact[0]).all()
    assert (S.diff() <= 0).all()
    projected = U.T @ dense @ V
    assert (projected - S.diag()).abs().max() <= 3e-5 * exact[0].clamp_min(1)
    return exact


@pytest.mark.parametrize("name", CASES)
def test_captures_the_energy_of_the_best_approximation(name):
    dense, r = CASES[name]
    result = truncated_svd(dense, r)
    exact = check(result, dense, r)
    assert result.report.converged
    fraction = (exact.square().sum() / dense.double().square().sum()).item()
    assert result.report.captured_energy == pytest.approx(fraction, rel=2e-4)


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("random signs", 3),
        ("signs of a gradient", 3),
        ("strong outliers", 1),
        ("seven decades", 1),
    ],
)
def test_filtering_needs_few_cycles(name, most):
    """Plain subspace iteration takes several times as many on a flat spectrum."""
    dense, r = CASES[name]
    assert truncated_svd(dense, r).report.iterations <= most


def test_the_bulk_behind_outliers_converges():
    """Outliers 50 times as large as the bulk would dominate the filter; locked, they do not."""
    dense, r = CASES["outliers on a flat bulk"]
    exact = torch.linalg.svdvals(dense.double())[:r]
    assert exact[2] > 40 * exact[3]
    result = truncated_svd(dense, r, tol=2e-7)
    assert result.report.converged
    assert result.report.iterations <= 5
    bulk = exact[3:].square().sum()
    assert result.S[3:].double().square().sum() >= 0.999 * bulk


@pytest.mark.parametrize("name", [name for name in CASES if "sign" in name or "rank" in name])
def test_packed_signs_agree_with_dense(name):
    dense, r = CASES[name]
    dense = dense.sign()
    packed = truncated_svd(SignMatrix.from_dense(dense), r)
    check(packed, dense, r)
    assert torch.allclose(packed.S, truncated_svd(dense, r).S, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(300, 280), (20, 30)])
def test_all_zero_matrix_gives_orthonormal_factors(shape):
    for matrix in (torch.zeros(shape), SignMatrix.from_dense(torch.zeros(shape))):
        result = truncated_svd(matrix, 6)
        assert result.S.eq(0).all()
        assert result.report.orthogonality_error <= 1e-5
        assert result.report.captured_energy == 1.0
        for basis in (result.U, result.V):
            assert torch.allclose(basis.T @ basis, torch.eye(6), atol=1e-5)


def test_singular_values_beyond_the_rank_are_exactly_zero():
    result = truncated_svd(low_rank_signs(), 16)
    assert result.S[:5].gt(1).all()
    assert result.S[5:].eq(0).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e15])
def test_scale_of_the_matrix_does_not_matter(scale):
    dense = random_signs(300, 320)
    S = truncated_svd(dense * scale, 8).S
    assert torch.allclose(S / scale, truncated_svd(dense, 8).S, rtol=1e-5)


@pytest.mark.parametrize("largest", [1.01, 3.0, 1e2, 1e5])
def test_the_filter_amplifies_no_more_than_an_orthonormalization_bears(largest):
    """T_d at the largest Ritz value, or d = 1, where the filter is a plain power step."""
    theta, gap = torch.tensor([[largest, 1.001, 1.0]]), torch.tensor([0.5])
    degree = chebyshev._degree(theta, gap, 0, 2, 5e-5, 3)
    amplified = math.cosh(degree * math.acosh(2 * largest - 1))
    assert degree == 1 or amplified <= 1.001e4


def test_estimated_gap_is_the_right_size():
    """At tolerances loose enough that the true gap is larger than rounding."""
    dense = random_signs(400, 600)
    best = torch.linalg.svdvals(dense.double())[:16].square().sum()
    for tol in (0.3, 3e-2, 3e-3):
        result = truncated_svd(dense, 16, tol=tol)
        true = 1 - (result.S.double().square().sum() / best).item()
        assert true / 2 <= result.report.gap <= 2 * true


def test_same_call_same_bits_and_the_global_generator_is_untouched():
    dense = random_signs(300, 320)
    state = torch.get_rng_state()
    first, second = truncated_svd(dense, 8), truncated_svd(dense, 8)
    assert torch.equal(torch.get_rng_state(), state)
    for name in ("U", "S", "V"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    seeded = [truncated_svd(dense, 8, generator=generator(seed)) for seed in (7, 7, 8)]
    assert torch.equal(seeded[0].U, seeded[1].U)
    assert not torch.equal(seeded[0].U, seeded[2].U)


def test_largest_entry_of_each_left_vector_is_positive():
    U = truncated_svd(random_signs(300, 320), 8).U
    assert U.gather(0, U.abs().argmax(0, keepdim=True)).gt(0).all()


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Many matrices in lockstep, from a random block; packed products, Cholesky QR."""
    monkeypatch.setattr(truncated, "_tactics", lambda device: truncated.GPU)
    monkeypatch.setattr(truncated, "orthonormalize", cholesky_qr2)
    monkeypatch.setattr(chebyshev, "orthonormalize", cholesky_qr2)


@pytest.mark.parametrize("name", CASES)
def test_captures_as_much_by_the_tactics_of_a_gpu(name, as_on_a_gpu):
    dense, r = CASES[name]
    signs = torch.equal(dense, dense.sign())
    check(truncated_svd(SignMatrix.from_dense(dense) if signs else dense, r), dense, r)


def test_batch_agrees_with_single_matrices(as_on_a_gpu):
    """With matrices that converge in different cycles."""
    dense = [random_signs(300, 320), torch.zeros(300, 320), low_rank_signs(300, 320)]
    dense += [torch.linalg.qr(random_signs(320, 300))[0].T, random_signs(300, 320, seed=8)]
    batch = truncated_svd_batch(dense, 8)
    assert len({result.report.iterations for result in batch}) > 1
    for matrix, result in zip(dense, batch, strict=True):
        assert result.report.converged
        if matrix.any():
            check(result, matrix, 8)
        else:
            assert result.S.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    dense = random_signs(300, 320).to(dtype)
    result = truncated_svd(dense, 8)
    assert result.S.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    check(result, dense, 8)


def test_running_out_of_iterations_warns_and_says_so():
    with pytest.warns(UserWarning, match="max_iter=1"):
        result = truncated_svd(random_signs(300, 320), 8, tol=1e-6, max_iter=1)
    assert not result.report.converged
    assert result.report.gap > 1e-6


@pytest.mark.parametrize("orthonormal", [orthonormalize, cholesky_qr2])
@pytest.mark.parametrize("noise", [None, 0, 1e-6, 1e-4, 3e-4, 1e-3, 1e-2])
def test_orthonormalize_survives_dependent_columns(noise, orthonormal):
    """A block of zeros, and columns that repeat others up to some noise."""
    block = torch.randn(2, 100, 8, generator=generator())
    if noise is None:
        block[0] = 0
    else:
        block[0, :, 4:] = block[0, :, :4] + noise * block[1, :, :4]
    basis = orthonormal(block).double()
    assert (basis.mT @ basis - torch.eye(8)).abs().max() <= 2e-6
    projected = basis[1] @ (basis[1].T @ block[1].double())
    assert torch.allclose(projected, block[1].double(), atol=1e-5)


@pytest.mark.parametrize(
    ("matrix", "options", "message"),
    [
        (torch.ones(4, 6), {"r": 5}, "r is 5; expected 1 <= r <= 4"),
        (torch.ones(4, 6), {"r": 0}, "r is 0"),
        (torch.ones(4), {"r": 1}, r"matrices\[0\] has shape \(4,\)"),
        (torch.ones(0, 6), {"r": 1}, r"matrices\[0\] has shape \(0, 6\)"),
        (torch.full((4, 6), math.nan), {"r": 1}, "24 elements that are not finite"),
        (torch.ones(4, 6), {"r": 1, "tol": 0.0}, "tol is 0.0"),
        (torch.ones(4, 6), {"r": 1, "max_iter": 0}, "max_iter is 0"),
        (torch.ones(4, 6), {"r": 1, "oversample": 0}, "oversample is 0"),
        (SignMatrix.from_dense(torch.full((4, 6), math.inf)), {"r": 1}, "24 elements"),
    ],
)
def test_bad_values_are_named(matrix, options, message):
    with pytest.raises(ValueError, match=message):
        truncated_svd(matrix, **options)


def test_bad_types_and_batches_are_named():
    with pytest.raises(TypeError, match="is a list"):
        truncated_svd([[1.0]], 1)
    with pytest.raises(TypeError, match="int64"):
        truncated_svd(torch.ones(2, 2, dtype=torch.int64), 1)
    with pytest.raises(TypeError, match="expected a sequence"):
        truncated_svd_batch(torch.ones(2, 2, 2), 1)
    with pytest.raises(ValueError, match="empty"):
        truncated_svd_batch([], 1)
    with pytest.raises(ValueError, match=r"matrices\[1\] has shape \(3, 2\)"):
        truncated_svd_batch([torch.ones(2, 3), torch.ones(3, 2)], 1)


@pytest.mark.slow
@pytest.mark.parametrize(("m", "n", "r"), [(1024, 1024, 96), (2048, 2048, 96), (576, 1536, 16)])
def test_full_size_random_signs(m, n, r):
    dense = random_signs(m, n)
    check(truncated_svd(SignMatrix.from_dense(dense), r), dense, r)
