"""Truncated SVD of dense and packed sign matrices, to a stated accuracy.

Works on the shorter side, k = min(m, n): finds the eigenspace of the r largest eigenvalues
of A Aᵀ (`chebyshev.py`, or a full eigendecomposition if r is not small compared with k), then
projects onto it,

    Y = Aᵀ X = Q R,   R = P Σ Wᵀ,   A ≈ (X W) Σ (Q P)ᵀ

so that singular values come from A itself and not from its square.

Judge the result by captured energy Σσ²: a sign matrix has a nearly flat spectrum, in which
individual singular vectors are ill-conditioned and do not matter.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lorasb_kernels.init.sign_matrix import SignMatrix
from lorasb_kernels.init.svd.chebyshev import Product, Subspace, dominant_subspace
from lorasb_kernels.init.svd.orthonormal import orthogonality_error, orthonormalize

Matrix = torch.Tensor | SignMatrix


@dataclass(frozen=True)
class Tactics:
    """How the work is organized on a kind of device; the results agree up to rounding.

    Args:
        batch: matrices iterated together.
        unpack: whether a sign matrix is made dense, one batch at a time.
        blocks: of the Krylov space that the search starts from.
    """

    batch: int
    unpack: bool
    blocks: int


# One matrix at a time stays in cache; unpacking once costs less than unpacking in each product.
CPU = Tactics(batch=1, unpack=True, blocks=3)

# Factorizations are launch bound, and large ones are slow: many matrices at a time, and no more
# columns than the block has. Products with packed planes are as fast as reading the planes.
GPU = Tactics(batch=32, unpack=False, blocks=1)

# Blocks of the iteration's width that are multiplied before it ends: 3 and a few more on the
# signs of gradients, about 12 on random signs.
EXPECTED_PRODUCTS = 6


@dataclass(frozen=True)
class SVDReport:
    """How a truncated SVD was computed and how accurate it is.

    Args:
        method: `"chebyshev"` for `dominant_subspace`, or `"eigh"` for a full eigendecomposition.
        iterations: filter cycles; 0 if the Krylov space was enough, and for `"eigh"`.
        converged: whether `gap` reached `tol`.
        captured_energy: Σσ² / ‖A‖²_F, in [0, 1]; 1 for a zero matrix.
        gap: estimated relative shortfall of Σσ² from that of the best rank-r approximation.
        orthogonality_error: the larger of ‖UᵀU − I‖_F and ‖VᵀV − I‖_F.
    """

    method: str
    iterations: int
    converged: bool
    captured_energy: float
    gap: float
    orthogonality_error: float


@dataclass(frozen=True)
class TruncatedSVD:
    """A ≈ U diag(S) Vᵀ.

    Args:
        U: [m, r], orthonormal columns; the entry of largest magnitude in each is positive.
        S: [r], in descending order, ≥ 0, exactly 0 beyond the numerical rank.
        V: [n, r], orthonormal columns.
        report: `SVDReport`.
    """

    U: torch.Tensor
    S: torch.Tensor
    V: torch.Tensor
    report: SVDReport


def truncated_svd(
    matrix: Matrix,
    r: int,
    *,
    tol: float = 5e-5,
    max_iter: int = 30,
    oversample: int | None = None,
    generator: torch.Generator | None = None,
) -> TruncatedSVD:
    """The r leading singular triplets of one matrix; see `truncated_svd_batch`."""
    return truncated_svd_batch(
        [matrix], r, tol=tol, max_iter=max_iter, oversample=oversample, generator=generator
    )[0]


def truncated_svd_batch(
    matrices: Sequence[Matrix],
    r: int,
    *,
    tol: float = 5e-5,
    max_iter: int = 30,
    oversample: int | None = None,
    generator: torch.Generator | None = None,
) -> list[TruncatedSVD]:
    """The r leading singular triplets of each of several matrices of one shape.

    Args:
        matrices: dense [m, n] tensors (fp16 and bf16 are computed in fp32) or
            `SignMatrix`es, all of one shape on one device.
        r: rank, 1 ≤ r ≤ min(m, n).
        tol: estimated shortfall of captured energy Σσ², relative to the best rank-r
            approximation's, at which to stop.
        max_iter: largest number of filter cycles; if it is reached, a warning is given and the
            result so far is returned.
        oversample: columns iterated beyond r; None for max(16, r/2).
        generator: of the random starting block; None for a fixed one. The global random
            state is neither read nor written.

    Raises:
        TypeError: a matrix that is neither a floating-point tensor nor a `SignMatrix`.
        ValueError: no matrices, differing shapes or devices, an element that is not
            finite, a rank that does not fit, `tol`, `max_iter` or `oversample` out of range.
    """
    m, n = _check_matrices(matrices)
    _check_parameters(m, n, r, tol, max_iter, oversample)
    width = min(m, n, r + (max(16, r // 2) if oversample is None else oversample))
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    tactics = _tactics(matrices[0].device)
    start = torch.randn(1, min(m, n), width, generator=generator, device=generator.device)
    start = orthonormalize(start.to(matrices[0].device, _working_dtype(matrices[0])))
    results = []
    for first in range(0, len(matrices), tactics.batch):
        several = matrices[first : first + tactics.batch]
        results += _decompose(several, r, start, tol, max_iter, tactics)
    missed = [i for i, result in enumerate(results) if not result.report.converged]
    if missed:
        worst = max(results[i].report.gap for i in missed)
        warnings.warn(
            f"truncated_svd: {len(missed)} of {len(results)} matrices stopped at "
            f"max_iter={max_iter} with an estimated gap up to {worst:.1e}, above tol={tol:.1e}",
            stacklevel=3,
        )
    return results


def _tactics(device: torch.device) -> Tactics:
    return CPU if device.type == "cpu" else GPU


def _decompose(
    matrices: Sequence[Matrix],
    r: int,
    start: torch.Tensor,
    tol: float,
    max_iter: int,
    tactics: Tactics,
) -> list[TruncatedSVD]:
    swap = matrices[0].shape[0] > matrices[0].shape[1]
    scales = [_scale(matrix) for matrix in matrices]
    wide = [_working(matrix, s, tactics.unpack) for matrix, s in zip(matrices, scales, strict=True)]
    wide = [A.T if swap else A for A in wide]
    _, k, width = start.shape
    exact = _eigh_is_faster(k, width)
    if exact:
        subspaces = [_whole_eigenspace(_gram(A), r) for A in wide]
    else:
        products = [_gram_product(A, width) for A in wide]
        block = start.expand(len(wide), -1, -1)
        subspaces = dominant_subspace(products, block, tactics.blocks, r, tol, max_iter)
    X = orthonormalize(torch.stack([subspace.basis for subspace in subspaces]))
    Y = torch.stack([A.T @ basis for A, basis in zip(wide, X, strict=True)])
    Q = orthonormalize(Y)
    P, S, Wt = torch.linalg.svd(Q.mT @ Y)
    left, right = X @ Wt.mT, Q @ P
    U, V = (right, left) if swap else (left, right)
    flip = _leading_sign(U)
    U, V = U * flip, V * flip
    S = S.masked_fill(S.le(_rank_threshold(S, max(matrices[0].shape))), 0)
    errors = torch.maximum(orthogonality_error(U), orthogonality_error(V)).tolist()
    results = []
    for i, (A, subspace) in enumerate(zip(wide, subspaces, strict=True)):
        total = float(A.norm()) ** 2
        report = SVDReport(
            method="eigh" if exact else "chebyshev",
            iterations=subspace.cycles,
            converged=subspace.gap <= tol,
            captured_energy=S[i].double().square().sum().item() / total if total else 1.0,
            gap=subspace.gap,
            orthogonality_error=errors[i],
        )
        results.append(TruncatedSVD(U[i], S[i] * scales[i], V[i], report))
    return results


def _eigh_is_faster(k: int, width: int) -> bool:
    """Measured on the CPU: filtering is faster once the side is long compared with the block."""
    return k <= 4 * width


def _whole_eigenspace(gram: torch.Tensor, r: int) -> Subspace:
    _, vectors = torch.linalg.eigh(gram)
    return Subspace(vectors[:, -r:].flip(1), gap=0.0, cycles=0)


def _gram_product(A: Matrix, width: int) -> Product:
    """X → A Aᵀ X, through the k×k Gram matrix if that is less work.

    On the CPU only: a GPU multiplies by the packed planes as fast as it reads them.
    """
    k, n = A.shape
    if A.device.type == "cpu" and k <= EXPECTED_PRODUCTS * width * (2 - k / n):
        gram = _gram(A)
        return lambda X: gram @ X
    return lambda X: A @ (A.T @ X)


def _gram(A: Matrix) -> torch.Tensor:
    return A.gram() if isinstance(A, SignMatrix) else A @ A.T


def _working_dtype(matrix: Matrix) -> torch.dtype:
    double = isinstance(matrix, torch.Tensor) and matrix.dtype == torch.float64
    return torch.float64 if double else torch.float32


def _scale(matrix: Matrix) -> float:
    """Largest magnitude; dividing by it keeps the squares of the elements in range."""
    if isinstance(matrix, SignMatrix):
        return 1.0
    return matrix.detach().abs().amax().item() or 1.0


def _working(matrix: Matrix, scale: float, unpack: bool) -> Matrix:
    """The operand of the products: the matrix over its scale; packed signs unless `unpack`."""
    if isinstance(matrix, SignMatrix):
        return matrix.to_dense() if unpack else matrix
    return matrix.detach().to(_working_dtype(matrix)) / scale


def _leading_sign(U: torch.Tensor) -> torch.Tensor:
    """±1 [b, 1, r] that makes the entry of largest magnitude in each column positive."""
    low, high = U.aminmax(dim=-2, keepdim=True)
    return torch.where(-low > high, -1.0, 1.0).to(U.dtype)


def _rank_threshold(S: torch.Tensor, longest: int) -> torch.Tensor:
    """Singular values below this are rounding errors of the products, [b, 1]."""
    return S[:, :1] * (torch.finfo(S.dtype).eps * math.sqrt(longest))


def _check_matrices(matrices: Sequence[Matrix]) -> tuple[int, int]:
    if isinstance(matrices, torch.Tensor):
        raise TypeError("matrices is a Tensor; expected a sequence of matrices")
    if not matrices:
        raise ValueError("matrices is empty; expected at least one")
    first = matrices[0]
    for i, matrix in enumerate(matrices):
        name = f"matrices[{i}]"
        if isinstance(matrix, torch.Tensor):
            if not matrix.dtype.is_floating_point:
                raise TypeError(f"{name} has dtype {matrix.dtype}; expected floating point")
            bad = int((~matrix.isfinite()).sum())
        elif isinstance(matrix, SignMatrix):
            bad = matrix.nonfinite() if (matrix.positive & matrix.negative).any() else 0
        else:
            raise TypeError(
                f"{name} is a {type(matrix).__name__}; expected a torch.Tensor or a SignMatrix"
            )
        if len(matrix.shape) != 2 or 0 in matrix.shape:
            raise ValueError(f"{name} has shape {tuple(matrix.shape)}; expected [m, n], m, n >= 1")
        if matrix.shape != first.shape:
            raise ValueError(
                f"{name} has shape {tuple(matrix.shape)}; "
                f"expected {tuple(first.shape)}, as the first"
            )
        if matrix.device != first.device:
            raise ValueError(f"{name} is on {matrix.device}; expected {first.device}, as the first")
        if bad:
            raise ValueError(f"{name} has {bad} elements that are not finite; expected none")
    m, n = first.shape
    return m, n


def _check_parameters(m, n, r, tol, max_iter, oversample) -> None:
    if not 1 <= r <= min(m, n):
        raise ValueError(f"r is {r}; expected 1 <= r <= {min(m, n)} for a matrix of {m}×{n}")
    if not tol > 0:
        raise ValueError(f"tol is {tol}; expected a positive number")
    if max_iter < 1:
        raise ValueError(f"max_iter is {max_iter}; expected at least 1")
    if oversample is not None and oversample < 1:
        raise ValueError(f"oversample is {oversample}; expected at least 1, or None")


__all__ = ["SVDReport", "TruncatedSVD", "truncated_svd", "truncated_svd_batch"]
