"""Clusters of several blocks: registers, distributed shared memory, barriers, multicast,
reducing bulk copies; each with planted faults."""

import re

import numpy as np
import pytest

import ptxcheck
from ptxcheck import TensorMap
from ptxcheck.numerics import bf16_to_f32, f32_to_bf16

from .sources import CHECKS, faults, mostly_slow, slow

SOURCE = "cluster.cu"
FAULTS = faults(SOURCE)
MODES = [
    dict(),
    CHECKS,
    dict(cp_async="late", **CHECKS),
    dict(cp_async="early", **CHECKS),
    *[dict(schedule_seed=s, **CHECKS) for s in range(4)],
]


@pytest.fixture(scope="session")
def clusters(cuda):
    return lambda fault=None: cuda(SOURCE, "90a", [f"-DFAULT={FAULTS[fault]}"] if fault else [])


@pytest.mark.parametrize(
    ("dims", "grid"),
    [
        ((2, 1, 1), (6, 1, 1)),
        ((2, 2, 2), (4, 6, 2)),
        ((1, 4, 1), (3, 8, 1)),
        ((8, 1, 1), (16, 2, 1)),
    ],
)
@pytest.mark.parametrize("seed", [None, 1])
def test_registers(clusters, dims, grid, seed):
    y = np.zeros((*grid[::-1], 16), np.uint32)
    clusters().launch("ids", grid, 32, [y], cluster=dims, schedule_seed=seed, max_lanes=256)
    for z, yy, x in np.ndindex(grid[::-1]):
        at = np.array([x, yy, z])
        inside = at % dims
        want = [
            inside[0] + dims[0] * (inside[1] + dims[1] * inside[2]),
            np.prod(dims),
            *inside,
            *dims,
            *(at // dims),
            *(np.array(grid) // dims),
            1,
        ]
        assert y[z, yy, x, :15].tolist() == [int(v) for v in want]


def test_no_cluster(clusters):
    y = np.zeros((3, 16), np.uint32)
    clusters().launch("ids", 3, 32, [y])
    assert y[2, :15].tolist() == [0, 1, 0, 0, 0, 1, 1, 1, 2, 0, 0, 3, 1, 1, 0]


def test_cluster_dims(clusters):
    mod = clusters()
    y = np.zeros(4, np.uint32)
    mod.launch("fixed", 4, 32, [y])
    assert y.tolist() == [0, 1, 0, 1]
    for grid, more, text in [(3, {}, "no multiple"), (4, dict(cluster=4), "requires clusters")]:
        with pytest.raises(ptxcheck.PtxError, match=text):
            mod.launch("fixed", grid, 32, [y], **more)
    with pytest.raises(ptxcheck.PtxError, match="bad cluster size"):
        mod.launch("ids", 16, 32, [np.zeros(256, np.uint32)], cluster=16)


# ------------------------------------------------- distributed shared memory


def exchange(mod, size=4, count=3, **options):
    y = np.zeros((size * count, 64, 4), np.int32)
    stats = mod.launch("exchange", size * count, 64, [y], cluster=size, **options)
    return y, stats


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("options", MODES, ids=str)
def test_exchange(clusters, size, options):
    y, stats = exchange(clusters(), size, **options)
    block, t = np.mgrid[: 3 * size, :64]
    rank = block % size
    after = block - rank + (rank + 1) % size
    assert np.array_equal(y[..., 0], 1000 * after + t)
    assert np.array_equal(y[..., 1], 1000 * after + (t ^ 1))
    assert np.array_equal(y[..., 2], 7 * t + (rank + size - 1) % size)
    total = np.where(rank == 0, size * 64 * 63 // 2, 0)
    assert np.array_equal(y[..., 3], total + 10000 * ((rank + 1) % size) + 100000)
    assert not stats.notes


ANY = ptxcheck.PtxError
EXCHANGE = {
    "NO_FIRST_SYNC": (ptxcheck.RaceError, "may not have started: no cluster barrier"),
    "NO_MIDDLE_SYNC": (ANY, "race|never written"),
    "NO_LAST_SYNC": (ANY, "ends without waiting for this access|which has exited"),
    "RELAXED_MIDDLE": (ptxcheck.RaceError, "race .*of block rank"),
    "WRONG_RANK": (ptxcheck.MemoryFault, "mapa to block rank 4: the cluster has 4 blocks"),
    "CTA_SPACE": (ptxcheck.MemoryFault, r"shared::cta instruction on the .*block rank [0-3]"),
    "EARLY_EXIT": (ptxcheck.MemoryFault, "block rank 3 of the cluster, which has exited"),
    "ARRIVE_TWICE": (ptxcheck.BarrierError, "arrive again without a barrier.cluster.wait"),
    "WAIT_ONLY": (ptxcheck.BarrierError, "wait without a barrier.cluster.arrive"),
    "ONE_MISSING": (ptxcheck.DeadlockError, "for 64 threads of the cluster that have not arrived"),
    "OUT_OF_BOUNDS": (ptxcheck.MemoryFault, "out-of-bounds shared access"),
    "UNSYNC_STORE": (ptxcheck.RaceError, "race .*of block rank"),
}


@pytest.mark.parametrize("fault", mostly_slow(EXCHANGE, "WRONG_RANK", "EARLY_EXIT"))
@pytest.mark.parametrize("seed", [None, 0])
def test_exchange_fault(clusters, fault, seed):
    kind, text = EXCHANGE[fault]
    with pytest.raises(kind, match=f"(?s){text}") as e:
        exchange(clusters(fault), schedule_seed=seed, **CHECKS)
    assert re.search(r"PTX line \d+.*block \(\d+, 0, 0\) thread \(\d+, 0, 0\)", str(e.value), re.S)


# ------------------------------------------------------------ remote mbarriers


def ring(mod, size=4, count=2, rounds=5, **options):
    y = np.zeros((size * count, 32), np.int32)
    stats = mod.launch(
        "ring", size * count, 32, [y, rounds], cluster=size, max_steps=100000, **options
    )
    return y, stats


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("options", MODES, ids=str)
def test_ring(clusters, size, options):
    y, stats = ring(clusters(), size, **options)
    v = 100 * np.arange(size)[:, None] + np.arange(32)
    for _ in range(5):
        v = np.roll(v, 1, 0)[:, np.arange(32) ^ 1] + 1
    assert np.array_equal(y, np.concatenate([v, v]))
    assert not stats.notes


RING = {
    "FEW_ARRIVALS": (ptxcheck.DeadlockError, "mbarrier at shared byte .* of block rank"),
    "MANY_ARRIVALS": (ptxcheck.DeadlockError, "mbarrier at shared byte .* of block rank"),
    "WRONG_TARGET": (ANY, "race|never written"),
    "NO_ARRIVAL_ORDER": (ptxcheck.RaceError, "read after write.*block rank"),
    "REMOTE_WAIT": (ptxcheck.MemoryFault, "memory of another block"),
    "REMOTE_STATE": (ptxcheck.BarrierError, "no state is returned"),
    "NO_INIT_FENCE": (ptxcheck.RaceError, "used without synchronization with its initialization"),
    "EXIT_BEFORE_ARRIVALS": (ANY, "ends without waiting for this access|which has exited"),
}


@pytest.mark.parametrize("fault", mostly_slow(RING, "FEW_ARRIVALS", "NO_ARRIVAL_ORDER"))
@pytest.mark.parametrize("seed", [None, 0])
def test_ring_fault(clusters, fault, seed):
    kind, text = RING[fault]
    with pytest.raises(kind, match=f"(?s){text}") as e:
        ring(clusters(fault), schedule_seed=seed, **CHECKS)
    assert "PTX line" in str(e.value)


# ------------------------------------------------------------------- multicast


def spread(mod, size=2, steps=3, tensor=1, count=2, **options):
    """(what every block saw, what it should have seen)."""
    rows = 8 * size
    rng = np.random.default_rng(1)
    t = f32_to_bf16(rng.standard_normal((count * rows - 3, 64 * steps - 24)).astype(np.float32))
    flat = rng.integers(0, 256, steps * rows * 128, dtype=np.uint8)
    out = np.zeros((count * size, steps, rows, 128), np.uint8)
    tm = TensorMap.of(mod.memory, t, [8, 64], 128, "bfloat16")
    stats = mod.launch(
        "spread",
        count * size,
        32,
        [tm, flat, out, rows, steps, tensor],
        cluster=size,
        dynamic_smem=rows * 128,
        max_steps=100000,
        **options,
    )
    full = np.zeros((count * rows, 64 * steps), np.uint16)
    full[: t.shape[0], 8 : 8 + t.shape[1]] = t[:, : 64 * steps - 8]
    want = np.zeros_like(out)
    r, c = np.mgrid[:rows, :8]
    for b, i in np.ndindex(count * size, steps):
        if tensor:
            tile = full[b // size * rows :][:rows, 64 * i : 64 * i + 64].copy().view(np.uint8)
            want[b, i].reshape(rows, 8, 16)[r, c ^ r % 8] = tile.reshape(rows, 8, 16)
        else:
            want[b, i] = flat.reshape(steps, rows, 128)[i]
    return out, want, stats


@pytest.mark.parametrize("size", [2, 3, slow(8)])
@pytest.mark.parametrize("tensor", [0, 1])
@pytest.mark.parametrize("options", MODES, ids=str)
def test_multicast(clusters, size, tensor, options):
    out, want, stats = spread(clusters(), size, tensor=tensor, **options)
    assert np.array_equal(out, want)
    assert not stats.notes
    # every byte is read from global memory once for the cluster
    assert stats.global_read_bytes == (
        2 * 3 * size * 1024 if not tensor else (16 * size - 3) * (64 * 3 - 24) * 2
    )


SPREAD = {
    "NO_FIRST_SYNC": (ANY, "may not have started|without synchronization with its init"),
    "NARROW_MASK": (ptxcheck.DeadlockError, r"mbarrier at shared byte \d+ of block rank"),
    "WIDE_MASK": (ptxcheck.ExecutionError, "multicast mask 0x1ff for a cluster of 2 blocks"),
    "NO_WAIT_BEFORE_EXIT": (
        ANY,
        "ends with a bulk copy into its shared memory in flight|"
        "without having waited for this bulk copy|wait at",
    ),
    "EARLY_LEAVE": (ANY, "which has exited|ends with a bulk copy into its shared memory in flight"),
    "FEW_BYTES": (ptxcheck.UninitializedRead, "never written"),
    "SAME_HALF": (ptxcheck.RaceError, "write after write.*of block rank"),
    "NO_RELEASE": (ANY, "write after|more arrivals"),
    "NO_WAIT": (ptxcheck.UninitializedRead, "never written"),
    "UNINITIALIZED": (
        ptxcheck.BarrierError,
        r"no mbarrier is initialized at shared byte \d+ of "
        "block rank 1",
    ),
    "NO_LAST_SYNC": (ANY, "ends without waiting for this access|which has exited"),
}


@pytest.mark.parametrize("fault", mostly_slow(SPREAD, "NARROW_MASK", "NO_FIRST_SYNC"))
@pytest.mark.parametrize("tensor", [0, 1])
@pytest.mark.parametrize("seed", [None, 0])
def test_multicast_fault(clusters, fault, tensor, seed):
    kind, text = SPREAD[fault]
    with pytest.raises(kind, match=f"(?s){text}") as e:
        spread(clusters(fault), tensor=tensor, schedule_seed=seed, **CHECKS)
    assert "PTX line" in str(e.value)


@pytest.mark.parametrize(
    "fault",
    mostly_slow(["FEW_BYTES", "NO_WAIT", "NARROW_MASK", "NO_WAIT_BEFORE_EXIT"], "NARROW_MASK"),
)
def test_multicast_fault_without_checks(clusters, fault):
    try:
        out, want, _ = spread(clusters(fault))
    except ptxcheck.ExecutionError:
        return
    assert not np.array_equal(out, want)


# ---------------------------------------------------------- reducing bulk copies

KINDS = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16}


def values(x):
    return bf16_to_f32(x) if x.dtype == np.uint16 else x.astype(np.float32)


def rounded(x, kind):
    return f32_to_bf16(x) if kind == "bf16" else x.astype(KINDS[kind])


def tile_of(kind, block, scale):
    n = 128 // KINDS[kind]().itemsize
    v = (np.arange(16 * n) % 61 * np.float32(scale) + block).astype(np.float32)
    return values(rounded(v, kind)).reshape(16, n)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", MODES[1:6], ids=str)
def test_reduce_tensor(clusters, kind, options):
    """Three blocks add a box that is partly outside; sums of integers have no order."""
    mod = clusters()
    n = 128 // KINDS[kind]().itemsize
    y = rounded(np.arange(13 * (n - 8), dtype=np.float32).reshape(13, n - 8) % 7, kind)
    before = values(y)
    tm = TensorMap.of(mod.memory, y, [16, n], 0, "bfloat16" if kind == "bf16" else None)
    stats = mod.launch(f"add_{kind}", 3, 64, [tm, None, -4, 2, 1.0], dynamic_smem=2048, **options)
    want = before.copy()
    for block in range(3):
        want[2:, : n - 8] += tile_of(kind, block, 1)[:11, 4 : n - 4]
    assert np.array_equal(values(y), want)
    assert stats.atomic_ops == 3 * 11 * (n - 8)
    assert stats.global_write_bytes == 3 * 11 * (n - 8) * y.itemsize


@pytest.mark.parametrize("kind", KINDS)
def test_reduce_flat(clusters, kind):
    y = rounded(np.linspace(-3, 3, 2048 // KINDS[kind]().itemsize, dtype=np.float32), kind)
    want = values(y)
    clusters().launch(f"add_flat_{kind}", 4, 64, [y, 0.3], dynamic_smem=2048, **CHECKS)
    for block in range(4):  # in this schedule: one after another
        want = values(rounded(want + tile_of(kind, block, 0.3).ravel(), kind))
    assert np.array_equal(values(y), want)


@pytest.mark.slow
def test_reduce_faults(clusters):
    y = np.zeros(512, np.float32)
    with pytest.raises(ptxcheck.RaceError, match=r"missing fence\.proxy\.async"):
        clusters("NO_REDUCE_FENCE").launch(
            "add_flat_f32", 1, 64, [y, 1.0], dynamic_smem=2048, **CHECKS
        )
    with pytest.raises(ptxcheck.ExecutionError, match="before this bulk copy has read"):
        clusters("NO_REDUCE_WAIT").launch("add_flat_f32", 1, 64, [y, 1.0], dynamic_smem=2048)
    mod = clusters()
    mod.memory.register(y, "y", uninit=True)
    with pytest.raises(ptxcheck.UninitializedRead, match="never-written global memory of y"):
        mod.launch("add_flat_f32", 1, 64, [y, 1.0], dynamic_smem=2048, **CHECKS)


# ------------------------------------------------------------ aligned barriers


@pytest.mark.parametrize(
    "barrier", ["bar.sync 0;", "barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;"]
)
@pytest.mark.parametrize("seed", [None, *range(4)])
def test_sleeping_thread_joins_its_warp(barrier, seed):
    """One thread of a warp sleeps at an mbarrier while the others are at an aligned barrier."""
    text = f"""
.version 8.5
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 py)
{{
    .reg .pred p, q, z;
    .reg .b32 %r<9>;
    .reg .b64 %o;
    .shared .align 8 .b8 bar[8];
    ld.param.u64 %o, [py];
    mov.u32 %r1, bar;
    mov.u32 %r2, %tid.x;
    setp.eq.u32 p, %r2, 0;
    @p mbarrier.init.shared.b64 [%r1], 32;
    bar.sync 0;
    setp.ge.u32 q, %r2, 32;
    @q bra OTHER;
    @!p bra JOIN;
L:  mbarrier.try_wait.parity.shared.b64 z, [%r1], 0;
    @!z bra L;
    bra JOIN;
OTHER:
    mbarrier.arrive.shared.b64 _, [%r1];
JOIN:
    {barrier}
    red.global.add.u32 [%o], 1;
    ret;
}}
"""
    y = np.zeros(1, np.uint32)
    ptxcheck.load(text).launch("k", 2, 64, [y], cluster=2, schedule_seed=seed, **CHECKS)
    assert y[0] == 128
    with pytest.raises(ptxcheck.DeadlockError, match="wait for missing warp members"):
        ptxcheck.load(text.replace("b64 [%r1], 32", "b64 [%r1], 33")).launch(
            "k", 2, 64, [y], cluster=2, schedule_seed=seed, **CHECKS
        )


# --------------------------------------------------------------------- Triton


@pytest.mark.parametrize("options", [CHECKS, dict(schedule_seed=0, **CHECKS)], ids=str)
def test_triton_with_two_blocks_a_program(options):
    from .triton_compiler import torch  # isort: skip - it skips the test without Triton
    from .cluster_triton import matmul

    k = ptxcheck.triton_compile(
        matmul,
        {"x": "*bf16", "y": "*bf16", "o": "*fp32", "M": "i32", "N": "i32", "K": "i32"},
        {"BM": 128, "BN": 64, "BK": 32},
        attrs=["x", "y", "o", "K"],
        arch=90,
        num_warps=4,
        num_stages=2,
        num_ctas=2,
    )
    assert k.module.unsupported() == {k.name: []}
    x, y = torch.randn(200, 96).bfloat16(), torch.randn(100, 96).bfloat16()
    o = torch.zeros(200, 100)
    k((2, 2), x, y, o, 200, 100, 96, **options)
    assert torch.allclose(o, x.float() @ y.float().T, atol=1e-4)
