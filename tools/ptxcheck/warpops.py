"""Shuffles, votes and other exchanges between the threads of a warp; matrices of 8 x 8."""

from __future__ import annotations

import numpy as np

from .access import Access, addresser
from .binding import binder, sync, unsupported
from .state import DTYPE
from .syntax import Imm, Pair, Sink

u16, u32, i64 = np.uint16, np.uint32, np.int64


def full_mask(st, m):
    """Boolean mask of the participating lanes."""
    return m if m is not None else st.live


def warp_bits(mask):
    """(N,) bool -> (W, 1) uint32 with one bit per lane of each warp."""
    b = np.packbits(mask.reshape(-1, 32), axis=1, bitorder="little")
    return b.view(u32)


def member_operand(ins):
    """The membermask operand of a warp-synchronous instruction, or None when
    every live thread of the warp must take part."""
    base = ins.base
    if base in ("shfl", "vote", "match", "redux") and "sync" in ins.mods:
        return ins.ops[-1]
    if base == "bar" and "warp" in ins.mods:
        return ins.ops[0]
    return None


@sync("shfl")
def bind_shfl(st, ins):
    if "sync" not in ins.mods:
        raise unsupported(ins, "only shfl.sync")
    mode = ins.mods[1]
    dst = ins.ops[0]
    pput = None
    if isinstance(dst, Pair):
        pput = st.setter(dst.second, "pred")
        dst = dst.first
    put = st.setter(dst, "b32")
    a, b, c = st.src(ins.ops[1], "b32"), st.src(ins.ops[2], "u32"), st.src(ins.ops[3], "u32")
    lane = st.sregs["laneid"].astype(i64)
    base = np.arange(st.N) - lane

    def index():
        bv = (b & u32(31)).astype(i64)
        cv = (c & u32(31)).astype(i64)
        seg = ((c >> u32(8)) & u32(31)).astype(i64)
        max_lane = (lane & seg) | (cv & ~seg)
        min_lane = lane & seg
        if mode == "up":
            j = lane - bv
            ok = j >= max_lane
        elif mode == "down":
            j = lane + bv
            ok = j <= max_lane
        elif mode == "bfly":
            j = lane ^ bv
            ok = j <= max_lane
        else:
            j = min_lane | (bv & ~seg)
            ok = j <= max_lane
        return base + np.where(ok, j, lane), ok

    cached = None
    if isinstance(ins.ops[2], Imm) and isinstance(ins.ops[3], Imm):
        cached = index()

    def ex(m):
        idx, ok = cached or index()
        v = a[idx] if len(a) > 1 else a
        if pput is not None:
            pput(ok, m)
        put(v, m)

    return ex


@sync("vote")
def bind_vote(st, ins):
    mode = next(m for m in ins.mods if m in ("all", "any", "uni", "ballot"))
    p = st.pred(ins.ops[1])
    put = st.setter(ins.ops[0], "b32" if mode == "ballot" else "pred")
    member = st.src(ins.ops[-1], "u32") if "sync" in ins.mods else np.full(1, 0xFFFFFFFF, u32)

    def ex(m):
        part = full_mask(st, m)
        there = np.repeat(warp_bits(part).ravel(), 32) & member
        yes = np.repeat(warp_bits(np.broadcast_to(p(), (st.N,)) & part).ravel(), 32) & member
        if mode == "ballot":
            r = yes
        elif mode == "any":
            r = yes != 0
        elif mode == "all":
            r = yes == there
        else:
            r = (yes == there) | (yes == 0)
        put(r, m)

    return ex


def per_member(st, ins, ex):
    """Run `ex` once per distinct member mask, so that disjoint sub-warp groups
    at one instruction do not see each other."""
    member = st.src(ins.ops[-1], "u32")
    if len(member) == 1:
        return ex

    def split(m):
        part = full_mask(st, m)
        vals = np.unique(member[part])
        if len(vals) <= 1:
            return ex(m)
        keys = member.copy()
        for v in vals:
            ex(part & (keys == v))

    return split


@sync("match")
def bind_match(st, ins):
    typ = "b64" if "b64" in ins.mods else "b32"
    a = st.src(ins.ops[1], typ)
    dst = ins.ops[0]
    pput = None
    if isinstance(dst, Pair):
        pput = st.setter(dst.second, "pred")
        dst = dst.first
    put = st.setter(dst, "b32")
    every = "all" in ins.mods

    def ex(m):
        part = full_mask(st, m).reshape(-1, 32)
        v = np.broadcast_to(a, (st.N,)).reshape(-1, 32)
        eq = (v[:, :, None] == v[:, None, :]) & part[:, None, :]
        bits = np.packbits(eq, axis=2, bitorder="little").view(u32)[:, :, 0]
        if every:
            want = warp_bits(part.ravel())
            ok = bits == want
            if pput is not None:
                pput(ok.ravel(), m)
            bits = np.where(ok, bits, u32(0))
        put(bits.ravel(), m)

    return per_member(st, ins, ex)


@sync("redux")
def bind_redux(st, ins):
    op = ins.mods[1]
    typ = next((m for m in reversed(ins.mods) if m in DTYPE), "b32")
    if typ == "f32":
        raise unsupported(ins)
    a = st.src(ins.ops[1], typ)
    put = st.setter(ins.ops[0], typ)
    dt = DTYPE[typ]
    info = np.iinfo(dt)
    uf, ident = {
        "add": (np.add, 0),
        "min": (np.minimum, info.max),
        "max": (np.maximum, info.min),
        "and": (np.bitwise_and, 0xFFFFFFFF),
        "or": (np.bitwise_or, 0),
        "xor": (np.bitwise_xor, 0),
    }[op]

    def ex(m):
        part = full_mask(st, m)
        v = np.where(part, a, dt(ident)).reshape(-1, 32)
        put(np.repeat(uf.reduce(v, axis=1, dtype=dt), 32), m)

    return per_member(st, ins, ex)


@sync("bar.warp")
def bind_warp_barrier(st, ins):
    return lambda m: None


@sync("elect")
def bind_elect(st, ins):
    dst = ins.ops[0]
    put = st.setter(dst.first, "b32") if not isinstance(dst.first, Sink) else None
    pput = st.setter(dst.second, "pred")

    def ex(m):
        part = full_mask(st, m).reshape(-1, 32)
        first = part.argmax(1)
        if put:
            put(np.repeat(first.astype(u32), 32), m)
        pput((np.arange(32) == first[:, None]).ravel(), m)

    return ex


@binder("activemask")
def bind_activemask(st, ins):
    put = st.setter(ins.ops[0], "b32")
    return lambda m: put(np.repeat(warp_bits(full_mask(st, m)), 32, axis=1).ravel(), m)


def active_warps(st, m):
    """None when all warps take part, else indices of the warps that do."""
    act = st.active(m)
    if act is None:
        return None
    w = act.reshape(-1, 32).any(1)
    return None if w.all() else np.flatnonzero(w)


@sync("ldmatrix")
def bind_ldmatrix(st, ins):
    if "m8n8" not in ins.mods or "b16" not in ins.mods:
        raise unsupported(ins)
    n = next(int(x[1]) for x in ins.mods if x in ("x1", "x2", "x4"))
    trans = "trans" in ins.mods
    dst = ins.ops[0].items if hasattr(ins.ops[0], "items") else [ins.ops[0]]
    acc = Access(st, ins, "shared" if any("shared" in x for x in ins.mods) else None, "b32", 4)
    addr = addresser(st, ins.ops[1])
    rows = [st.row(d).reshape(-1, 32) for d in dst]
    row_lanes = np.arange(8 * n)

    def ex(m):
        warps = active_warps(st, m)
        w = np.arange(st.W) if warps is None else warps
        lanes = (w[:, None] * 32 + row_lanes).ravel()
        data = acc.load(addr(lanes), lanes)  # (len, 4) u32
        data = np.ascontiguousarray(data).reshape(len(w), n, 8, 4)
        if trans:
            h = data.view(u16).reshape(len(w), n, 8, 8).swapaxes(2, 3)
            data = np.ascontiguousarray(h).view(u32).reshape(len(w), n, 8, 4)
        for k in range(n):
            v = data[:, k].reshape(len(w), 32)
            if warps is None:
                rows[k][...] = v
            else:
                rows[k][warps] = v

    return ex


@sync("stmatrix")
def bind_stmatrix(st, ins):
    if "m8n8" not in ins.mods or "b16" not in ins.mods:
        raise unsupported(ins)
    n = next(int(x[1]) for x in ins.mods if x in ("x1", "x2", "x4"))
    trans = "trans" in ins.mods
    src = ins.ops[1].items if hasattr(ins.ops[1], "items") else [ins.ops[1]]
    acc = Access(st, ins, "shared" if any("shared" in x for x in ins.mods) else None, "b32", 4)
    addr = addresser(st, ins.ops[0])
    rows = [st.row(s).reshape(-1, 32) for s in src]
    row_lanes = np.arange(8 * n)

    def ex(m):
        warps = active_warps(st, m)
        w = np.arange(st.W) if warps is None else warps
        lanes = (w[:, None] * 32 + row_lanes).ravel()
        data = np.stack([r[w] for r in rows], axis=1).reshape(len(w), n, 8, 4)
        if trans:
            h = np.ascontiguousarray(data).view(u16).reshape(len(w), n, 8, 8).swapaxes(2, 3)
            data = np.ascontiguousarray(h).view(u32)
        acc.store(addr(lanes), np.ascontiguousarray(data).reshape(-1, 4), lanes)

    return ex


@sync("movmatrix")
def bind_movmatrix(st, ins):
    s = st.row(ins.ops[1]).reshape(-1, 32)
    put = st.setter(ins.ops[0], "b32")

    def ex(m):
        h = s.view(u16).reshape(-1, 8, 8).swapaxes(1, 2)
        put(np.ascontiguousarray(h).view(u32).ravel(), m)

    return ex


@sync("tcgen05", "tensormap")
def bind_unsupported(st, ins):
    raise unsupported(ins)
