"""Hopper instructions in CUDA C++: mbarrier, TMA, wgmma; each with planted faults."""

import numpy as np
import pytest

import ptxcheck
from ptxcheck import TensorMap
from ptxcheck.numerics import bf16_to_f32, f32_to_bf16

from .sources import CHECKS, faults, mostly_slow

SOURCE = "hopper.cu"
FAULTS = faults(SOURCE)


@pytest.fixture(scope="session")
def hopper(cuda):
    def build(fault=None):
        flags = [f"-DFAULT={FAULTS[fault]}"] if fault else []
        return cuda(SOURCE, "90a", flags)

    return build


def bf16(rng, *shape):
    return f32_to_bf16(rng.standard_normal(shape).astype(np.float32))


def gemm(mod, M=75, N=200, K=136, tiles=2, **options):
    """Run the GEMM; (result, reference, stats)."""
    rng = np.random.default_rng(0)
    a, b = bf16(rng, M, K), bf16(rng, N, K)
    y = np.zeros((M, N), np.uint16)
    maps = [TensorMap.of(mod.memory, t, [64, 64], 128, "bfloat16") for t in (a, b, y)]
    rows, cols = -(-M // 64), -(-N // (64 * tiles))
    stats = mod.launch(
        "gemm", (rows, cols), 160, [*maps, K, 64, tiles], dynamic_smem=5 * 8192, **options
    )
    ref = bf16_to_f32(a).astype(float) @ bf16_to_f32(b).astype(float).T
    return bf16_to_f32(y), ref, stats


def close(y, ref):
    return np.allclose(y, ref, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        CHECKS,
        dict(cp_async="late", **CHECKS),
        dict(cp_async="early", **CHECKS),
        *[dict(schedule_seed=s, **CHECKS) for s in range(5)],
    ],
    ids=str,
)
def test_gemm(hopper, options):
    y, ref, stats = gemm(hopper(), **options)
    assert close(y, ref)
    assert stats.global_write_bytes == 75 * 200 * 2
    # two column blocks read all of a twice, two row blocks all of b; the last tile is outside
    assert stats.global_read_bytes == 2 * 136 * (75 * 4 + 200 * 2)
    assert "schedule_seed" in options or stats.mma_flops() == 2 * 2 * 2 * 64 * 64 * 192 * 2
    assert not stats.notes


ANY = ptxcheck.PtxError
EXPECTED = {
    "NO_FULL_WAIT": (ptxcheck.UninitializedRead, "never written"),
    "ONE_WARP_WAITS": (ptxcheck.RaceError, "read after write.*bulk copy at"),
    "WRONG_PARITY": (ptxcheck.UninitializedRead, "never written"),
    "NO_WGMMA_FENCE": (ptxcheck.ExecutionError, "no wgmma.fence"),
    "NO_PROXY_FENCE": (ptxcheck.RaceError, "missing fence.proxy.async"),
    "MANY_BYTES": (ptxcheck.DeadlockError, r"mbarrier at shared byte \d+.*transaction count 16"),
    "FEW_BYTES": (ptxcheck.UninitializedRead, "never written"),
    "EARLY_RELEASE": (ptxcheck.ExecutionError, "asynchronous access is not|still in flight"),
    "NO_STORE_WAIT": (ptxcheck.ExecutionError, "ends before this bulk copy has read"),
    "NO_INIT_SYNC": (ANY, "no mbarrier is initialized|used without synchronization"),
    "MISALIGNED": (ptxcheck.MemoryFault, "multiple of 128"),
    "NO_STORE_SYNC": (ANY, "read after write|never written"),
    "TWICE_ARRIVE": (ptxcheck.ExecutionError, ""),
    "NO_EMPTY_WAIT": (ptxcheck.BarrierError, "more arrivals than the phase expects"),
    "LATE_WRITE": (ptxcheck.ExecutionError, "written after the last wgmma.fence"),
    "OVERWRITE_BARRIER": (ptxcheck.BarrierError, "overwritten"),
    "REUSE_STORE": (ptxcheck.RaceError, "write after read"),
    "NO_STORE_COMMIT": (ANY, "no commit_group|write after read"),
    "NO_WGMMA_WAIT": (ptxcheck.RaceError, "write after read.*asynchronous access"),
    "NO_COMMIT": (ptxcheck.RaceError, "write after read.*asynchronous access"),
}


@pytest.mark.parametrize(
    "fault",
    mostly_slow(EXPECTED, "NO_FULL_WAIT", "NO_PROXY_FENCE", "NO_WGMMA_WAIT", "OVERWRITE_BARRIER"),
)
def test_gemm_fault_is_reported(hopper, fault):
    kind, text = EXPECTED[fault]
    with pytest.raises(kind, match=f"(?s){text}") as e:
        gemm(hopper(fault), **CHECKS)
    assert "PTX line" in str(e.value)


SILENT = [
    *("NO_FULL_WAIT", "WRONG_PARITY", "FEW_BYTES", "READ_IN_FLIGHT", "WRONG_SWIZZLE"),
    *("WRONG_STRIDE", "NO_EMPTY_WAIT", "REUSE_STORE", "EARLY_RELEASE"),
]


@pytest.mark.parametrize("fault", mostly_slow(SILENT, "NO_FULL_WAIT"))
def test_gemm_fault_gives_wrong_results(hopper, fault):
    """Also without the checks, by the values that unfinished operations leave."""
    wrong = 0
    for seed in (None, 0, 1, 2):
        try:
            y, ref, _ = gemm(hopper(fault), schedule_seed=seed)
            wrong += not close(y, ref)
        except ptxcheck.ExecutionError:
            wrong += 1
    assert wrong


# ------------------------------------------------------------ matrix layouts


def k_major(rows, mode):
    """(byte offset of every element (row, k) of rows x 16, lead, stride): canonical layouts."""
    r, k = np.mgrid[:rows, :16]
    if mode == 0:  # 8x8 core matrices of 128 bytes
        lead, stride = rows * 16, 128
        return r // 8 * stride + k // 8 * lead + r % 8 * 16 + k % 8 * 2, lead, stride
    width = {1: 128, 2: 64, 3: 32}[mode]
    return swizzle(r * width + k * 2, width), 16, 8 * width


def mn_major(rows, mode):
    r, k = np.mgrid[:rows, :16]
    if mode == 0:
        lead, stride = rows // 8 * 128, 128
        return r // 8 * stride + k // 8 * lead + k % 8 * 16 + r % 8 * 2, lead, stride
    width = {1: 128, 2: 64, 3: 32}[mode]
    lead = 16 * width  # next rows of the pattern's width
    return (
        swizzle(r // (width // 2) * lead + k * width + r % (width // 2) * 2, width),
        lead,
        8 * width,
    )


def swizzle(offset, width):
    """Chunks of 16 bytes of a row of `width` bytes are permuted by the number of the 128 bytes."""
    chunk, line = offset // 16, offset // 128
    return (chunk ^ line % (width // 16)) * 16 + offset % 16


@pytest.mark.parametrize("mode_a", range(4))
@pytest.mark.parametrize("mode_b", range(4))
@pytest.mark.parametrize("major", ["kk", "mk", "km", "mm"])
def test_matrix_descriptors(hopper, mode_a, mode_b, major):
    rng = np.random.default_rng(3)
    a, b = bf16(rng, 64, 16), bf16(rng, 64, 16)
    at_a, lead_a, stride_a = (mn_major if major[0] == "m" else k_major)(64, mode_a)
    at_b, lead_b, stride_b = (mn_major if major[1] == "m" else k_major)(64, mode_b)
    assert len(np.unique(at_a)) == 1024
    assert at_a.max() < 8192
    y = np.zeros((64, 64), np.float32)
    hopper().launch(
        f"product_{major}",
        1,
        128,
        [
            a,
            b,
            at_a.astype(np.int32),
            at_b.astype(np.int32),
            y,
            lead_a,
            stride_a,
            mode_a,
            lead_b,
            stride_b,
            mode_b,
            0,
        ],
        dynamic_smem=16384,
        **CHECKS,
    )
    assert np.allclose(y, bf16_to_f32(a).astype(float) @ bf16_to_f32(b).astype(float).T, atol=1e-5)


# ---------------------------------------------------------------------- TMA


@pytest.mark.parametrize("mode", [0, 32, 64, 128])
@pytest.mark.parametrize("at", [(0, 0), (-3, 2), (13, -2), (40, 9), (-50, -50), (7, 30)])
def test_box_2d(hopper, mode, at):
    mod = hopper()
    t = np.arange(1, 1 + 30 * 48, dtype=np.float16).reshape(30, 48)[:, :45]
    width = (mode or 32) // 2
    out = np.zeros(16 * width * 2, np.uint8)
    tm = TensorMap.of(mod.memory, t, [16, width], mode)
    mod.launch("box", 1, 32, [tm, out, *at, 0, out.nbytes, 2], dynamic_smem=16384, **CHECKS)
    want = np.zeros((16, width), np.float16)
    for i in range(16):
        for j in range(width):
            y, x = at[1] + i, at[0] + j
            if 0 <= y < 30 and 0 <= x < 45:
                want[i, j] = t[y, x]
    place = np.arange(16 * width).reshape(16, width) * 2
    place = swizzle(place, mode) if mode else place
    got = out.view(np.float16)[place // 2]
    assert np.array_equal(got, want)


def test_box_1d_3d_steps(hopper):
    mod = hopper()
    x = np.arange(100, dtype=np.float32)
    out = np.zeros(128, np.uint8)
    mod.launch(
        "box",
        1,
        32,
        [TensorMap.of(mod.memory, x, [32]), out, 80, 0, 0, 128, 1],
        dynamic_smem=1024,
        **CHECKS,
    )
    assert np.array_equal(out.view(np.float32), np.r_[x[80:], np.zeros(12, np.float32)])
    t = np.arange(5 * 6 * 8, dtype=np.int32).reshape(5, 6, 8)
    out = np.zeros(2 * 3 * 4 * 4, np.uint8)
    mod.launch(
        "box",
        1,
        32,
        [TensorMap.of(mod.memory, t, [2, 3, 4]), out, 2, 1, 4, out.nbytes, 3],
        dynamic_smem=1024,
        **CHECKS,
    )
    want = np.zeros((2, 3, 4), np.int32)
    want[:1] = t[4:6, 1:4, 2:6]
    assert np.array_equal(out.view(np.int32).reshape(2, 3, 4), want)
    t = np.arange(40 * 16, dtype=np.float32).reshape(40, 16)
    tm = TensorMap.of(mod.memory, t, [8, 8], steps=[1, 2])
    assert tm.size == 4 * 8 * 4
    out = np.zeros(tm.size, np.uint8)
    mod.launch("box", 1, 32, [tm, out, 8, 1, 0, out.nbytes, 2], dynamic_smem=1024, **CHECKS)
    assert np.array_equal(out.view(np.float32).reshape(4, 8), t[1:9:2, 8:16])


def test_map_beyond_its_buffer(hopper):
    mod = hopper()
    t = np.zeros((30, 64), np.float16)
    tm = TensorMap.of(mod.memory, t, [16, 64], 128)
    tm.dims[1] = 31
    with pytest.raises(ptxcheck.MemoryFault, match=r"(?s)bulk copy.*(past|at byte)"):
        mod.launch(
            "box", 1, 32, [tm, np.zeros(2048, np.uint8), 0, 20, 0, 2048, 2], dynamic_smem=2048
        )


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (dict(address=8), "multiple of 16"),
        (dict(strides=[120]), "stride"),
        (dict(box=[512, 16]), "1 .. 256"),
        (dict(box=[128, 16]), "larger than the swizzle"),
        (dict(box=[4, 16]), "16 bytes"),
        (dict(dims=[0, 8]), "dimension"),
        (dict(steps=[9, 1]), "element"),
        (dict(dtype="complex64"), "not supported"),
        (dict(strides=[16]), "smaller"),
    ],
)
def test_tensor_map_limits(change, why):
    good = dict(
        address=1 << 36, dtype="float16", dims=[64, 30], strides=[128], box=[64, 16], swizzle=128
    )
    TensorMap(**good)
    with pytest.raises(ptxcheck.PtxError, match=why):
        TensorMap(**{**good, **change})


def test_no_tensor_map(hopper):
    with pytest.raises(ptxcheck.ExecutionError, match="no tensor map"):
        hopper().launch(
            "box", 1, 32, [bytes(128), np.zeros(64, np.uint8), 0, 0, 0, 64, 2], dynamic_smem=1024
        )


def test_flat_copies(hopper):
    x = np.arange(208, dtype=np.uint8)
    y = np.zeros(208, np.uint8)
    for options in (CHECKS, dict(cp_async="early"), dict(schedule_seed=1)):
        y[:] = 0
        s = hopper().launch("flat", 1, 32, [x, y, 208], dynamic_smem=1024, **options)
        assert y[0] == 255
        assert np.array_equal(y[1:], x[1:])
        assert s.global_read_bytes == s.global_write_bytes == 208
    with pytest.raises(ptxcheck.MemoryFault, match="misaligned"):
        hopper().launch("flat", 1, 32, [x, y, 200], dynamic_smem=1024)
    with pytest.raises(ptxcheck.MemoryFault, match="bulk copy"):
        hopper().launch("flat", 1, 32, [x, y, 224], dynamic_smem=1024)


def test_phases(hopper):
    y = np.zeros(256, np.int32)
    for seed in (None, 0, 1):
        hopper().launch("phases", 2, 256, [y, 5, 256], schedule_seed=seed, check_races=True)
        assert np.array_equal(y, (np.arange(256) + 165) % 256)
    with pytest.raises(ptxcheck.DeadlockError, match="1 of 257 arrivals pending"):
        hopper().launch("phases", 1, 256, [y, 1, 257])
    with pytest.raises(ptxcheck.PtxError):  # completes before all have arrived
        hopper().launch("phases", 1, 256, [y, 5, 128], check_races=True)


def test_small_instructions(hopper):
    y = np.zeros(64, np.int32)
    hopper().launch("small", 1, 64, [y], **CHECKS)
    assert np.array_equal(y, 5100 + (np.arange(64) % 32 == 0))
