"""Random integer and floating point programs: the same C++ text is compiled by
nvcc (run in the interpreter) and by the host compiler, and must agree."""

import ctypes
import random
import shutil
import subprocess

import numpy as np
import pytest

from .sources import slow

TYPES = ["int32_t", "uint32_t", "int64_t", "uint64_t", "int16_t", "uint8_t"]
UNSIGNED = {
    "int32_t": "uint32_t",
    "int64_t": "uint64_t",
    "int16_t": "uint32_t",
    "uint8_t": "uint32_t",
    "uint32_t": "uint32_t",
    "uint64_t": "uint64_t",
}


class Gen:
    """Random expressions and statements without undefined behaviour."""

    def __init__(self, seed):
        self.r = random.Random(seed)

    def expr(self, depth):
        r = self.r
        if depth == 0:
            return r.choice(
                [
                    "a",
                    "b",
                    "c",
                    "v0",
                    "v1",
                    "v2",
                    f"{r.randrange(1 << 20)}u",
                    f"(int32_t)-{r.randrange(1, 9999)}",
                ]
            )
        x, y = self.expr(depth - 1), self.expr(r.randrange(depth))
        t = r.choice(TYPES)
        u = UNSIGNED[t]
        w = {"uint32_t": 31, "uint64_t": 63}[u]
        k = r.randrange(12)
        if k < 3:
            return f"({t})(({u})({x}) {r.choice('+-*')} ({u})({y}))"
        if k == 3:
            return f"({t})(({u})({x}) / (({u})({y}) | 1))"
        if k == 4:
            return f"({t})(({t})({x}) % (({t})(({y}) & 0x3f) + 3))"
        if k == 5:
            return f"({t})(({u})({x}) << (({y}) & {w}))"
        if k == 6:
            return f"({t})(({t})({x}) >> (({y}) & {7 if t == 'uint8_t' else 15}))"
        if k == 7:
            return f"({t})(({x}) {r.choice('&|^')} ({y}))"
        if k == 8:
            return (
                f"((({t})({x}) {r.choice(['<', '>', '<=', '>=', '==', '!='])} ({t})({y})) ? "
                f"({t})({self.expr(depth - 1)}) : ({t})({y}))"
            )
        if k == 9:
            return f"({t})~({u})({x})"
        if k == 10:
            return (
                f"({t})((({u})({x}) << {r.randrange(1, w)}) | (({u})({y}) >> {r.randrange(1, w)}))"
            )
        return f"({t})({t})({x})"

    def function(self, n):
        r = self.r
        out = [
            f"HD int64_t f{n}(int32_t a, uint32_t b, int64_t c) {{",
            "  int64_t v0 = a; uint32_t v1 = b ^ 77u; int32_t v2 = 5;",
        ]
        for _ in range(3):
            v = r.choice(["v0", "v1", "v2"])
            kind = r.randrange(4)
            if kind == 0:
                out.append(f"  {v} = {self.expr(3)};")
            elif kind == 1:
                out.append(
                    f"  for (uint32_t i = 0; i < ((uint32_t)({self.expr(1)}) & 7u); i++) "
                    f"{{ {v} = {self.expr(2)}; v1 += i; if (({self.expr(1)}) == 3) break; }}"
                )
            elif kind == 2:
                out.append(
                    f"  if (({self.expr(2)}) & 1) {v} = {self.expr(2)}; "
                    f"else {{ {v} = {self.expr(2)}; v2 ^= 9; }}"
                )
            else:
                cases = " ".join(
                    f"case {k}: {v} = {self.expr(2)}; {'break;' if k % 2 else ''}" for k in range(4)
                )
                out.append(
                    f"  switch ((uint32_t)({self.expr(1)}) % 5u) {{ {cases} default: v0 += 1; }}"
                )
        out.append("  return v0 * 31 + (int64_t)((uint64_t)v1 * 17u) + v2; }")
        return "\n".join(out)

    def fexpr(self, depth):
        r = self.r
        if depth == 0:
            return r.choice(["x", "y", "z", "w0", "w1", f"{r.uniform(-8, 8):.4f}f"])
        a, b = self.fexpr(depth - 1), self.fexpr(r.randrange(depth))
        k = r.randrange(9)
        if k < 4:
            return f"({a} {r.choice('+-*/')} {b})"
        if k == 4:
            return f"fmaf({a}, {b}, {self.fexpr(0)})"
        if k == 5:
            return f"({a} {r.choice(['<', '>', '<=', '!='])} {b} ? {a} : {self.fexpr(depth - 1)})"
        if k == 6:
            return f"{r.choice(['fabsf', 'floorf', 'truncf', 'ceilf', 'rintf'])}({a})"
        if k == 7:
            return f"sqrtf(fabsf({a}))"
        return f"(float)((double){a} * 1.25 + (double){b})"

    def ffunction(self, n):
        body = "".join(f"  {v} = {self.fexpr(3)};\n" for v in ("w0", "w1", "w0"))
        return (
            f"HD float g{n}(float x, float y, float z) {{ float w0 = 1.5f, w1 = x;\n{body}"
            f"  return {self.fexpr(2)}; }}"
        )


def build(tmp_path, seed, nf):
    g = Gen(seed)
    funcs = [g.function(k) for k in range(nf)] + [g.ffunction(k) for k in range(nf)]
    calls = "".join(f"o[{k} * n + i] = f{k}(a[i], b[i], c[i]);\n" for k in range(nf))
    fcalls = "".join(f"p[{k} * n + i] = g{k}(x[i], y[i], z[i]);\n" for k in range(nf))
    args = (
        "const int32_t* a, const uint32_t* b, const int64_t* c, int64_t* o, "
        "const float* x, const float* y, const float* z, float* p, int n"
    )
    head = "#include <cstdint>\n#include <cmath>\n"
    dev = (
        head
        + "#define HD __device__ __noinline__ static\n"
        + "\n".join(funcs)
        + f"""
extern "C" __global__ void k({args}) {{
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) {{ {calls} {fcalls} }} }}"""
    )
    host = (
        head
        + "#define HD static\n"
        + "\n".join(funcs)
        + f"""
extern "C" void k({args}) {{ for (int i = 0; i < n; i++) {{ {calls} {fcalls} }} }}"""
    )
    src, lib = tmp_path / "h.cpp", tmp_path / "h.so"
    src.write_text(host)
    flags = ["-O1", "-fwrapv", "-ffp-contract=off", "-shared", "-fPIC", "-w"]
    subprocess.run([shutil.which("g++") or "c++", *flags, str(src), "-o", str(lib)], check=True)
    return dev, ctypes.CDLL(str(lib))


@pytest.mark.parametrize("seed", [0, 1, *map(slow, range(2, 12))])
def test_random_programs(cuda, tmp_path, seed):
    if not (shutil.which("g++") or shutil.which("c++")):
        pytest.skip("no host compiler")
    nf, n = 12, 400
    dev, lib = build(tmp_path, seed, nf)
    mod = cuda(dev, flags=("-fmad=false", "-w"))
    r = np.random.default_rng(seed)
    a = r.integers(-(2**31), 2**31, n).astype(np.int32) >> r.integers(0, 31, n).astype(np.int32)
    b = r.integers(0, 2**32, n, dtype=np.uint64).astype(np.uint32) >> r.integers(0, 31, n).astype(
        np.uint32
    )
    c = r.integers(-(2**63), 2**63 - 1, n, dtype=np.int64) >> r.integers(0, 60, n)
    x, y, z = (
        (r.standard_normal(n) * 10.0 ** r.integers(-3, 4, n)).astype(np.float32) for _ in range(3)
    )
    o, p = np.zeros((nf, n), np.int64), np.zeros((nf, n), np.float32)
    want, wantf = o.copy(), p.copy()

    def ptr(v):
        return ctypes.c_void_p(v.ctypes.data)

    lib.k(*map(ptr, (a, b, c, want, x, y, z, wantf)), ctypes.c_int(n))
    mod.launch("k", 4, 128, [a, b, c, o, x, y, z, p, n])
    for k in range(nf):
        assert np.array_equal(o[k], want[k]), f"f{k}"
        same = (p[k].view(np.uint32) == wantf[k].view(np.uint32)) | (
            np.isnan(p[k]) & np.isnan(wantf[k])
        )
        assert same.all(), (
            f"g{k}",
            np.flatnonzero(~same)[:3],
            p[k][~same][:3],
            wantf[k][~same][:3],
        )
