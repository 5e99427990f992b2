"""Single PTX instructions against independent scalar references."""

import math
import random
import struct
from fractions import Fraction

import numpy as np
import pytest

import ptxcheck

random.seed(1)
M32, M64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
WIDTH = {"b16": 2, "b32": 4, "b64": 8, "pred": 4}
NP = {"b16": np.uint16, "b32": np.uint32, "b64": np.uint64, "pred": np.uint32}


def run(body, ins, out="b32", nout=1):
    """Execute `body` for each row of input columns.

    ins: list of (kind, values); in the body, sources are %a0, %a1... and the
    destination is %d0 (further ones %d1...)."""
    n = len(ins[0][1])
    decl, load = [], []
    for k, (kind, _) in enumerate(ins):
        decl.append(f".reg .{kind} %a{k};")
        w = WIDTH[kind]
        load += [
            f"mul.wide.u32 %off, %i, {w};",
            f"ld.param.u64 %p, [p{k}];",
            "add.s64 %p, %p, %off;",
            f"ld.global.{kind} %a{k}, [%p];",
        ]
    store = []
    for j in range(nout):
        decl.append(f".reg .{out} %d{j};")
        src = f"%d{j}"
        if out == "pred":
            decl.append(f".reg .b32 %e{j};")
            store.append(f"selp.b32 %e{j}, 1, 0, %d{j};")
            src = f"%e{j}"
        w = WIDTH[out]
        store += [
            f"mul.wide.u32 %off, %i, {w};",
            f"ld.param.u64 %p, [q{j}];",
            "add.s64 %p, %p, %off;",
            f"st.global.{'b32' if out == 'pred' else out} [%p], {src};",
        ]
    params = (
        [f".param .u64 p{k}" for k in range(len(ins))]
        + [f".param .u64 q{j}" for j in range(nout)]
        + [".param .u32 n"]
    )
    text = f"""
.version 8.0
.target sm_86
.address_size 64
.visible .entry k({", ".join(params)})
{{
    .reg .pred %skip; .reg .b32 %i, %n, %nt, %ct, %t<4>; .reg .b64 %off, %p, %l<4>;
    .reg .b16 %h<4>; .reg .pred %q<4>;
    {" ".join(decl)}
    mov.u32 %i, %tid.x; mov.u32 %ct, %ctaid.x; mov.u32 %nt, %ntid.x;
    mad.lo.s32 %i, %ct, %nt, %i;
    ld.param.u32 %n, [n];
    setp.ge.u32 %skip, %i, %n;
    @%skip bra DONE;
    {" ".join(load)}
    {body}
    {" ".join(store)}
DONE:
    ret;
}}
"""
    mod = ptxcheck.load(text)
    bufs = [np.array(v, NP[k]) for k, v in ins]
    outs = [np.zeros(n, NP[out]) for _ in range(nout)]
    mod.launch("k", (n + 127) // 128, 128, bufs + outs + [n])
    res = [[int(x) for x in o] for o in outs]
    return res if nout > 1 else res[0]


def s(v, w=32):
    v &= (1 << w) - 1
    return v - (1 << w) if v >> (w - 1) else v


def fbits(x):
    return struct.unpack("<I", struct.pack("<f", x))[0]


def bitsf(b):
    return struct.unpack("<f", struct.pack("<I", b))[0]


def bitsd(b):
    return struct.unpack("<d", struct.pack("<Q", b))[0]


def rand32(n):
    special = [0, 1, M32, 0x80000000, 0x7FFFFFFF, 0xFFFF, 0x10000, 31, 32, 33, 255, 256]
    return special + [
        random.getrandbits(32) >> random.choice([0, 0, 0, 8, 16, 24])
        for _ in range(n - len(special))
    ]


def randf(n, wide=True):
    """float32 bit patterns, all classes, no NaN."""
    sp = [
        0,
        0x80000000,
        1,
        0x80000001,
        0x7F800000,
        0xFF800000,
        0x7F7FFFFF,
        0x00800000,
        0x3F800000,
        0xBF800000,
        0x3F000000,
        0x007FFFFF,
    ]
    out = list(sp)
    while len(out) < n:
        b = random.getrandbits(32)
        if not wide:
            b = (b & 0x80FFFFFF) | (random.randint(118, 136) << 23)
        if (b >> 23) & 255 != 255:
            out.append(b)
    return out


def round_frac(q, p, emin, emax, mode):
    """Round a Fraction to p bits; returns (Fraction or +-inf). Exponents are of
    the leading bit."""
    if q == 0:
        return q
    neg, a = q < 0, abs(q)
    e = a.numerator.bit_length() - a.denominator.bit_length()
    if Fraction(2) ** e > a:
        e -= 1
    e = max(e, emin)
    ulp = Fraction(2) ** (e - p + 1)
    k, rem = divmod(a, ulp)
    if mode == "rn":
        up = rem * 2 > ulp or (rem * 2 == ulp and k & 1)
    elif mode == "rna":
        up = rem * 2 >= ulp
    elif mode == "rz":
        up = False
    elif mode == "rm":
        up = neg and rem > 0
    else:
        up = (not neg) and rem > 0
    k += 1 if up else 0
    r = k * ulp
    top = (Fraction(2) - Fraction(2) ** (1 - p)) * Fraction(2) ** emax
    if r > top:
        trunc = mode == "rz" or (mode == "rm" and not neg) or (mode == "rp" and neg)
        r = top if trunc else math.inf
    return -r if neg else r


FMT = {"f32": (24, -126, 127), "f16": (11, -14, 15), "bf16": (8, -126, 127)}


def value_of(bits, fmt):
    if fmt == "f32":
        return bitsf(bits)
    if fmt == "bf16":
        return bitsf(bits << 16)
    return struct.unpack("<e", struct.pack("<H", bits))[0]


def same(bits, want, fmt):
    got = value_of(bits, fmt)
    return (
        got == (want if isinstance(want, float) else float(want))
        if want in (math.inf, -math.inf)
        else (not math.isinf(got) and Fraction(got) == want)
    )


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("op", ["add", "mul", "fma"])
def test_f32_rounding(op, mode):
    n = 1500
    cols = [randf(n, wide=False)[12:] for _ in range(3)]
    # near-halfway and cancelling cases
    cols[2][:300] = (
        [fbits(-bitsf(a) * bitsf(b)) for a, b in zip(cols[0][:300], cols[1][:300], strict=True)]
        if op == "fma"
        else cols[2][:300]
    )
    cols[1][300:600] = [a ^ 0x80000000 ^ random.getrandbits(3) for a in cols[0][300:600]]
    cols[2][600:800] = [(random.randint(60, 90) << 23) | random.getrandbits(23) for _ in range(200)]
    src = "%a0, %a1, %a2" if op == "fma" else "%a0, %a1"
    got = run(f"{op}.{mode}.f32 %d0, {src};", [("b32", c) for c in cols])
    for a, b, c, g in zip(*cols, got, strict=True):
        x, y, z = (Fraction(bitsf(v)) for v in (a, b, c))
        q = x + y if op == "add" else x * y if op == "mul" else x * y + z
        want = round_frac(q, *FMT["f32"], mode)
        assert same(g, want, "f32"), (bitsf(a), bitsf(b), bitsf(c), bitsf(g), want)


def test_f32_fma_halfway():
    """Cases where rounding twice (via float64) gives the wrong answer."""
    a, b, c = [], [], []
    for _ in range(400):
        x = 0x3F800000 | random.getrandbits(12) << 11
        y = 0x3F800000 | random.getrandbits(12) << 11
        p = Fraction(bitsf(x)) * Fraction(bitsf(y))
        a.append(x)
        b.append(y)
        c.append(fbits(float(Fraction(2) ** -random.randint(60, 80))) | random.choice([0, 1 << 31]))
        del p
    # products with exactly 25 bits are halfway cases
    a += [fbits(1 + 2.0**-12)] * 2
    b += [fbits(1 + 2.0**-12)] * 2
    c += [fbits(2.0**-70), fbits(-(2.0**-70))]
    got = run("fma.rn.f32 %d0, %a0, %a1, %a2;", [("b32", a), ("b32", b), ("b32", c)])
    for x, y, z, g in zip(a, b, c, got, strict=True):
        q = Fraction(bitsf(x)) * Fraction(bitsf(y)) + Fraction(bitsf(z))
        assert Fraction(bitsf(g)) == round_frac(q, *FMT["f32"], "rn")


@pytest.mark.parametrize("fmt", ["f16", "bf16"])
@pytest.mark.parametrize("op", ["add", "sub", "mul", "fma"])
def test_half_arith(fmt, op):
    n = 1200

    def col():
        if fmt == "f16":
            return [random.getrandbits(16) & 0xBFFF for _ in range(n)]
        return [
            (random.getrandbits(1) << 15) | (random.randint(110, 140) << 7) | random.getrandbits(7)
            for _ in range(n)
        ]

    cols = [col() for _ in range(3)]
    src = "%a0, %a1, %a2" if op == "fma" else "%a0, %a1"
    got = run(f"{op}.rn.{fmt} %d0, {src};", [("b16", c) for c in cols], "b16")
    packed = [[lo | (hi << 16) for lo, hi in zip(c, c[::-1], strict=True)] for c in cols]
    got2 = run(f"{op}.rn.{fmt}x2 %d0, {src};", [("b32", c) for c in packed])
    for k in range(n):
        x, y, z = (Fraction(value_of(c[k], fmt)) for c in cols)
        q = {"add": x + y, "sub": x - y, "mul": x * y, "fma": x * y + z}[op]
        want = round_frac(q, *FMT[fmt], "rn")
        assert same(got[k], want, fmt)
        assert got2[k] & 0xFFFF == got[k]
        assert got2[k] >> 16 == got[n - 1 - k]


@pytest.mark.parametrize("mode", ["rn", "rz"])
@pytest.mark.parametrize("fmt", ["f16", "bf16"])
def test_cvt_to_half(fmt, mode):
    x = [*randf(2000)[12:], 1199562752, 1199566848, 1199566847, 855638016, 855638017, 2139095039]
    got = run(f"cvt.{mode}.{fmt}.f32 %d0, %a0;", [("b32", x)], "b16")
    two = run(f"cvt.{mode}.{fmt}x2.f32 %d0, %a0, %a1;", [("b32", x), ("b32", x[::-1])])
    sat = (
        run(f"cvt.{mode}.satfinite.{fmt}x2.f32 %d0, %a0, %a1;", [("b32", x), ("b32", x[::-1])])
        if fmt == "f16"
        else None
    )
    for k, b in enumerate(x):
        want = round_frac(Fraction(bitsf(b)), *FMT[fmt], mode)
        assert same(got[k], want, fmt), (hex(b), hex(got[k]))
        assert two[k] >> 16 == got[k]
        assert two[k] & 0xFFFF == got[-1 - k]
        if sat and want in (math.inf, -math.inf):
            assert sat[k] >> 16 in (0x7BFF, 0xFBFF)


def test_cvt_nan_inf():
    nan = [0x7FC00000, 0xFF800001, 0x7F800000, 0xFF800000]
    assert run("cvt.rn.bf16.f32 %d0, %a0;", [("b32", nan)], "b16") == [
        0x7FFF,
        0x7FFF,
        0x7F80,
        0xFF80,
    ]
    assert run("cvt.rn.f16.f32 %d0, %a0;", [("b32", nan)], "b16") == [
        0x7FFF,
        0x7FFF,
        0x7C00,
        0xFC00,
    ]
    assert run("cvt.rn.relu.f16x2.f32 %d0, %a0, %a0;", [("b32", [0xBF800000, 0x3F800000])]) == [
        0,
        0x3C003C00,
    ]


def test_cvt_tf32():
    x = randf(1000)[12:]
    got = run("cvt.rna.tf32.f32 %d0, %a0;", [("b32", x)])
    for b, g in zip(x, got, strict=True):
        want = round_frac(Fraction(bitsf(b)), 11, -126, 127, "rna")
        if (b >> 23) & 255:
            assert math.isinf(bitsf(g)) if isinstance(want, float) else Fraction(bitsf(g)) == want


@pytest.mark.parametrize("mode", ["rni", "rzi", "rmi", "rpi"])
@pytest.mark.parametrize("typ", ["s32", "u32", "s64", "u64", "s8", "u16"])
def test_cvt_float_to_int(typ, mode):
    x = randf(1500) + [
        fbits(v) for v in (0.5, 1.5, 2.5, -0.5, -1.5, 2147483520.0, 2147483648.0, 1e20)
    ]
    x += [0x7FC00000]
    w = int(typ[1:])
    d = {8: "b32", 16: "b16", 32: "b32", 64: "b64"}[w]
    got = run(f"cvt.{mode}.{typ}.f32 %d0, %a0;", [("b32", x)], d)
    lo, hi = (-(1 << (w - 1)), (1 << (w - 1)) - 1) if typ[0] == "s" else (0, (1 << w) - 1)
    for b, g in zip(x, got, strict=True):
        v = bitsf(b)
        if math.isnan(v):
            want = 0
        elif math.isinf(v):
            want = hi if v > 0 else lo
        else:
            q = Fraction(v)
            fl = math.floor(q)
            want = {"rmi": fl, "rpi": math.ceil(q), "rzi": math.trunc(q), "rni": round(q)}[mode]
            want = min(max(want, lo), hi)
        assert s(g, w) == want if typ[0] == "s" else g & ((1 << w) - 1) == want, (v, g, want)


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("typ", ["s32", "u32", "s64", "u64"])
def test_cvt_int_to_float(typ, mode):
    w = int(typ[1:])
    x = [random.getrandbits(w) >> random.randint(0, w - 8) for _ in range(600)]
    x += [0, 1, (1 << w) - 1, 1 << (w - 1), (1 << (w - 1)) - 1]
    got = run(f"cvt.{mode}.f32.{typ} %d0, %a0;", [(f"b{w}", x)])
    for v, g in zip(x, got, strict=True):
        q = s(v, w) if typ[0] == "s" else v
        assert Fraction(bitsf(g)) == round_frac(Fraction(q), *FMT["f32"], mode), (v, mode)


@pytest.mark.parametrize(
    "cv",
    [
        "s32.s8",
        "u32.u8",
        "s64.s32",
        "u64.u32",
        "s16.s32",
        "u8.u32",
        "s8.s32",
        "sat.s8.s32",
        "sat.u8.s32",
        "sat.s16.u32",
    ],
)
def test_cvt_int_int(cv):
    x = rand32(300)
    parts = cv.split(".")
    sat = parts[0] == "sat"
    to, frm = parts[-2:]
    wt, wf = int(to[1:]), int(frm[1:])
    out = {8: "b32", 16: "b16", 32: "b32", 64: "b64"}[wt]
    got = run(f"cvt.{cv} %d0, %a0;", [("b32", x)], out)
    for v, g in zip(x, got, strict=True):
        q = s(v, wf) if frm[0] == "s" else v & ((1 << wf) - 1)
        if sat:
            lo, hi = (-(1 << (wt - 1)), (1 << (wt - 1)) - 1) if to[0] == "s" else (0, (1 << wt) - 1)
            q = min(max(q, lo), hi)
        q &= (1 << wt) - 1
        if to[0] == "s":  # sign-extended into the register
            q = s(q, wt) & ((1 << (8 * WIDTH[out])) - 1)
        assert g == q, (cv, v, g, q)


@pytest.mark.parametrize("lut", range(256))
def test_lop3(lut):
    a, b, c = (rand32(40) for _ in range(3))
    random.shuffle(b)
    random.shuffle(c)
    got = run(f"lop3.b32 %d0, %a0, %a1, %a2, {lut};", [("b32", v) for v in (a, b, c)])
    for x, y, z, g in zip(a, b, c, got, strict=True):
        want = 0
        for k in range(32):
            i = ((x >> k) & 1) * 4 + ((y >> k) & 1) * 2 + ((z >> k) & 1)
            want |= ((lut >> i) & 1) << k
        assert g == want


@pytest.mark.parametrize("typ", ["u32", "s32", "u64", "s64"])
def test_bfe_bfi(typ):
    w = int(typ[1:])
    n = 800
    a = [random.getrandbits(w) for _ in range(n)]
    b = [random.getrandbits(w) for _ in range(n)]
    pos = [random.choice([0, 1, w - 1, w, 40, 255, random.randint(0, w)]) for _ in range(n)]
    ln = [random.choice([0, 1, w - 1, w, 40, 255, random.randint(0, w)]) for _ in range(n)]
    kind = f"b{w}"
    got = run(f"bfe.{typ} %d0, %a0, %a1, %a2;", [(kind, a), ("b32", pos), ("b32", ln)], kind)
    ins = run(
        f"bfi.b{w} %d0, %a0, %a1, %a2, %a3;",
        [(kind, a), (kind, b), ("b32", pos), ("b32", ln)],
        kind,
    )
    for x, y, p, k, g, h in zip(a, b, pos, ln, got, ins, strict=True):
        msb = w - 1
        sbit = 0 if typ[0] == "u" or k == 0 else x >> min(p + k - 1, msb) & 1
        want = 0
        for i in range(w):
            bit = (x >> (p + i)) & 1 if i < k and p + i <= msb else sbit
            want |= bit << i
        assert g == want, (typ, hex(x), p, k, hex(g), hex(want))
        f = y
        for i in range(k):
            if p + i <= msb:
                f = (f & ~(1 << (p + i))) | (((x >> i) & 1) << (p + i))
        assert h == f


@pytest.mark.parametrize("mode", ["", ".f4e", ".b4e", ".rc8", ".ecl", ".ecr", ".rc16"])
def test_prmt(mode):
    n = 300
    a, b = rand32(n), rand32(n)[::-1]
    c = [random.getrandbits(16) if not mode else random.randint(0, 3) for _ in range(n)]
    got = run(f"prmt.b32{mode} %d0, %a0, %a1, %a2;", [("b32", v) for v in (a, b, c)])
    table = {
        ".f4e": ["3210", "4321", "5432", "6543"],
        ".b4e": ["5670", "6701", "7012", "0123"],
        ".rc8": ["0000", "1111", "2222", "3333"],
        ".ecl": ["3210", "3211", "3222", "3333"],
        ".ecr": ["0000", "1110", "2210", "3210"],
        ".rc16": ["1010", "3232", "1010", "3232"],
    }
    for x, y, z, g in zip(a, b, c, got, strict=True):
        v = (y << 32) | x
        want = 0
        for k in range(4):
            sel = (z >> (4 * k)) & 15 if not mode else int(table[mode][z & 3][3 - k])
            byte = (v >> (8 * (sel & 7))) & 255
            if sel & 8:
                byte = 255 if byte & 128 else 0
            want |= byte << (8 * k)
        assert g == want


def test_shifts():
    n = 400
    a = rand32(n)
    sh = [random.choice([0, 1, 31, 32, 33, 63, 64, 200, random.randint(0, 40)]) for _ in range(n)]
    b = rand32(n)[::-1]
    shl = run("shl.b32 %d0, %a0, %a1;", [("b32", a), ("b32", sh)])
    shr = run("shr.u32 %d0, %a0, %a1;", [("b32", a), ("b32", sh)])
    sar = run("shr.s32 %d0, %a0, %a1;", [("b32", a), ("b32", sh)])
    fl = run("shf.l.wrap.b32 %d0, %a0, %a2, %a1;", [("b32", a), ("b32", sh), ("b32", b)])
    fr = run("shf.r.clamp.b32 %d0, %a0, %a2, %a1;", [("b32", a), ("b32", sh), ("b32", b)])
    imm = run("shr.s32 %d0, %a0, 40;", [("b32", a)])
    for x, k, y, *g in zip(a, sh, b, shl, shr, sar, fl, fr, imm, strict=True):
        v = (y << 32) | x
        assert g[0] == (x << k & M32 if k < 32 else 0)
        assert g[1] == (x >> k if k < 32 else 0)
        assert g[2] == (s(x) >> min(k, 31)) & M32
        assert g[3] == (v << (k & 31)) >> 32 & M32
        assert g[4] == (v >> min(k, 32)) & M32
        assert g[5] == (M32 if x >> 31 else 0)


def test_int_arith():
    n = 500
    a, b, c = rand32(n), rand32(n)[::-1], rand32(n)
    random.shuffle(b)
    A = [("b32", a), ("b32", b), ("b32", c)]
    ops = {
        "mul.lo.u32 %d0, %a0, %a1;": lambda x, y, z: x * y,
        "mul.hi.u32 %d0, %a0, %a1;": lambda x, y, z: (x * y) >> 32,
        "mul.hi.s32 %d0, %a0, %a1;": lambda x, y, z: (s(x) * s(y)) >> 32,
        "mad.lo.s32 %d0, %a0, %a1, %a2;": lambda x, y, z: x * y + z,
        "mad.hi.s32 %d0, %a0, %a1, %a2;": lambda x, y, z: ((s(x) * s(y)) >> 32) + z,
        "add.sat.s32 %d0, %a0, %a1;": lambda x, y, z: max(-(2**31), min(2**31 - 1, s(x) + s(y))),
        "min.s32 %d0, %a0, %a1;": lambda x, y, z: min(s(x), s(y)),
        "max.u32 %d0, %a0, %a1;": lambda x, y, z: max(x, y),
        "sad.u32 %d0, %a0, %a1, %a2;": lambda x, y, z: abs(x - y) + z,
        "sad.s32 %d0, %a0, %a1, %a2;": lambda x, y, z: abs(s(x) - s(y)) + z,
        "abs.s32 %d0, %a0;": lambda x, y, z: abs(s(x)),
        "neg.s32 %d0, %a0;": lambda x, y, z: -x,
        "not.b32 %d0, %a0;": lambda x, y, z: ~x,
        "popc.b32 %d0, %a0;": lambda x, y, z: bin(x).count("1"),
        "clz.b32 %d0, %a0;": lambda x, y, z: 32 - x.bit_length(),
        "brev.b32 %d0, %a0;": lambda x, y, z: int(f"{x:032b}"[::-1], 2),
        "bfind.u32 %d0, %a0;": lambda x, y, z: x.bit_length() - 1,
        "bfind.s32 %d0, %a0;": lambda x, y, z: (x if s(x) >= 0 else ~x & M32).bit_length() - 1,
        "bfind.shiftamt.u32 %d0, %a0;": lambda x, y, z: 32 - x.bit_length() if x else -1,
        "slct.b32.s32 %d0, %a0, %a1, %a2;": lambda x, y, z: x if s(z) >= 0 else y,
        "dp4a.u32.s32 %d0, %a0, %a1, %a2;": lambda x, y, z: (
            z + sum(((x >> 8 * k) & 255) * s((y >> 8 * k) & 255, 8) for k in range(4))
        ),
        "sub.s32 %d0, %a0, %a1;": lambda x, y, z: x - y,
    }
    for body, f in ops.items():
        got = run(body, A)
        for x, y, z, g in zip(a, b, c, got, strict=True):
            assert g == f(x, y, z) & M32, (body, x, y, z)


def test_wide_and_64():
    n = 400
    a, b = rand32(n), rand32(n)[::-1]
    A = [("b32", a), ("b32", b)]
    for x, y, g in zip(a, b, run("mul.wide.s32 %d0, %a0, %a1;", A, "b64"), strict=True):
        assert g == s(x) * s(y) & M64
    for x, y, g in zip(a, b, run("mul.wide.u32 %d0, %a0, %a1;", A, "b64"), strict=True):
        assert g == x * y
    p, q = ([random.getrandbits(64) >> random.choice([0, 20, 40]) for _ in range(n)] for _ in "ab")
    B = [("b64", p), ("b64", q)]
    for op, f in {
        "mul.hi.u64": lambda x, y: x * y >> 64,
        "mul.lo.s64": lambda x, y: x * y,
        "mul.hi.s64": lambda x, y: s(x, 64) * s(y, 64) >> 64,
        "div.u64": lambda x, y: x // y if y else M64,
        "rem.s64": lambda x, y: (
            int(math.copysign(1, s(x, 64))) * (abs(s(x, 64)) % abs(s(y, 64))) if y else x
        ),
    }.items():
        for x, y, g in zip(p, q, run(f"{op} %d0, %a0, %a1;", B, "b64"), strict=True):
            assert g == f(x, y) & M64, op
    body = """{ .reg .b32 al, ah, bl, bh, r0, r1; mov.b64 {al, ah}, %a0; mov.b64 {bl, bh}, %a1;
        add.cc.u32 r0, al, bl; addc.u32 r1, ah, bh; mov.b64 %d0, {r0, r1}; }"""
    for x, y, g in zip(p, q, run(body, B, "b64"), strict=True):
        assert g == (x + y) & M64
    body = body.replace("add.cc", "sub.cc").replace("addc", "subc")
    for x, y, g in zip(p, q, run(body, B, "b64"), strict=True):
        assert g == (x - y) & M64
    body = """{ .reg .b32 al, ah, bl, bh, r0, r1, r2, r3;
        mov.b64 {al, ah}, %a0; mov.b64 {bl, bh}, %a1;
        mul.lo.u32 r0, al, bl; mul.hi.u32 r1, al, bl; mad.lo.cc.u32 r1, al, bh, r1;
        madc.hi.u32 r2, al, bh, 0; mad.lo.cc.u32 r1, ah, bl, r1; madc.hi.cc.u32 r2, ah, bl, r2;
        madc.hi.u32 r3, ah, bh, 0; mad.lo.cc.u32 r2, ah, bh, r2; addc.u32 r3, r3, 0;
        mov.b64 %d0, {r0, r1}; mov.b64 %d1, {r2, r3}; }"""
    lo, hi = run(body, B, "b64", 2)
    for x, y, g, h in zip(p, q, lo, hi, strict=True):
        assert (h << 64 | g) == x * y


def test_min_max_nan_zero():
    nan, one, nz = 0x7FC00001, 0x3F800000, 0x80000000
    a, b = [nan, one, nan, nz, 0], [one, nan, nan, 0, nz]
    A = [("b32", a), ("b32", b)]
    assert run("min.f32 %d0, %a0, %a1;", A) == [one, one, 0x7FFFFFFF, nz, nz]
    assert run("max.f32 %d0, %a0, %a1;", A) == [one, one, 0x7FFFFFFF, 0, 0]
    assert run("max.NaN.f32 %d0, %a0, %a1;", A)[:3] == [0x7FFFFFFF] * 3


@pytest.mark.parametrize(
    "cmp",
    ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"],
)
def test_setp_float(cmp):
    v = [0x7FC00000, 0, 0x80000000, 0x3F800000, 0xBF800000, 0x7F800000]
    a, b = [x for x in v for _ in v], v * len(v)
    got = run(f"setp.{cmp}.f32 %d0, %a0, %a1;", [("b32", a), ("b32", b)], "pred")
    f = {
        "eq": lambda x, y: x == y,
        "ne": lambda x, y: x != y,
        "lt": lambda x, y: x < y,
        "le": lambda x, y: x <= y,
        "gt": lambda x, y: x > y,
        "ge": lambda x, y: x >= y,
    }
    for x, y, g in zip(a, b, got, strict=True):
        x, y = bitsf(x), bitsf(y)
        un = math.isnan(x) or math.isnan(y)
        if cmp in ("num", "nan"):
            want = un == (cmp == "nan")
        elif cmp.endswith("u"):
            want = un or f[cmp[:-1]](x, y)
        else:
            want = not un and f[cmp](x, y)
        assert g == want


def test_setp_pair_and_combine():
    a, b = rand32(200), rand32(200)[::-1]
    body = "setp.lt.u32 %q0, %a1, 1000; setp.gt.and.s32 %d0|%d1, %a0, %a1, !%q0;"
    p, q = run(body, [("b32", a), ("b32", b)], "pred", 2)
    for x, y, g, h in zip(a, b, p, q, strict=True):
        c = not y < 1000
        assert g == (s(x) > s(y) and c)
        assert h == ((not s(x) > s(y)) and c)


def test_float_classes_and_ftz():
    x = [1, 0x00800000, 0x3F800000, 0x80000001]
    assert run("add.ftz.f32 %d0, %a0, 0f00000000;", [("b32", x)]) == [0, 0x00800000, 0x3F800000, 0]
    assert run(
        "mul.sat.f32 %d0, %a0, 0f40000000;", [("b32", [0xBF800000, 0x3E800000, 0x3F800000])]
    ) == [0, 0x3F000000, 0x3F800000]
    assert run(
        "ex2.approx.ftz.f32 %d0, %a0;", [("b32", [fbits(v) for v in (0.0, 3.0, -2.0, -200.0)])]
    ) == [fbits(v) for v in (1.0, 8.0, 0.25, 0.0)]


def test_f64():
    n = 500
    a, b, c = (
        [struct.unpack("<Q", struct.pack("<d", random.gauss(0, 1)))[0] for _ in range(n)]
        for _ in "abc"
    )
    c = [
        struct.unpack("<Q", struct.pack("<d", -bitsd(x) * bitsd(y) * (1 + 1e-15)))[0]
        if k % 2
        else z
        for k, (x, y, z) in enumerate(zip(a, b, c, strict=True))
    ]
    got = run("fma.rn.f64 %d0, %a0, %a1, %a2;", [("b64", v) for v in (a, b, c)], "b64")
    for x, y, z, g in zip(a, b, c, got, strict=True):
        want = float(Fraction(bitsd(x)) * Fraction(bitsd(y)) + Fraction(bitsd(z)))
        assert bitsd(g) == want


def test_fp8_round_trip():
    codes = [c for c in range(256) if c & 0x7F != 0x7F]
    pairs = [c | (d << 8) for c, d in zip(codes, codes[::-1], strict=True)]
    h = run("cvt.rn.f16x2.e4m3x2 %d0, %a0;", [("b16", pairs)])
    back = run("cvt.rn.satfinite.e4m3x2.f16x2 %d0, %a0;", [("b32", h)], "b16")
    assert back == pairs
    x = [fbits(v) for v in (448.0, 500.0, -1e9, 2.0**-9, 2.0**-10, 17.0)]
    assert [
        g & 255 for g in run("cvt.rn.satfinite.e4m3x2.f32 %d0, %a0, %a0;", [("b32", x)], "b16")
    ] == [0x7E, 0x7E, 0xFE, 1, 0, 0x58]


def test_brx_and_vectors():
    a = [random.randint(0, 2) for _ in range(200)]
    body = """
    LIST: .branchtargets L0, L1, L2;
    brx.idx %a0, LIST;
L0: mov.u32 %d0, 10; bra.uni OUT;
L1: mov.u32 %d0, 21; bra.uni OUT;
L2: mov.u32 %d0, 32;
OUT:
"""
    assert run(body, [("b32", a)]) == [[10, 21, 32][v] for v in a]


def test_packing_moves():
    a = rand32(100)
    body = """{ .reg .b16 lo, hi; mov.b32 {lo, hi}, %a0; mov.b32 %d0, {hi, lo}; }"""
    assert run(body, [("b32", a)]) == [(x >> 16) | (x << 16 & M32) for x in a]
    body = "mov.b64 %l0, {%a0, 7}; shr.u64 %l1, %l0, 16; cvt.u32.u64 %d0, %l1;"
    assert run(body, [("b32", a)]) == [((7 << 32 | x) >> 16) & M32 for x in a]
