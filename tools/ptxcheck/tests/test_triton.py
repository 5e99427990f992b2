"""Triton kernels compiled ahead of time for sm_86 and run in the interpreter."""

import pytest

import ptxcheck

from .sources import slow
from .triton_compiler import tl, torch, triton


@triton.jit
def add(x, y, o, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    m = i < n
    tl.store(o + i, tl.load(x + i, mask=m) + tl.load(y + i, mask=m), mask=m)


@triton.jit
def low_rank(x, a, rm, h, M, N, sxm, R: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    rr = tl.arange(0, R)
    acc = tl.zeros((BM, R), tl.float32)
    for k in range(0, N, BK):
        ks = k + tl.arange(0, BK)
        xt = tl.load(
            x + rows[:, None] * sxm + ks[None, :],
            mask=(rows[:, None] < M) & (ks[None, :] < N),
            other=0.0,
        )
        at = tl.load(a + rr[:, None] * N + ks[None, :], mask=ks[None, :] < N, other=0.0)
        acc = tl.dot(xt, at.trans(), acc)
    hb = acc.to(h.dtype.element_ty)
    rt = tl.load(rm + rr[:, None] * R + rr[None, :])
    p = tl.dot(hb, rt.trans())
    tl.store(h + rows[:, None] * R + rr[None, :], p.to(h.dtype.element_ty), mask=rows[:, None] < M)


@triton.jit
def gemm_ext(
    x,
    w,
    p,
    b,
    y,
    M,
    N,
    K,
    sx,
    sw,
    sp,
    sb,
    sy,
    R: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    GM: tl.constexpr,
):
    """y = x w' + p b' with grouped tile order."""
    pid = tl.program_id(0)
    nm = tl.cdiv(M, BM)
    nn = tl.cdiv(N, BN)
    width = GM * nn
    g = pid // width
    first = g * GM
    gs = min(nm - first, GM)
    pm = first + (pid % width) % gs
    pn = (pid % width) // gs
    rm = pm * BM + tl.arange(0, BM)
    rn = pn * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    xp = x + rm[:, None] * sx + rk[None, :]
    wp = w + rn[None, :] * sw + rk[:, None]
    for _ in range(0, K, BK):
        acc = tl.dot(
            tl.load(xp, mask=rm[:, None] < M, other=0.0),
            tl.load(wp, mask=rn[None, :] < N, other=0.0),
            acc,
        )
        xp += BK
        wp += BK
    rr = tl.arange(0, BR)
    for k in tl.static_range(0, R, BR):
        acc = tl.dot(
            tl.load(p + rm[:, None] * sp + (k + rr)[None, :], mask=rm[:, None] < M, other=0.0),
            tl.load(b + rn[None, :] * sb + (k + rr)[:, None], mask=rn[None, :] < N, other=0.0),
            acc,
        )
    tl.store(
        y + rm[:, None] * sy + rn[None, :],
        acc.to(y.dtype.element_ty),
        mask=(rm[:, None] < M) & (rn[None, :] < N),
    )


@triton.jit
def softmax(x, y, n, B: tl.constexpr):
    r = tl.program_id(0)
    i = tl.arange(0, B)
    v = tl.load(x + r * n + i, mask=i < n, other=-float("inf")).to(tl.float32)
    v = tl.exp(v - tl.max(v, 0))
    tl.store(y + r * n + i, v / tl.sum(v, 0), mask=i < n)


@triton.jit
def pack_signs(x, o, n, B: tl.constexpr):
    """One bit per element, 32 per word, with a count of ones per program."""
    pid = tl.program_id(0)
    i = pid * B + tl.arange(0, B)
    v = tl.load(x + i, mask=i < n, other=-1.0)
    bit = (v >= 0).to(tl.uint32)
    w = tl.reshape(bit, (B // 32, 32))
    word = tl.sum(w << tl.arange(0, 32)[None, :].to(tl.uint32), 1)
    j = pid * (B // 32) + tl.arange(0, B // 32)
    tl.store(o + j, word, mask=j * 32 < n)


@triton.jit
def row_sum_atomic(x, o, cnt, M, N, BM: tl.constexpr, BN: tl.constexpr):
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    v = tl.load(
        x + rm[:, None] * N + rn[None, :], mask=(rm[:, None] < M) & (rn[None, :] < N), other=0.0
    )
    tl.atomic_add(o + rm, tl.sum(v, 1), mask=rm < M)
    tl.atomic_add(cnt, 1)


@triton.jit
def layer_norm(x, w, y, n, eps, B: tl.constexpr):
    r = tl.program_id(0)
    i = tl.arange(0, B)
    m = i < n
    v = tl.load(x + r * n + i, mask=m, other=0.0).to(tl.float32)
    mean = tl.sum(v, 0) / n
    d = tl.where(m, v - mean, 0.0)
    var = tl.sum(d * d, 0) / n
    o = d * tl.rsqrt(var + eps) * tl.load(w + i, mask=m).to(tl.float32)
    tl.store(y + r * n + i, o.to(y.dtype.element_ty), mask=m)


@triton.jit
def int8_dot(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    rm, rn, rk = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(a + rm[:, None] * K + rk[None, :])
    y = tl.load(b + rk[:, None] * N + rn[None, :])
    tl.store(c + rm[:, None] * N + rn[None, :], tl.dot(x, y))


@triton.jit
def cumulative(x, o, idx, N: tl.constexpr):
    i = tl.arange(0, N)
    v = tl.load(x + i)
    tl.store(o + i, tl.cumsum(v, 0))
    tl.store(idx, tl.argmax(v, 0))


@pytest.mark.parametrize("num_warps", [1, 4])
def test_add(num_warps):
    n = 1003
    k = ptxcheck.triton_compile(
        add, {"x": "*fp32", "y": "*fp32", "o": "*fp32", "n": "i32"}, {"B": 256}, num_warps=num_warps
    )
    x, y, o = torch.randn(n), torch.randn(n), torch.zeros(n)
    k(4, x, y, o, n, check_uninit=True)
    assert torch.equal(o, x + y)


def test_add_vectorized_bf16():
    n = 1024
    k = ptxcheck.triton_compile(
        add,
        {"x": "*bf16", "y": "*bf16", "o": "*bf16", "n": "i32"},
        {"B": 512},
        attrs=["x", "y", "o", "n"],
    )
    x, y = torch.randn(n).bfloat16(), torch.randn(n).bfloat16()
    o = torch.zeros(n, dtype=torch.bfloat16)
    k(2, x, y, o, n)
    assert torch.equal(o, x + y)


def test_out_of_bounds():
    k = ptxcheck.triton_compile(
        add, {"x": "*fp32", "y": "*fp32", "o": "*fp32", "n": "i32"}, {"B": 256}
    )
    x = torch.randn(1000)
    with pytest.raises(ptxcheck.MemoryFault, match=r"\.py:\d+"):
        k(4, x, x, torch.zeros(1000), 1001)


@pytest.mark.parametrize("num_stages", [slow(1), slow(2), 3])
def test_low_rank(num_stages):
    M, N, R = 200, 160, 64
    k = ptxcheck.triton_compile(
        low_rank,
        dict(x="*bf16", a="*bf16", rm="*bf16", h="*bf16", M="i32", N="i32", sxm="i32"),
        {"R": R, "BM": 128, "BK": 64},
        num_stages=num_stages,
        attrs=["x", "a", "rm", "h", "N", "sxm"],
    )
    x, a = torch.randn(M, N).bfloat16(), torch.randn(R, N).bfloat16()
    rm = (torch.randn(R, R) / 8).bfloat16()
    h = torch.zeros(M, R, dtype=torch.bfloat16)
    k(2, x, a, rm, h, M, N, N, check_races=True)
    want = (x.double() @ a.double().T).bfloat16().double() @ rm.double().T
    assert (h.double() - want).abs().max() < 0.01 * want.abs().max()


SIG = {
    **{k: "*bf16" for k in "xwpby"},
    **{k: "i32" for k in ("M", "N", "K", "sx", "sw", "sp", "sb", "sy")},
}


@pytest.mark.parametrize(
    "tile", [slow((128, 128, 32, 4, 3)), slow((128, 256, 32, 8, 3)), (64, 64, 64, 4, 2)]
)
def test_gemm_ext(tile):
    BM, BN, BK, nw, ns = tile
    M, N, K, R = 200, 256, 256, 96
    k = ptxcheck.triton_compile(
        gemm_ext,
        SIG,
        dict(R=R, BM=BM, BN=BN, BK=BK, BR=32, GM=8),
        attrs=[*"xwpby", "K", "sx", "sw", "sp", "sb", "sy"],
        num_warps=nw,
        num_stages=ns,
    )
    x, w, p, b = (torch.randn(s).bfloat16() for s in ((M, K), (N, K), (M, R), (N, R)))
    y = torch.zeros(M, N, dtype=torch.bfloat16)
    grid = -(-M // BM) * -(-N // BN)
    k(grid, x, w, p, b, y, M, N, K, K, K, R, R, N)
    want = x.double() @ w.double().T + p.double() @ b.double().T
    assert (y.double() - want).abs().max() < 0.01 * want.abs().max()


def test_softmax():
    k = ptxcheck.triton_compile(softmax, {"x": "*fp16", "y": "*fp32", "n": "i32"}, {"B": 512})
    x, y = torch.randn(5, 300).half(), torch.zeros(5, 300)
    k(5, x, y, 300)
    assert torch.allclose(y, x.float().softmax(1), atol=1e-6)


def test_pack_signs():
    n = 1000
    k = ptxcheck.triton_compile(pack_signs, {"x": "*fp32", "o": "*i32", "n": "i32"}, {"B": 256})
    x, o = torch.randn(n), torch.zeros(32, dtype=torch.int32)
    k(4, x, o, n)
    bits = (o[:, None] >> torch.arange(32)) & 1
    assert torch.equal(bits.reshape(-1)[:n].bool(), x >= 0)
    assert not bits.reshape(-1)[n:].any()


def test_atomic_add():
    M, N = 100, 300
    k = ptxcheck.triton_compile(
        row_sum_atomic,
        dict(x="*fp32", o="*fp32", cnt="*i32", M="i32", N="i32"),
        {"BM": 32, "BN": 64},
    )
    x, o, c = torch.randn(M, N), torch.zeros(M), torch.zeros(1, dtype=torch.int32)
    k((4, 5), x, o, c, M, N)
    assert torch.allclose(o.double(), x.double().sum(1), atol=1e-4)
    assert c.item() == 20


def test_layer_norm():
    k = ptxcheck.triton_compile(
        layer_norm, dict(x="*bf16", w="*bf16", y="*bf16", n="i32", eps="fp32"), {"B": 256}
    )
    x, w = torch.randn(6, 200).bfloat16(), torch.randn(200).bfloat16()
    y = torch.zeros(6, 200, dtype=torch.bfloat16)
    k(6, x, w, y, 200, 1e-5)
    want = torch.nn.functional.layer_norm(x.double(), (200,), w.double(), eps=1e-5)
    assert (y.double() - want).abs().max() < 0.01 * want.abs().max()


def test_int8_dot():
    k = ptxcheck.triton_compile(
        int8_dot, dict(a="*i8", b="*i8", c="*i32"), {"M": 32, "N": 32, "K": 64}
    )
    a = torch.randint(-128, 128, (32, 64), dtype=torch.int8)
    b = torch.randint(-128, 128, (64, 32), dtype=torch.int8)
    c = torch.zeros(32, 32, dtype=torch.int32)
    k(1, a, b, c)
    assert torch.equal(c.long(), a.long() @ b.long())


def test_scan_argmax():
    k = ptxcheck.triton_compile(cumulative, dict(x="*fp32", o="*fp32", idx="*i32"), {"N": 512})
    x, o, i = torch.randn(512), torch.zeros(512), torch.zeros(1, dtype=torch.int32)
    k(1, x, o, i)
    assert torch.allclose(o.double(), x.double().cumsum(0), atol=1e-4)
    assert i.item() == x.argmax().item()
