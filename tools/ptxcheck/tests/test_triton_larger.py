"""Larger Triton kernels: attention, split-K with a lock, scans, sorts, asserts."""

import pytest

import ptxcheck

from .sources import slow
from .triton_compiler import tl, torch, triton


@triton.jit
def attention(
    q, k, v, o, N, scale, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr
):
    """One head: online softmax over tiles of keys."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.arange(0, D)
    qt = tl.load(q + m[:, None] * D + d[None, :], mask=m[:, None] < N, other=0.0)
    mx = tl.full((BM,), -float("inf"), tl.float32)
    den = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, D), tl.float32)
    hi = tl.minimum((tl.program_id(0) + 1) * BM, N) if CAUSAL else N
    for s in range(0, hi, BN):
        n = s + tl.arange(0, BN)
        kt = tl.load(k + n[:, None] * D + d[None, :], mask=n[:, None] < N, other=0.0)
        vt = tl.load(v + n[:, None] * D + d[None, :], mask=n[:, None] < N, other=0.0)
        w = tl.dot(qt, kt.trans()) * scale
        keep = n[None, :] < N
        if CAUSAL:
            keep = keep & (n[None, :] <= m[:, None])
        w = tl.where(keep, w, -float("inf"))
        new = tl.maximum(mx, tl.max(w, 1))
        p = tl.exp2((w - new[:, None]) * 1.44269504)
        r = tl.exp2((mx - new) * 1.44269504)
        den = den * r + tl.sum(p, 1)
        acc = acc * r[:, None]
        acc = tl.dot(p.to(vt.dtype), vt, acc)
        mx = new
    acc = acc / den[:, None]
    tl.store(o + m[:, None] * D + d[None, :], acc.to(o.dtype.element_ty), mask=m[:, None] < N)


@triton.jit
def split_k(
    a,
    b,
    c,
    lock,
    M,
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Programs of one tile add their parts under a spin lock, in float32."""
    pm, pn, ps = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rm, rn, rk = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN), tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(ps * BK, K, SPLIT * BK):
        x = tl.load(a + rm[:, None] * K + (k + rk)[None, :])
        y = tl.load(b + (k + rk)[:, None] * N + rn[None, :])
        acc = tl.dot(x, y, acc)
    tile = lock + pm * tl.num_programs(1) + pn
    while tl.atomic_cas(tile, 0, 1) == 1:
        pass
    p = c + rm[:, None] * N + rn[None, :]
    tl.store(p, tl.load(p) + acc)
    tl.debug_barrier()
    tl.atomic_xchg(tile, 0)


@triton.jit
def persistent(x, o, n, B: tl.constexpr):
    for t in range(tl.program_id(0), tl.cdiv(n, B), tl.num_programs(0)):
        i = t * B + tl.arange(0, B)
        v = tl.load(x + i, mask=i < n)
        tl.store(o + i, tl.where(v > 0, tl.sqrt(v), tl.sin(v)), mask=i < n)


@triton.jit
def dot32(a, b, c, N: tl.constexpr, PREC: tl.constexpr):
    i, j = tl.arange(0, N), tl.arange(0, N)
    x = tl.load(a + i[:, None] * N + j[None, :])
    y = tl.load(b + i[:, None] * N + j[None, :])
    tl.store(c + i[:, None] * N + j[None, :], tl.dot(x, y, input_precision=PREC))


@triton.jit
def sort_rows(x, o, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(o + i, tl.sort(tl.load(x + i)))


@triton.jit
def random_bits(o, seed, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(o + i, tl.rand(seed, i))


@triton.jit
def checked(x, n, B: tl.constexpr):
    i = tl.arange(0, B)
    v = tl.load(x + i, mask=i < n, other=1)
    tl.device_assert(v > 0, "positive")
    tl.store(x + i, v + 1, mask=i < n)


@triton.jit
def quantise(x, q, s, N: tl.constexpr, G: tl.constexpr):
    """Per-group int4 quantisation, two values per byte."""
    r = tl.program_id(0)
    i = tl.arange(0, N)
    v = tl.load(x + r * N + i).to(tl.float32)
    g = tl.reshape(v, (N // G, G))
    sc = tl.maximum(tl.max(tl.abs(g), 1) / 7.0, 1e-8)
    z = tl.extra.cuda.libdevice.rint(g / sc[:, None])
    c = (z.to(tl.int32) & 15).reshape(N // 2, 2)
    lo, hi = tl.split(c)
    tl.store(q + r * (N // 2) + tl.arange(0, N // 2), (lo | (hi << 4)).to(tl.uint8))
    tl.store(s + r * (N // G) + tl.arange(0, N // G), sc)


@pytest.mark.parametrize(("causal", "stages"), [slow(False, 2), (True, 3)])
def test_attention(causal, stages):
    N, D = 150, 64
    q, k, v = (torch.randn(N, D).half() for _ in range(3))
    o = torch.zeros(N, D, dtype=torch.half)
    kern = ptxcheck.triton_compile(
        attention,
        dict(q="*fp16", k="*fp16", v="*fp16", o="*fp16", N="i32", scale="fp32"),
        dict(D=D, BM=64, BN=32, CAUSAL=causal),
        num_stages=stages,
        attrs=["q", "k", "v", "o"],
    )
    kern(3, q, k, v, o, N, D**-0.5, check_races=True)
    s = q.double() @ k.double().T * D**-0.5
    if causal:
        s = s.masked_fill(torch.ones(N, N).triu(1).bool(), -torch.inf)
    want = s.softmax(1) @ v.double()
    assert (o.double() - want).abs().max() < 5e-3


@pytest.mark.parametrize("max_lanes", [128, slow(4096)])
def test_split_k_lock(max_lanes):
    M, N, K = 64, 128, 256
    k = ptxcheck.triton_compile(
        split_k,
        dict(a="*bf16", b="*bf16", c="*fp32", lock="*i32", M="i32", N="i32", K="i32"),
        dict(BM=32, BN=64, BK=32, SPLIT=4),
        attrs=["a", "b", "c", "N", "K"],
    )
    a, b = torch.randn(M, K).bfloat16(), torch.randn(K, N).bfloat16()
    c, lock = torch.zeros(M, N), torch.zeros(8, dtype=torch.int32)
    k((2, 2, 4), a, b, c, lock, M, N, K, max_lanes=max_lanes)
    assert torch.allclose(c.double(), a.double() @ b.double(), atol=1e-3)
    assert not lock.any()


def test_persistent():
    n = 5000
    k = ptxcheck.triton_compile(persistent, dict(x="*fp32", o="*fp32", n="i32"), {"B": 256})
    x, o = torch.randn(n), torch.zeros(n)
    k(3, x, o, n)
    want = torch.where(x > 0, x.double().abs().sqrt(), x.double().sin())
    assert torch.allclose(o.double(), want, atol=1e-6)


@pytest.mark.parametrize(
    ("prec", "tol"), [slow("tf32", 2e-3), ("tf32x3", 1e-5), slow("ieee", 1e-5)]
)
def test_dot_fp32(prec, tol):
    k = ptxcheck.triton_compile(
        dot32, dict(a="*fp32", b="*fp32", c="*fp32"), {"N": 64, "PREC": prec}
    )
    a, b, c = torch.randn(64, 64), torch.randn(64, 64), torch.zeros(64, 64)
    k(1, a, b, c)
    want = a.double() @ b.double()
    err = ((c.double() - want).abs().max() / want.abs().max()).item()
    assert err < tol
    assert prec != "tf32" or err > 1e-6


def test_sort():
    k = ptxcheck.triton_compile(sort_rows, dict(x="*fp32", o="*fp32"), {"N": 128})
    x, o = torch.randn(3, 128), torch.zeros(3, 128)
    k(3, x, o)
    assert torch.equal(o, x.sort(1).values)


def test_random():
    k = ptxcheck.triton_compile(random_bits, dict(o="*fp32", seed="i32"), {"N": 4096})
    o = torch.zeros(4096)
    k(1, o, 7)
    assert abs(o.mean() - 0.5) < 0.02
    assert o.min() >= 0
    assert o.max() < 1
    assert len(o.unique()) > 4000


def test_device_assert():
    k = ptxcheck.triton_compile(checked, dict(x="*i32", n="i32"), {"B": 128}, debug=True)
    x = torch.ones(100, dtype=torch.int32)
    k(1, x, 100)
    assert (x == 2).all()
    x[60] = -1
    with pytest.raises(ptxcheck.TrapError):
        k(1, x, 100)


def test_quantise():
    N, G = 256, 32
    k = ptxcheck.triton_compile(quantise, dict(x="*bf16", q="*u8", s="*fp32"), dict(N=N, G=G))
    x = torch.randn(4, N).bfloat16()
    q, s = torch.zeros(4, N // 2, dtype=torch.uint8), torch.zeros(4, N // G)
    k(4, x, q, s)
    g = x.float().reshape(4, N // G, G)
    sc = g.abs().amax(2) / 7
    assert torch.allclose(s, sc)
    code = torch.round(g / sc[..., None]).reshape(4, N).int() & 15
    got = torch.stack([q & 15, q >> 4], -1).reshape(4, N).int()
    assert (code != got).float().mean() < 0.01
