"""Logic, shifts and bit fields."""

from __future__ import annotations

import numpy as np

from .binding import binder, run_ufunc, simple, type_of, unsupported
from .state import DTYPE, UDTYPE, WIDTH
from .syntax import Imm, Not, Pair

u8, u16, u32, u64 = np.uint8, np.uint16, np.uint32, np.uint64
i8, i16, i32, i64 = np.int8, np.int16, np.int32, np.int64
f16, f32, f64 = np.float16, np.float32, np.float64


@binder("and", "or", "xor")
def bind_logic(st, ins):
    typ = type_of(ins)
    uf = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[ins.base]
    if any(isinstance(o, Not) for o in ins.ops):
        raise unsupported(ins)
    return simple(st, ins, uf, [typ] * 2, typ)


@binder("not")
def bind_not(st, ins):
    typ = type_of(ins)
    return simple(st, ins, np.invert, [typ], typ)


@binder("cnot")
def bind_cnot(st, ins):
    typ = type_of(ins)
    return simple(st, ins, lambda a: (a == 0).astype(a.dtype), [typ], typ)


def lop2(table):
    """Two-input truth table (bit index 2*x + y) -> function of (x, y)."""
    full = u32(0xFFFFFFFF)
    return [
        lambda x, y: u32(0),
        lambda x, y: ~(x | y),
        lambda x, y: ~x & y,
        lambda x, y: ~x,
        lambda x, y: x & ~y,
        lambda x, y: ~y,
        lambda x, y: x ^ y,
        lambda x, y: ~(x & y),
        lambda x, y: x & y,
        lambda x, y: ~(x ^ y),
        lambda x, y: y,
        lambda x, y: ~x | y,
        lambda x, y: x,
        lambda x, y: x | ~y,
        lambda x, y: x | y,
        lambda x, y: full,
    ][table]


LOP3_FAST = {
    0x96: lambda a, b, c: a ^ b ^ c,
    0x80: lambda a, b, c: a & b & c,
    0xFE: lambda a, b, c: a | b | c,
    0xE8: lambda a, b, c: (a & b) | (c & (a | b)),
    0xF8: lambda a, b, c: a | (b & c),
    0xEA: lambda a, b, c: (a & b) | c,
    0xCA: lambda a, b, c: (a & b) | (~a & c),
    0x6A: lambda a, b, c: (a & b) ^ c,
    0x78: lambda a, b, c: a ^ (b & c),
    0xA8: lambda a, b, c: (a | b) & c,
    0xE0: lambda a, b, c: a & (b | c),
}


def lop3(lut):
    """Truth table (bit index 4a + 2b + c) -> function of (a, b, c)."""
    if lut in LOP3_FAST:
        return LOP3_FAST[lut]
    f0 = f1 = 0
    for k in range(4):
        f0 |= ((lut >> (2 * k)) & 1) << k
        f1 |= ((lut >> (2 * k + 1)) & 1) << k
    g0, g1 = lop2(f0), lop2(f1)
    if f0 == f1:
        return lambda a, b, c: g0(a, b)
    return lambda a, b, c: (g0(a, b) & ~c) | (g1(a, b) & c)


@binder("lop3")
def bind_lop3(st, ins):
    if not isinstance(ins.ops[4], Imm) or isinstance(ins.ops[0], Pair):
        raise unsupported(ins)
    fn = lop3(ins.ops[4].value & 0xFF)
    return simple(st, ins, fn, ["b32"] * 3, "b32")


@binder("shl", "shr")
def bind_shift(st, ins):
    typ = type_of(ins)
    w = WIDTH[typ]
    left = ins.base == "shl"
    dt = DTYPE[typ]
    uf = np.left_shift if left else np.right_shift
    a = st.src(ins.ops[1], typ)
    d = st.dst(ins.ops[0], typ)
    if isinstance(ins.ops[2], Imm):
        s = int(ins.ops[2].value) & 0xFFFFFFFF
        if s < w:
            return run_ufunc(uf, [a, np.array([s], dt)], d)
        if typ[0] == "s" and not left:
            return run_ufunc(uf, [a, np.array([w - 1], dt)], d)
        return run_ufunc(np.bitwise_and, [a, np.array([0], dt)], d)
    s = st.src(ins.ops[2], "u32")
    put = st.setter(ins.ops[0], typ)
    if typ[0] == "s" and not left:
        return lambda m: put(a >> np.minimum(s, w - 1).astype(dt), m)
    return lambda m: put(np.where(s < w, uf(a, np.minimum(s, w - 1).astype(dt)), dt(0)), m)


@binder("shf")
def bind_shf(st, ins):
    left = ins.mods[0] == "l"
    wrap = "wrap" in ins.mods
    a, b, c = (st.src(o, "u32") for o in ins.ops[1:4])
    put = st.setter(ins.ops[0], "u32")

    def ex(m):
        n = (c & u32(31)) if wrap else np.minimum(c, u32(32))
        v = (b.astype(u64) << u64(32)) | a
        n = n.astype(u64)
        r = (v << n) >> u64(32) if left else v >> n
        put(r.astype(u32), m)

    return ex


@binder("prmt")
def bind_prmt(st, ins):
    mode = next((x for x in ins.mods if x != "b32"), None)
    a, b, c = (st.src(o, "u32") for o in ins.ops[1:4])
    put = st.setter(ins.ops[0], "u32")
    tables = {
        "f4e": [(0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5), (3, 4, 5, 6)],
        "b4e": [(0, 7, 6, 5), (1, 0, 7, 6), (2, 1, 0, 7), (3, 2, 1, 0)],
        "rc8": [(0,) * 4, (1,) * 4, (2,) * 4, (3,) * 4],
        "ecl": [(0, 1, 2, 3), (1, 1, 2, 3), (2, 2, 2, 3), (3, 3, 3, 3)],
        "ecr": [(0, 0, 0, 0), (0, 1, 1, 1), (0, 1, 2, 2), (0, 1, 2, 3)],
        "rc16": [(0, 1, 0, 1), (2, 3, 2, 3), (0, 1, 0, 1), (2, 3, 2, 3)],
    }

    def byte(v, sel):
        x = (v >> ((sel & u64(7)) * u64(8))) & u64(0xFF)
        sign = (sel & u64(8)) != 0
        return np.where(sign, np.where(x >= u64(128), u64(255), u64(0)), x)

    def ex(m):
        v = (b.astype(u64) << u64(32)) | a
        r = u64(0)
        sel = c.astype(u64)
        for k in range(4):
            if mode is None:
                s = (sel >> u64(4 * k)) & u64(15)
            else:
                s = np.array([t[k] for t in tables[mode]], u64)[(sel & u64(3)).astype(i64)]
            r = r | (byte(v, s) << u64(8 * k))
        put(r.astype(u32), m)

    return ex


@binder("bfe")
def bind_bfe(st, ins):
    typ = type_of(ins)
    w = WIDTH[typ]
    dt, ut = DTYPE[typ], UDTYPE[w]
    a = st.src(ins.ops[1], typ)
    pos, ln = st.src(ins.ops[2], "u32"), st.src(ins.ops[3], "u32")
    put = st.setter(ins.ops[0], typ)

    def ex(m):
        p, n = (pos & u32(255)).astype(i64), (ln & u32(255)).astype(i64)
        if typ[0] == "u":
            x = np.where(p < w, a >> np.minimum(p, w - 1).astype(dt), dt(0))
            keep = np.where(
                n >= w, ut(np.iinfo(ut).max), (ut(1) << np.minimum(n, w - 1).astype(ut)) - ut(1)
            )
            put(x & keep, m)
        else:
            # sign bit: the last bit of the field, or bit w-1 when it runs off
            x = a >> np.minimum(p, w - 1).astype(dt)
            top = np.minimum(np.maximum(w - n, 0), w - 1).astype(dt)
            r = (x.view(ut) << top.astype(ut)).view(dt) >> top
            r = np.where(n >= w, x, r)
            put(np.where(n == 0, dt(0), r), m)

    return ex


@binder("bfi")
def bind_bfi(st, ins):
    typ = type_of(ins)
    w = WIDTH[typ]
    dt = DTYPE[typ]
    a, b = st.src(ins.ops[1], typ), st.src(ins.ops[2], typ)
    pos, ln = st.src(ins.ops[3], "u32"), st.src(ins.ops[4], "u32")
    put = st.setter(ins.ops[0], typ)

    def ex(m):
        p, n = (pos & u32(255)).astype(i64), (ln & u32(255)).astype(i64)
        field = np.where(
            n >= w, dt(np.iinfo(dt).max), (dt(1) << np.minimum(n, w - 1).astype(dt)) - dt(1)
        )
        ps = np.minimum(p, w - 1).astype(dt)
        mask = np.where(p < w, field << ps, dt(0))
        put((b & ~mask) | ((a << ps) & mask), m)

    return ex


@binder("bmsk")
def bind_bmsk(st, ins):
    a, b = st.src(ins.ops[1], "u32"), st.src(ins.ops[2], "u32")
    put = st.setter(ins.ops[0], "u32")
    wrap = "wrap" in ins.mods

    def ex(m):
        p = (a & u32(31) if wrap else np.minimum(a, u32(32))).astype(u64)
        n = (b & u32(31) if wrap else np.minimum(b, u32(32))).astype(u64)
        put((((u64(1) << n) - u64(1)) << p).astype(u32), m)

    return ex


def reverse_bits(x, w):
    out = np.zeros_like(x)
    dt = x.dtype.type
    for k in range(w):
        out |= ((x >> dt(k)) & dt(1)) << dt(w - 1 - k)
    return out


def high_bit(x, w):
    """Position of the highest set bit of an unsigned array, -1 for zero."""
    pos = np.full(x.shape, -1, i64)
    v = x.copy()
    acc = np.zeros(x.shape, i64)
    s = w // 2
    while s:
        big = (v >> v.dtype.type(s)) != 0
        acc = np.where(big, acc + s, acc)
        v = np.where(big, v >> v.dtype.type(s), v)
        s //= 2
    return np.where(x != 0, acc, pos)


@binder("brev", "popc", "clz", "bfind")
def bind_bits(st, ins):
    typ = type_of(ins)
    w = WIDTH[typ]
    ut = "u" + str(w)
    if ins.base == "brev":
        return simple(st, ins, lambda a: reverse_bits(a, w), [ut], ut)
    if ins.base == "popc":
        return simple(st, ins, lambda a: np.bitwise_count(a).astype(u32), [ut], "u32")
    if ins.base == "clz":
        return simple(st, ins, lambda a: (w - 1 - high_bit(a, w)).astype(u32), [ut], "u32")
    shift = "shiftamt" in ins.mods

    def find(a):
        x = a
        if typ[0] == "s":
            x = np.where(a.view(DTYPE[typ]) < 0, ~a, a)
        h = high_bit(x, w)
        if shift:
            h = np.where(h < 0, h, w - 1 - h)
        return (h & 0xFFFFFFFF).astype(u32)

    return simple(st, ins, find, [ut], "u32")


@binder("fns")
def bind_fns(st, ins):
    mask, base, off = (
        st.src(o, t) for o, t in zip(ins.ops[1:], ("u32", "u32", "s32"), strict=True)
    )
    put = st.setter(ins.ops[0], "u32")

    def nth(v, b, n):
        if n == 0:
            return b if (v >> b) & 1 else 0xFFFFFFFF
        step, left = (1, n) if n > 0 else (-1, -n)
        while 0 <= b < 32:
            if (v >> b) & 1:
                left -= 1
                if left == 0:
                    return b
            b += step
        return 0xFFFFFFFF

    def ex(m):
        args = np.broadcast_arrays(mask, base, off)
        put(
            np.array(
                [nth(int(v), int(b) & 31, int(n)) for v, b, n in zip(*args, strict=True)], u32
            ),
            m,
        )

    return ex
