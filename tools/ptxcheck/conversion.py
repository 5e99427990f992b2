"""Conversion between number formats: cvt."""

from __future__ import annotations

import numpy as np

from . import numerics as nx
from .binding import binder, half_bits, half_values, pack2, unpack2, unsupported
from .state import DTYPE

u8, u16, u32, u64 = np.uint8, np.uint16, np.uint32, np.uint64
i8, i16, i32, i64 = np.int8, np.int16, np.int32, np.int64
f16, f32, f64 = np.float16, np.float32, np.float64


CVT_TYPES = set(DTYPE) | {"e4m3x2", "e5m2x2"}


@binder("cvt")
def bind_cvt(st, ins):
    mods = ins.mods
    types = [m for m in mods if m in CVT_TYPES]
    if len(types) != 2 or any(m in ("rs",) for m in mods):
        raise unsupported(ins)
    to, frm = types
    mode = next(
        (m for m in mods if m in ("rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi")), None
    )
    relu, satfin, sat = "relu" in mods, "satfinite" in mods, "sat" in mods
    flush = "ftz" in mods
    if mode == "rna" and to != "tf32":
        raise unsupported(ins)

    def finish_float(x):
        if sat:
            x = nx.saturate(x)
        if relu:
            x = np.where(np.isnan(x), x, np.maximum(x, x.dtype.type(0)))
        return x

    def to_half(x, kind):
        """f32 -> f16/bf16 bits."""
        x = finish_float(x)
        if kind == "bf16":
            r = nx.f32_to_bf16(x, mode or "rn")
            top = 0x7F7F
        else:
            if mode in (None, "rn"):
                r = half_bits(x, "f16")
            else:
                r = nx.narrow(x.astype(f64), None, f16, mode).view(u16)
                r = np.where(np.isnan(x), nx.CANON16, r)
            top = 0x7BFF
        if satfin:
            inf = (r & u16(0x7FFF)) == u16(top + 1)
            r = np.where(inf, (r & u16(0x8000)) | u16(top), r)
        return r

    # packed results from two f32
    if to in ("f16x2", "bf16x2") and frm == "f32" and len(ins.ops) == 3:
        hi, lo = st.src(ins.ops[1], "f32"), st.src(ins.ops[2], "f32")
        put = st.setter(ins.ops[0], "b32")
        kind = to[:-2]
        return lambda m: put(pack2(to_half(lo, kind), to_half(hi, kind)), m)
    if to in ("e4m3x2", "e5m2x2"):
        put = st.setter(ins.ops[0], "b16")
        if frm == "f32":
            hi, lo = st.src(ins.ops[1], "f32"), st.src(ins.ops[2], "f32")

            def get():
                return (lo, hi)
        else:
            s = st.src(ins.ops[1], "b32")

            def get():
                return unpack2(s, frm)

        def to8(m):
            lo_, hi_ = (finish_float(x) for x in get())
            put(
                nx.to_fp8(lo_, to[:4]).astype(u16) | (nx.to_fp8(hi_, to[:4]).astype(u16) << u16(8)),
                m,
            )

        return to8
    if frm in ("e4m3x2", "e5m2x2"):
        s = st.src(ins.ops[1], "b16")
        put = st.setter(ins.ops[0], "b32")
        tab = nx.FP8[frm[:4]].astype(f32)
        return lambda m: put(
            pack2(
                *[
                    half_bits(finish_float(tab[x.astype(i64)]), to)
                    for x in (s & u16(0xFF), s >> u16(8))
                ]
            ),
            m,
        )
    if to == "tf32":
        s = st.src(ins.ops[1], "b32")
        put = st.setter(ins.ops[0], "b32")

        def tf(m):
            x = s
            if relu:
                x = np.where((x >> u32(31)) != 0, u32(0), x)
            put(nx.f32_to_tf32(x, mode or "rna"), m)

        return tf

    f_to, f_frm = to in ("f16", "bf16", "f32", "f64"), frm in ("f16", "bf16", "f32", "f64")
    s = st.src(ins.ops[1], frm)
    put = st.setter(ins.ops[0], "b16" if to in ("f16", "bf16") else to)

    def value(x):
        if frm in ("f16", "bf16"):
            return half_values(x, frm)
        return nx.ftz(x) if flush and frm == "f32" else x

    if f_frm and not f_to:
        return lambda m: put(nx.float_to_int(value(s), mode or "rzi", to), m)
    if not f_frm and f_to:
        if to == "bf16":
            return lambda m: put(nx.f64_to_bf16(s.astype(f64), mode or "rn"), m)
        if to == "f16":
            return lambda m: put(np.ascontiguousarray(nx.int_to_float(s, f16, mode)).view(u16), m)
        dt = DTYPE[to]
        return lambda m: put(finish_float(nx.int_to_float(s, dt, mode)), m)
    if not f_frm and not f_to:
        if sat:
            lo, hi = nx.INT_RANGE[to.replace("b", "u")]
            slo, shi = nx.INT_RANGE[frm.replace("b", "u")]
            lo, hi = max(lo, slo), min(hi, shi)
            return lambda m: put(np.clip(s, DTYPE[frm](lo), DTYPE[frm](hi)).astype(DTYPE[to]), m)
        dt = DTYPE[to]
        return lambda m: put(s.astype(dt), m)

    # float -> float
    def ff(m):
        x = value(s)
        if mode in ("rni", "rzi", "rmi", "rpi"):
            x = nx.round_int(x, mode)
        if to == "f64":
            r = finish_float(x.astype(f64))
        elif to == "f32":
            if x.dtype == f64:
                r = (
                    x.astype(f32)
                    if mode in (None, "rn") or mode.endswith("i")
                    else nx.narrow(x, None, f32, mode)
                )
            else:
                r = x
            r = finish_float(r)
            if flush:
                r = nx.ftz(r)
        else:
            if x.dtype == f64:
                if mode not in (None, "rn"):
                    raise unsupported(ins)
                r = half_bits(finish_float(x), to)
            else:
                r = to_half(x, to)
        put(r, m)

    return ff
