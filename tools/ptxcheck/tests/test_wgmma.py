"""wgmma.mma_async in PTX: sizes, types, operands in registers, signs, misuse."""

import numpy as np
import pytest

import ptxcheck
from ptxcheck.numerics import FP8, bf16_to_f32, f32_to_bf16

CHECKS = dict(check_races=True, check_uninit=True)


def kernel(
    n,
    types,
    k,
    a_regs=0,
    signs="1, 1",
    tnsp=", 0, 0",
    accumulate="p",
    before="",
    wait="0",
    fence="wgmma.fence.sync.aligned;",
    after="",
    packed=False,
):
    """One product: a and b are copied to shared memory as they are (K-major, no swizzle)."""
    count = n // 4 if packed else n // 2
    kind = "b32" if packed else "f32"
    regs = ", ".join(f"%d{i}" for i in range(count))
    loads = "\n".join(f"ld.global.{kind} %d{i}, [%rd7+{4 * i}];" for i in range(count))
    stores = "\n".join(f"st.global.{kind} [%rd7+{4 * i}], %d{i};" for i in range(count))
    a = "{" + ", ".join(f"%a{i}" for i in range(a_regs)) + "}" if a_regs else "%rd10"
    a_loads = "\n".join(f"ld.global.b32 %a{i}, [%rd9+{4 * i}];" for i in range(a_regs))
    return f"""
.version 8.5
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 pa, .param .u64 pb, .param .u64 py, .param .u64 pf, .param .u32 na,
                  .param .u32 nb, .param .u64 da, .param .u64 db)
{{
    .reg .pred p, q;
    .reg .b32 %r<20>;
    .reg .b64 %rd<20>;
    .reg .b32 %a<8>;
    .reg .{kind} %d<{count}>;
    .shared .align 1024 .b8 sa[8192];
    .shared .align 1024 .b8 sb[8192];
    ld.param.u64 %rd1, [pa];
    ld.param.u64 %rd2, [pb];
    ld.param.u64 %rd3, [py];
    ld.param.u64 %rd4, [pf];
    ld.param.u32 %r1, [na];
    ld.param.u32 %r2, [nb];
    ld.param.u64 %rd10, [da];
    ld.param.u64 %rd11, [db];
    mov.u32 %r3, %tid.x;
    mov.u32 %r4, sa;
    mov.u32 %r5, sb;
    shl.b32 %r6, %r3, 2;
LA: setp.ge.u32 p, %r6, %r1;
    @p bra LAE;
    cvt.u64.u32 %rd5, %r6;
    add.u64 %rd6, %rd1, %rd5;
    ld.global.b32 %r7, [%rd6];
    add.u32 %r8, %r4, %r6;
    st.shared.b32 [%r8], %r7;
    add.u32 %r6, %r6, 512;
    bra LA;
LAE: shl.b32 %r6, %r3, 2;
LB: setp.ge.u32 p, %r6, %r2;
    @p bra LBE;
    cvt.u64.u32 %rd5, %r6;
    add.u64 %rd6, %rd2, %rd5;
    ld.global.b32 %r7, [%rd6];
    add.u32 %r8, %r5, %r6;
    st.shared.b32 [%r8], %r7;
    add.u32 %r6, %r6, 512;
    bra LB;
LBE: fence.proxy.async;
    bar.sync 0;
    mul.wide.u32 %rd5, %r3, {4 * count};
    add.u64 %rd7, %rd3, %rd5;
    mul.wide.u32 %rd5, %r3, {4 * max(a_regs, 1)};
    add.u64 %rd9, %rd4, %rd5;
    shr.u32 %r9, %r4, 4;
    cvt.u64.u32 %rd12, %r9;
    or.b64 %rd10, %rd10, %rd12;
    shr.u32 %r9, %r5, 4;
    cvt.u64.u32 %rd12, %r9;
    or.b64 %rd11, %rd11, %rd12;
    setp.eq.u32 p, %r3, %r3;
    {loads}
    {a_loads}
    {before}
    {fence}
    wgmma.mma_async.sync.aligned.m64n{n}k{k}.{types}
        {{{regs}}}, {a}, %rd11, {accumulate}, {signs}{tnsp};
    wgmma.commit_group.sync.aligned;
    {after}
    wgmma.wait_group.sync.aligned {wait};
    {stores}
    ret;
}}
"""


def core(bits):
    """(rows, K bytes) -> K-major bytes without swizzle: cores of 8 rows of 16 bytes."""
    rows, width = bits.shape
    return np.ascontiguousarray(bits.reshape(rows // 8, 8, width // 16, 16).transpose(2, 0, 1, 3))


def fragment(n, packed=False):
    """(thread, register, half) -> (row, column) of the accumulator."""
    t = np.arange(128)[:, None]
    i = np.arange(n // 2)[None]
    row = t // 32 * 16 + t % 32 // 4 + i // 2 % 2 * 8
    col = i // 4 * 8 + t % 4 * 2 + i % 2
    return row, col


TYPES = {"bf16": (16, 2), "f16": (16, 2), "tf32": (8, 4), "e4m3": (32, 1), "e5m2": (32, 1)}


def data(rng, rows, kind):
    k, _size = TYPES[kind]
    v = rng.standard_normal((rows, k)).astype(np.float32)
    if kind == "bf16":
        bits = f32_to_bf16(v)
        return bits.view(np.uint8).reshape(rows, -1), bf16_to_f32(bits).astype(float)
    if kind == "f16":
        half = v.astype(np.float16)
        return half.view(np.uint8).reshape(rows, -1), half.astype(float)
    if kind == "tf32":
        exact = (v.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
        return v.view(np.uint8).reshape(rows, -1), exact.astype(float)
    bits = rng.integers(0, 0x70, (rows, k)).astype(np.uint8)
    return bits, FP8[kind][bits].astype(float)


def run(n, kind, out="f32", a_regs=False, sign=(1, 1), accumulate="p", seed=None, **more):
    rng = np.random.default_rng(n)
    k, size = TYPES[kind]
    a, av = data(rng, 64, kind)
    b, bv = data(rng, n, kind)
    c = rng.standard_normal((64, n)).astype(np.float16).astype(np.float32)
    row, col = fragment(n)
    y = c[row, col]
    if out == "f16":
        y = y.astype(np.float16).view(np.uint32)
    frag = np.zeros(0, np.uint32)
    if a_regs:
        t, i = np.arange(128)[:, None], np.arange(4)[None]
        r = t // 32 * 16 + t % 32 // 4 + i % 2 * 8
        word = t % 4 + i // 2 * 4
        frag = np.ascontiguousarray(a).view(np.uint32)[r, word]
    tn = "" if size != 2 else ", 0" if a_regs else ", 0, 0"
    text = kernel(
        n,
        f"{out}.{kind}.{kind}",
        k,
        4 if a_regs else 0,
        f"{sign[0]}, {sign[1]}",
        tn,
        accumulate,
        packed=out == "f16",
        **more,
    )

    def desc(rows):
        return rows * 16 >> 4 << 16 | 128 >> 4 << 32

    sa, sb = core(a).ravel(), core(b).ravel()
    ptxcheck.load(text).launch(
        "k",
        1,
        128,
        [sa, sb, y, frag, sa.size, sb.size, desc(64), desc(n)],
        schedule_seed=seed,
        **CHECKS,
    )
    got = np.zeros((64, n))
    with np.errstate(invalid="ignore"):
        got[row, col] = y.view(np.float16) if out == "f16" else y
    return got, sign[0] * sign[1] * av @ bv.T + (c if accumulate == "p" else 0)


@pytest.mark.parametrize("n", [8, 16, 24, 72, 128, 200, 256])
@pytest.mark.parametrize("a_regs", [False, True])
def test_sizes(n, a_regs):
    got, ref = run(n, "bf16", a_regs=a_regs)
    assert np.allclose(got, ref, atol=1e-5)


@pytest.mark.parametrize("kind", ["f16", "tf32", "e4m3", "e5m2"])
@pytest.mark.parametrize("a_regs", [False, True])
def test_types(kind, a_regs):
    got, ref = run(64, kind, a_regs=a_regs, seed=1)
    assert np.allclose(got, ref, rtol=1e-6, atol=1e-5)


def test_half_accumulator():
    got, ref = run(32, "f16", "f16")
    assert np.allclose(got, ref, rtol=2**-10, atol=2**-8)


@pytest.mark.parametrize("sign", [(-1, 1), (1, -1), (-1, -1)])
def test_signs_and_scale(sign):
    got, ref = run(16, "bf16", sign=sign)
    assert np.allclose(got, ref, atol=1e-5)
    got, ref = run(16, "bf16", sign=sign, accumulate="0")
    assert np.allclose(got, ref, atol=1e-5)


def test_results_only_after_the_wait():
    got, _ref = run(16, "bf16", after="add.f32 %d3, %d3, 0f3F800000;")
    _row, _col = fragment(16)
    assert np.isnan(got).all(), "a register of an accumulator in flight was touched"
    with pytest.raises(ptxcheck.ExecutionError, match="wgmma in flight"):
        run(16, "bf16", wait="1")


def test_operands_stay_until_the_wait():
    change = "mov.u32 %r15, 0; @!q st.shared.b32 [%r4], %r15;"
    with pytest.raises(ptxcheck.RaceError, match="write after read"):
        run(16, "bf16", after=change)
    text = kernel(16, "f32.bf16.bf16", 16, after=change)
    a = b = np.full(4096, 0x3F, np.uint8)
    y = np.zeros((128, 8), np.float32)
    d = 64 << 16 | 8 << 32
    ptxcheck.load(text).launch("k", 1, 128, [a, b, y, None, 2048, 512, d, 16 << 16 | 8 << 32])
    assert np.isnan(y).all()


def test_fence_is_needed():
    with pytest.raises(ptxcheck.ExecutionError, match=r"no wgmma\.fence"):
        run(16, "bf16", fence="")
    with pytest.raises(ptxcheck.ExecutionError, match="register 3 of the accumulator was written"):
        run(16, "bf16", fence="wgmma.fence.sync.aligned; add.f32 %d3, %d3, 0f3F800000;")
    with pytest.raises(ptxcheck.ExecutionError, match="register 1 of A was written"):
        run(16, "bf16", a_regs=True, fence="wgmma.fence.sync.aligned; add.u32 %a1, %a1, 1;")


def test_whole_warpgroups():
    text = kernel(16, "f32.bf16.bf16", 16, before="setp.lt.u32 q, %r3, 96; @!q bra END;").replace(
        "    ret;", "END: ret;"
    )
    z = np.zeros(4096, np.uint8)
    args = [z, z, np.zeros((128, 8), np.float32), None, 2048, 512, 64 << 16, 16 << 16]
    with pytest.raises(ptxcheck.ExecutionError, match=r"warpgroup|missing"):
        ptxcheck.load(text).launch("k", 1, 128, args)
    with pytest.raises(ptxcheck.ExecutionError, match="128 threads"):
        ptxcheck.load(kernel(16, "f32.bf16.bf16", 16)).launch("k", 1, 96, args)


def test_descriptor_out_of_bounds():
    text = kernel(16, "f32.bf16.bf16", 16)
    z = np.zeros(4096, np.uint8)
    with pytest.raises(ptxcheck.MemoryFault, match="by wgmma"):
        ptxcheck.load(text).launch(
            "k",
            1,
            128,
            [z, z, np.zeros((128, 8), np.float32), None, 2048, 512, 0x3FFF << 16, 16 << 16],
        )


def test_different_descriptors():
    text = kernel(
        16,
        "f32.bf16.bf16",
        16,
        before="shr.u32 %r9, %r3, 6; cvt.u64.u32 %rd12, %r9; add.u64 %rd10, %rd10, %rd12;",
    )
    z = np.zeros(4096, np.uint8)
    with pytest.raises(ptxcheck.ExecutionError, match="different descriptors"):
        ptxcheck.load(text).launch(
            "k", 1, 128, [z, z, np.zeros((128, 8), np.float32), None, 2048, 512, 64 << 16, 16 << 16]
        )
