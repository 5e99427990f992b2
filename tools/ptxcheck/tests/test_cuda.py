"""CUDA C++ kernels compiled by nvcc and compared with numpy references."""

import ctypes

import numpy as np
import pytest

SOURCE = "kernels.cu"
rng = np.random.default_rng(0)


@pytest.fixture
def mod(cuda):
    return cuda(SOURCE)


def bf16(x):
    """float32 array -> uint16 bf16 bits."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(b):
    return (b.astype(np.uint32) << 16).view(np.float32)


def test_kernel_list(mod):
    assert [p[1] for p in mod.kernels["saxpy"]] == ["f32", "u64", "u64", "u32"]


@pytest.mark.parametrize("max_lanes", [256, 4096])
def test_saxpy_tail(mod, max_lanes):
    n = 1001
    x, y = (rng.standard_normal(n).astype(np.float32) for _ in range(2))
    want = (np.float64(2.5) * x + y).astype(np.float32)
    s = mod.launch("saxpy", 8, 128, [2.5, x, y, n], max_lanes=max_lanes)
    assert np.array_equal(y, want)
    assert s.global_read_bytes == 8 * n
    assert s.global_write_bytes == 4 * n


def test_block_sum(mod):
    n = 5000
    x = rng.standard_normal(n).astype(np.float32)
    out = np.zeros(7, np.float32)
    mod.launch("block_sum", 7, 256, [x, out, n], check_races=True, check_uninit=True)
    want = np.zeros(7)
    for b in range(7):
        idx = np.concatenate([np.arange(b * 256, (b + 1) * 256) + k * 7 * 256 for k in range(3)])
        want[b] = x[idx[idx < n]].astype(np.float64).sum()
    assert np.allclose(out, want, atol=1e-4)


def test_pack_bits(mod):
    n = 1000
    x = rng.standard_normal(n).astype(np.float32)
    bits = np.zeros((n + 31) // 32, np.uint32)
    mod.launch("pack_bits", 4, 256, [x, bits, n])
    got = np.unpackbits(bits.view(np.uint8), bitorder="little")[:n]
    assert np.array_equal(got, x >= 0)


def test_atomics(mod):
    n = 3000
    x = rng.integers(0, 10, n).astype(np.int32)
    w = rng.standard_normal(n).astype(np.float32)
    s, c = np.zeros(10, np.float32), np.zeros(10, np.int32)
    mod.launch("histogram", 12, 256, [x, s, c, w, n])
    assert np.array_equal(c, np.bincount(x, minlength=10))
    assert np.allclose(s, np.bincount(x, w.astype(np.float64), minlength=10), atol=1e-4)


@pytest.mark.parametrize("max_lanes", [256, 512, 8192])
def test_last_block(mod, max_lanes):
    n = 5000
    x = rng.standard_normal(n).astype(np.float32)
    g = (n + 255) // 256
    part, out = np.zeros(g, np.float32), np.zeros(1, np.float32)
    for _ in range(2):  # the counter wraps: launch twice
        out[:] = 0
        mod.launch(
            "last_block_sum", g, 256, [x, part, out, n], max_lanes=max_lanes, check_races=True
        )
        assert abs(out[0] - x.astype(np.float64).sum()) < 1e-3
    assert mod.symbol("arrived", np.uint32)[0] == 0


@pytest.mark.parametrize("max_lanes", [32, 64, 4096])
def test_blocks_wait_for_later_blocks(mod, max_lanes):
    flag, order = np.zeros(1, np.int32), np.zeros(6, np.int32)
    mod.launch("chain", 6, 32, [flag, order], max_lanes=max_lanes)
    assert np.array_equal(order, np.arange(6)[::-1])
    assert flag[0] == 6


def test_spin_lock(mod):
    lock, total = np.zeros(1, np.int32), np.zeros(1, np.int32)
    mod.launch("spin_lock", 2, 48, [lock, total])
    assert total[0] == 96


def test_divergent_loops(mod):
    n = 777
    x = rng.integers(1, 3000, n).astype(np.int32)
    got = np.zeros(n, np.int32)
    mod.launch("collatz", 4, 224, [x, got, n])

    def ref(v):
        s = 0
        while v != 1:
            v = 3 * v + 1 if v & 1 else v >> 1
            s += 1
        return s

    assert np.array_equal(got, [ref(int(v)) for v in x])


def test_switch(mod):
    x = rng.integers(0, 8, 32).astype(np.int32)
    y = np.zeros(32, np.int32)
    mod.launch("switches", 1, 32, [x, y])
    i = np.arange(32)
    f = [i * 3, i - 7, i ^ 21, i << 3, i * i, -i]
    r = np.array([f[v][k] if v < 6 else 1000 + v for k, v in enumerate(x)])
    assert np.array_equal(y, r[(i + 1) & 31] + r)


def test_half_math(mod):
    n = 300
    a, b = (bf16(rng.standard_normal(2 * n) * 4) for _ in range(2))
    c, d = (rng.standard_normal(2 * n).astype(np.float16) for _ in range(2))
    o, p = np.zeros(4 * n, np.uint16), np.zeros(4 * n, np.float16)
    mod.launch("half_math", 3, 128, [a, b, c, d, o, p, n])
    fa, fb = (from_bf16(v).astype(np.float64) for v in (a, b))
    sm = from_bf16(bf16(fa + fb)).astype(np.float64)
    # nvcc may not contract these intrinsics: each is one rounding
    assert np.array_equal(o[: 2 * n], bf16((fa * fb + sm).astype(np.float32)))
    df = from_bf16(bf16(fa - fb)).astype(np.float64)
    assert np.array_equal(o[2 * n :], bf16(np.maximum(fa, fb) * df))
    fc, fd = c.astype(np.float64), d.astype(np.float64)
    sh = (fc + fd).astype(np.float16).astype(np.float64)
    assert np.array_equal(p[: 2 * n], (fc * fd + sh).astype(np.float16))
    assert np.allclose(p[2 * n :].astype(float), np.exp(np.minimum(fc, fd)), rtol=2e-3)


class Args(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_uint64),
        ("y", ctypes.c_uint64),
        ("n", ctypes.c_int),
        ("scale", ctypes.c_float),
    ]


def test_struct_call_local_const(mod):
    n = 200
    x, y = rng.standard_normal(n).astype(np.float32), np.zeros(n, np.float32)
    mod.launch("structs", 2, 128, [Args(mod.address_of(x), mod.address_of(y), n, 0.5)])
    coef = [1, 2, 4, 8]
    want = np.zeros(n)
    for i in range(n):
        r = 0.0
        for k in range(i % 5):
            r = r * float(x[i]) + coef[k & 3]
        want[i] = r + 0.5 * ((i * 7) & 7)
    assert np.allclose(y, want, rtol=1e-5, atol=1e-5)


def test_int_ops(mod):
    n = 256
    a = rng.integers(-(2**31), 2**31, n).astype(np.int32)
    b = rng.integers(-(2**31), 2**31, n).astype(np.int32)
    b[::3] = rng.integers(1, 100, len(b[::3]))
    a[5], b[5] = -(2**31), -1
    o = np.zeros(17 * n, np.int32)
    mod.launch("int_ops", 2, 128, [a, b, o, n])
    got = o.reshape(17, n)
    M = 0xFFFFFFFF

    def s32(v):
        v &= M
        return v - (1 << 32) if v >> 31 else v

    def tdiv(x, y):
        q = abs(x) // abs(y)
        return -q if (x < 0) != (y < 0) else q

    for i in range(n):
        x, y = int(a[i]), int(b[i])
        ux, uy = x & M, y & M
        ffs = (ux & -ux).bit_length()
        v = (uy << 32) | ux
        sel = 0x5140 + (i & 3)
        perm = 0
        for k in range(4):
            perm |= ((v >> (8 * ((sel >> (4 * k)) & 7))) & 0xFF) << (8 * k)
        sh = i & 31
        dp = sum(
            int(p) * int(q)
            for p, q in zip(a[i : i + 1].view(np.int8), b[i : i + 1].view(np.int8), strict=True)
        )
        want = [
            s32(tdiv(x, y)),
            s32(x - tdiv(x, y) * y),
            s32(ux // uy),
            s32(bin(ux).count("1") + (32 - uy.bit_length()) * 64 + ffs * 4096),
            s32(int(f"{ux:032b}"[::-1], 2)),
            s32(perm),
            s32((((uy << 32) | ux) << sh) >> 32),
            s32((x * y) >> 32),
            s32((ux * uy) >> 32),
            s32((ux & uy) | (~ux & i)),
            s32((x * y) >> 13),
            s32(min(x, y) - max(ux, uy)),
            x >> sh,
            (ux >> 5) & 0x7FF,
            s32(dp + i),
            s32(((x << 20) * (y << 21)) >> 64),
            s32((ux * 0x123456789 & 0xFFFFFFFFFFFFFFFF) // (uy | 1 << 33)),
        ]
        assert list(got[:, i]) == want, (i, x, y)


def test_warp_ops(mod):
    x = rng.integers(0, 8, 64).astype(np.int32)
    o = np.zeros(64 * 7, np.uint32)
    mod.launch("warp_ops", 1, 64, [x, o])
    o = o.reshape(7, 64)
    for w in range(2):
        v = x[w * 32 : w * 32 + 32]
        g = o[:, w * 32 : w * 32 + 32]

        def mask(sel):
            return sum(1 << k for k in range(32) if sel[k])

        odd = mask(v & 1)
        for k in range(32):
            assert g[0, k] == (odd if v[k] & 1 else (~mask((v & 1) == 0)) & 0xFFFFFFFF)
            assert g[1, k] == mask(v == v[k])
            assert g[2, k] == v.sum()
            assert g[3, k] == int((v == 3).any()) + 2
            assert g[4, k] == (v[k - 3] if k % 8 >= 3 else v[k])
            assert g[5, k] == (x & 1).sum()
            half = 0xFFFF0000 if k & 16 else 0xFFFF
            assert g[6, k] == mask(v > 3) & half


def test_math(mod):
    import math

    n = 500
    x = (rng.standard_normal(n) * 3).astype(np.float32)
    o = np.zeros(11 * n, np.float32)
    mod.launch("math32", 4, 128, [x, o, n])
    o = o.reshape(11, n)
    d = x.astype(np.float64)
    f = x * np.float32(100)
    want = [
        np.exp(d),
        np.log(np.abs(d)),
        np.sin(f.astype(np.float64)),
        np.tanh(d),
        1 / np.sqrt(np.abs(d)),
        1 / d,
        np.sqrt(np.abs(d)),
        np.array([math.erf(v) for v in d]),
        np.abs(d) ** float(np.float32(1.7)),
        np.rint(x * np.float32(7)) + np.floor(d) * 16,
        d * 3 + np.exp(d),
    ]
    for k in range(11):
        assert np.allclose(o[k], want[k], rtol=2e-6, atol=2e-7), k


@pytest.mark.parametrize("mode", ["strict", "late", "early"])
@pytest.mark.parametrize("shape", [(64, 64, 64), (100, 136, 200)])
def test_gemm_bf16(mod, shape, mode):
    M, N, K = shape
    a, b = bf16(rng.standard_normal((M, K))), bf16(rng.standard_normal((K, N)))
    c = np.zeros((M, N), np.uint16)
    s = mod.launch(
        "gemm_bf16",
        ((N + 63) // 64, (M + 63) // 64),
        128,
        [a, b, c, M, N, K],
        cp_async=mode,
        check_races=mode == "strict",
        check_uninit=mode == "strict",
        stats="full",
    )
    want = from_bf16(a).astype(np.float64) @ from_bf16(b).astype(np.float64)
    assert np.abs(from_bf16(c) - want).max() < 0.01 * np.abs(want).max()
    assert np.array_equal(c, bf16(want)) or (c != bf16(want)).mean() < 0.01
    assert s.mma_flops() > 0
    assert s.shared_requests > 0


def test_gemm_torch_tensors(mod):
    torch = pytest.importorskip("torch")
    a, b = torch.randn(64, 96).bfloat16(), torch.randn(96, 64).bfloat16()
    c = torch.zeros(64, 64, dtype=torch.bfloat16)
    mod.launch("gemm_bf16", (1, 1), 128, [a, b, c, 64, 64, 96])
    want = (a.double() @ b.double()).bfloat16()
    assert (c.double() - want.double()).abs().max() <= 0.01 * want.double().abs().max()


def test_mma_s8(mod):
    a, b = (rng.integers(-128, 128, s).astype(np.int8) for s in ((16, 32), (8, 32)))
    d = np.zeros((16, 8), np.int32)
    mod.launch("mma_s8", 1, 32, [a, b, d])
    start = np.zeros((16, 8), np.int64)
    start[:8, ::2], start[:8, 1::2], start[8:, ::2], start[8:, 1::2] = 1, 2, 3, 4
    assert np.array_equal(d, a.astype(np.int64) @ b.astype(np.int64).T + start)


def test_mma_b1(mod):
    a, b = (rng.integers(0, 2**32, s, dtype=np.uint32) for s in ((16, 8), (8, 8)))
    d = np.zeros((16, 8), np.int32)
    mod.launch("mma_b1", 1, 32, [a, b, d])
    want = np.bitwise_count(a[:, None] ^ b[None]).sum(-1)
    assert np.array_equal(d, want)


def test_mma_tf32(mod):
    a, b = (rng.standard_normal(s).astype(np.float32) for s in ((16, 8), (8, 8)))
    d = np.zeros((16, 8), np.float32)
    mod.launch("mma_tf32", 1, 32, [a, b, d])
    want = a.astype(np.float64) @ b.astype(np.float64).T
    assert np.abs(d - want).max() < 5e-3
    assert np.abs(d - want).max() > 1e-7


@pytest.mark.parametrize("seed", [None, 5])
def test_block_votes(mod, seed):
    x = rng.integers(0, 8, (20, 96)).astype(np.int32)
    x[3] = 1
    x[4] = 7
    o = np.zeros_like(x)
    mod.launch("votes", 20, 96, [x, o], max_lanes=1000, schedule_seed=seed)
    want = (x > 0).all(1) + 2 * (x > 6).any(1) + 4 * (x > 3).sum(1)
    assert np.array_equal(o, np.repeat(want[:, None], 96, 1))
