"""Moves between registers, address spaces and their addresses."""

from __future__ import annotations

import time

import numpy as np

from .binding import binder, copyto, run_fn, simple, type_of, unsupported
from .memory import LOCAL_BASE, PARAM_BASE, SHARED_BASE
from .state import DTYPE, UDTYPE, WIDTH
from .syntax import Reg, SReg, Sym, Vec

u8, u16, u32, u64 = np.uint8, np.uint16, np.uint32, np.uint64
i8, i16, i32, i64 = np.int8, np.int16, np.int32, np.int64
f16, f32, f64 = np.float16, np.float32, np.float64


@binder("mov")
def bind_mov(st, ins):
    typ = type_of(ins)
    dst, src = ins.ops[0], ins.ops[1]
    w = WIDTH[typ]
    if isinstance(src, Vec):  # pack
        part = w // len(src.items)
        srcs = [st.src(o, "b" + str(part)) for o in src.items]
        row = st.dst(dst, "b" + str(w)).view(UDTYPE[part])
        views = [row[k :: len(srcs)] for k in range(len(srcs))]
        alias = any(isinstance(o, Reg) and o is dst for o in src.items)

        def pack(m):
            vals = [s.copy() for s in srcs] if alias else srcs
            for v, s in zip(views, vals, strict=True):
                if m is None:
                    copyto(v, s)
                else:
                    copyto(v, s, where=m)

        return pack
    if isinstance(dst, Vec):  # unpack
        n = len(dst.items)
        part = w // n
        full = st.src(src, "b" + str(w))
        puts = [st.setter(o, "b" + str(part)) for o in dst.items]

        def unpack(m):
            v = full.view(UDTYPE[part])
            parts = [v[k::n] for k in range(n)]
            for put, x in zip(puts, parts, strict=True):
                put(x, m)

        return unpack
    if isinstance(src, SReg) and src.name.startswith(("clock", "globaltimer")):
        put = st.setter(dst, typ)
        dt = DTYPE[typ]
        name = src.name

        def clock(m):
            if name.startswith("clock"):
                v = st.steps * 16
                v = v >> 32 if name == "clock_hi" else v
            else:
                v = time.time_ns()
                v = v >> 32 if name == "globaltimer_hi" else v
            put(np.array([v & ((1 << w) - 1)], UDTYPE[w]).view(dt), m)

        return clock
    if isinstance(src, Sym) and isinstance(src.var, str):
        raise unsupported(ins, "address of a function")
    a = st.src(src, typ)
    d = st.dst(dst, typ)

    def ex(m):
        if m is None:
            copyto(d, a)
        else:
            copyto(d, a, where=m)

    return ex


@binder("cvta")
def bind_cvta(st, ins):
    space = next(
        (
            m.split("::")[0]
            for m in ins.mods
            if m.split("::")[0] in ("global", "shared", "local", "const", "param")
        ),
        None,
    )
    base = {"shared": SHARED_BASE, "local": LOCAL_BASE, "param": PARAM_BASE}.get(space, 0)
    typ = type_of(ins)
    k = DTYPE[typ](base) if WIDTH[typ] == 64 else DTYPE[typ](0)
    if "to" in ins.mods:
        return simple(st, ins, lambda a: a - k, [typ], typ)
    return simple(st, ins, lambda a: a + k, [typ], typ)


@binder("isspacep")
def bind_isspacep(st, ins):
    space = ins.mods[0].split("::")[0]
    code = {"shared": 1, "local": 2, "param": 3}.get(space, 0)
    if space == "shared" and st.cluster.size > 1 and ins.mods[0] != "shared::cluster":
        own = st.cluster.rank_of.astype(np.uint64) + u64(1)  # see cluster.py
        return run_fn(
            lambda a: (
                ((a >> u64(56)) == u64(code)) & ((a >> u64(24) & u64(0xFF)) == u64(0))
                | ((a >> u64(24)) == (own | u64(1 << 32)))
            ),
            [st.src(ins.ops[1], "u64")],
            st.setter(ins.ops[0], "pred"),
        )
    return run_fn(
        lambda a: (a >> u64(56)) == u64(code),
        [st.src(ins.ops[1], "u64")],
        st.setter(ins.ops[0], "pred"),
    )
