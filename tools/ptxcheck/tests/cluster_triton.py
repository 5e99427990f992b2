"""A GEMM whose programs are clusters of num_ctas blocks."""

import triton
import triton.language as tl


@triton.jit
def matmul(x, y, o, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        at = k + tl.arange(0, BK)
        a = tl.load(
            x + rows[:, None] * K + at[None, :],
            mask=(rows[:, None] < M) & (at[None, :] < K),
            other=0.0,
        )
        b = tl.load(
            y + cols[None, :] * K + at[:, None],
            mask=(cols[None, :] < N) & (at[:, None] < K),
            other=0.0,
        )
        acc = tl.dot(a, b, acc)
    tl.store(
        o + rows[:, None] * N + cols[None, :], acc, mask=(rows[:, None] < M) & (cols[None, :] < N)
    )
