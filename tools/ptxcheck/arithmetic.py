"""Integer and float arithmetic, math functions."""

from __future__ import annotations

import numpy as np

from . import numerics as nx
from .binding import (
    HALF,
    binder,
    copyto,
    float_op,
    half_op,
    rounding,
    run_fn,
    simple,
    type_of,
    unsupported,
)
from .state import DTYPE, UDTYPE, WIDTH

u8, u16, u32, u64 = np.uint8, np.uint16, np.uint32, np.uint64
i8, i16, i32, i64 = np.int8, np.int16, np.int32, np.int64
f16, f32, f64 = np.float16, np.float32, np.float64


def _sat_add(fn):
    def f(a, b):
        r = fn(a.astype(i64), b.astype(i64))
        return np.clip(r, -(1 << 31), (1 << 31) - 1).astype(i32)

    return f


@binder("add", "sub")
def bind_addsub(st, ins):
    typ = type_of(ins)
    uf = np.add if ins.base == "add" else np.subtract
    if typ in HALF:
        return half_op(st, ins, typ, uf, 2)
    if typ in ("f32", "f64"):
        mode = rounding(ins)
        if mode in (None, "rn"):
            return float_op(st, ins, typ, uf, 2)
        if typ == "f64":
            raise unsupported(ins, "directed rounding of f64")
        return float_op(st, ins, typ, lambda a, b: nx.arith_f32(ins.base, a, b, None, mode), 2)
    if "cc" in ins.mods:
        return _carry(st, ins, typ)
    if "sat" in ins.mods:
        return simple(st, ins, _sat_add(uf), [typ] * 2, typ)
    if typ in ("u16x2", "s16x2"):
        raise unsupported(ins)
    ut = {16: "u16", 32: "u32", 64: "u64"}[WIDTH[typ]]
    return simple(st, ins, uf, [ut] * 2, ut)


def _cc_flag(st):
    if not hasattr(st, "cc"):
        st.cc = np.zeros(st.N, bool)
    return st.cc


@binder("addc", "subc")
def bind_carry(st, ins):
    return _carry(st, ins, type_of(ins))


def _carry(st, ins, typ):
    """add/sub/addc/subc/mad/madc with the carry flag."""
    cc = _cc_flag(st)
    w = WIDTH[typ]
    ut = "u" + str(w)
    dt = DTYPE[ut]
    put = st.setter(ins.ops[0], ut)
    use, keep = ins.base.endswith("c"), "cc" in ins.mods
    sub = ins.base.startswith("sub")
    if ins.base.startswith("mad"):
        fn, _ = int_mul(typ, "lo" if "lo" in ins.mods else "hi")
        in_t = ut if "lo" in ins.mods else typ
        p, q = st.src(ins.ops[1], in_t), st.src(ins.ops[2], in_t)

        def first():
            return fn(p, q).view(dt)

        b = st.src(ins.ops[3], ut)
    else:
        a, b = st.src(ins.ops[1], ut), st.src(ins.ops[2], ut)

        def first():
            return a

    def ex(m):
        x, y = first(), b
        cin = cc.astype(dt) if use else dt(0)
        if sub:
            r = x - y
            out = x < y
            if use:
                out = out | (r < cin)
                r = r - cin
        else:
            r = x + y
            out = r < x
            if use:
                r = r + cin
                out = out | (r < cin)
        if keep:
            flag = np.broadcast_to(out, cc.shape)
            if m is None:
                copyto(cc, flag)
            else:
                copyto(cc, flag, where=m)
        put(r, m)

    return ex


def mul_hi64(a, b, signed):
    """High 64 bits of a 64x64-bit product."""
    ua, ub = a.view(u64), b.view(u64)
    m32, s32 = u64(0xFFFFFFFF), u64(32)
    al, ah, bl, bh = ua & m32, ua >> s32, ub & m32, ub >> s32
    ll, lh, hl = al * bl, al * bh, ah * bl
    mid = (ll >> s32) + (lh & m32) + (hl & m32)
    hi = ah * bh + (lh >> s32) + (hl >> s32) + (mid >> s32)
    if signed:
        hi = hi - np.where(a.view(i64) < 0, ub, u64(0)) - np.where(b.view(i64) < 0, ua, u64(0))
    return hi


def int_mul(typ, part):
    """Product function and its result type."""
    w = WIDTH[typ]
    signed = typ[0] == "s"
    if part == "lo":
        return np.multiply, {16: "u16", 32: "u32", 64: "u64"}[w]
    wide = {16: (i32 if signed else u32), 32: (i64 if signed else u64)}.get(w)
    if part == "wide":
        return (lambda a, b: a.astype(wide) * b.astype(wide)), ("s" if signed else "u") + str(2 * w)
    if w == 64:
        return (lambda a, b: mul_hi64(a, b, signed)), "u64"
    shift = wide(w)
    return (lambda a, b: ((a.astype(wide) * b.astype(wide)) >> shift).astype(DTYPE[typ])), typ


@binder("mul", "mul24")
def bind_mul(st, ins):
    typ = type_of(ins)
    if typ in HALF:
        return half_op(st, ins, typ, np.multiply, 2)
    if typ in ("f32", "f64"):
        mode = rounding(ins)
        if mode in (None, "rn"):
            return float_op(st, ins, typ, np.multiply, 2)
        if typ == "f64":
            raise unsupported(ins, "directed rounding of f64")
        return float_op(st, ins, typ, lambda a, b: nx.arith_f32("mul", a, b, None, mode), 2)
    part = next((p for p in ("lo", "hi", "wide") if p in ins.mods), None)
    if ins.base == "mul24":
        raise unsupported(ins)
    fn, out = int_mul(typ, part)
    if part == "lo":
        return simple(st, ins, fn, [out] * 2, out)
    return simple(st, ins, fn, [typ] * 2, out)


@binder("mad", "fma", "madc")
def bind_mad(st, ins):
    typ = type_of(ins)
    if typ in ("f16", "bf16", "f16x2", "bf16x2"):
        return half_op(st, ins, typ, nx.fma_odd, 3)
    if typ == "f32":
        mode = rounding(ins)
        if mode in (None, "rn"):
            return float_op(st, ins, typ, nx.fma_f32, 3)
        return float_op(st, ins, typ, lambda a, b, c: nx.arith_f32("fma", a, b, c, mode), 3)
    if typ == "f64":
        return float_op(st, ins, typ, nx.fma_f64, 3)
    if "cc" in ins.mods or ins.base == "madc":
        return _carry(st, ins, typ)
    part = next(p for p in ("lo", "hi", "wide") if p in ins.mods)
    fn, out = int_mul(typ, part)
    in_t = out if part == "lo" else typ
    a, b = st.src(ins.ops[1], in_t), st.src(ins.ops[2], in_t)
    c = st.src(ins.ops[3], out)
    dt = DTYPE[out]
    put = st.setter(ins.ops[0], out)
    if part == "lo":
        return lambda m: put(a * b + c, m)
    if "sat" in ins.mods:
        return lambda m: put(np.clip(fn(a, b).astype(i64) + c, -(1 << 31), (1 << 31) - 1), m)
    return lambda m: put(fn(a, b).astype(dt) + c, m)


@binder("sad")
def bind_sad(st, ins):
    typ = type_of(ins)
    return simple(st, ins, lambda a, b, c: np.maximum(a, b) - np.minimum(a, b) + c, [typ] * 3, typ)


@binder("dp4a", "dp2a")
def bind_dp4a(st, ins):
    if ins.base == "dp2a":
        raise unsupported(ins)
    ta, tb = [m for m in ins.mods if m in DTYPE][-2:]
    a, b, c = st.src(ins.ops[1], "u32"), st.src(ins.ops[2], "u32"), st.src(ins.ops[3], "u32")
    put = st.setter(ins.ops[0], "u32")
    da, db = (np.int8 if t == "s32" else u8 for t in (ta, tb))

    def ex(m):
        x = np.ascontiguousarray(np.broadcast_to(a, (st.N,))).view(da).reshape(-1, 4)
        y = np.ascontiguousarray(np.broadcast_to(b, (st.N,))).view(db).reshape(-1, 4)
        r = (x.astype(i64) * y.astype(i64)).sum(1)
        put((r + c.astype(i64)).astype(u32), m)

    return ex


def int_div(typ, rem):
    signed = typ[0] == "s"
    w = WIDTH[typ]
    ut = UDTYPE[w]

    def f(a, b):
        ua, ub = a.view(ut), b.view(ut)
        if signed:
            na, nb = a < 0, b < 0
            ua = np.where(na, ut(0) - ua, ua)
            ub = np.where(nb, ut(0) - ub, ub)
        zero = ub == 0
        safe = np.where(zero, ut(1), ub)
        if rem:
            r = np.where(zero, ua, ua % safe)
            return np.where(na, ut(0) - r, r) if signed else r
        q = ua // safe
        if signed:
            q = np.where(na ^ nb, ut(0) - q, q)
        return np.where(zero, ut(np.iinfo(ut).max), q)

    return f


@binder("div")
def bind_div(st, ins):
    typ = type_of(ins)
    if typ in ("f32", "f64"):
        mode = rounding(ins)
        if mode not in (None, "rn"):
            if typ == "f64":
                raise unsupported(ins, "directed rounding of f64")

            def directed(a, b):
                a, b = a.astype(f64), b.astype(f64)
                q = a / b
                e = nx.fma_f64(-q, b, a) / b
                return nx.narrow(q, np.where(np.isfinite(e), e, 0.0), f32, mode)

            return float_op(st, ins, typ, directed, 2)
        return float_op(st, ins, typ, np.divide, 2)
    return simple(st, ins, int_div(typ, False), [typ] * 2, "u" + str(WIDTH[typ]))


@binder("rem")
def bind_rem(st, ins):
    typ = type_of(ins)
    return simple(st, ins, int_div(typ, True), [typ] * 2, "u" + str(WIDTH[typ]))


@binder("abs")
def bind_abs(st, ins):
    typ = type_of(ins)
    masks = {
        "f32": ("b32", u32(0x7FFFFFFF)),
        "f64": ("b64", u64((1 << 63) - 1)),
        "f16": ("b16", u16(0x7FFF)),
        "bf16": ("b16", u16(0x7FFF)),
        "f16x2": ("b32", u32(0x7FFF7FFF)),
        "bf16x2": ("b32", u32(0x7FFF7FFF)),
    }
    if typ in masks:
        bt, k = masks[typ]
        if typ == "f32" and "ftz" in ins.mods:
            return float_op(st, ins, typ, np.abs, 1)
        return simple(st, ins, lambda a: a & k, [bt], bt)
    return simple(st, ins, np.abs, [typ], typ)


@binder("neg")
def bind_neg(st, ins):
    typ = type_of(ins)
    masks = {
        "f32": ("b32", u32(0x80000000)),
        "f64": ("b64", u64(1 << 63)),
        "f16": ("b16", u16(0x8000)),
        "bf16": ("b16", u16(0x8000)),
        "f16x2": ("b32", u32(0x80008000)),
        "bf16x2": ("b32", u32(0x80008000)),
    }
    if typ in masks:
        bt, k = masks[typ]
        if typ == "f32" and "ftz" in ins.mods:
            return float_op(st, ins, typ, np.negative, 1)
        return simple(st, ins, lambda a: a ^ k, [bt], bt)
    ut = "u" + str(WIDTH[typ])
    zero = DTYPE[ut](0)
    return simple(st, ins, lambda a: zero - a, [ut], ut)


@binder("min", "max")
def bind_minmax(st, ins):
    typ = type_of(ins)
    is_min = ins.base == "min"
    nan = "NaN" in ins.mods
    if "xorsign" in ins.mods:
        raise unsupported(ins)
    fn = nx.fmin if is_min else nx.fmax
    nsrc = len(ins.ops) - 1
    if typ in (*HALF, "f32", "f64"):

        def f(*a):
            r = fn(a[0], a[1], nan)
            return fn(r, a[2], nan) if len(a) > 2 else r

        if typ in HALF:
            return half_op(st, ins, typ, f, nsrc)
        return float_op(st, ins, typ, f, nsrc)
    if "relu" in ins.mods:
        return simple(
            st,
            ins,
            lambda a, b: np.maximum(
                np.minimum(a, b) if is_min else np.maximum(a, b), DTYPE[typ](0)
            ),
            [typ] * 2,
            typ,
        )
    return simple(st, ins, np.minimum if is_min else np.maximum, [typ] * 2, typ)


def _unary_math(fn64):
    """Evaluate in float64, round once to the argument's type."""
    return lambda x: fn64(x.astype(f64)).astype(x.dtype)


MATH = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "rcp": lambda x: 1.0 / x,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "sqrt": np.sqrt,
}


@binder(*MATH)
def bind_math(st, ins):
    typ = type_of(ins)
    fn = MATH[ins.base]
    if typ in HALF:
        return half_op(st, ins, typ, lambda x: fn(x.astype(f64)), 1)
    mode = rounding(ins)
    if mode not in (None, "rn"):
        if ins.base == "sqrt" and typ == "f32":

            def directed(x):
                s = np.sqrt(x.astype(f64))
                e = nx.fma_f64(-s, s, x.astype(f64)) / np.where(s > 0, 2 * s, 1)
                return nx.narrow(s, np.where(np.isfinite(e), e, 0.0), f32, mode)

            return float_op(st, ins, typ, directed, 1)
        if ins.base == "rcp" and typ == "f32":

            def directed(x):
                x = x.astype(f64)
                q = 1.0 / x
                e = nx.fma_f64(-q, x, np.ones_like(x)) / x
                return nx.narrow(q, np.where(np.isfinite(e), e, 0.0), f32, mode)

            return float_op(st, ins, typ, directed, 1)
        raise unsupported(ins, "directed rounding")
    return float_op(st, ins, typ, _unary_math(fn) if typ == "f32" else fn, 1)


@binder("copysign")
def bind_copysign(st, ins):
    typ = type_of(ins)
    return simple(st, ins, lambda a, b: np.copysign(b, a), [typ] * 2, typ)


@binder("testp")
def bind_testp(st, ins):
    typ = type_of(ins)
    tiny = f32(1.17549435e-38) if typ == "f32" else 2.2250738585072014e-308
    fns = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda x: ~np.isnan(x),
        "notanumber": np.isnan,
        "normal": lambda x: np.isfinite(x) & (np.abs(x) >= tiny),
        "subnormal": lambda x: (np.abs(x) < tiny) & (x != 0),
    }
    return run_fn(fns[ins.mods[0]], [st.src(ins.ops[1], typ)], st.setter(ins.ops[0], "pred"))
