"""The gradient of a trained factor: the product of two tall matrices, summed over the tokens.

    out = leftᵀ drop(rows)        [r, k]

With `left = q` and `rows = x` it is dA = qᵀ drop(x); with `left = p` and `rows = dy` it is
dBᵀ = pᵀ dy.

Reads rows once (M·k elements) whatever the rank, and left once per tile of columns; writes r·k
fp32 numbers; 2·M·r·k flops. Memory bound up to ranks of about 100. Summed in fp32 and in a fixed
order: the same inputs give the same bits.

It is a separate pass, although `core_backward` reads dy and `shrink` reads x. Backward has to read
x again in any case, because q is not known during forward. If it were fused into the pass of
`core_backward` over dy, each block of BLOCK_M rows would have to store its own partial dB, m·r fp32
numbers: 4·m·r / BLOCK_M bytes per row to write and as many to read back. Reading dy once more costs
2·m bytes per row in 16 bits. With 64 rows per block the fusion pays only below a rank of 16; at a
rank of 64 it moves four times the bytes.
"""

import torch

from lorasb_kernels.ops.dispatch import BackendOperator
from lorasb_kernels.ops.sign_accumulate import sign_accumulate_


def _fake(left, rows, dropout, seed):
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return rows.new_empty((left.shape[1], rows.shape[1]), dtype=dtype)


def _flops(left, rows, *_):
    (M, r), (_, k) = left, rows
    return 2 * M * r * k


_operator = BackendOperator(
    "factor_gradient",
    "(Tensor left, Tensor rows, float dropout, Tensor? seed) -> Tensor",
    fake=_fake,
    flops=_flops,
)


def factor_gradient(
    left: torch.Tensor,
    rows: torch.Tensor,
    dropout: float,
    seed: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    """Returns `leftᵀ drop(rows)`, [r, k] in fp32 (fp64 with fp64 operands).

    The CUDA backend runs its `sign_accumulate` kernel on a zeroed accumulator, which has no
    dropout: `check_backend` of `lorasb_linear` refuses that case before anything runs.

    Args:
        left: [M, r], last dimension contiguous, dtype of `rows`.
        rows: [M, k], fp16, bf16 or fp32, last dimension contiguous.
        dropout: probability that an element of `rows` is dropped, in [0, 1).
        seed: int64 [1] on the device of `rows`; None when `dropout` is 0. The mask is that
            of an [M, k] tensor.
        backend: a backend that `resolve_backend` returned.
    """
    if backend == "cuda":
        gradient = rows.new_zeros((left.shape[1], rows.shape[1]), dtype=torch.float32)
        return sign_accumulate_(gradient, left, rows, backend=backend)
    return _operator(backend, left, rows, dropout, seed)


__all__ = ["factor_gradient"]
