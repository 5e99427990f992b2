"""Matrix multiply of a warp through fragments of unspecified layout: wmma.

Where the elements of a matrix lie in wmma fragments is unspecified, so a layout of our own is
used: element i of the row-major matrix is value i // 32 of lane i % 32.
"""

from __future__ import annotations

import numpy as np

from . import numerics as nx
from .access import Access, addresser
from .binding import sync, unsupported
from .warpops import active_warps

u8, u16, u32, u64 = np.uint8, np.uint16, np.uint32, np.uint64
i8, i16, i32, i64 = np.int8, np.int16, np.int32, np.int64
f16, f32, f64 = np.float16, np.float32, np.float64


def _wmma_shape(ins):
    shape = next(x for x in ins.mods if x[0] == "m" and "n" in x and "k" in x)
    mm, rest = shape[1:].split("n")
    nn, kk = rest.split("k")
    return int(mm), int(nn), int(kk)


def _wmma_memory(st, ins, what, addr_op, stride_op, typ):
    """(Access, function warps -> element addresses (W, count), count)."""
    mm, nn, kk = _wmma_shape(ins)
    rows, cols = {"a": (mm, kk), "b": (kk, nn)}.get(what, (mm, nn))
    acc = Access(
        st,
        ins,
        next((x.split("::")[0] for x in ins.mods if x.startswith(("global", "shared"))), None),
        typ,
    )
    addr = addresser(st, addr_op)
    by_col = "col" in ins.mods
    ld = (
        st.src(stride_op, "u32")
        if stride_op is not None
        else np.array([rows if by_col else cols], u32)
    )
    e = np.arange(rows * cols)
    r, c = e // cols, e % cols
    major, minor = (c, r) if by_col else (r, c)

    def addresses(w):
        first = w * 32
        base = addr(first)
        stride = (ld if len(ld) == 1 else ld[first]).astype(i64)
        return base[:, None] + (stride[:, None] * major + minor) * acc.esize

    return acc, addresses, rows * cols


def _wmma_pack(vals, regs, kind):
    """(W, own, 32) raw values -> list of (W, 32) u32 registers."""
    own = vals.shape[1]
    dt = {"f16": u16, "bf16": u16, "s8": u8, "u8": u8}.get(kind, u32)
    per = 4 // np.dtype(dt).itemsize
    need = len(regs) * per
    v = np.zeros((vals.shape[0], 32, need), dt)
    v[:, :, :own] = vals.swapaxes(1, 2)
    words = v.view(u32)
    return [words[:, :, k] for k in range(len(regs))]


def _wmma_unpack(words, kind, rows, cols):
    """(regs, W, 32) u32 -> (W, rows, cols) numeric values."""
    w = words.shape[1]
    dt = {"f16": f16, "bf16": u16, "s8": i8, "u8": u8, "f32": f32, "s32": i32}[kind]
    v = np.ascontiguousarray(words.transpose(1, 2, 0)).view(dt)  # (W, 32, values)
    own = rows * cols // 32
    v = v[:, :, :own].swapaxes(1, 2).reshape(w, rows, cols)
    return nx.bf16_to_f32(v).astype(f64) if kind == "bf16" else v.astype(f64)


@sync("wmma")
def bind_wmma(st, ins):
    kind = ins.mods[0]
    if kind not in ("load", "store", "mma") or any(
        x in ins.mods for x in ("tf32", "f64", "s4", "u4", "b1")
    ):
        raise unsupported(ins)
    kinds = [x for x in ins.mods if x in ("f16", "bf16", "f32", "s8", "u8", "s32")]
    mm, nn, kk = _wmma_shape(ins)

    if kind in ("load", "store"):
        what, typ = ins.mods[1], kinds[-1]
        frag = (ins.ops[0] if kind == "load" else ins.ops[1]).items
        addr_op = ins.ops[1] if kind == "load" else ins.ops[0]
        stride_op = ins.ops[2] if len(ins.ops) > 2 else None
        raw = {"f16": "b16", "bf16": "b16", "s8": "b8", "u8": "b8"}.get(typ, "b32")
        acc, addresses, count = _wmma_memory(st, ins, what, addr_op, stride_op, raw)
        rows = [st.row(o).view(u32).reshape(-1, 32) for o in frag]

        def ex_mem(m):
            warps = active_warps(st, m)
            w = np.arange(st.W) if warps is None else warps
            a = addresses(w)
            lanes = (w[:, None] * 32 + np.arange(count) % 32).ravel()
            if kind == "load":
                v = acc.load(a.ravel(), lanes).reshape(len(w), count // 32, 32)
                for r, x in zip(rows, _wmma_pack(v, frag, typ), strict=True):
                    r[w] = x
            else:
                words = np.stack([r[w] for r in rows])  # (regs, W, 32)
                v = np.ascontiguousarray(words.transpose(1, 2, 0)).view(acc.dt)
                v = v[:, :, : count // 32].swapaxes(1, 2).reshape(len(w), count)
                acc.store(a.ravel(), np.ascontiguousarray(v).ravel(), lanes)

        return ex_mem

    frags = [[st.row(o).view(u32).reshape(-1, 32) for o in op.items] for op in ins.ops[:4]]
    if len(kinds) == 2:  # .dtype.ctype: f16 inputs
        dk, ck, ak, bk = kinds[0], kinds[1], "f16", "f16"
    else:
        dk, ak, bk, ck = kinds

    def ex(m):
        warps = active_warps(st, m)
        w = np.arange(st.W) if warps is None else warps
        a, b, c = (np.stack([r[w] for r in f]) for f in frags[1:])
        d = np.matmul(_wmma_unpack(a, ak, mm, kk), _wmma_unpack(b, bk, kk, nn)) + _wmma_unpack(
            c, ck, mm, nn
        )
        if dk == "s32":
            if "satfinite" in ins.mods:
                d = np.clip(d, -(1 << 31), (1 << 31) - 1)
            v = d.astype(i64).astype(i32).view(u32)
        elif dk == "f16":
            v = d.astype(f16).view(u16)
        else:
            v = d.astype(f32).view(u32)
        v = v.reshape(len(w), -1, 32)
        for r, x in zip(frags[0], _wmma_pack(v, frags[0], dk), strict=True):
            r[w] = x

    return ex
