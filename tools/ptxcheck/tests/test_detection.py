"""What ptxcheck is for, one fault each, in PTX that needs no compiler.

Every kernel is right first and wrong by one edit: the check must pass the one and name the
other. A check that sees nothing any more fails here.
"""

import numpy as np
import pytest

import ptxcheck
from ptxcheck import BarrierError, DeadlockError, MemoryFault, RaceError, UninitializedRead

THREADS = 64


def run(body: str, blocks: int = 1, uninit: bool = False, **options) -> np.ndarray:
    """Runs 64 threads a block on x (in) and y (out) of 64 words; returns y.

    %x and %y are the addresses of the thread's words, %s that of its word in `cells`, %t its
    number, and %warp the number of its warp.
    """
    text = f"""
.version 8.0
.target sm_86
.address_size 64
.visible .entry k(.param .u64 px, .param .u64 py)
{{
    .reg .pred p, q;
    .reg .b16 %h;
    .reg .b32 %r<9>, %t, %s, %warp;
    .reg .b64 %x, %y, %offset;
    .shared .align 16 .b8 cells[256];
    mov.u32 %t, %tid.x;
    shr.u32 %warp, %t, 5;
    setp.eq.u32 p, %t, 0;
    mul.wide.u32 %offset, %t, 4;
    ld.param.u64 %x, [px];
    add.u64 %x, %x, %offset;
    ld.param.u64 %y, [py];
    add.u64 %y, %y, %offset;
    mov.u32 %s, cells;
    mad.lo.u32 %s, %t, 4, %s;
    {body}
    ret;
}}
"""
    module = ptxcheck.load(text)
    x, y = np.arange(THREADS, dtype=np.uint32) + 100, np.zeros(THREADS, np.uint32)
    if uninit:
        module.memory.register(x, "x", uninit=True)
    module.launch("k", blocks, THREADS, [x, y], **options)
    return y


# The other warp's word is read: shared memory between a store, a barrier and a load.
EXCHANGE = """
    st.shared.u32 [%s], %t;
    bar.sync 0;
    mov.u32 %r1, cells;
    xor.b32 %r2, %t, 32;
    mad.lo.u32 %r1, %r2, 4, %r1;
    ld.shared.u32 %r3, [%r1];
    st.global.u32 [%y], %r3;
"""
COPY = """
    cp.async.ca.shared.global [%s], [%x], 4;
    cp.async.commit_group;
    cp.async.wait_group 0;
    ld.shared.u32 %r1, [%s];
    st.global.u32 [%y], %r1;
"""
CHECKED = {"check_races": True, "check_uninit": True, "check_overlap": True}


def test_the_kernels_are_right_without_a_fault():
    threads = np.arange(THREADS)
    for seed in (None, 0, 1):
        assert np.array_equal(run(EXCHANGE, schedule_seed=seed, **CHECKED), threads ^ 32)
        for mode in ("strict", "late", "early"):
            y = run(COPY, cp_async=mode, schedule_seed=seed, **CHECKED)
            assert np.array_equal(y, threads + 100)


@pytest.mark.parametrize(
    "body",
    [
        "ld.global.u32 %r1, [%x+4];",
        "st.global.u32 [%y+4], %t;",
        "st.global.u32 [%y-4], %t;",
        "red.global.add.u32 [%y+4], %t;",
        "atom.global.add.u32 %r1, [%y+4], %t;",
        "@p ld.global.v2.u32 {%r1, %r2}, [%x+256];",
        "cp.async.ca.shared.global [%s], [%x+4], 4;",
    ],
)
def test_global_access_out_of_bounds(body):
    with pytest.raises(MemoryFault, match=r"out-of-bounds global access: .* of buffer"):
        run(body)
    run(body.replace("+256", "").replace("+4", "").replace("-4", ""))


@pytest.mark.parametrize(
    "body",
    [
        "ld.shared.u32 %r1, [%s+4];",
        "st.shared.u32 [%s+4], %t;",
        "st.shared.u32 [%s-4], %t;",
        "atom.shared.add.u32 %r1, [%s+4], %t;",
        "cp.async.ca.shared.global [%s+4], [%x], 4;",
    ],
)
def test_shared_access_out_of_bounds(body):
    with pytest.raises(MemoryFault, match="out-of-bounds shared access"):
        run(body)
    run(body.replace("+4", "").replace("-4", ""))


@pytest.mark.parametrize(
    "body",
    [
        "@p ld.global.u32 %r1, [%x+2];",
        "@p st.global.u32 [%y+1], %t;",
        "@p st.global.v2.u32 [%y+4], {%t, %t};",
        "@p ld.shared.v4.u32 {%r1, %r2, %r3, %r4}, [%s+8];",
        "@p st.shared.u32 [%s+2], %t;",
        "@p cp.async.cg.shared.global [%s], [%x+8], 16;",
    ],
)
def test_misaligned_access(body):
    with pytest.raises(MemoryFault, match="misaligned access"):
        run(body)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (EXCHANGE.replace("bar.sync 0;", ""), "read after write"),
        (
            "@p ld.shared.u32 %r1, [%s];setp.eq.u32 q, %t, 32; @q st.shared.u32 [%s-128], %t;",
            "write after read",
        ),
        ("mov.u32 %s, cells; st.shared.u32 [%s], %t;", "write"),
        (
            "mov.u32 %s, cells; setp.lt.u32 q, %t, 32; @q st.shared.u32 [%s], 1;"
            "@!q atom.shared.add.u32 %r1, [%s], 1;",
            "atomic after write",
        ),
        # Half of the barrier: warp 0 arrives and does not wait.
        (
            EXCHANGE.replace(
                "bar.sync 0;",
                "setp.eq.u32 q, %warp, 0; @q bar.arrive 1, 64; @!q bar.sync 1, 64;",
            ),
            "read after write",
        ),
    ],
    ids=["read after write", "write after read", "two writes", "atomic", "only one side waits"],
)
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_race_between_warps(body, kind, seed):
    with pytest.raises(RaceError, match=f"shared memory race.*{kind}"):
        run(body, check_races=True, schedule_seed=seed)


def test_shared_memory_that_nobody_wrote():
    body = EXCHANGE.replace("st.shared.u32 [%s], %t;", "@!p st.shared.u32 [%s], %t;")
    with pytest.raises(UninitializedRead, match="shared byte 0"):
        run(body, check_uninit=True)
    assert run(body)[32] == 0xFFFFFFFF, "shared memory starts as 0xFF"


def test_global_memory_that_nobody_wrote():
    body = "ld.global.u32 %r1, [%x]; st.global.u32 [%y], %r1;"
    with pytest.raises(UninitializedRead, match="byte 0 of x"):
        run(body, uninit=True, check_uninit=True)
    run("st.global.u32 [%x], %t;" + body, uninit=True, check_uninit=True)


@pytest.mark.parametrize("wait", ["", "cp.async.wait_group 1;"])
def test_asynchronous_copy_that_is_not_waited_for(wait):
    body = COPY.replace("cp.async.wait_group 0;", wait)
    assert (run(body) == 0xFFFFFFFF).all(), "the destination holds 0xFF until the wait"
    with pytest.raises(UninitializedRead, match="asynchronous copy still in flight"):
        run(body, check_uninit=True)


def test_asynchronous_copy_that_only_its_own_warp_waited_for():
    body = COPY.replace("ld.shared.u32 %r1, [%s];", EXCHANGE.split("bar.sync 0;")[1])
    with pytest.raises(RaceError, match="read after write"):
        run(body, check_races=True)
    run(body.replace("wait_group 0;", "wait_group 0; bar.sync 0;"), check_races=True)


def test_two_blocks_that_store_to_the_same_byte():
    with pytest.raises(RaceError, match="two blocks store to byte 0 of"):
        run("st.global.u32 [%y], %t;", blocks=2, check_overlap=True)
    run("red.global.add.u32 [%y], %t;", blocks=2, check_overlap=True)


def test_barrier_that_some_threads_never_reach():
    # Warp 1 waits at another barrier.
    body = "setp.eq.u32 q, %warp, 1; @q bar.sync 1; @!q bar.sync 2;"
    with pytest.raises(DeadlockError, match=r"32 threads .* wait at"):
        run(body)


def test_barrier_in_divergent_code():
    with pytest.raises(BarrierError, match="only a part of the warp"):
        run("and.b32 %r1, %t, 1; setp.eq.u32 q, %r1, 0; @q bar.sync 0;", check_races=True)


def test_bytes_that_the_kernel_left_out():
    module = ptxcheck.load("""
.version 8.0
.target sm_86
.address_size 64
.visible .entry k(.param .u64 py)
{
    .reg .b32 %t;
    .reg .b64 %y, %offset;
    mov.u32 %t, %tid.x;
    mul.wide.u32 %offset, %t, 4;
    ld.param.u64 %y, [py];
    add.u64 %y, %y, %offset;
    st.global.u32 [%y], %t;
    ret;
}
""")
    y = np.zeros(THREADS, np.uint32)
    module.memory.register(y, "y", uninit=True)
    module.launch("k", 1, 60, [y])
    assert module.memory.unwritten(y) == 4 * 4
