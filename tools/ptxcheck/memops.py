"""Loads and stores, fences and hints."""

from __future__ import annotations

import numpy as np

from .access import Access, access_type, addresser, lanes_of, space_of
from .binding import binder, unsupported
from .state import DTYPE, UDTYPE, WIDTH, address_parts
from .syntax import Imm, Vec

u64 = np.uint64


@binder("ld", "ldu")
def bind_ld(st, ins):
    typ = access_type(ins)
    space = space_of(ins)
    vec = next((int(m[1]) for m in ins.mods if m in ("v2", "v4", "v8")), 1)
    dst = ins.ops[0]
    items = dst.items if isinstance(dst, Vec) else [dst]
    if len(items) != vec:
        raise unsupported(ins, "vector size")
    _, off, var = address_parts(st, ins.ops[1])
    if space == "param":
        if var is not None and var.space == "param" and var not in st.kernel.local_params:
            return _ld_param(st, ins, typ, items, off)
        if var is not None:
            space = "local"
        elif ins.func != st.kernel.name:
            raise unsupported(ins, "indexed parameter of a device function")
    if space == "const":
        space = "global"
    acc = Access(st, ins, space, typ, vec)
    addr = addresser(st, ins.ops[1])
    dt = DTYPE[typ]
    puts = [st.scatter(o, typ) for o in items]

    def ex(m):
        some, lanes = lanes_of(st, m)
        if not some:
            return
        v = acc.load(addr(lanes), lanes).view(dt)
        if vec == 1:
            puts[0](v, lanes)
        else:
            for k in range(vec):
                puts[k](v[:, k], lanes)

    return ex


def _ld_param(st, ins, typ, items, off):
    """Kernel parameter at a constant offset: the same for every lane."""
    n = WIDTH[typ] // 8
    if off < 0 or off + n * len(items) > len(st.param):
        raise unsupported(ins, "parameter offset out of range")
    puts = [st.setter(o, typ) for o in items]
    pieces = [st.param[off + k * n : off + (k + 1) * n] for k in range(len(items))]
    dt = DTYPE[typ]

    def ex(m):
        for put, p in zip(puts, pieces, strict=True):
            put(np.frombuffer(p.tobytes(), dt), m)

    return ex


@binder("st")
def bind_st(st, ins):
    typ = access_type(ins)
    space = space_of(ins)
    vec = next((int(m[1]) for m in ins.mods if m in ("v2", "v4", "v8")), 1)
    src = ins.ops[1]
    items = src.items if isinstance(src, Vec) else [src]
    if len(items) != vec:
        raise unsupported(ins, "vector size")
    if any(m in ("async", "bulk") for m in ins.mods):
        raise unsupported(ins)
    if space == "param":
        space = "local"
    ut = "b" + str(WIDTH[typ])
    if any(isinstance(o, Imm) and o.kind != "i" for o in items):
        srcs = [np.ascontiguousarray(st.src(o, typ)).view(UDTYPE[WIDTH[typ]]) for o in items]
    else:
        srcs = [st.src(o, ut) for o in items]
    acc = Access(st, ins, space, typ, vec)
    addr = addresser(st, ins.ops[0])
    dt = UDTYPE[WIDTH[typ]]

    def pick(s, lanes, n):
        if len(s) == 1:
            return np.full(n, s[0], dt)
        return s if lanes is None else s[lanes]

    def ex(m):
        some, lanes = lanes_of(st, m)
        if not some:
            return
        a = addr(lanes)
        n = len(a)
        if vec == 1:
            val = pick(srcs[0], lanes, n)
        else:
            val = np.empty((n, vec), dt)
            for k in range(vec):
                val[:, k] = pick(srcs[k], lanes, n)
        acc.store(a, val, lanes)

    return ex


def _nothing(st, ins):
    return lambda m: None


@binder("fence", "membar")
def bind_fence(st, ins):
    if "proxy" in ins.mods:
        if any(x.split("::")[0] == "async" for x in ins.mods):
            return lambda m: (
                st.checker.proxy_fence(st.live if m is None else m)
                if st.checker is not None and st.checker.races
                else None
            )
        return lambda m: None
    if st.cluster.size == 1 or "cta" in ins.mods:
        return lambda m: None
    return lambda m: st.cluster.fence(st.live if m is None else m, "mbarrier_init" in ins.mods)


for _name in (
    "prefetch",
    "prefetchu",
    "discard",
    "applypriority",
    "nanosleep",
    "griddepcontrol",
    "pmevent",
):
    binder(_name)(_nothing)


@binder("createpolicy")
def bind_createpolicy(st, ins):
    put = st.setter(ins.ops[0], "b64")
    zero = np.zeros(1, u64)
    return lambda m: put(zero, m)
