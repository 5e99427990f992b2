"""Atomic operations on memory: atom and red."""

from __future__ import annotations

import numpy as np

from . import numerics as nx
from .access import Access, addresser, lanes_of, space_of
from .binding import binder, half_bits, half_values, pack2, unpack2, unsupported
from .state import DTYPE, UDTYPE, WIDTH
from .syntax import Imm, Sink


def atomic_fn(op, typ):
    """Function (old, b, c) -> new on arrays of the raw unsigned dtype."""
    dt = DTYPE[typ]

    def typed(fn):
        def f(old, b, c):
            return np.ascontiguousarray(fn(old.view(dt), b.view(dt)).astype(dt)).view(old.dtype)

        return f

    if op == "exch":
        return lambda old, b, c: b
    if op == "cas":
        return lambda old, b, c: np.where(old == b, c, old)
    if op in ("and", "or", "xor"):
        uf = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[op]
        return lambda old, b, c: uf(old, b)
    if op == "inc":
        return lambda old, b, c: np.where(old >= b, old.dtype.type(0), old + old.dtype.type(1))
    if op == "dec":
        return lambda old, b, c: np.where((old == 0) | (old > b), b, old - old.dtype.type(1))
    fns = {"add": np.add, "min": np.minimum, "max": np.maximum}
    if op not in fns:
        return None
    if typ in ("f16x2", "bf16x2"):
        uf = {"add": np.add, "min": nx.fmin, "max": nx.fmax}[op]

        def packed(old, b, c):
            (al, ah), (bl, bh) = unpack2(old, typ), unpack2(b, typ)
            return pack2(half_bits(uf(al, bl), typ), half_bits(uf(ah, bh), typ))

        return packed
    if typ in ("f16", "bf16"):
        uf = {"add": np.add, "min": nx.fmin, "max": nx.fmax}[op]
        return lambda old, b, c: half_bits(
            uf(half_values(old.view(dt), typ), half_values(b.view(dt), typ)), typ
        ).view(old.dtype)
    if typ in ("f32", "f64") and op != "add":
        return typed(nx.fmin if op == "min" else nx.fmax)
    return typed(fns[op])


@binder("atom", "red")
def bind_atom(st, ins):
    returns = ins.base == "atom"
    typ = [m for m in ins.mods if m in DTYPE][-1]
    op = next(
        (
            m
            for m in ins.mods
            if m in ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
        ),
        None,
    )
    fn = atomic_fn(op, typ) if op else None
    if fn is None or "b128" in ins.mods:
        raise unsupported(ins)
    if "async" in ins.mods:
        raise unsupported(ins)
    vec = next((int(m[1]) for m in ins.mods if m in ("v2", "v4", "v8")), 1)
    if vec > 1:
        raise unsupported(ins, "vector atomics")
    ops = ins.ops[1:] if returns else ins.ops
    ut = "b" + str(WIDTH[typ])
    udt = UDTYPE[WIDTH[typ]]
    srcs = [
        np.ascontiguousarray(st.src(o, typ)).view(udt) if isinstance(o, Imm) else st.src(o, ut)
        for o in ops[1:]
    ]
    acc = Access(st, ins, space_of(ins), typ)
    acc.atomic = True
    addr = addresser(st, ops[0])
    want = returns and not isinstance(ins.ops[0], Sink)
    put = st.scatter(ins.ops[0], typ) if want else None
    dt = DTYPE[typ]

    def get(s, lanes, n):
        if len(s) == 1:
            return np.full(n, s[0], udt)
        return s if lanes is None else s[lanes]

    def ex(m):
        some, lanes = lanes_of(st, m)
        if not some:
            return
        a = addr(lanes)
        n = len(a)
        vals = [get(s, lanes, n) for s in srcs]
        every = np.arange(st.N) if lanes is None else lanes
        old = np.zeros(n, udt)
        parts = acc.split_generic(a, lanes) if acc.space is None else [(acc.space, a, None)]
        for space, pa, sel in parts:
            ln = every if sel is None else every[sel]
            if sel is None:
                old[:] = _atomic(acc, fn, space, pa, vals, ln)
            else:
                old[sel] = _atomic(acc, fn, space, pa, [v[sel] for v in vals], ln)
        if want:
            put(old.view(dt), lanes)

    return ex


def _atomic(acc, fn, space, addr, vals, lanes):
    """Apply the lanes' updates one after another (in lane order per address)."""
    n = len(addr)
    b = vals[0]
    c = vals[1] if len(vals) > 1 else None
    if space == "shared":
        key = acc.window(addr, lanes, "shared")
        if acc.checker is not None:
            acc.checker.atomic(acc, key << acc.shift, lanes)
    else:
        key = addr
        acc.stats.atomic_access(acc, addr, lanes)
    order = np.argsort(key, kind="stable")
    k = key[order]
    first = np.ones(n, bool)
    first[1:] = k[1:] != k[:-1]
    starts = np.flatnonzero(first)
    group = np.cumsum(first) - 1
    rank = np.arange(n) - starts[group]
    checker, acc.checker = acc.checker, None
    counted, acc.stats = acc.stats, _Quiet
    try:
        cur = acc.load(addr[order[starts]], lanes[order[starts]], space).copy()
        old = np.zeros(n, acc.dt)
        depth = int(rank.max()) + 1
        if depth > 1:
            by_rank = np.argsort(rank, kind="stable")
            bounds = np.searchsorted(rank[by_rank], np.arange(depth + 1))
        for r in range(depth):
            pos = by_rank[bounds[r] : bounds[r + 1]] if depth > 1 else np.arange(n)
            src = order[pos]
            g = group[pos]
            prev = cur[g]
            old[src] = prev
            cur[g] = fn(prev, b[src], None if c is None else c[src])
        acc.store(addr[order[starts]], cur, lanes[order[starts]], space, note=False)
    finally:
        acc.checker, acc.stats = checker, counted
    return old


class _Quiet:
    detail = False

    @staticmethod
    def global_access(*a):
        pass
