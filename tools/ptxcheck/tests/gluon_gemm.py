"""Persistent warp-specialized GEMM for Hopper in Gluon: y = x Wᵀ + p Fᵀ.

Two pairs of operands run through one pipeline: the k-steps of the rank come first, then those
of K.  One warp loads boxes by TMA into a ring of STAGES buffers, two warpgroups multiply.  A
stage is given back one step late, when its wgmma is known to be complete; STAGES must
therefore be at least 2 (with 1 the loads would wait for a stage that the next step frees).
TRANS: W and F are kept [K, N] and [r, N].
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def load_pair(
    a,
    b,
    length,
    row,
    col,
    idx,
    a_bufs,
    b_bufs,
    ready,
    empty,
    BM: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    TRANS: gl.constexpr,
):
    for k in range(0, length, BK):
        s = idx % STAGES
        mbarrier.wait(empty.index(s), ((idx // STAGES) & 1) ^ 1)
        mbarrier.expect(ready.index(s), (BM + BN) * BK * (a.dtype.primitive_bitwidth // 8))
        tma.async_copy_global_to_shared(a, [row, k], ready.index(s), a_bufs.index(s))
        if TRANS:
            tma.async_copy_global_to_shared(b, [k, col], ready.index(s), b_bufs.index(s))
        else:
            tma.async_copy_global_to_shared(b, [col, k], ready.index(s), b_bufs.index(s))
        idx += 1
    return idx


@gluon.jit
def load_part(
    x,
    w,
    p,
    f,
    a_bufs,
    b_bufs,
    ready,
    empty,
    M,
    N,
    K,
    r,
    BM: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    TRANS: gl.constexpr,
):
    idx = 0
    tiles_m = gl.cdiv(M, BM)
    tiles = tiles_m * gl.cdiv(N, BN)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row = (tile % tiles_m) * BM
        col = (tile // tiles_m) * BN
        idx = load_pair(
            p, f, r, row, col, idx, a_bufs, b_bufs, ready, empty, BM, BN, BK, STAGES, TRANS
        )
        idx = load_pair(
            x, w, K, row, col, idx, a_bufs, b_bufs, ready, empty, BM, BN, BK, STAGES, TRANS
        )


@gluon.jit
def mma_part(
    y,
    a_bufs,
    b_bufs,
    c_buf,
    ready,
    empty,
    M,
    N,
    K,
    r,
    BM: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    TRANS: gl.constexpr,
):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BN, 16])
    idx = 0
    tiles_m = gl.cdiv(M, BM)
    tiles = tiles_m * gl.cdiv(N, BN)
    steps = gl.cdiv(r, BK) + gl.cdiv(K, BK)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row = (tile % tiles_m) * BM
        col = (tile // tiles_m) * BN
        acc = gl.zeros((BM, BN), gl.float32, layout)
        for step in range(steps):
            s = idx % STAGES
            mbarrier.wait(ready.index(s), (idx // STAGES) & 1)
            b = b_bufs.index(s) if TRANS else b_bufs.index(s).permute((1, 0))
            acc = warpgroup_mma(a_bufs.index(s), b, acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            mbarrier.arrive(empty.index((idx + STAGES - 1) % STAGES), pred=step > 0)
            idx += 1
        out = warpgroup_mma_wait(0, deps=(acc,))
        # no step, no stage to give back
        mbarrier.arrive(empty.index((idx + STAGES - 1) % STAGES), pred=steps > 0)
        tma.store_wait(0)
        c_buf.store(out.to(y.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(y, [row, col], c_buf)
    tma.store_wait(0)


@gluon.jit
def gemm(
    x,
    w,
    p,
    f,
    y,
    M,
    N,
    K,
    r,
    BM: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    TRANS: gl.constexpr,
):
    gl.static_assert(STAGES >= 2, "a stage is freed in the step after its own")
    a_bufs = gl.allocate_shared_memory(x.dtype, [STAGES, BM, BK], x.layout)
    if TRANS:
        b_bufs = gl.allocate_shared_memory(w.dtype, [STAGES, BK, BN], w.layout)
    else:
        b_bufs = gl.allocate_shared_memory(w.dtype, [STAGES, BN, BK], w.layout)
    c_buf = gl.allocate_shared_memory(y.dtype, [BM, BN], y.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()  # the copies signal the barriers through the async proxy
    gl.warp_specialize(
        [
            (
                mma_part,
                (y, a_bufs, b_bufs, c_buf, ready, empty, M, N, K, r, BM, BN, BK, STAGES, TRANS),
            ),
            (
                load_part,
                (x, w, p, f, a_bufs, b_bufs, ready, empty, M, N, K, r, BM, BN, BK, STAGES, TRANS),
            ),
        ],
        [1],
        [24],
    )
