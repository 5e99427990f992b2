"""Comparisons and selections."""

from __future__ import annotations

import numpy as np

from . import numerics as nx
from .binding import binder, half_values, pack2, run_ufunc, type_of, unpack2, unsupported
from .state import DTYPE
from .syntax import Pair, Reg, Sink

u8, u16, u32, u64 = np.uint8, np.uint16, np.uint32, np.uint64
i8, i16, i32, i64 = np.int8, np.int16, np.int32, np.int64
f16, f32, f64 = np.float16, np.float32, np.float64


def compare(op, typ):
    """Comparison function on arrays of the type's numpy dtype."""
    uf = {
        "eq": np.equal,
        "ne": np.not_equal,
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
        "lo": np.less,
        "ls": np.less_equal,
        "hi": np.greater,
        "hs": np.greater_equal,
    }
    is_float = typ in ("f16", "bf16", "f32", "f64")
    if not is_float:
        return uf[op]
    if op == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if op == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if op == "ne":
        return lambda a, b: (a != b) & ~(np.isnan(a) | np.isnan(b))
    if op.endswith("u") and op[:-1] in uf:
        base = uf[op[:-1]]
        return lambda a, b: base(a, b) | np.isnan(a) | np.isnan(b)
    return uf[op]


CMP = (
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "lo",
    "ls",
    "hi",
    "hs",
    "num",
    "nan",
    "equ",
    "neu",
    "ltu",
    "leu",
    "gtu",
    "geu",
)
BOOL = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def float_source(st, op, typ):
    """Function returning float values of an operand (halves become f32)."""
    s = st.src(op, typ)
    if typ in ("f16", "bf16"):
        return lambda: half_values(s, typ)
    return lambda: s


@binder("setp")
def bind_setp(st, ins):
    typ = type_of(ins)
    cmp = ins.mods[0]
    if cmp not in CMP:
        raise unsupported(ins)
    boolop = next((BOOL[m] for m in ins.mods if m in BOOL), None)
    third = st.pred(ins.ops[3]) if boolop else None
    dst = ins.ops[0]
    flush = typ == "f32" and "ftz" in ins.mods
    if typ in ("f16x2", "bf16x2"):
        fn = compare(cmp, "f32")
        a, b = st.src(ins.ops[1], "b32"), st.src(ins.ops[2], "b32")
        puts = [
            st.setter(x, "pred")
            for x in ((dst.first, dst.second) if isinstance(dst, Pair) else (dst, Sink()))
        ]

        def ex2(m):
            pa, pb = unpack2(a, typ), unpack2(b, typ)
            res = [fn(x, y) for x, y in zip(pa, pb, strict=True)]
            if boolop:
                res = [boolop(r, third()) for r in res]
            for put, r in zip(puts, res, strict=True):
                put(r, m)

        return ex2
    fn = compare(cmp, typ)
    if (
        isinstance(dst, Reg)
        and boolop is None
        and isinstance(fn, np.ufunc)
        and not flush
        and typ not in ("f16", "bf16")
    ):
        return run_ufunc(
            fn, [st.src(ins.ops[1], typ), st.src(ins.ops[2], typ)], st.dst(dst, "pred")
        )
    a, b = float_source(st, ins.ops[1], typ), float_source(st, ins.ops[2], typ)
    put2 = None
    if isinstance(dst, Pair):
        put, put2 = st.setter(dst.first, "pred"), st.setter(dst.second, "pred")
    else:
        put = st.setter(dst, "pred")

    def ex(m):
        x, y = a(), b()
        if flush:
            x, y = nx.ftz(x), nx.ftz(y)
        r = fn(x, y)
        if boolop:
            t = third().copy() if put2 else third()
            first = boolop(r, t)
            if put2:
                second = boolop(~r, t)
                put2(second, m)
            put(first, m)
        else:
            inv = ~r if put2 else None
            put(r, m)
            if put2:
                put2(inv, m)

    return ex


@binder("set")
def bind_set(st, ins):
    types = [m for m in ins.mods if m in DTYPE]
    dt, typ = types[0], types[-1]
    cmp = ins.mods[0]
    boolop = next((BOOL[m] for m in ins.mods if m in BOOL), None)
    third = st.pred(ins.ops[3]) if boolop else None
    if typ in ("f16x2", "bf16x2"):
        fn = compare(cmp, "f32")
        a, b = st.src(ins.ops[1], "b32"), st.src(ins.ops[2], "b32")
        put = st.setter(ins.ops[0], "b32")
        one = {"f16x2": 0x3C00, "bf16x2": 0x3F80}.get(dt, 0xFFFF)

        def ex2(m):
            pa, pb = unpack2(a, typ), unpack2(b, typ)
            res = [fn(x, y) for x, y in zip(pa, pb, strict=True)]
            if boolop:
                res = [boolop(r, third()) for r in res]
            put(pack2(*[np.where(r, u16(one), u16(0)) for r in res]), m)

        return ex2
    fn = compare(cmp, typ)
    a, b = float_source(st, ins.ops[1], typ), float_source(st, ins.ops[2], typ)
    put = st.setter(ins.ops[0], dt)
    true = {
        "f32": f32(1),
        "f16": f16(1),
        "bf16": u16(0x3F80),
        "u32": u32(0xFFFFFFFF),
        "s32": i32(-1),
        "u16": u16(0xFFFF),
        "s16": i16(-1),
    }[dt]
    false = DTYPE[dt](0)

    def ex(m):
        r = fn(a(), b())
        if boolop:
            r = boolop(r, third())
        put(np.where(r, true, false), m)

    return ex


@binder("selp")
def bind_selp(st, ins):
    typ = type_of(ins)
    a, b = st.src(ins.ops[1], typ), st.src(ins.ops[2], typ)
    p = st.pred(ins.ops[3])
    put = st.setter(ins.ops[0], typ)
    return lambda m: put(np.where(p(), a, b), m)


@binder("slct")
def bind_slct(st, ins):
    types = [m for m in ins.mods if m in DTYPE]
    a, b = st.src(ins.ops[1], types[0]), st.src(ins.ops[2], types[0])
    c = st.src(ins.ops[3], types[1])
    put = st.setter(ins.ops[0], types[0])
    return lambda m: put(np.where(c >= 0, a, b), m)
