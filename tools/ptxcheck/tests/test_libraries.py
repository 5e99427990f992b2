"""Library code (cooperative groups, CUB, wmma) as a broader test."""

import numpy as np
import pytest

import ptxcheck

pytestmark = pytest.mark.slow  # compiling CUB takes most of it
rng = np.random.default_rng(3)


@pytest.fixture(scope="module")
def mod(cuda):
    try:
        return cuda("libraries.cu")
    except ptxcheck.CompileError as error:
        if "No such file" in str(error):
            pytest.skip(f"a library's headers are missing: {str(error)[:200]}")
        raise


def test_cooperative_groups(mod):
    x = rng.standard_normal(96).astype(np.float32)
    s, scan, size = np.zeros(96, np.float32), np.zeros(96, np.int32), np.zeros(96, np.int32)
    mod.launch("groups", 1, 96, [x, s, scan, size])
    assert np.allclose(s, np.repeat(x.reshape(-1, 16).sum(1), 16), atol=1e-5)
    assert np.array_equal(scan.reshape(-1, 16), np.arange(96).reshape(-1, 16).cumsum(1))
    for w in range(3):
        mine = [i for i in range(32 * w, 32 * w + 32) if i % 3 == 0]
        for r, i in enumerate(mine):
            assert size[i] == len(mine) * 100 + r


def test_cub(mod):
    x, z = rng.standard_normal(128).astype(np.float32), rng.integers(-50, 50, 128).astype(np.int32)
    keys = rng.integers(0, 2**32, 256, dtype=np.uint32)
    want = np.sort(keys)
    s, e = np.zeros(1, np.float32), np.zeros(128, np.int32)
    mod.launch("block_ops", 1, 128, [x, z, s, e, keys], check_races=True)
    assert abs(s[0] - x.astype(np.float64).sum()) < 1e-4
    assert np.array_equal(e, np.concatenate([[0], z.cumsum()[:-1]]))
    assert np.array_equal(keys, want)


def test_wmma(mod):
    a, b = (rng.standard_normal((16, 64)).astype(np.float16) for _ in range(2))
    c = np.zeros((16, 16), np.float32)
    mod.launch("wmma_gemm", 1, 32, [a, b, c, 0.5])
    want = 0.5 * a.astype(np.float64) @ b.astype(np.float64).T
    assert np.allclose(c.T, want, atol=1e-3)


@pytest.mark.parametrize(("max_lanes", "seed"), [(64, None), (4096, None), (128, 1)])
def test_grid_sync(mod, max_lanes, seed):
    x, y = rng.standard_normal(6 * 64).astype(np.float32), np.zeros(6 * 64, np.float32)
    want = x.copy()
    for r in range(3):
        want = np.roll(2 * want + np.float32(r), -64)
    mod.launch("grid_sync", 6, 64, [x, y, 3], max_lanes=max_lanes, schedule_seed=seed)
    assert np.allclose(y, want)
