"""Orthonormal bases of tall blocks.

On the CPU by Householder QR. On a GPU, where that is many small steps, by CholeskyQR2
(Yamamoto, Nakatsukasa, Yanagisawa and Fukaya, ETNA 44, 2015): with XᵀX = RᵀR, X R⁻¹ is
orthonormal up to the square of the condition of X; a second pass brings it to rounding. All
of it is matrix products, as long as the condition stays below about 1/√eps. Columns are
scaled to unit norm first, so that only their directions matter, and where the first pass
leaves the block far from orthonormal, Householder QR takes over.
"""

import torch

# ‖QᵀQ − I‖ that a first pass may leave for the second to reach rounding.
FIRST_PASS_ERROR = 0.1


def orthonormalize(block: torch.Tensor) -> torch.Tensor:
    """Orthonormal Q [b, k, q] whose span contains that of `block` [b, k, q], q ≤ k.

    Columns that are zero or dependent are replaced by directions orthogonal to the rest.
    """
    return torch.linalg.qr(block).Q if block.device.type == "cpu" else cholesky_qr2(block)


def cholesky_qr2(block: torch.Tensor) -> torch.Tensor:
    """`orthonormalize` by two passes of Cholesky QR."""
    norm = block.norm(dim=-2, keepdim=True)
    block = block / torch.where(norm > 0, norm, 1)
    factor, failed = torch.linalg.cholesky_ex(block.mT @ block, upper=True)
    basis = torch.linalg.solve_triangular(factor, block, upper=True, left=False)
    gram = basis.mT @ basis
    error = (gram - torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)).abs()
    good = (failed == 0) & (error.amax(dim=(-2, -1)) < FIRST_PASS_ERROR)
    factor, _ = torch.linalg.cholesky_ex(gram, upper=True)
    basis = torch.linalg.solve_triangular(factor, basis, upper=True, left=False)
    if not good.all():
        basis[~good] = torch.linalg.qr(block[~good]).Q
    return basis


def orthogonality_error(basis: torch.Tensor) -> torch.Tensor:
    """‖QᵀQ − I‖ in the Frobenius norm, for Q [..., k, q]."""
    gram = basis.mT @ basis
    identity = torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)
    return torch.linalg.matrix_norm(gram - identity)


__all__ = ["cholesky_qr2", "orthogonality_error", "orthonormalize"]
