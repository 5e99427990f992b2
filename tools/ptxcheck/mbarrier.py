"""mbarrier objects: phases, pending arrivals, transaction counts, waits.

An mbarrier lives in shared memory as eight bytes that nothing but these instructions may
touch; here the bytes hold the state's digest, so that an object overwritten by ordinary
stores is noticed.  A phase is complete when no arrival is pending and the transaction count
is zero.  Bulk copies in flight on the barrier arrive when a waiting thread needs them (see
:mod:`bulk`), which is the latest moment they may.
"""

from __future__ import annotations

import numpy as np

from .access import Access, addresser, lanes_of, space_of
from .binding import binder, unsupported
from .checks import BARRIERS
from .errors import BarrierError, ExecutionError, RaceError
from .memory import SHARED_BASE
from .syntax import SINK, Sink

u64, i64 = np.uint64, np.int64
COUNT_LIMIT = (1 << 20) - 1


class MBarrier:
    """One initialized object."""

    __slots__ = (
        "addr",
        "announced",
        "arrivals",
        "block",
        "born",
        "clocks",
        "column",
        "copies",
        "count",
        "far",
        "ins",
        "owner",
        "passed",
        "pending",
        "phase",
        "place",
        "published",
        "tx",
        "waiting",
    )

    def __init__(self, block, addr, column, count, ins, owner, place):
        self.block, self.addr, self.column, self.ins, self.owner = block, addr, column, ins, owner
        self.count = self.pending = count
        self.tx = self.phase = self.passed = self.waiting = 0
        self.copies = []  # bulk copies in flight, in order of issue
        self.arrivals = []  # (instruction, lanes) of cp.async.mbarrier.arrive
        self.born = None  # what is known to those who may use it
        self.clocks = None  # (known, fenced) of the arrivals so far
        self.published = None  # the same at the last completed phase
        self.place = place  # in words
        self.announced = None  # cluster barriers before its fence.mbarrier_init
        self.far = None  # (time, ins, lane) of another block's last copy

    def digest(self):
        return (
            (self.phase & 0xFFFFF) << 43
            | (self.pending & 0xFFFFF) << 23
            | (self.count & 0xFFFFF) << 3
            | 5
        )

    def __str__(self):
        return (
            f"mbarrier at {self.place}: phase {self.phase} (parity "
            f"{self.phase & 1}), {self.pending} of {self.count} arrivals pending, "
            f"transaction count {self.tx}, {len(self.copies)} copies in flight; "
            f"initialized at {self.ins.where()}"
        )


class Barriers:
    """The mbarriers of a batch's blocks."""

    def __init__(self, st, mode):
        self.st, self.mode = st, mode
        self.rng = None
        self.reset()

    def reset(self):
        self.table = {}
        self.columns, self.passed = {}, {}
        self.refused = None  # the last barrier that a test_wait found incomplete
        self.ready = []  # keys of barriers whose waiters can go on
        self.late = {}  # barriers left incomplete by chance (random schedules)

    # ------------------------------------------------------------- objects
    def words(self):
        return self.st.shared.view(u64)

    def flat(self, block, addr):
        return (block * self.st.sh_stride + addr) >> 3

    def place(self, block, addr):
        """In words."""
        cl = self.st.cluster
        return f"shared byte {addr}" + (f" of {cl.name(block)}" if cl.size > 1 else "")

    def get(self, ins, lane, block, addr):
        bar = self.table.get((block, addr))
        if bar is None:
            raise self.st.error(
                BarrierError, ins, lane, f"no mbarrier is initialized at {self.place(block, addr)}"
            )
        if int(self.words()[self.flat(block, addr)]) != bar.digest():
            raise self.st.error(
                BarrierError,
                ins,
                lane,
                f"the mbarrier at {bar.place} was overwritten; it was "
                f"initialized at {bar.ins.where()}",
            )
        ck = self.st.checker
        if ck is not None and ck.races:
            w, cl = int(ck.lane_warp[lane]), self.st.cluster
            if bar.born > ck.known[cl.unit_of[lane], w, bar.owner] and (
                bar.announced is None or cl.passed[lane] <= bar.announced
            ):
                raise self.st.error(
                    RaceError,
                    ins,
                    lane,
                    f"mbarrier at {bar.place} used without "
                    "synchronization with its initialization by "
                    f"{ck.who(bar.owner)} at {bar.ins.where()}",
                )
        return bar

    def keep(self, bar):
        self.words()[self.flat(bar.block, bar.addr)] = bar.digest()

    def init(self, ins, lane, block, addr, count):
        st = self.st
        unit = block // st.cluster.size
        place = self.place(block, addr)
        if not 1 <= count <= COUNT_LIMIT:
            raise st.error(BarrierError, ins, lane, f"mbarrier count {count} is out of range")
        key = block, addr
        if key in self.table:
            raise st.error(
                BarrierError,
                ins,
                lane,
                f"mbarrier at {place} is initialized again without "
                f"mbarrier.inval; first at {self.table[key].ins.where()}",
            )
        column = self.columns.setdefault(
            key, sum(b // st.cluster.size == unit for b, _ in self.columns)
        )
        if column >= BARRIERS * st.cluster.size:
            raise st.error(ExecutionError, ins, lane, f"more than {BARRIERS} mbarriers in a block")
        ck = st.checker
        bar = self.table[key] = MBarrier(block, addr, column, count, ins, 0, place)
        if ck is not None:
            bar.owner = int(ck.lane_warp[lane])
            bar.born = int(ck.known[unit, bar.owner, bar.owner])
            ck.written[block * st.sh_stride + addr : block * st.sh_stride + addr + 8] = True
        bar.passed = self.passed.get(key, 0)
        self.keep(bar)

    def inval(self, ins, lane, block, addr):
        bar = self.get(ins, lane, block, addr)
        if bar.copies or bar.waiting or bar.arrivals:
            raise self.st.error(BarrierError, ins, lane, f"invalidated while in use: {bar}")
        self.passed[bar.block, addr] = bar.passed
        del self.table[bar.block, addr]
        self.words()[self.flat(bar.block, addr)] = u64(0xFFFFFFFFFFFFFFFF)

    def finish(self):
        """At the end of the blocks."""
        words = self.words()
        for bar in self.table.values():
            if int(words[self.flat(bar.block, bar.addr)]) != bar.digest():
                self.st.stats.target.note(
                    "the memory of an mbarrier was put to another use without mbarrier.inval "
                    f"(undefined in PTX): {bar.ins.where()}"
                )

    # -------------------------------------------------------------- events
    def expect(self, ins, lane, bar, tx):
        bar.tx += tx
        if abs(bar.tx) > COUNT_LIMIT:
            raise self.st.error(BarrierError, ins, lane, f"transaction count out of range: {bar}")

    def arrive(self, ins, lanes, bar, count=1, drop=False, relaxed=False):
        """Arrivals of all these lanes (of one cluster)."""
        ck = self.st.checker
        if ck is not None and ck.races and not relaxed:
            warps = np.unique(ck.lane_warp[lanes])
            clocks = ck.release(self.unit(bar), warps)
            if bar.clocks is None:
                bar.clocks = clocks
            else:
                bar.clocks = tuple(map(np.maximum, bar.clocks, clocks))
        left = count * len(lanes)
        if drop:
            bar.count -= left
        while left:
            if count > bar.pending:
                raise self.st.error(
                    BarrierError, ins, lanes[0], f"more arrivals than the phase expects: {bar}"
                )
            part = min(left, bar.pending // count * count)
            bar.pending -= part
            left -= part
            self.settle(bar)
        self.keep(bar)

    def unit(self, bar):
        return bar.block // self.st.cluster.size

    def settle(self, bar, polled=False):
        """Complete the phase if it can be; a waiting thread lets copies in flight arrive."""
        while True:
            if bar.pending == 0 and bar.tx == 0:
                self.complete(bar)
                return
            late = bar.arrivals if bar.pending else bar.copies if bar.tx > 0 else ()
            if not late or not (polled or bar.waiting):
                return
            if not polled and self.rng is not None and self.rng.random() < 0.5:
                self.late[bar.block, bar.addr] = bar
                return
            polled = True
            k = 0 if self.rng is None else int(self.rng.integers(len(late)))
            if bar.pending:
                self.finish_copies(bar, *bar.arrivals.pop(k))
            else:
                self.land(bar, bar.copies.pop(k))

    def finish_copies(self, bar, ins, lanes):
        """The cp.async of these threads are complete, which counts as their arrival."""
        self.st.cp_async.wait(self.mask(lanes), 0, True)
        self.arrive(ins, lanes, bar)

    def mask(self, lanes):
        m = np.zeros(self.st.N, bool)
        m[lanes] = True
        return m

    def land(self, bar, copy):
        copy.deliver()
        bar.tx -= copy.size

    def complete(self, bar):
        ck = self.st.checker
        bar.phase += 1
        bar.passed += 1
        bar.pending = bar.count or COUNT_LIMIT
        if ck is not None and ck.races:
            if bar.clocks is None:
                bar.clocks = ck.known[0, 0] * 0, ck.fenced[0, 0] * 0
            bar.clocks[0][ck.nw + bar.column] = ck.base + bar.passed
            bar.published = tuple(a.copy() for a in bar.clocks)
            for copy in bar.copies:
                copy.late(bar)
        self.keep(bar)
        self.late.pop((bar.block, bar.addr), None)
        if bar.waiting:
            self.ready.append((bar.block, bar.addr))

    def flush(self):
        """Complete what chance has left; True when some waiter can go on."""
        for bar in list(self.late.values()):
            self.settle(bar, True)
        self.late.clear()
        return bool(self.ready)

    def passed_phase(self, ins, lanes, bar, parity=None, token=None):
        """Has the phase of this parity (or of this arrival's token) completed?"""

        def done():
            return (
                bar.phase & 1 != parity
                if token is None
                else bar.phase & 0xFFFFF != token >> 43 & 0xFFFFF
            )

        if not done():
            self.settle(bar, True)
            self.keep(bar)
        if not done():
            return False
        ck = self.st.checker
        if ck is not None and ck.races and bar.published is not None:
            ck.acquire(self.unit(bar), np.unique(ck.lane_warp[lanes]), bar.published)
        return True


# ----------------------------------------------------------------- binders


def barrier_addresses(st, ins, op, local=False):
    """Function lanes -> flat shared byte addresses, checked.  `local`: of the own block only."""
    acc = Access(st, ins, "shared", "b64")
    addr = addresser(st, op)
    generic = space_of(ins) is None
    acc.local = local or (not generic and "shared::cluster" not in ins.mods)

    def get(lanes):
        a = addr(lanes)
        if generic:
            a = np.where(a >> 56 == SHARED_BASE >> 56, a - SHARED_BASE, a)
        return acc.window(a, lanes, "shared") << acc.shift

    return get


def by_barrier(st, lanes, flat):
    """Lanes of one barrier together: [(block, address, positions in lanes)]."""
    if len(flat) == 1 or (flat == flat[0]).all():
        return [(*divmod(int(flat[0]), st.sh_stride), np.arange(len(lanes)))]
    return [(*divmod(int(k), st.sh_stride), np.flatnonzero(flat == k)) for k in np.unique(flat)]


def lane_values(op, lanes):
    return np.broadcast_to(op, (len(lanes),)) if len(op) == 1 else op[lanes]


@binder("mbarrier")
def bind_mbarrier(st, ins):
    kind = ins.mods[0]
    bars = st.mbar
    if kind == "pending_count":
        token = st.src(ins.ops[1], "u64")
        put = st.setter(ins.ops[0], "u32")
        return lambda m: put(token >> u64(23) & u64(0xFFFFF), m)
    if kind in ("init", "inval", "expect_tx", "complete_tx"):
        where = barrier_addresses(st, ins, ins.ops[0], kind in ("init", "inval"))
        value = st.src(ins.ops[1], "u32") if len(ins.ops) > 1 else np.zeros(1, np.uint32)

        def simple(m):
            some, lanes = lanes_of(st, m)
            if not some:
                return
            every = np.arange(st.N) if lanes is None else lanes
            for lane, a, v in zip(
                every, where(every).tolist(), lane_values(value, every).tolist(), strict=True
            ):
                block, a = divmod(a, st.sh_stride)
                if kind == "init":
                    bars.init(ins, lane, block, a, v)
                elif kind == "inval":
                    bars.inval(ins, lane, block, a)
                else:
                    bar = bars.get(ins, lane, block, a)
                    bars.expect(ins, lane, bar, v if kind == "expect_tx" else -v)
                    bars.settle(bar)
                    bars.keep(bar)

        return simple
    if kind in ("arrive", "arrive_drop"):
        return bind_arrive(st, ins, kind)
    if kind == "test_wait":
        test = wait_test(st, ins)
        put = st.setter(ins.ops[0], "pred")
        out = np.zeros(st.N, bool)

        def poll(m):
            some, lanes = lanes_of(st, m)
            if some:
                every = np.arange(st.N) if lanes is None else lanes
                out[every] = test(every)[0]
                put(out, m)

        return poll
    raise unsupported(ins)


def bind_arrive(st, ins, kind):
    bars = st.mbar
    where = barrier_addresses(st, ins, ins.ops[1])
    expects = "expect_tx" in ins.mods
    value = st.src(ins.ops[2], "u32") if len(ins.ops) > 2 else np.ones(1, np.uint32)
    put = (
        None
        if ins.ops[0] is SINK or isinstance(ins.ops[0], Sink)
        else st.scatter(ins.ops[0], "b64")
    )
    if "noComplete" in ins.mods:
        raise unsupported(ins)

    def ex(m):
        some, lanes = lanes_of(st, m)
        if not some:
            return
        every = np.arange(st.N) if lanes is None else lanes
        addr, val = where(every), lane_values(value, every)
        for block, a, pos in by_barrier(st, every, addr):
            own = every[pos]
            bar = bars.get(ins, own[0], block, a)
            if put is not None:
                if (st.block_of[own] != block).any():
                    raise st.error(
                        BarrierError,
                        ins,
                        own[0],
                        "no state is returned by an arrival "
                        f"at another block's mbarrier (use _): {bar}",
                    )
                put(np.full(len(own), bar.digest(), u64), own)
            if expects:
                bars.expect(ins, own[0], bar, int(val[pos].sum()))
                counts = {1: own}
            else:
                counts = {int(c): own[val[pos] == c] for c in np.unique(val[pos])}
            for c, who in counts.items():
                bars.arrive(ins, who, bar, c, kind == "arrive_drop", "relaxed" in ins.mods)

    return ex


def wait_test(st, ins):
    """Function lanes -> (which of them may pass, the barriers of the others)."""
    bars = st.mbar
    where = barrier_addresses(st, ins, ins.ops[1], True)
    parity = "parity" in ins.mods
    value = st.src(ins.ops[2], "u32" if parity else "u64")

    def test(lanes):
        addr, val = where(lanes), lane_values(value, lanes)
        ok = np.zeros(len(lanes), bool)
        waits = []
        for block, a, pos in by_barrier(st, lanes, addr):
            bar = bars.get(ins, lanes[pos[0]], block, a)
            for v in np.unique(val[pos]):
                own = pos[val[pos] == v]
                if parity:
                    if v > 1:
                        raise st.error(
                            BarrierError, ins, lanes[own[0]], f"phase parity {v} is neither 0 nor 1"
                        )
                    ok[own] = bars.passed_phase(ins, lanes[own], bar, parity=int(v))
                else:
                    ok[own] = bars.passed_phase(ins, lanes[own], bar, token=int(v))
                if not ok[own[0]]:
                    waits.append((bar, lanes[own]))
                    bars.refused = bar
        return ok, waits

    return test


def bind_async_arrive(st, ins):
    """cp.async.mbarrier.arrive: the threads arrive when their copies so far are complete."""
    bars = st.mbar
    where = barrier_addresses(st, ins, ins.ops[0], True)

    def ex(m):
        some, lanes = lanes_of(st, m)
        if not some:
            return
        every = np.arange(st.N) if lanes is None else lanes
        for block, a, pos in by_barrier(st, every, where(every)):
            own = every[pos]
            bar = bars.get(ins, own[0], block, a)
            if "noinc" not in ins.mods:
                bar.pending += len(own)
            if bars.mode == "early":
                bars.arrive(ins, own, bar)
            else:
                bar.arrivals.append((ins, own))
                bars.settle(bar)
            bars.keep(bar)

    return ex
