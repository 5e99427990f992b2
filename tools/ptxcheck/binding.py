"""What the instructions' modules share: the tables of binders, and closures over operands.

A binder takes (state, instruction) and returns a closure ex(mask) that runs the instruction
for all lanes (mask None) or for the lanes in the mask.  BINDERS holds those of instructions
that each thread runs by itself, SYNC those that the threads of a warp run together: the
executor makes sure that all threads named by the member mask (all live threads of the warp
for `.aligned` forms) are present before it runs the closure.
"""

from __future__ import annotations

import numpy as np

from . import numerics as nx
from .errors import UnsupportedInstruction
from .state import DTYPE, WIDTH
from .syntax import Reg

u16, u32, f16, f32, f64 = np.uint16, np.uint32, np.float16, np.float32, np.float64
copyto = np.copyto
BINDERS, SYNC = {}, {}


def binder(*names):
    """Registers the binder of these instructions."""

    def register(fn):
        BINDERS.update(dict.fromkeys(names, fn))
        return fn

    return register


def sync(*names):
    """Registers the binder of these warp-synchronous instructions."""

    def register(fn):
        SYNC.update(dict.fromkeys(names, fn))
        return fn

    return register


def unsupported(ins, why=""):
    return UnsupportedInstruction(f"{ins.where()}{' - ' + why if why else ''}")


def type_of(ins):
    for m in reversed(ins.mods):
        if m in DTYPE:
            return m
    raise unsupported(ins, "no type suffix")


def rounding(ins):
    for m in ins.mods:
        if m in ("rn", "rz", "rm", "rp"):
            return m
    return None


def run_ufunc(uf, srcs, d):
    """Closure for a ufunc whose sources and destination share a dtype."""
    if len(srcs) == 2:
        a, b = srcs

        def ex(m):
            if m is None:
                uf(a, b, out=d)
            else:
                copyto(d, uf(a, b), where=m)
    else:
        (a,) = srcs

        def ex(m):
            if m is None:
                uf(a, out=d)
            else:
                copyto(d, uf(a), where=m)

    return ex


def run_fn(fn, srcs, put):
    """Closure for a general function."""
    if len(srcs) == 1:
        (a,) = srcs
        return lambda m: put(fn(a), m)
    if len(srcs) == 2:
        a, b = srcs
        return lambda m: put(fn(a, b), m)
    if len(srcs) == 3:
        a, b, c = srcs
        return lambda m: put(fn(a, b, c), m)
    return lambda m: put(fn(*srcs), m)


def simple(st, ins, fn, in_types, out_type):
    srcs = [st.src(o, t) for o, t in zip(ins.ops[1:], in_types, strict=False)]
    if (
        isinstance(fn, np.ufunc)
        and isinstance(ins.ops[0], Reg)
        and DTYPE[out_type] == DTYPE[in_types[0]]
        and ins.ops[0].width == WIDTH[out_type]
    ):
        return run_ufunc(fn, srcs, st.dst(ins.ops[0], out_type))
    return run_fn(fn, srcs, st.setter(ins.ops[0], out_type))


def unpack2(bits, kind):
    """u32 -> two float32 arrays (low, high) for f16x2 / bf16x2."""
    lo, hi = (bits & u32(0xFFFF)).astype(u16), (bits >> u32(16)).astype(u16)
    if kind == "f16x2":
        return lo.view(f16).astype(f32), hi.view(f16).astype(f32)
    return nx.bf16_to_f32(lo), nx.bf16_to_f32(hi)


def half_bits(x, kind):
    """float32/float64 values -> u16 bits (nearest even)."""
    if kind.startswith("bf16"):
        return nx.f64_to_bf16(x) if x.dtype == f64 else nx.f32_to_bf16(x)
    h = np.ascontiguousarray(x.astype(f16)).view(u16)
    nan = np.isnan(x)
    return np.where(nan, nx.CANON16, h) if nan.any() else h


def pack2(lo, hi):
    return lo.astype(u32) | (hi.astype(u32) << u32(16))


def half_values(bits, kind):
    return bits.astype(f32) if kind == "f16" else nx.bf16_to_f32(bits)


def half_op(st, ins, typ, fn, nsrc):
    """fn works on float32 arrays and returns float32 or float64."""
    mods = ins.mods
    sat, relu = "sat" in mods, "relu" in mods

    def finish(x, kind):
        if sat:
            x = nx.saturate(x)
        if relu:
            x = np.where(np.isnan(x), x, np.maximum(x, 0))
        return half_bits(x, kind)

    if typ in ("f16", "bf16"):
        srcs = [st.src(o, typ) for o in ins.ops[1 : 1 + nsrc]]
        put = st.setter(ins.ops[0], "b16")
        return lambda m: put(finish(fn(*[half_values(s, typ) for s in srcs]), typ), m)
    srcs = [st.src(o, "b32") for o in ins.ops[1 : 1 + nsrc]]
    put = st.setter(ins.ops[0], "b32")

    def ex(m):
        pairs = [unpack2(s, typ) for s in srcs]
        lo = finish(fn(*[p[0] for p in pairs]), typ)
        hi = finish(fn(*[p[1] for p in pairs]), typ)
        put(pack2(lo, hi), m)

    return ex


HALF = ("f16", "bf16", "f16x2", "bf16x2")


def float_op(st, ins, typ, fn, nsrc):
    """f32/f64 operation with optional .ftz and .sat."""
    use_ftz, sat = "ftz" in ins.mods, "sat" in ins.mods
    if not use_ftz and not sat:
        return simple(st, ins, fn, [typ] * nsrc, typ)

    def wrapped(*a):
        if use_ftz:
            a = [nx.ftz(x) for x in a]
        r = fn(*a)
        if use_ftz:
            r = nx.ftz(r)
        return nx.saturate(r) if sat else r

    return simple(st, ins, wrapped, [typ] * nsrc, typ)
