"""The dominant eigenspace of A Aᵀ: a block Krylov space, then Chebyshev-filtered iteration.

The start is the best block in a Krylov space span(X, A Aᵀ X, (A Aᵀ)² X) of a random X, or X alone
(Musco and Musco, "Randomized block Krylov methods for stronger and faster approximate singular
value decomposition", NeurIPS 2015). For the signs of gradients, whose singular values
first decrease fast, this is enough.

Flat spectra continue with the filtered subspace iteration of Zhou, Saad, Tiago and Chelikowsky,
"Self-consistent-field calculations using Chebyshev-filtered subspace iteration", J. Comput.
Phys. 219 (2006). Each cycle

    1. bounds the unwanted eigenvalues by a = θ_q, the smallest Ritz value of the block;
    2. filters: X ← T_d(2 A Aᵀ/a − I) X (d products), which keeps components with eigenvalues
       in [0, a] below 1 and makes those above grow like cosh(d·arccosh(2θ/a − 1));
    3. orthonormalizes;
    4. projects: θ, X ← Ritz values and vectors of the block (one product, one small eigh).

Plain subspace iteration gains a factor θ/a per product. The polynomial converges like a Krylov
method, but with a block of fixed width and one orthonormalization per cycle instead of one per
product.

Every step works on a stack of matrices of one shape, [b, k, q].
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lorasb_kernels.init.svd.orthonormal import orthonormalize

Product = Callable[[torch.Tensor], torch.Tensor]

# Largest degree of the filter, by the number of previous blocks and cycles: the bound `a` is poor
# at first, and a high degree with a low bound would amplify unwanted directions.
DEGREES = (4, 8, 12, 16)

# How much more than the rest the filter may amplify a direction. Above about 1/√eps the block is
# too ill-conditioned for Cholesky QR.
GROWTH = 1e4


@dataclass(frozen=True)
class Subspace:
    """Approximate dominant eigenspace of one matrix.

    Args:
        basis: A Aᵀ times the Ritz vectors [k, r], in descending order of Ritz value; one
            iteration step more accurate than the Ritz vectors.
        gap: estimated shortfall of captured energy, relative to the best r-dimensional
            subspace's.
        cycles: filters applied.
    """

    basis: torch.Tensor
    gap: float
    cycles: int


def dominant_subspace(
    products: Sequence[Product],
    block: torch.Tensor,
    blocks: int,
    r: int,
    tol: float,
    max_iter: int,
) -> list[Subspace]:
    """Approximates the eigenspaces of the r largest eigenvalues of b matrices A Aᵀ.

    Args:
        products: b functions, each X [k, q] → A Aᵀ X.
        block: orthonormal starting block [b, k, q], q > r; usually random.
        blocks: X, A Aᵀ X, … of the Krylov space, blocks·q ≤ k; 1 for `block` alone.
        r: dimension wanted.
        tol: a matrix is done when its estimated gap is at most this.
        max_iter: largest number of cycles.
    """
    found: list[Subspace | None] = [None] * len(products)
    active = list(range(len(products)))
    width = block.shape[-1]
    theta, X, W = _rayleigh_ritz(*_krylov_space(products, block, blocks), width)
    for cycle in range(max_iter + 1):
        residual = (W - X * theta[:, None]).square().sum(-2).sqrt()
        gap = _energy_gap(theta, residual, r)
        done = [g <= tol or cycle == max_iter for g in gap.tolist()]
        for position, index in enumerate(active):
            if done[position]:
                found[index] = Subspace(W[position, :, :r], gap[position].item(), cycle)
        rest = [position for position, finished in enumerate(done) if not finished]
        if not rest:
            return found
        if len(rest) < len(active):
            active = [active[position] for position in rest]
            X, W, theta, residual, gap = (t[rest] for t in (X, W, theta, residual, gap))
        locked = _locked(theta, residual, r, tol)
        degree = _degree(theta, gap, locked, r, tol, cycle + blocks - 1)
        X = orthonormalize(_filter(products, active, X, W, theta, locked, degree))
        theta, X, W = _rayleigh_ritz(X, _apply(products, active, X), width)
    raise AssertionError("unreachable: the last cycle finishes every matrix")


def _apply(products: Sequence[Product], active: list[int], block: torch.Tensor) -> torch.Tensor:
    return torch.stack([products[i](X) for i, X in zip(active, block, strict=True)])


def _krylov_space(
    products: Sequence[Product], block: torch.Tensor, blocks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Basis X of the Krylov space of `block`, and W = A Aᵀ X.

    X is orthonormal unless the space holds fewer dimensions than columns (A of low rank).
    Then residuals are large, whatever the Ritz values, and the next cycle corrects it.
    """
    everything = list(range(len(products)))
    X = block
    W = following = _apply(products, everything, block)
    for _ in range(blocks - 1):
        for _ in range(2):  # the second pass removes the rounding errors of the first
            following = following - X @ (X.mT @ following)
        following = orthonormalize(following)
        X = torch.cat([X, following], dim=-1)
        following = _apply(products, everything, following)
        W = torch.cat([W, following], dim=-1)
    return X, W


def _rayleigh_ritz(X: torch.Tensor, W: torch.Tensor, width: int) -> tuple[torch.Tensor, ...]:
    """The `width` largest Ritz values [b, q] in descending order, Ritz vectors and products.

    Args:
        X: orthonormal basis [b, k, ≥ q].
        W: A Aᵀ X.
        width: q.
    """
    theta, rotation = torch.linalg.eigh(X.mT @ W)
    theta, rotation = theta.flip(-1)[:, :width], rotation.flip(-1)[..., :width]
    return theta, X @ rotation, W @ rotation


def _energy_gap(theta: torch.Tensor, residual: torch.Tensor, r: int) -> torch.Tensor:
    """Estimated relative shortfall of the energy in A Aᵀ X for the r leading X, [b].

    Kato–Temple: an eigenvalue is within ρ²/δ of its Ritz value, and at most ρ, where ρ is the
    residual and δ the distance to the rest of the spectrum, here to θ_q, the end of the block.
    The part of a Ritz vector in the rest of the spectrum (eigenvalues λ ≤ θ_q + ρ_q) is reduced by
    A Aᵀ by a factor λ/θ, and enters the energy squared.
    """
    distance = (theta - theta[:, -1:]).clamp_min(_tiny(theta))
    shortfall = torch.minimum(residual, residual**2 / distance)
    shrinking = (theta[:, -1:] + residual[:, -1:]) / theta
    shortfall = shortfall * shrinking.square().clamp_max(1)
    return shortfall[:, :r].nansum(-1) / theta[:, :r].sum(-1).clamp_min(_tiny(theta))


def _tiny(tensor: torch.Tensor) -> float:
    return torch.finfo(tensor.dtype).tiny


def _locked(theta: torch.Tensor, residual: torch.Tensor, r: int, tol: float) -> int:
    """How many leading Ritz vectors, in every matrix, are accurate enough to be locked.

    Their share of the gap stays below tol/16.
    """
    good = residual <= math.sqrt(tol) / 4 * (theta - theta[:, -1:])
    return int(good[:, : r - 1].long().cumprod(-1).sum(-1).min()) if r > 1 else 0


def _bound(theta: torch.Tensor) -> torch.Tensor:
    return torch.maximum(theta[:, -1], theta[:, 0] * torch.finfo(theta.dtype).eps)


def _degree(
    theta: torch.Tensor, gap: torch.Tensor, locked: int, r: int, tol: float, stage: int
) -> int:
    """The degree that reaches `tol`, limited by the amplification and the stage."""
    bound = _bound(theta)
    largest = (2 * theta[:, locked] / bound - 1).max().item()
    smallest = (2 * theta[:, r - 1] / bound - 1).min().item()
    affordable = math.acosh(GROWTH) / math.acosh(max(largest, 1 + 1e-6))
    shrink_by = math.sqrt(max(2 * gap.max().item() / tol, 1.0))
    enough = math.acosh(shrink_by) / math.acosh(max(smallest, 1 + 1e-6))
    most = DEGREES[min(stage, len(DEGREES) - 1)]
    return max(1, min(most, int(affordable), math.ceil(enough)))


def _filter(
    products: Sequence[Product],
    active: list[int],
    X: torch.Tensor,
    W: torch.Tensor,
    theta: torch.Tensor,
    locked: int,
    degree: int,
) -> torch.Tensor:
    """Filters all of the block except its first `locked` Ritz vectors, given W = A Aᵀ X.

    The locked ones are moved to eigenvalue 0 by subtracting their part of each product; otherwise
    they would dominate the others. The recurrence is scaled to 1 at the largest remaining
    eigenvalue, so that nothing overflows.
    """
    bound, top = (t[:, None, None] for t in (_bound(theta), theta[:, locked]))
    center = bound / 2
    first = center / (top - center)
    fixed = X[..., :locked]
    deflation = fixed * theta[:, None, :locked].sqrt()

    scale = first
    previous = X[..., locked:]
    current = W[..., locked:] * (scale / center) - previous * scale
    for _ in range(degree - 1):
        following = 1 / (2 / first - scale)
        image = _apply(products, active, current)
        if locked:
            image -= deflation @ (deflation.mT @ current)
        image.mul_(2 * following / center).addcmul_(current, -2 * following)
        previous, current = current, image.addcmul_(previous, -scale * following)
        scale = following
    return torch.cat([fixed, current - fixed @ (fixed.mT @ current)], dim=-1)


__all__ = ["Product", "Subspace", "dominant_subspace"]
