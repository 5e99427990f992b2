"""mbarrier instructions one by one, in PTX."""

import numpy as np
import pytest

import ptxcheck


def run(body, threads=32, out=8, data=None, regs="", **options):
    """Runs `body`; register %o points to 32-bit outputs, %b is a barrier's shared address."""
    y = np.zeros(out, np.uint32)
    text = f"""
.version 8.5
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 py, .param .u64 px)
{{
    .reg .pred p, q;
    .reg .b32 %r<20>;
    .reg .b32 %b, %t;
    .reg .b64 %o, %x, %g;
    .reg .b64 %s<9>;
    {regs}
    .shared .align 16 .b8 bars[64];
    .shared .align 16 .b8 cells[1024];
    ld.param.u64 %o, [py];
    ld.param.u64 %x, [px];
    mov.u32 %b, bars;
    mov.u32 %t, %tid.x;
    setp.eq.u32 p, %t, 0;
    {body}
    ret;
}}
"""
    s = ptxcheck.load(text).launch("k", 1, threads, [y, data], **options)
    return y, s


INIT = "@p mbarrier.init.shared::cta.b64 [%b], {};\nbar.sync 0;\n"


def test_tokens_and_counts():
    y, _ = run(
        INIT.format(5)
        + """
    @!p bra END;
    mbarrier.arrive.shared.b64 %s1, [%b];
    mbarrier.arrive.shared.b64 %s2, [%b], 3;
    mbarrier.pending_count.b64 %r1, %s1;
    mbarrier.pending_count.b64 %r2, %s2;
    st.global.u32 [%o], %r1;
    st.global.u32 [%o+4], %r2;
    mbarrier.test_wait.shared.b64 q, [%b], %s1;
    selp.u32 %r3, 1, 0, q;
    st.global.u32 [%o+8], %r3;
    mbarrier.arrive.shared.b64 _, [%b];
    mbarrier.test_wait.shared.b64 q, [%b], %s1;
    selp.u32 %r3, 1, 0, q;
    st.global.u32 [%o+12], %r3;
    mbarrier.test_wait.parity.shared.b64 q, [%b], 0;
    selp.u32 %r3, 1, 0, q;
    st.global.u32 [%o+16], %r3;
    mbarrier.test_wait.parity.shared.b64 q, [%b], 1;
    selp.u32 %r3, 1, 0, q;
    st.global.u32 [%o+20], %r3;
    mbarrier.arrive_drop.shared.b64 %s3, [%b];
    mbarrier.arrive.shared.b64 _, [%b], 4;
    mbarrier.arrive.shared.b64 %s4, [%b];
    mbarrier.pending_count.b64 %r1, %s4;
    st.global.u32 [%o+24], %r1;
END:"""
    )
    assert y.tolist() == [5, 4, 0, 1, 1, 0, 4, 0]


def test_transactions():
    y, _ = run(
        INIT.format(1)
        + """
    @!p bra END;
    mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%b], 48;
    mbarrier.arrive.shared.b64 _, [%b];
    mbarrier.test_wait.parity.shared.b64 q, [%b], 0;
    selp.u32 %r3, 1, 0, q;
    st.global.u32 [%o], %r3;
    mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%b], 16;
    mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%b], 32;
    mbarrier.test_wait.parity.shared.b64 q, [%b], 0;
    selp.u32 %r3, 1, 0, q;
    st.global.u32 [%o+4], %r3;
END:"""
    )
    assert y.tolist()[:2] == [0, 1]


def test_generic_address_and_reuse():
    run(
        INIT.format(1)
        + """
    @!p bra END;
    cvt.u64.u32 %g, %b;
    cvta.shared.u64 %g, %g;
    mbarrier.arrive.b64 _, [%g];
    mbarrier.inval.b64 [%g];
    mbarrier.init.b64 [%g], 7;
END:"""
    )
    with pytest.raises(ptxcheck.BarrierError, match=r"again without mbarrier\.inval"):
        run(INIT.format(1) + "@p mbarrier.init.shared.b64 [%b], 1;")
    _, s = run(INIT.format(1) + "@p st.shared.u32 [%b], 0;")
    assert any("without mbarrier.inval" in n for n in s.notes)


@pytest.mark.parametrize(
    ("body", "kind", "text"),
    [
        (
            "@p mbarrier.arrive.shared.b64 _, [%b];",
            ptxcheck.BarrierError,
            "no mbarrier is initialized",
        ),
        (INIT.format(0), ptxcheck.BarrierError, "count 0"),
        (
            INIT.format(2) + "@p mbarrier.arrive.shared.b64 _, [%b], 3;",
            ptxcheck.BarrierError,
            "more arrivals than the phase expects",
        ),
        (
            INIT.format(1) + "@p mbarrier.arrive.shared.b64 _, [%b+4];",
            ptxcheck.MemoryFault,
            "misaligned",
        ),
        (
            INIT.format(1) + "L: mbarrier.try_wait.parity.shared.b64 q, [%b], 0;\n@!q bra L;",
            ptxcheck.DeadlockError,
            r"32 threads.*mbarrier at shared byte \d+: phase 0.*1 of 1 arrivals",
        ),
        (
            INIT.format(1) + "L: mbarrier.test_wait.parity.shared.b64 q, [%b], 0;\n@!q bra L;",
            ptxcheck.StepLimitExceeded,
            "polled in vain: mbarrier at shared byte",
        ),
        (
            INIT.format(1) + "mbarrier.try_wait.parity.shared.b64 q, [%b], 2;",
            ptxcheck.BarrierError,
            "parity 2",
        ),
    ],
)
def test_misuse(body, kind, text):
    with pytest.raises(kind, match=f"(?s){text}"):
        run(body, max_steps=3000)


@pytest.mark.parametrize("noinc", ["", ".noinc"])
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_async_arrive(noinc, seed):
    """Each thread copies four bytes; all read their neighbours' after the mbarrier."""
    x = np.arange(64, dtype=np.uint32) + 7
    arrive = f"cp.async.mbarrier.arrive{noinc}.shared.b64 [%b];" + (
        "" if noinc else "\nmbarrier.arrive.shared.b64 _, [%b];"
    )
    body = (
        INIT.format(64)
        + f"""
    mov.u32 %r1, cells;
    mad.lo.u32 %r2, %t, 4, %r1;
    mul.wide.u32 %g, %t, 4;
    add.u64 %s1, %x, %g;
    cp.async.ca.shared.global [%r2], [%s1], 4;
    {arrive}
L:  mbarrier.try_wait.parity.shared.b64 q, [%b], 0;
    @!q bra L;
    xor.b32 %r3, %t, 33;
    mad.lo.u32 %r2, %r3, 4, %r1;
    ld.shared.u32 %r4, [%r2];
    add.u64 %s2, %o, %g;
    st.global.u32 [%s2], %r4;
"""
    )
    for mode in ("strict", "early"):
        y, _ = run(
            body, 64, 64, x, schedule_seed=seed, cp_async=mode, check_races=True, check_uninit=True
        )
        assert np.array_equal(y, x[np.arange(64) ^ 33])
    body = body.replace("L:  mbarrier.try_wait.parity.shared.b64 q, [%b], 0;", "")
    with pytest.raises(ptxcheck.UninitializedRead):
        run(body.replace("@!q bra L;", ""), 64, 64, x, check_uninit=True)


def test_only_one_warp_waits():
    """Synchronization counts for the warps that take part, not for the block."""
    body = (
        INIT.format(32)
        + """
    mov.u32 %r1, cells;
    mad.lo.u32 %r2, %t, 4, %r1;
    shr.u32 %r3, %t, 5;
    setp.eq.u32 q, %r3, 1;
    @q bra L;
    st.shared.u32 [%r2], %t;
    setp.eq.u32 q, %r3, 0;
    @q mbarrier.arrive.shared.b64 _, [%b];
    bra END;
L:  mbarrier.try_wait.parity.shared.b64 q, [%b], 0;
    @!q bra L;
    ld.shared.u32 %r4, [%r2+{}];
END:"""
    )
    for seed in (None, 0, 1):
        run(body.replace("{}", "-128"), 96, check_races=True, schedule_seed=seed)
        with pytest.raises(ptxcheck.RaceError):
            run(body.replace("{}", "128"), 96, check_races=True, schedule_seed=seed)
