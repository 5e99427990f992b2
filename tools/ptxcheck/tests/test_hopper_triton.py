"""What Triton and Gluon make for sm_90a: wgmma, TMA, warp specialization; planted faults."""

import math
import re
from functools import partial

import numpy as np
import pytest

import ptxcheck

from .sources import CHECKS, slow
from .triton_compiler import TensorDescriptor, tl, torch, triton

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
SCHEDULES = [
    dict(),
    dict(cp_async="early"),
    dict(cp_async="late"),
    *[dict(schedule_seed=s) for s in range(4)],
]


@triton.jit
def descriptor_kernel(
    x_desc,
    w_desc,
    p_desc,
    f_desc,
    y_desc,
    M,
    N,
    K,
    r,
    T: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    row, col = tl.program_id(0) * BM, tl.program_id(1) * BN
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, r, BK):
        f = f_desc.load([k, col]) if T else f_desc.load([col, k]).T
        acc = tl.dot(p_desc.load([row, k]), f, acc)
    for k in range(0, K, BK):
        w = w_desc.load([k, col]) if T else w_desc.load([col, k]).T
        acc = tl.dot(x_desc.load([row, k]), w, acc)
    y_desc.store([row, col], acc.to(y_desc.dtype))


@triton.jit
def pointer_kernel(
    a_ptr,
    b_ptr,
    y_ptr,
    M,
    N,
    K,
    am,
    ak,
    bk,
    bn,
    SCALE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros([BM, BN], tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        a = tl.load(
            a_ptr + m[:, None] * am + k[None, :] * ak,
            mask=(m < M)[:, None] & (k < K)[None, :],
            other=0.0,
        )
        b = tl.load(
            b_ptr + k[:, None] * bk + n[None, :] * bn,
            mask=(k < K)[:, None] & (n < N)[None, :],
            other=0.0,
        )
        if SCALE:
            a = (a.to(tl.float32) * 2).to(b.dtype)  # A comes from registers
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    tl.store(y_ptr + m[:, None] * N + n[None, :], acc, mask=(m < M)[:, None] & (n < N)[None, :])


def operands(dtype, M, N, K, r, transposed):
    torch.manual_seed(0)
    x, p = torch.randn(M, K).to(dtype), torch.randn(M, r).to(dtype)
    w, f = torch.randn(N, K) / math.sqrt(K), torch.randn(N, r) / math.sqrt(r)
    w, f = w.to(dtype), f.to(dtype)
    ref = x.double() @ w.double().T + p.double() @ f.double().T
    if transposed:
        w, f = w.T.contiguous(), f.T.contiguous()
    return x, w, p, f, torch.zeros(M, N, dtype=dtype), ref


def close(y, ref, dtype):
    eps = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-20}[dtype]
    return bool(((y.double() - ref).abs() <= 2 * eps * ref.abs().clamp(min=1)).all())


_KERNELS = {}


def cached(key, build):
    if key not in _KERNELS:
        _KERNELS[key] = build()
    return _KERNELS[key]


def descriptor_products(
    dtype, transposed, M, N, K, r, BM, BN, BK, warps, stages, text=None, **options
):
    name = NAMES[dtype]
    wb = [BK, BN] if transposed else [BN, BK]

    def build():
        def d(b):
            return f"tensordesc<{name}[{b[0]},{b[1]}]>"

        return ptxcheck.triton_compile(
            descriptor_kernel,
            {
                "x_desc": d([BM, BK]),
                "w_desc": d(wb),
                "p_desc": d([BM, BK]),
                "f_desc": d(wb),
                "y_desc": d([BM, BN]),
                "M": "i32",
                "N": "i32",
                "K": "i32",
                "r": "i32",
            },
            {"T": transposed, "BM": BM, "BN": BN, "BK": BK},
            arch=90,
            num_warps=warps,
            num_stages=stages,
        )

    k = cached((dtype, transposed, BM, BN, BK, warps, stages), build)
    x, w, p, f, y, ref = operands(dtype, M, N, K, r, transposed)
    boxes = [(x, [BM, BK]), (w, wb), (p, [BM, BK]), (f, wb), (y, [BM, BN])]
    whole = k.module
    try:
        if text is not None:
            k.module = ptxcheck.load(text(k.ptx))
        stats = k(
            (triton.cdiv(M, BM), triton.cdiv(N, BN)),
            *[TensorDescriptor.from_tensor(t, b) for t, b in boxes],
            M,
            N,
            K,
            r,
            max_steps=200_000,
            **options,
        )
    finally:
        k.module = whole
    return y, ref, stats


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "tile",
    [
        (64, 64, 32, 4, 3),
        slow((128, 128, 64, 8, 3)),
        slow((64, 256, 64, 4, 2)),
        (128, 32, 64, 4, 4),
    ],
    ids=str,
)
def test_descriptors(dtype, transposed, tile):
    for options in SCHEDULES[:1] + SCHEDULES[1:4] * (tile[0] == tile[1] == 64):
        y, ref, stats = descriptor_products(
            dtype, transposed, 75, 136, 200, 40, *tile, **CHECKS, **options
        )
        assert close(y, ref, dtype)
    assert stats.count("wgmma.mma_async")
    assert stats.count("cp.async.bulk.tensor")
    assert stats.global_write_bytes == 2 * 75 * 136
    rows, cols = -(-75 // tile[0]), -(-136 // tile[1])
    assert stats.global_read_bytes == 2 * 240 * (75 * cols + 136 * rows)


def remove(pattern, nth=0):
    """PTX without the nth instruction that matches."""

    def change(text):
        lines = text.split("\n")
        hits = [i for i, ln in enumerate(lines) if re.search(pattern, ln) and "//" not in ln]
        assert len(hits) > nth
        lines[hits[nth]] = ""
        return "\n".join(lines)

    return change


def replace(pattern, new, count=0):
    def change(text):
        out, n = re.subn(pattern, new, text, count=count)
        assert n
        return out

    return change


TRITON_FAULTS = {
    "no wait for the copy": replace(
        r"mbarrier\.try_wait\.parity.*;", "setp.eq.u32 complete, 0, 0;"
    ),
    "wrong parity": replace(
        r"(mbarrier\.try_wait\.parity\S+ complete, \[%r\d+\]), (%r\d+);",
        r"xor.b32 \2, \2, 1;\n\t\1, \2;\n\txor.b32 \2, \2, 1;",
    ),
    "no wgmma wait": remove(r"wgmma\.wait_group\.sync\.aligned"),
    "no wgmma fence": replace(r"wgmma\.fence\.sync\.aligned;", ""),
    "no commit": remove(r"wgmma\.commit_group"),
    "no proxy fence before the store": lambda t: remove(
        r"fence\.proxy\.async", t.count("fence.proxy.async") - 1
    )(t),
    "64-byte swizzle in the descriptors": replace(
        r"46116862\d{11}", lambda m: str(int(m[0]) ^ 3 << 62)
    ),
    "fewer bytes expected": replace(r"(arrive\.expect_tx\S+ _, \[%r\d+\]), \d+;", r"\1, 4096;"),
    "more bytes expected": replace(r"(arrive\.expect_tx\S+ _, \[%r\d+\]), \d+;", r"\1, 99984;"),
    "no wait for the store": remove(r"cp\.async\.bulk\.wait_group"),
    "no initialization": remove(r"mbarrier\.init"),
    "no barrier before the store": lambda t: remove(
        r"bar\.sync", len(re.findall(r"bar\.sync", t)) - 2
    )(t),
}


def is_found(run) -> bool:
    """Whether a fault shows in one of three schedules: by an error or by a wrong result."""
    for options in ({}, dict(schedule_seed=1), dict(schedule_seed=2)):
        try:
            y, ref, _ = run(**CHECKS, **options)
        except ptxcheck.ExecutionError as error:
            return "PTX line" in str(error)
        if not close(y, ref, torch.bfloat16):
            return True
    return False


@pytest.mark.parametrize("fault", TRITON_FAULTS)
def test_descriptor_fault(fault):
    shape, tile = (75, 136, 200, 200), (128, 128, 64, 8, 3)
    run = partial(descriptor_products, torch.bfloat16, False, *shape, *tile)
    assert is_found(partial(run, text=TRITON_FAULTS[fault]))


def pointers(dtype, transposed, scale=False, M=75, N=72, K=200, precision="tf32", **options):
    BM, BN, BK, warps = 64, 64, 32 if dtype is torch.float32 else 64, 4

    def build():
        t = "*" + NAMES[dtype]
        return ptxcheck.triton_compile(
            pointer_kernel,
            {
                "a_ptr": t,
                "b_ptr": t,
                "y_ptr": "*fp32",
                "M": "i32",
                "N": "i32",
                "K": "i32",
                "am": "i32",
                "bk" if not transposed else "bn": "i32",
            },
            {
                "SCALE": scale,
                "BM": BM,
                "BN": BN,
                "BK": BK,
                "PRECISION": precision,
                "ak": 1,
                "bn" if not transposed else "bk": 1,
            },
            attrs=["a_ptr", "b_ptr", "y_ptr", "am", "N", "bk" if not transposed else "bn", "K"],
            arch=90,
            num_warps=warps,
            num_stages=3,
        )

    k = cached(("pointers", dtype, transposed, scale, precision), build)
    torch.manual_seed(1)
    a, b = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype)
    ref = a.double() @ b.double() * (2 if scale else 1)
    stored = b.T.contiguous() if transposed else b
    y = torch.zeros(M, N)
    stats = k(
        (triton.cdiv(M, BM), triton.cdiv(N, BN)),
        a,
        stored,
        y,
        M,
        N,
        K,
        K,
        K if transposed else N,
        **{**CHECKS, **options},
    )
    return y, ref, stats, k


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_cp_async_and_wgmma(dtype, transposed):
    for options in SCHEDULES[:4]:
        y, ref, stats, k = pointers(dtype, transposed, N=80, K=208, **options)
        assert (y - ref).abs().max() < (0.1 if dtype is torch.float32 else 1e-3)
    assert "wgmma.mma_async" in k.ptx
    assert stats.count("cp.async.c")
    assert not stats.notes


def test_a_from_registers():
    """Triton rewrites registers of A while a wgmma reads them; ptxas waits for each wgmma."""
    y, ref, stats, k = pointers(torch.bfloat16, False, scale=True, N=80, K=208)
    assert re.search(r"wgmma.mma_async\S+ \{[^}]*\}, \{", k.ptx)
    assert (y - ref).abs().max() < 1e-3
    noted = any("registers of A" in n for n in stats.notes)
    y, *_ = pointers(torch.bfloat16, False, scale=True, N=80, K=208, wgmma_registers="strict")
    assert bool(y.isnan().any()) == noted


# -------------------------------------------------------------------- Gluon


def gluon_gemm(
    dtype,
    transposed,
    M,
    N,
    K,
    r,
    BM=128,
    BN=128,
    BK=64,
    stages=3,
    warps=8,
    grid=2,
    text=None,
    **options,
):
    pytest.importorskip("triton.experimental.gluon")
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

    from . import gluon_gemm

    layout = gl.NVMMASharedLayout(128, 16, 2)
    wb = [BK, BN] if transposed else [BN, BK]

    def build():
        def d(b):
            return ptxcheck.gluon_descriptor(NAMES[dtype], b, layout)

        return ptxcheck.triton_compile(
            gluon_gemm.gemm,
            {
                "x": d([BM, BK]),
                "w": d(wb),
                "p": d([BM, BK]),
                "f": d(wb),
                "y": d([BM, BN]),
                "M": "i32",
                "N": "i32",
                "K": "i32",
                "r": "i32",
            },
            {"BM": BM, "BN": BN, "BK": BK, "STAGES": stages, "TRANS": transposed},
            arch=90,
            num_warps=warps,
        )

    k = cached(("gluon", dtype, transposed, BM, BN, BK, stages, warps), build)
    x, w, p, f, y, ref = operands(dtype, M, N, K, r, transposed)
    boxes = [(x, [BM, BK]), (w, wb), (p, [BM, BK]), (f, wb), (y, [BM, BN])]
    whole = k.module
    try:
        if text is not None:
            k.module = ptxcheck.load(text(k.ptx))
        stats = k(
            (grid,),
            *[GluonDescriptor.from_tensor(t, b, layout) for t, b in boxes],
            M,
            N,
            K,
            r,
            max_steps=200_000,
            **options,
        )
    finally:
        k.module = whole
    return y, ref, stats


@pytest.mark.parametrize(
    ("dtype", "transposed", "schedules"),
    [
        (torch.bfloat16, False, SCHEDULES[:4]),
        *[
            slow(dtype, transposed, SCHEDULES)
            for dtype in (torch.bfloat16, torch.float16)
            for transposed in (False, True)
        ],
    ],
)
def test_warp_specialized_gemm(dtype, transposed, schedules):
    for options in schedules:
        y, ref, stats = gluon_gemm(dtype, transposed, 200, 264, 200, 40, **CHECKS, **options)
        assert close(y, ref, dtype)
    assert stats.global_write_bytes == 2 * 200 * 264


@pytest.mark.parametrize("shape", [(300, 72, 136, 8, 1), slow((60, 40, 320, 136, 5))], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        dict(stages=2),
        slow(dict(BM=128, BN=256)),
        slow(dict(BM=256)),
        slow(dict(BM=64, BN=64, warps=4, stages=4)),
    ],
    ids=str,
)
def test_warp_specialized_shapes(shape, config):
    *shape, grid = shape
    for seed in (None, 3):
        y, ref, _ = gluon_gemm(
            torch.bfloat16, False, *shape, grid=grid, schedule_seed=seed, **config, **CHECKS
        )
        assert close(y, ref, torch.bfloat16)


GLUON_FAULTS = {
    "loads do not wait for a free stage": replace(
        r"(?s)(BB0_12:.*?)mbarrier\.try_wait\.parity[^;]*;", r"\1setp.eq.u32 complete, 0, 0;", 1
    ),
    "stage freed before its wgmma is complete": remove(r"wgmma\.wait_group\.sync\.aligned \s*1"),
    "stage not freed": lambda t: remove(r"mbarrier\.arrive\.shared", 1)(t),
    "only one warpgroup's end is waited for": lambda t: remove(r"bar\.sync\s+0, 256", 4)(t),
    "registers not given up": replace(r"setmaxnreg\.dec[^;]*;", ""),
    "no proxy fence before the store": lambda t: remove(
        r"fence\.proxy\.async", t.count("fence.proxy.async") - 1
    )(t),
    "store's buffer reused at once": remove(r"cp\.async\.bulk\.wait_group\.read"),
    "workers are told nothing": remove(r"st\.shared\.b32 \s*\[global_smem"),
}


@pytest.mark.parametrize("fault", GLUON_FAULTS)
def test_warp_specialized_fault(fault):
    run = partial(gluon_gemm, torch.bfloat16, False, 200, 264, 200, 40, grid=1)
    assert is_found(partial(run, text=GLUON_FAULTS[fault]))


def test_accumulator_without_steps():
    y, _, _ = gluon_gemm(torch.bfloat16, False, 200, 72, 64, 64, **CHECKS)
    assert np.isfinite(y.float().numpy()).all()
