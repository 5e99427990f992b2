"""Orthonormal bases of tall blocks.

On the CPU by Householder QR. On a GPU, where that would be many small steps, by CholeskyQR2
(Yamamoto, Nakatsukasa, Yanagisawa and Fukaya, ETNA 44, 2015): with XᵀX = RᵀR, X R⁻¹ is
orthonormal up to the square of the condition number of X; after a second pass it is orthonormal up
to rounding. All of this is matrix products, as long as the condition number is below about 1/√eps.
Columns are first scaled to unit norm, so that only their directions matter. If a factorization
still fails, Householder QR is used.
"""

import torch


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
    factor, failed_again = torch.linalg.cholesky_ex(basis.mT @ basis, upper=True)
    basis = torch.linalg.solve_triangular(factor, basis, upper=True, left=False)
    failed = failed + failed_again > 0
    if failed.any():
        basis[failed] = torch.linalg.qr(block[failed]).Q
    return basis


def orthogonality_error(basis: torch.Tensor) -> torch.Tensor:
    """‖QᵀQ − I‖ in the Frobenius norm, for Q [..., k, q]."""
    gram = basis.mT @ basis
    identity = torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)
    return torch.linalg.matrix_norm(gram - identity)


__all__ = ["cholesky_qr2", "orthogonality_error", "orthonormalize"]
