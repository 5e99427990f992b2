"""Bit-exact number formats and rounding, vectorized with numpy.

Registers hold raw bits in unsigned arrays.  The helpers here convert between
bits and values and implement the PTX rounding rules.
"""

from __future__ import annotations

import numpy as np

u8, u16, u32, u64 = np.uint8, np.uint16, np.uint32, np.uint64
i8, i16, i32, i64 = np.int8, np.int16, np.int32, np.int64
f16, f32, f64 = np.float16, np.float32, np.float64

CANON32 = u32(0x7FFFFFFF)
CANON16 = u16(0x7FFF)


# ------------------------------------------------------------- f32 <-> bf16


def bf16_to_f32(bits):
    """uint16 bf16 bits -> float32."""
    return (bits.astype(u32) << u32(16)).view(f32)


def f32_to_bf16(x, mode="rn"):
    """float32 -> uint16 bf16 bits."""
    b = np.ascontiguousarray(x, dtype=f32).view(u32)
    if mode == "rn":
        r = (b + u32(0x7FFF) + ((b >> u32(16)) & u32(1))) >> u32(16)
    elif mode == "rz":
        r = b >> u32(16)
    elif mode == "rna":
        r = (b + u32(0x8000)) >> u32(16)
    else:
        neg = (b >> u32(31)) != 0
        up = neg if mode == "rm" else ~neg
        r = np.where(up, b + u32(0xFFFF), b) >> u32(16)
        inf = (b & u32(0x7FFFFFFF)) == u32(0x7F800000)
        r = np.where(inf, b >> u32(16), r)
    r = r.astype(u16)
    nan = (b & u32(0x7FFFFFFF)) > u32(0x7F800000)
    if nan.any():
        r = np.where(nan, CANON16, r)
    return r


def f32_to_tf32(bits, mode="rna"):
    """float32 bits -> tf32 bits (low 13 bits cleared)."""
    b = bits
    if mode == "rna":
        r = b + u32(0x1000)
    elif mode == "rz":
        r = b
    else:
        r = b + u32(0xFFF) + ((b >> u32(13)) & u32(1))
    r = r & u32(0xFFFFE000)
    special = (b & u32(0x7F800000)) == u32(0x7F800000)
    return np.where(special, np.where((b & u32(0x7FFFFF)) != 0, CANON32, b), r)


# ------------------------------------------------------ rounding to odd, fma


def two_sum(a, b):
    """s, e with s = fl(a + b) and s + e = a + b exactly (float64)."""
    s = a + b
    bb = s - a
    return s, (a - (s - bb)) + (b - bb)


def to_odd(s, e):
    """The float64 nearest toward zero of s + e, low bit set when inexact."""
    bad = (e != 0) & np.isfinite(s)
    if not bad.any():
        return s
    bits = np.ascontiguousarray(s).view(i64)
    same = (e > 0) == (s > 0)
    fixed = np.where(same, bits, bits - 1) | 1
    return np.where(bad, fixed, bits).view(f64)


def fma_f32(a, b, c):
    """Correctly rounded float32 fma (round to nearest even)."""
    p = a.astype(f64) * b
    s = p + c
    r = s.astype(f32)
    low = np.ascontiguousarray(s).view(u64) & u64(0x1FFFFFFF)
    risky = low == u64(0x10000000)
    tiny = np.abs(r) < f32(2.4e-38)
    if risky.any() or (tiny & (r != 0)).any():
        s, e = two_sum(p, np.broadcast_to(c, p.shape).astype(f64))
        return to_odd(s, e).astype(f32)
    return r


def fma_f64(a, b, c):
    """float64 fma through an exact product (Dekker); may differ from a true
    fma by one rounding in rare halfway cases and near overflow."""
    p = a * b
    split = 134217729.0
    ah = a * split
    ah = ah - (ah - a)
    al = a - ah
    bh = b * split
    bh = bh - (bh - b)
    bl = b - bh
    e = ((ah * bh - p) + ah * bl + al * bh) + al * bl
    s, t = two_sum(p, c)
    r = s + (t + e)
    return np.where(np.isfinite(r), r, p + c)


def fma_odd(a, b, c):
    """a * b + c in float64, rounded to odd; a * b must be exact in float64."""
    p = a.astype(f64) * b
    s, e = two_sum(p, np.broadcast_to(c, p.shape).astype(f64))
    return to_odd(s, e)


def f64_to_f32_odd(x):
    """float64 -> float32 rounded to odd."""
    y = x.astype(f32)
    back = y.astype(f64)
    bad = (back != x) & np.isfinite(x)
    if not bad.any():
        return y
    bits = y.view(i32)
    fixed = np.where(np.abs(back) > np.abs(x), bits - 1, bits) | 1
    return np.where(bad, fixed, bits).view(f32)


def f64_to_bf16(x, mode="rn"):
    return f32_to_bf16(f64_to_f32_odd(x), mode)


# -------------------------------------------------------- directed rounding


def _step(y, back, x, e, mode):
    """Move y (nearest) so that it is a directed rounding of x + e."""
    itype = {2: i16, 4: i32, 8: i64}[y.dtype.itemsize]
    d = (back - x) - e  # sign of y - exact
    d = np.where(np.isinf(back) & np.isfinite(x), np.sign(back), d)
    over, under = d > 0, d < 0
    bits = y.view(itype)
    neg = bits < 0
    mag = bits & np.iinfo(itype).max
    if mode == "rz":
        # exact value nearer zero than y
        fix = (over & ~neg) | (under & neg)
        out = np.where(fix, bits - 1, bits)
    elif mode == "rm":
        down = np.where(neg, bits + 1, np.where(mag == 0, itype(np.iinfo(itype).min + 1), bits - 1))
        out = np.where(over, down, bits)
    else:
        up = np.where(neg, np.where(mag == 0, itype(1), bits - 1), bits + 1)
        out = np.where(under, up, bits)
    return out.astype(itype).view(y.dtype)


def narrow(x, e, dtype, mode):
    """Round the exact value x + e (float64 arrays) to dtype."""
    if mode in ("rn", None):
        return to_odd(x, e).astype(dtype) if e is not None else x.astype(dtype)
    y = np.ascontiguousarray(x.astype(dtype))
    return _step(y, y.astype(f64), x, 0.0 if e is None else e, mode)


def arith_f32(kind, a, b, c, mode):
    """f32 add/sub/mul/fma with a directed rounding mode."""
    a, b = a.astype(f64), b.astype(f64)
    if kind == "mul":
        return narrow(a * b, None, f32, mode)
    if kind == "fma":
        s, e = two_sum(a * b, np.broadcast_to(c, np.broadcast(a, b).shape).astype(f64))
    else:
        s, e = two_sum(a, b if kind == "add" else -b)
    return narrow(s, np.where(np.isfinite(s), e, 0.0), f32, mode)


def ftz(x):
    """Flush float32 subnormals to signed zero."""
    small = np.abs(x) < f32(1.17549435e-38)
    if not small.any():
        return x
    return np.where(small, np.copysign(f32(0), x), x)


def saturate(x):
    """Clamp to [0, 1], NaN -> 0."""
    r = np.minimum(np.maximum(x, x.dtype.type(0)), x.dtype.type(1))
    return np.where(np.isnan(x), x.dtype.type(0), r)


# ------------------------------------------------------------------ min/max

_UINT = {2: u16, 4: u32, 8: u64}


def fmin(a, b, nan=False):
    return _minmax(a, b, nan, True)


def fmax(a, b, nan=False):
    return _minmax(a, b, nan, False)


def _minmax(a, b, nan, is_min):
    if nan:
        r = np.minimum(a, b) if is_min else np.maximum(a, b)
    else:
        r = np.fmin(a, b) if is_min else np.fmax(a, b)
    ui = _UINT[r.dtype.itemsize]
    eq = (a == b) & (r == 0)
    if eq.any():  # -0 < +0
        av = np.ascontiguousarray(np.broadcast_to(a, r.shape)).view(ui)
        bv = np.ascontiguousarray(np.broadcast_to(b, r.shape)).view(ui)
        z = (av | bv) if is_min else (av & bv)
        r = np.where(eq, z.view(r.dtype), r)
    n = np.isnan(r)
    if n.any():
        canon = {2: u16(0x7FFF), 4: CANON32, 8: u64(0x7FF8000000000000)}[r.dtype.itemsize]
        bits = np.ascontiguousarray(r).view(ui)
        r = np.where(n, canon, bits).view(r.dtype)
    return r


# ---------------------------------------------------------- float -> integer

INT_RANGE = {
    f"{s}{w}": ((-(1 << (w - 1)), (1 << (w - 1)) - 1) if s == "s" else (0, (1 << w) - 1))
    for s in "su"
    for w in (8, 16, 32, 64)
}
INT_DTYPE = {
    "s8": i8,
    "s16": i16,
    "s32": i32,
    "s64": i64,
    "u8": u8,
    "u16": u16,
    "u32": u32,
    "u64": u64,
    "b8": u8,
    "b16": u16,
    "b32": u32,
    "b64": u64,
}


def round_int(x, mode):
    """Round a float array to integral values (rni, rzi, rmi, rpi)."""
    return {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode](x)


def float_to_int(x, mode, typ):
    """Float array -> integer array of PTX type `typ`, saturating, NaN -> 0."""
    x = round_int(x.astype(f64), mode)
    lo, hi = INT_RANGE[typ]
    dt = INT_DTYPE[typ]
    nan = np.isnan(x)
    big, small = x >= float(hi), x <= float(lo)
    safe = np.where(nan | big | small, 0.0, x)
    r = safe.astype(dt)
    r = np.where(big, dt(hi), np.where(small, dt(lo), r))
    return np.where(nan, dt(0), r).astype(dt)


def int_to_float(x, dtype, mode):
    """Integer array -> float array."""
    if mode in ("rn", None):
        if dtype == f16:
            return x.astype(f64).astype(f16) if x.dtype.itemsize < 8 else x.astype(f32).astype(f16)
        return x.astype(dtype)
    ld = x.astype(np.longdouble)
    y = np.ascontiguousarray(x.astype(dtype))
    d = (y.astype(np.longdouble) - ld).astype(f64)
    return _step(y, d, np.zeros_like(d), 0.0, mode)


# ---------------------------------------------------------------------- fp8


def _fp8_table(exp_bits, man_bits, bias, kind):
    vals = np.zeros(256, f64)
    for c in range(256):
        s = -1.0 if c & 0x80 else 1.0
        e = (c >> man_bits) & ((1 << exp_bits) - 1)
        m = c & ((1 << man_bits) - 1)
        if kind == "e4m3" and (c & 0x7F) == 0x7F:
            v = np.nan
        elif kind == "e5m2" and e == 31:
            v = np.inf if m == 0 else np.nan
        elif e == 0:
            v = m * 2.0 ** (1 - bias - man_bits)
        else:
            v = (1 + m / (1 << man_bits)) * 2.0 ** (e - bias)
        vals[c] = s * v
    return vals


FP8 = {"e4m3": _fp8_table(4, 3, 7, "e4m3"), "e5m2": _fp8_table(5, 2, 15, "e5m2")}
_FP8_MAX = {"e4m3": 0x7E, "e5m2": 0x7B}
_FP8_NAN = {"e4m3": 0x7F, "e5m2": 0x7F}


def to_fp8(x, kind):
    """Float array -> uint8 fp8 bits (round to nearest even, satfinite)."""
    x = np.asarray(x, f64)
    n = _FP8_MAX[kind] + 1
    pos = FP8[kind][:n]
    a = np.abs(x)
    j = np.clip(np.searchsorted(pos, a), 1, n - 1)
    lo, hi = pos[j - 1], pos[j]
    dl, dh = a - lo, hi - a
    pick = np.where(dl < dh, j - 1, np.where(dl > dh, j, np.where((j & 1) == 0, j, j - 1)))
    pick = np.where(a >= pos[-1], n - 1, pick)
    r = pick.astype(u8) | np.where(np.signbit(x), u8(0x80), u8(0))
    return np.where(np.isnan(x), u8(_FP8_NAN[kind]), r).astype(u8)
