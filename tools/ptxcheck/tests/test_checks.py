"""Planted bugs must be found, correct kernels must pass."""

import numpy as np
import pytest

import ptxcheck

SOURCE = "kernels.cu"


@pytest.fixture
def mod(cuda):
    return cuda(SOURCE)


def test_out_of_bounds_store(mod):
    y = np.zeros(100, np.float32)
    with pytest.raises(ptxcheck.MemoryFault) as e:
        mod.launch("bad_index", 1, 128, [y, 100])
    msg = str(e.value)
    assert "out-of-bounds" in msg
    assert "bad_index" in msg
    assert "thread (100, 0, 0)" in msg
    assert "0 bytes past the end" in msg
    assert "st.global" in msg
    assert ".cu:" in msg


def test_bound_between_two_buffers(mod):
    """An index error must not land silently in another buffer."""
    y, z = np.zeros(100, np.float32), np.zeros(10000, np.float32)
    mod.memory.register(z, "z")
    with pytest.raises(ptxcheck.MemoryFault):
        mod.launch("bad_index", 1, 128, [y, 100])
    assert not z.any()


def test_misaligned(mod):
    with pytest.raises(ptxcheck.MemoryFault, match="misaligned"):
        mod.launch("bad_align", 1, 4, [np.zeros(64, np.uint8)])


def test_shared_out_of_bounds(mod):
    y = np.zeros(64, np.float32)
    mod.launch("bad_shared", 1, 32, [y], dynamic_smem=256)
    with pytest.raises(ptxcheck.MemoryFault, match="shared"):
        mod.launch("bad_shared", 1, 64, [y], dynamic_smem=256)


def test_missing_syncthreads(mod):
    x, y = np.arange(128, dtype=np.float32), np.zeros(128, np.float32)
    mod.launch("reverse", 1, 128, [x, y, 1], check_races=True)
    assert np.array_equal(y, x[::-1])
    with pytest.raises(ptxcheck.RaceError, match="read after write"):
        mod.launch("reverse", 1, 128, [x, y, 0], check_races=True)


def test_uninitialized_shared(mod):
    y = np.zeros(64, np.float32)
    mod.launch("hole", 1, 64, [y, -1], check_uninit=True)
    with pytest.raises(ptxcheck.UninitializedRead, match="shared byte 20"):
        mod.launch("hole", 1, 64, [y, 5], check_uninit=True)
    mod.launch("hole", 1, 64, [y, 5])
    assert np.isnan(y[63 - 5])  # shared memory starts as 0xFF bytes


def test_uninitialized_global(mod):
    x, y = np.ones(100, np.float32), np.ones(128, np.float32)
    mod.memory.register(y, "y", uninit=True)
    with pytest.raises(ptxcheck.UninitializedRead, match="of y"):
        mod.launch("saxpy", 1, 128, [1.0, x, y, 100], check_uninit=True)
    mod.memory.register(y, "y", uninit=True)
    mod.launch("bad_index", 1, 128, [y, 99])
    assert mod.memory.unwritten(y) == 28 * 4


def test_deadlock(mod):
    with pytest.raises(ptxcheck.DeadlockError, match="32 threads"):
        mod.launch("lost_barrier", 1, 64, [np.zeros(64, np.float32)])


def test_endless_loop(mod):
    with pytest.raises(ptxcheck.StepLimitExceeded):
        mod.launch("chain", 1, 32, [np.ones(1, np.int32), np.zeros(2, np.int32)], max_steps=20_000)


def test_named_barrier(mod):
    x, y = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
    mod.launch("producer", 3, 128, [x, y], check_races=True)
    assert np.array_equal(y, 2 * x[::-1])


def gemm(mod, **options):
    rng = np.random.default_rng(1)

    def f(s):
        return (rng.standard_normal(s).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)

    a, b, c = f((64, 128)), f((128, 64)), np.zeros((64, 64), np.uint16)
    mod.launch("gemm_bf16", (1, 1), 128, [a, b, c, 64, 64, 128], **options)

    def g(v):
        return (v.astype(np.uint32) << 16).view(np.float32).astype(np.float64)

    err = np.abs(g(c) - g(a) @ g(b)).max()
    return err if err == err else np.inf


def test_missing_cp_async_wait(cuda):
    """wait_group 2 leaves the tile that is about to be read in flight."""
    good, bad = cuda(SOURCE), cuda(SOURCE, flags=("-DWAIT_GROUPS=2",))
    assert gemm(good) < 0.2
    assert gemm(bad, cp_async="early") < 0.2  # hidden when copies are immediate
    assert gemm(bad, cp_async="strict") > 1
    with pytest.raises(ptxcheck.UninitializedRead):
        gemm(bad, cp_async="late", check_uninit=True)


def test_missing_loop_barrier(cuda):
    """Without the barrier at the end of the loop the next copy overwrites a
    tile that other warps may still read."""
    bad = cuda(SOURCE, flags=("-DLOOP_SYNC=",))
    with pytest.raises(ptxcheck.RaceError, match="write after read"):
        gemm(bad, check_races=True)


def test_unsupported_instruction():
    text = """
.version 8.0
.target sm_90
.address_size 64
.visible .entry k(.param .u64 p)
{
    .reg .b64 %rd<3>;
    tcgen05.fence::before_thread_sync;
    ret;
}
"""
    with pytest.raises(ptxcheck.UnsupportedInstruction, match="line 8: tcgen05"):
        ptxcheck.load(text).launch("k", 1, 32, [0])


def test_argument_checks(mod):
    with pytest.raises(ptxcheck.PtxError, match="takes 4 arguments"):
        mod.launch("saxpy", 1, 32, [1.0])


def test_partial_warp_barrier(mod):
    with pytest.raises(ptxcheck.BarrierError, match="part of the warp"):
        mod.launch("half_barrier", 1, 64, [np.zeros(64, np.float32)], check_races=True)


def test_random_schedules(mod):
    """Correct kernels give the same answer; unsynchronized ones do not."""
    x = np.arange(128, dtype=np.float32)
    wrong = wrong_blocks = 0
    for seed in range(12):
        y = np.zeros(128, np.float32)
        mod.launch("reverse", 1, 128, [x, y, 1], schedule_seed=seed)
        assert np.array_equal(y, x[::-1])
        mod.launch("reverse", 1, 128, [x, y, 0], schedule_seed=seed)
        wrong += not np.array_equal(y, x[::-1])
        part, y = np.zeros(8, np.float32), np.zeros(8, np.float32)
        mod.launch("neighbour", 8, 64, [part, y], schedule_seed=seed, max_lanes=128)
        wrong_blocks += not np.array_equal(y, np.arange(8))
    assert wrong
    assert wrong_blocks


def test_random_schedule_gemm_and_locks(mod):
    for seed in range(3):
        assert gemm(mod, schedule_seed=seed, check_races=True) < 0.2
        lock, total = np.zeros(1, np.int32), np.zeros(1, np.int32)
        mod.launch("spin_lock", 2, 48, [lock, total], schedule_seed=seed)
        assert total[0] == 96
        flag, order = np.zeros(1, np.int32), np.zeros(6, np.int32)
        mod.launch("chain", 6, 32, [flag, order], schedule_seed=seed, max_lanes=64)
        assert flag[0] == 6


def test_shared_memory_limit(mod):
    y = np.zeros(32, np.float32)
    mod.launch("big_shared", 1, 32, [y], dynamic_smem=101376)
    with pytest.raises(ptxcheck.PtxError, match="101376"):
        mod.launch("big_shared", 1, 32, [y], dynamic_smem=120000)
    mod.launch("big_shared", 1, 32, [y], dynamic_smem=120000, check_limits=False)


def test_scan_for_unsupported(mod):
    assert not any(mod.unsupported().values())


def test_printf_and_assert(mod, capsys):
    mod.launch("talk", 1, 32, [1])
    out = capsys.readouterr().out
    assert out == "thread 3:  4.50 ok 10000000000|\nthread 5:  7.50 ok 10000000000|\n"
    with pytest.raises(ptxcheck.TrapError, match="assertion"):
        mod.launch("talk", 1, 32, [100])


@pytest.mark.parametrize("arch", [80, 90])
def test_other_targets(cuda, arch):
    mod = cuda(SOURCE, arch)
    assert gemm(mod, check_races=True, check_uninit=True) < 0.2
    assert not any(mod.unsupported().values())


@pytest.mark.parametrize("max_lanes", [64, 4096])
def test_overlapping_stores(mod, max_lanes):
    y = np.zeros(256, np.float32)
    for _ in range(2):
        mod.launch("overlap", 4, 64, [y, 64], check_overlap=True, max_lanes=max_lanes)
    with pytest.raises(ptxcheck.RaceError, match="two blocks store to byte"):
        mod.launch("overlap", 4, 64, [y, 63], check_overlap=True, max_lanes=max_lanes)
    x, s, c = np.zeros(99, np.int32), np.zeros(2, np.float32), np.zeros(2, np.int32)
    w = np.ones(99, np.float32)
    mod.launch("histogram", 4, 32, [x, s, c, w, 99], check_overlap=True)
    assert c[0] == 99


def test_same_value_stores(mod):
    y = np.zeros(64, np.float32)
    mod.launch("same_store", 1, 64, [y, 0], check_races=True)
    with pytest.raises(ptxcheck.RaceError, match="write"):
        mod.launch("same_store", 1, 64, [y, 1], check_races=True)


def test_join_placed_before_its_branch():
    """A slow path laid out behind the join must be run before the join."""
    text = """
.version 8.0
.target sm_86
.address_size 64
.visible .entry k(.param .u64 p)
{
    .reg .pred %p<4>; .reg .b32 %r<9>; .reg .b64 %rd<4>;
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, 0;
    mov.u32 %r6, 0;
LOOP:
    and.b32 %r3, %r1, 3;
    setp.eq.u32 %p1, %r3, 1;
    @%p1 bra SLOW;
    add.u32 %r2, %r2, 1;
JOIN:
    activemask.b32 %r4;
    bar.sync 0;
    add.u32 %r6, %r6, 1;
    setp.lt.u32 %p2, %r6, 3;
    @%p2 bra LOOP;
    bra.uni END;
SLOW:
    add.u32 %r2, %r2, 100;
    bra.uni JOIN;
END:
    ld.param.u64 %rd1, [p];
    mul.wide.u32 %rd2, %r1, 8;
    add.s64 %rd1, %rd1, %rd2;
    st.global.v2.u32 [%rd1], {%r2, %r4};
    ret;
}
"""
    y = np.zeros((64, 2), np.uint32)
    ptxcheck.load(text).launch("k", 1, 64, [y], check_races=True)
    assert (y[:, 1] == 0xFFFFFFFF).all()
    assert np.array_equal(y[:, 0], np.where(np.arange(64) % 4 == 1, 300, 3))
