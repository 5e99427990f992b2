"""Matrix multiply of a warp: mma.sync and its fragments."""

from __future__ import annotations

import numpy as np

from . import numerics as nx
from .binding import sync, unsupported
from .syntax import Reg
from .warpops import active_warps

u8, u16, u32, u64 = np.uint8, np.uint16, np.uint32, np.uint64
i8, i16, i32, i64 = np.int8, np.int16, np.int32, np.int64
f16, f32, f64 = np.float16, np.float32, np.float64


def _rows(st, ops):
    """Function (warps) -> (n, W, 32) uint32 of a fragment's registers."""
    if all(isinstance(o, Reg) for o in ops):
        slots = np.array([st.reg_slot[o] for o in ops])
        if len({o.width for o in ops}) == 1:
            data = st.files[ops[0].width]
            return lambda w: (
                data[slots].reshape(len(slots), -1, 32)
                if w is None
                else data[slots].reshape(len(slots), -1, 32)[:, w]
            )
    srcs = [np.broadcast_to(st.src(o, "b32"), (st.N,)) for o in ops]

    def get(w):
        d = np.stack([s.reshape(-1, 32) for s in srcs])
        return d if w is None else d[:, w]

    return get


def _split(bits, kind):
    """(n, W, 32) u32 -> (n, W, 32, per) float64 values packed in each word."""
    b = np.ascontiguousarray(bits)
    if kind == "bf16":
        h = b.view(u16).reshape((*b.shape, 2))
        return nx.bf16_to_f32(h)
    if kind == "f16":
        return b.view(f16).reshape((*b.shape, 2)).astype(f32)
    if kind == "tf32":
        return (b & u32(0xFFFFE000)).view(f32).reshape((*b.shape, 1))
    if kind == "f64":
        return b.view(f64).reshape((*b.shape, 1))
    if kind in ("s8", "u8"):
        return b.view(i8 if kind == "s8" else u8).reshape((*b.shape, 4)).astype(f64)
    if kind in ("s4", "u4"):
        x = b.view(u8).reshape((*b.shape, 4))
        both = np.stack([x & 15, x >> 4], axis=-1).reshape((*b.shape, 8)).astype(i8)
        return np.where(both > 7, both - 16, both).astype(f64) if kind == "s4" else both.astype(f64)
    if kind in ("e4m3", "e5m2"):
        return nx.FP8[kind][b.view(u8).reshape((*b.shape, 4))]
    raise KeyError(kind)


def a_matrix(v, m, k):
    """A fragment (regs, W, 32, per) -> (W, m, k)."""
    n, w, _, per = v.shape
    rh = m // 8
    kh = n // rh
    return np.ascontiguousarray(
        v.reshape(kh, rh, w, 8, 4, per).transpose(2, 1, 3, 0, 4, 5)
    ).reshape(w, m, k)


def _b_matrix(v, k, n):
    """B fragment (regs, W, 32, per) -> (W, k, n)."""
    r, w, _, per = v.shape
    return np.ascontiguousarray(v.reshape(r, w, 8, 4, per).transpose(1, 0, 3, 4, 2)).reshape(
        w, k, n
    )


def _c_matrix(v, m, n):
    """Accumulator (m/8 * 2 values, W, 32) -> (W, m, n)."""
    w = v.shape[1]
    return v.reshape(m // 8, 2, w, 8, 4).transpose(2, 0, 3, 4, 1).reshape(w, m, n)


def _c_regs(d, m, n):
    """(W, m, n) -> (m/8 * 2, W, 32)."""
    w = d.shape[0]
    return np.ascontiguousarray(d.reshape(w, m // 8, 8, 4, 2).transpose(1, 4, 0, 2, 3)).reshape(
        m // 4, w, 32
    )


MMA_SHAPES = {
    ("m16n8k16", "bf16"),
    ("m16n8k8", "bf16"),
    ("m16n8k16", "f16"),
    ("m16n8k8", "f16"),
    ("m16n8k8", "tf32"),
    ("m16n8k4", "tf32"),
    ("m8n8k4", "f64"),
    ("m16n8k32", "s8"),
    ("m16n8k16", "s8"),
    ("m8n8k16", "s8"),
    ("m16n8k32", "u8"),
    ("m16n8k16", "u8"),
    ("m8n8k16", "u8"),
    ("m16n8k64", "s4"),
    ("m16n8k32", "s4"),
    ("m8n8k32", "s4"),
    ("m16n8k64", "u4"),
    ("m16n8k32", "u4"),
    ("m8n8k32", "u4"),
    ("m16n8k256", "b1"),
    ("m16n8k128", "b1"),
    ("m8n8k128", "b1"),
    ("m16n8k32", "e4m3"),
    ("m16n8k32", "e5m2"),
    ("m16n8k16", "e4m3"),
    ("m16n8k16", "e5m2"),
}


@sync("mma")
def bind_mma(st, ins):
    mods = ins.mods
    if "sp" in mods or any(x.startswith(("sp::", "kind::", "block_scale")) for x in mods):
        raise unsupported(ins)
    shape = next((x for x in mods if x[0] == "m" and "n" in x and "k" in x), None)
    kinds = [
        x
        for x in mods
        if x
        in (
            "f16",
            "bf16",
            "f32",
            "tf32",
            "f64",
            "s8",
            "u8",
            "s4",
            "u4",
            "b1",
            "s32",
            "e4m3",
            "e5m2",
        )
    ]
    if shape is None or len(kinds) != 4 or (shape, kinds[1]) not in MMA_SHAPES:
        raise unsupported(ins)
    dk, ak, bk, ck = kinds
    mm, rest = shape[1:].split("n")
    nn, kk = rest.split("k")
    mm, nn, kk = int(mm), int(nn), int(kk)
    dops, aops, bops, cops = (o.items if hasattr(o, "items") else [o] for o in ins.ops[:4])
    ga = _rows(st, aops)
    gb = _rows(st, bops)
    gc = _rows(st, cops)
    satfin = "satfinite" in mods
    nacc = mm // 4
    if ak == "f64":
        drows = [st.row(o).view(f64).reshape(-1, 32) for o in dops]
    else:
        drows = [st.row(o).reshape(-1, 32) for o in dops]

    def put(vals, w):
        for r, v in zip(drows, vals, strict=True):
            if w is None:
                r[...] = v
            else:
                r[w] = v

    if ak == "b1":
        use_xor = "xor" in mods

        def ex_b1(m):
            w = active_warps(st, m)
            a, b = ga(w), gb(w)
            # A: (kh, rh, W, g, t) words; B: (kh, W, g, t)
            rh = mm // 8
            a = a.reshape(-1, rh, a.shape[1], 8, 4).transpose(2, 1, 3, 0, 4)
            a = a.reshape(a.shape[0], mm, -1)
            b = b.reshape(-1, b.shape[1], 8, 4).transpose(1, 2, 0, 3).reshape(b.shape[1], nn, -1)
            x = a[:, :, None, :] ^ b[:, None] if use_xor else a[:, :, None, :] & b[:, None]
            d = np.bitwise_count(x).sum(-1, dtype=i64)
            c = _c_matrix(gc(w).view(i32), mm, nn)
            put(_c_regs((d + c).astype(i32), mm, nn).view(u32), w)

        return ex_b1

    if dk == "s32":

        def ex_int(m):
            w = active_warps(st, m)
            d = np.matmul(
                a_matrix(_split(ga(w), ak), mm, kk), _b_matrix(_split(gb(w), bk), kk, nn)
            ).astype(i64)
            d += _c_matrix(gc(w).view(i32), mm, nn)
            if satfin:
                d = np.clip(d, -(1 << 31), (1 << 31) - 1)
            put(_c_regs(d.astype(i32), mm, nn).view(u32), w)

        return ex_int

    if ak == "f64":

        def ex_f64(m):
            w = active_warps(st, m)
            d = np.matmul(a_matrix(_split(ga(w), ak), mm, kk), _b_matrix(_split(gb(w), bk), kk, nn))
            d = d + _c_matrix(gc(w).view(f64), mm, nn)
            put(_c_regs(d, mm, nn), w)

        return ex_f64

    def acc_values(bits, kind):
        """Accumulator registers -> (nacc, W, 32) float64."""
        if kind == "f32":
            return bits.view(f32)
        h = np.ascontiguousarray(bits).view(f16).reshape((*bits.shape, 2))
        return h.transpose(0, 3, 1, 2).reshape(nacc, *bits.shape[1:])

    def ex(m):
        w = active_warps(st, m)
        a = a_matrix(_split(ga(w), ak), mm, kk).astype(f64)
        b = _b_matrix(_split(gb(w), bk), kk, nn).astype(f64)
        c = acc_values(gc(w), ck)
        d = _c_regs(np.matmul(a, b), mm, nn) + c
        if dk == "f32":
            put(d.astype(f32).view(u32), w)
        else:
            h = d.astype(f16).reshape(nacc // 2, 2, -1, 32).transpose(0, 2, 3, 1)
            put(np.ascontiguousarray(h).view(u32).reshape(nacc // 2, -1, 32), w)

    return ex


#
# The placement of matrix elements in wmma fragments is unspecified, so a layout
# of our own is used: element i of the row-major matrix is value i // 32 of lane
# i % 32.
