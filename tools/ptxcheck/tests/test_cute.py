"""wgmma with shared memory layouts and matrix descriptors made by CuTe.

Needs CUTLASS's headers: CUTLASS_INCLUDE, or the package cutlass_library."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest

from ptxcheck.numerics import bf16_to_f32, f32_to_bf16


def headers():
    found = os.environ.get("CUTLASS_INCLUDE")
    spec = importlib.util.find_spec("cutlass_library")
    if not found and spec:
        found = Path(spec.origin).parent / "source" / "include"
    return found if found and (Path(found) / "cute").is_dir() else None


@pytest.mark.skipif(headers() is None, reason="CUTLASS's headers not found")
def test_layouts(cuda):
    mod = cuda("cute.cu", "90a", ["--expt-relaxed-constexpr", f"-I{headers()}"])
    rng = np.random.default_rng(0)
    a, b = (f32_to_bf16(rng.standard_normal((128, 64)).astype(np.float32)) for _ in range(2))
    ref = bf16_to_f32(a).astype(float) @ bf16_to_f32(b).astype(float).T
    assert len(mod.kernels) == 8
    for name in mod.kernels:
        c = np.full((128, 128), np.nan, np.float32)
        mod.launch(name, 1, 128, [a, b, c], dynamic_smem=32768, check_races=True, check_uninit=True)
        assert np.abs(c - ref).max() < 1e-4, name
