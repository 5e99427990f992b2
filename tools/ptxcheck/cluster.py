"""Thread block clusters: addresses of other blocks' shared memory, cluster barriers, ends.

The blocks of a cluster lie side by side in a batch.  A shared::cluster address is
`(rank + 1) << 24 | offset`; a plain shared::cta address means the block's own memory.  In a
cluster of one block both are the same.
"""

from __future__ import annotations

import numpy as np

from .binding import binder, unsupported
from .errors import BarrierError, ExecutionError, MemoryFault, RaceError
from .memory import SHARED_BASE
from .state import warps_in

SHIFT = 24
OFFSET = (1 << SHIFT) - 1
i64 = np.int64


class Cluster:
    """The clusters of a batch: `unit` counts them, `rank` is a block's number in its own."""

    def __init__(self, st, dims):
        self.st, self.dims = st, dims
        self.size = size = dims[0] * dims[1] * dims[2]
        self.unit_of = st.block_of // size  # of a lane
        self.rank_of = st.block_of % size
        self.units = st.B // size
        self.arrived = np.zeros(st.N, np.int32)  # cluster barriers, by lane
        self.passed = np.zeros(st.N, np.int32)
        self.done = np.zeros(self.units, np.int32)
        self.ended = np.zeros(st.B, bool)
        self.reset()

    def reset(self):
        self.arrived[:] = self.passed[:] = 0
        self.done[:] = 0
        self.parked = {}  # pc -> lanes in barrier.cluster.wait
        self.clocks, self.published = {}, {}  # unit -> what the arrivals (waits) know
        self.fences = {}  # global warp -> what it knew at its last fence
        self.touched = {}  # block -> {(warp): (time, arrivals, ins, lane)}
        self.ended[:] = False

    # ------------------------------------------------------------ addresses
    def name(self, block):
        return f"block rank {int(block) % self.size}"

    def resolve(self, ins, addr, lanes, local):
        """Shared addresses -> (block of the batch, offset), checked for a block that is there.
        `local`: the instruction reaches its own block only."""
        st = self.st
        own = st.block_of if lanes is None else st.block_of[lanes]
        field = addr >> SHIFT
        if not field.any():
            return own, addr
        bad = (field < 0) | (field > self.size)
        if bad.any():
            k = int(np.flatnonzero(bad)[0])
            raise st.error(
                MemoryFault,
                ins,
                k if lanes is None else lanes[k],
                "out-of-bounds shared access: no block of the cluster has address "
                f"0x{int(addr[k]) & 0xFFFFFFFFFFFFFFFF:x} (mapa gives those of "
                f"{self.size} blocks)",
            )
        block = np.where(field == 0, own, own // self.size * self.size + field - 1)
        far = block != own
        if far.any():
            every = np.arange(st.N) if lanes is None else np.asarray(lanes)
            if local:
                k = int(np.flatnonzero(far)[0])
                raise st.error(
                    MemoryFault,
                    ins,
                    every[k],
                    "a shared::cta instruction on the "
                    f"shared memory of another block ({self.name(block[k])})",
                )
            self.touch(ins, every[far], block[far])
        return block, addr & OFFSET

    def touch(self, ins, lanes, blocks, log=True):
        """These lanes use the shared memory of these other blocks."""
        st, ck = self.st, self.st.checker
        if self.ended[blocks].any():
            k = int(np.flatnonzero(self.ended[blocks])[0])
            raise st.error(
                MemoryFault,
                ins,
                lanes[k],
                "access to the shared memory of "
                f"{self.name(blocks[k])} of the cluster, which has exited",
            )
        if ck is None or not ck.races:
            return
        first = self.passed[lanes] == 0
        for k in np.flatnonzero(first):
            u, w, c = self.unit_of[lanes[k]], ck.lane_warp[lanes[k]], ck.columns(blocks[k])
            if ck.known[u, w, c].max() <= ck.base:
                raise st.error(
                    RaceError,
                    ins,
                    lanes[k],
                    f"{self.name(blocks[k])} of the cluster "
                    "may not have started: no cluster barrier before the first access "
                    "to its shared memory",
                )
        if not log:
            return
        warp = ck.lane_warp[lanes]
        key = blocks.astype(i64) * ck.nw + warp
        _, at = np.unique(key, return_index=True)
        for k in at:
            lane, w = int(lanes[k]), int(warp[k])
            time = int(ck.known[self.unit_of[lane], w, w])
            log = self.touched.setdefault(int(blocks[k]), {})
            log[w] = time, int(self.arrived[lane]), ins, lane

    # ------------------------------------------------------------- barriers
    def arrive(self, ins, act, relaxed):
        st, ck = self.st, self.st.checker
        lanes = np.flatnonzero(act)
        twice = self.arrived[lanes] > self.passed[lanes]
        if twice.any():
            raise st.error(
                BarrierError,
                ins,
                lanes[twice][0],
                "barrier.cluster.arrive again without a barrier.cluster.wait after the last one",
            )
        self.arrived[lanes] += 1
        if ck is None or not ck.races:
            return
        for w in np.flatnonzero(warps_in(act)):
            u, local = divmod(int(w), ck.nw)
            if relaxed:
                clocks = self.fences.get(int(w))
                if clocks is None:
                    continue
            else:
                clocks = ck.release(u, [local])
            old = self.clocks.get(u)
            self.clocks[u] = clocks if old is None else tuple(map(np.maximum, old, clocks))

    def settle(self, batch):
        """Complete the cluster barriers at which all threads that still run have arrived."""
        st = self.st
        late = st.live & (self.arrived <= self.done[self.unit_of])
        some = st.live.reshape(self.units, -1).any(1)
        full = some & ~late.reshape(self.units, -1).any(1)
        if not full.any():
            return
        self.done[full] += 1
        for u in np.flatnonzero(full).tolist():
            self.published[u] = self.clocks.pop(u, None)
        hit = full[self.unit_of]
        for pc, mask in list(self.parked.items()):
            go = mask & hit
            if go.any():
                self.leave(go)
                batch.add_group(pc + 1, go)
                if (mask & ~hit).any():
                    self.parked[pc] = mask & ~hit
                else:
                    del self.parked[pc]

    def leave(self, act):
        """These lanes pass their wait."""
        ck = self.st.checker
        np.copyto(self.passed, self.arrived, where=act)
        if ck is None or not ck.races:
            return
        per = warps_in(act).reshape(self.units, -1)
        for u in np.flatnonzero(per.any(1)).tolist():
            if self.published.get(u) is not None:
                ck.acquire(u, np.flatnonzero(per[u]), self.published[u])

    def fence(self, act, inits):
        """A fence of cluster scope or wider; `inits`: fence.mbarrier_init."""
        st, ck = self.st, self.st.checker
        if ck is None or not ck.races or self.size == 1:
            return
        for w in np.flatnonzero(warps_in(act)).tolist():
            u, local = divmod(w, ck.nw)
            if not inits:
                self.fences[w] = ck.release(u, [local])
            arrivals = int(self.arrived[32 * w : 32 * w + 32].max())
            for bar in st.mbar.table.values():
                if bar.owner == local and bar.block // self.size == u and bar.announced is None:
                    bar.announced = arrivals

    def waiting(self, batch):
        """Lines for a deadlock's report."""
        st, out = self.st, []
        for pc, mask in self.parked.items():
            lane = int(np.flatnonzero(mask)[0])
            u = self.unit_of[lane]
            late = st.live & (self.unit_of == u) & (self.arrived <= self.done[u])
            first = f" (first: {st.lane_name(np.flatnonzero(late)[0])})" if late.any() else ""
            out.append(
                f"  {int(mask.sum())} threads (first: {st.lane_name(lane)}) wait at "
                f"{batch.code[pc].where()}\n    for {int(late.sum())} threads of the "
                f"cluster that have not arrived{first}"
            )
        return out

    # ----------------------------------------------------------------- ends
    def gone(self, batch):
        """Threads have exited: barriers may complete, blocks may have ended."""
        st = self.st
        if self.size > 1:
            dead = ~st.live.reshape(st.B, -1).any(1) & ~self.ended
            for b in np.flatnonzero(dead).tolist():
                self.ended[b] = True
                if st.block_used[b]:
                    self.end(b)
        if self.arrived.any():
            self.settle(batch)

    def end(self, block):
        """A block ends: nobody may use its shared memory any more."""
        st, ck = self.st, self.st.checker
        bars = [bar for (b, _), bar in st.mbar.table.items() if b == block]
        for bar in bars:
            if bar.copies and st.mbar.mode != "early":
                c = bar.copies[0]
                raise st.error(
                    ExecutionError,
                    c.ins,
                    c.lane,
                    f"{self.name(block)} ends with a "
                    f"bulk copy into its shared memory in flight: {bar}",
                )
        if ck is None or not ck.races:
            return
        u = block // self.size
        known = ck.known[u, ck.columns(block)].max(axis=0)
        passed = int(self.passed[block * st.Tp : (block + 1) * st.Tp].max())
        for bar in bars:
            if bar.far is not None and bar.far[0] > known[ck.nw + bar.column]:
                raise st.error(
                    RaceError,
                    bar.far[1],
                    bar.far[2],
                    f"{self.name(block)} ends "
                    "without having waited for this bulk copy into its shared memory: "
                    f"{bar}",
                )
        for w, (time, arrivals, ins, lane) in self.touched.get(block, {}).items():
            if time <= known[w]:
                continue
            if passed > arrivals:  # ordered by a relaxed arrival
                st.stats.target.note(
                    "only barrier.cluster.arrive.relaxed orders an access to a "
                    f"block's shared memory before its end: {ins.where()}"
                )
                continue
            raise st.error(
                RaceError,
                ins,
                lane,
                f"{self.name(block)} of the cluster ends without "
                "waiting for this access to its shared memory (no cluster barrier "
                "after it)",
            )


# ----------------------------------------------------------------- binders


def cluster_barrier(batch, ins, pc):
    """barrier.cluster.arrive and .wait as control instructions."""
    st, cl = batch.st, batch.st.cluster
    nxt = pc + 1
    kind = ins.mods[1]
    aligned = "aligned" in ins.mods and batch.options.check_races
    if kind not in ("arrive", "wait"):
        raise unsupported(ins)

    def complete(m):
        """(mask, active lanes) of the warps that may execute an aligned instruction."""
        act = batch.guard_mask(ins, m)
        return (
            batch.barriers.whole_warps(ins, pc, m, act)
            if aligned and act is not st.live
            else (m, act)
        )

    def arrive(here):
        m, act = complete(here)
        if act.any():
            cl.arrive(ins, act, "relaxed" in ins.mods)
            cl.settle(batch)
        return nxt if m is here else batch.part(nxt, m)

    def wait(here):
        m, act = complete(here)
        idle = act & (cl.arrived == cl.passed)
        if idle.any():
            raise st.error(
                BarrierError,
                ins,
                np.flatnonzero(idle)[0],
                "barrier.cluster.wait without a barrier.cluster.arrive before it",
            )
        go = act & (cl.done[cl.unit_of] >= cl.arrived)
        if go.any():
            cl.leave(go)
        stay = act & ~go
        if not stay.any() and m is here:
            return nxt
        if stay.any():
            old = cl.parked.get(pc)
            cl.parked[pc] = stay if old is None else old | stay
        return batch.part(nxt, (st.live if m is None else m) & ~stay)

    return arrive if kind == "arrive" else wait


@binder("mapa")
def bind_mapa(st, ins):
    """The address of the same shared variable in another block."""
    cl = st.cluster
    typ = ins.mods[-1]
    src, rank = st.src(ins.ops[1], typ), st.src(ins.ops[2], "u32")
    put = st.setter(ins.ops[0], typ)
    generic = not any(x.startswith("shared") for x in ins.mods)

    def ex(m):
        r = np.broadcast_to(rank, (st.N,)).astype(i64)
        act = st.live if m is None else m
        bad = act & (r >= cl.size)
        if bad.any():
            lane = int(np.flatnonzero(bad)[0])
            raise st.error(
                MemoryFault,
                ins,
                lane,
                f"mapa to block rank {r[lane]}: the cluster has {cl.size} blocks",
            )
        a = np.broadcast_to(src, (st.N,)).astype(i64)
        bad = act & ((a >> 56 == SHARED_BASE >> 56) != generic)
        if bad.any():
            lane = int(np.flatnonzero(bad)[0])
            raise st.error(
                MemoryFault,
                ins,
                lane,
                f"mapa of 0x{int(a[lane]):x}, which is no "
                f"{'generic address of ' if generic else ''}shared memory",
            )
        if cl.size > 1:
            base = SHARED_BASE if generic else 0
            a = base + (a & OFFSET | r + 1 << SHIFT)
        put(a.astype(np.uint64 if typ == "u64" else np.uint32), m)

    return ex


@binder("getctarank")
def bind_getctarank(st, ins):
    cl = st.cluster
    typ = ins.mods[-1]
    src = st.src(ins.ops[1], typ)
    put = st.setter(ins.ops[0], "u32")

    def ex(m):
        field = np.broadcast_to(src, (st.N,)).astype(i64) >> SHIFT & 0xFF
        put(np.where(field == 0, cl.rank_of, field - 1).astype(np.uint32), m)

    return ex
