"""Shared memory checks: races, missing proxy fences and reads of unwritten bytes.

Order is tracked with vector clocks.  Every warp of a cluster has a clock, and every mbarrier
one that counts its completed phases.  `known[u, w, a]` is the time of agent a (warp or
mbarrier) that warp w of cluster u has synchronized with; a barrier joins the rows of the warps
that take part, an mbarrier carries the rows of those that arrive to those that wait.  An
access is a race when an earlier one by another agent, one of them a write, is later than
that.  `fenced` is the same for the async proxy: generic writes up to that time have a
`fence.proxy.async` behind them.
"""

from __future__ import annotations

import numpy as np

from .errors import RaceError, UninitializedRead
from .state import warps_in

BARRIERS = 64  # mbarriers of a block, at most
FLIGHT = np.iinfo(np.int32).max  # time of a read by a wgmma or bulk copy in flight


class SharedChecker:
    """Per-byte shadow of the shared memory of a batch."""

    def __init__(self, st, races, uninit):
        self.st, self.races, self.uninit = st, races, uninit
        n = len(st.shared)
        self.size = size = st.cluster.size
        self.per = per = st.Tp // 32  # warps of a block
        self.nw = nw = size * per  # of a cluster
        self.units = st.cluster.units
        self.written = np.zeros(n, bool)
        self.wr_time = np.zeros(n if races else 0, np.int32)
        self.wr_agent = np.zeros(n if races else 0, np.int16)
        self.wr_ins = np.zeros(n if races else 0, np.int32)
        self.rd_time = np.zeros((nw, n if races else 0), np.int32)
        self.rd_last = np.zeros(n if races else 0, np.int32)  # over the warps
        self.rd_ins = np.zeros(n if races else 0, np.int32)
        self.at_time = None  # of atomics, when there are any
        self.value = np.zeros(n if races else 0, np.uint8)
        self.known = np.zeros((self.units, nw, nw + BARRIERS * size), np.int32)
        self.fenced = np.zeros((self.units, nw, nw), np.int32)
        self.own = np.arange(nw)
        self.lane_warp = st.warp_of % nw
        self.unit_of = st.cluster.unit_of
        self.ids, self.instrs = {}, []
        self.base, self.flights = 0, False
        self.reset()

    def reset(self):
        """New blocks: what was recorded before lies before everything that follows."""
        self.written[:] = False
        if self.flights:
            self.rd_time[self.rd_time == FLIGHT] = 0
            self.rd_last[self.rd_last == FLIGHT] = 0
        self.flights = False
        self.base = int(max(self.known.max(), self.base)) + 2
        if self.base > 1 << 30:
            for a in (self.wr_time, self.rd_time, self.rd_last):
                a[...] = 0
            if self.at_time is not None:
                self.at_time[...] = 0
            self.base = 2
        self.known[...] = self.base
        self.fenced[...] = self.base
        self.known[:, self.own, self.own] += 1

    # ------------------------------------------------------ synchronization
    def barrier_all(self, blocks):
        """All warps of these blocks meet."""
        per, B = self.per, self.st.B
        k, f = self.known.reshape(B, per, -1), self.fenced.reshape(B, per, -1)
        blocks = np.arange(B)[blocks]
        rows = np.arange(len(blocks))[:, None]
        own = (blocks % self.size * per)[:, None] + np.arange(per)  # the block's warps
        all_know = k[blocks].max(axis=1)
        top = all_know[rows, own].max(axis=1, keepdims=True)
        all_know[rows, own] = top
        k[blocks] = all_know[:, None]
        k[blocks[:, None], np.arange(per), own] = top + 1
        f[blocks] = f[blocks].max(axis=1, keepdims=True)

    def place(self, block, warps):
        """(cluster, agents) of these warps of a block."""
        unit, rank = divmod(int(block), self.size)
        return unit, np.asarray(warps) + rank * self.per

    def columns(self, block):
        """The agents that are a block's warps."""
        start = int(block) % self.size * self.per
        return slice(start, start + self.per)

    def release(self, unit, warps):
        """What these warps know, for others to acquire: (known, fenced)."""
        out = self.known[unit, warps].max(axis=0), self.fenced[unit, warps].max(axis=0)
        self.known[unit, warps, warps] += 1
        return out

    def acquire(self, unit, warps, clocks):
        known, fenced = clocks
        np.maximum.at(self.known, (unit, warps), known)
        np.maximum.at(self.fenced, (unit, warps), fenced)

    def proxy_fence(self, mask):
        """fence.proxy.async by the warps of the mask."""
        for w in np.flatnonzero(warps_in(mask)):
            b, w = divmod(int(w), self.nw)
            np.maximum(self.fenced[b, w], self.known[b, w, : self.nw], out=self.fenced[b, w])
            self.known[b, w, w] += 1

    # ------------------------------------------------------------ reporting
    def number(self, ins):
        key = id(ins)
        if key not in self.ids:
            self.ids[key] = len(self.instrs)
            self.instrs.append(ins)
        return self.ids[key]

    def who(self, agent):
        if agent >= self.nw:
            return f"mbarrier {agent - self.nw}'s bulk copy"
        rank, warp = divmod(agent, self.per)
        return f"warp {warp}" + (f" of block rank {rank}" if self.size > 1 else "")

    def _at(self, byte):
        block, off = divmod(int(byte), self.st.sh_stride)
        return f"shared byte {off}" + (
            f" of block rank {block % self.size}" if self.size > 1 else ""
        )

    def _race(self, ins, lane, byte, what, table, agent):
        other = self.instrs[table[byte]]
        if agent is None or agent >= self.nw:
            why = "the asynchronous access is not known to be complete:"
            who = "" if agent is None else "the bulk copy "
        else:
            why, who = "no barrier since the access by", f"{self.who(agent)} "
        raise self.st.error(
            RaceError,
            ins,
            lane,
            f"shared memory race ({what}) at {self._at(byte)}: {why} {who}at {other.where()}",
        )

    def _unwritten(self, ins, lane, byte, what="read of shared memory never written"):
        raise self.st.error(
            UninitializedRead,
            ins,
            lane,
            f"{what} (or with an asynchronous copy still in flight) at {self._at(byte)}",
        )

    def _unfenced(self, ins, lane, byte, what):
        other = self.instrs[self.wr_ins[byte]]
        raise self.st.error(
            RaceError,
            ins,
            lane,
            f"missing fence.proxy.async: {self._at(byte)}, written by "
            f"{self.who(int(self.wr_agent[byte]))} at {other.where()}, is {what} by the async "
            "proxy",
        )

    # -------------------------------------------------------- generic proxy
    def _prepare(self, acc, flat, lanes):
        every = np.arange(self.st.N) if lanes is None else lanes
        byte = flat[:, None] + np.arange(acc.size)
        return every, byte, self.unit_of[every][:, None], self.lane_warp[every][:, None]

    def _after_write(self, ins, every, byte, block, warp, what, excuse=None):
        """Raise unless the last writes of these bytes are known to the accessing warps."""
        agent = self.wr_agent[byte]
        bad = self.wr_time[byte] > self.known[block, warp, agent]
        if excuse is not None and bad.any():
            bad &= excuse()
        if bad.any():
            k, j = np.argwhere(bad)[0]
            self._race(ins, every[k], byte[k, j], what, self.wr_ins, int(agent[k, j]))

    def _after_table(self, table, names, ins, every, byte, block, warp, what):
        """The same for the reads (or atomics) of every warp."""
        for a in range(self.nw):
            t = table[a][byte]
            bad = t > self.known[block, warp, a]
            if bad.any():
                k, j = np.argwhere(bad)[0]
                self._race(ins, every[k], byte[k, j], what, names, None if t[k, j] == FLIGHT else a)

    def _after_reads(self, ins, every, byte, block, warp, what):
        least = self.known[:, :, : self.nw].min(axis=2)
        if (self.rd_last[byte] > least[block, warp]).any():
            self._after_table(self.rd_time, self.rd_ins, ins, every, byte, block, warp, what)

    def read(self, acc, flat, lanes):
        every, byte, block, warp = self._prepare(acc, flat, lanes)
        if self.uninit:
            miss = ~self.written[byte]
            if miss.any():
                k, j = np.argwhere(miss)[0]
                self._unwritten(acc.ins, every[k], byte[k, j])
        if not self.races:
            return
        self._after_write(acc.ins, every, byte, block, warp, "read after write")
        if self.at_time is not None:
            self._after_table(
                self.at_time, self.wr_ins, acc.ins, every, byte, block, warp, "read after atomic"
            )
        now = self.known[block, warp, warp]
        warp = np.broadcast_to(warp, byte.shape)
        self.rd_time[warp, byte] = np.maximum(self.rd_time[warp, byte], now)
        self.rd_last[byte] = np.maximum(self.rd_last[byte], now)
        self.rd_ins[byte] = self.number(acc.ins)

    def write(self, acc, flat, lanes, val=None, valid=True):
        """A store of `val`; valid=False for an asynchronous copy in flight.

        Two warps storing the same value is no race."""
        every, byte, block, warp = self._prepare(acc, flat, lanes)
        self.written[byte] = valid
        if not self.races:
            return
        new = None
        if val is not None:
            new = np.ascontiguousarray(val).reshape(len(every), -1).view(np.uint8)
        self._after_write(
            acc.ins,
            every,
            byte,
            block,
            warp,
            "write after write",
            None
            if new is None
            else lambda: (self.st.shared[byte] != new) | (self.wr_agent[byte] >= self.nw),
        )
        self._after_reads(acc.ins, every, byte, block, warp, "write after read")
        if self.at_time is not None:
            self._after_table(
                self.at_time, self.wr_ins, acc.ins, every, byte, block, warp, "write after atomic"
            )
        self.wr_time[byte] = self.known[block, warp, warp]
        self.wr_ins[byte] = self.number(acc.ins)
        wb = np.broadcast_to(warp, byte.shape)
        self.wr_agent[byte] = wb
        bad = self.wr_agent[byte] != wb
        if bad.any() and new is not None:
            self.value[byte] = new
            bad &= self.value[byte] != new
        if bad.any():
            k, j = np.argwhere(bad)[0]
            self._race(
                acc.ins,
                every[k],
                byte[k, j],
                "two warps write at once",
                self.wr_ins,
                int(self.wr_agent[byte[k, j]]),
            )

    def atomic(self, acc, flat, lanes):
        every, byte, block, warp = self._prepare(acc, flat, lanes)
        if self.uninit and not self.written[byte].all():
            k, j = np.argwhere(~self.written[byte])[0]
            self._unwritten(acc.ins, every[k], byte[k, j], "atomic on shared memory never written")
        self.written[byte] = True
        if not self.races:
            return
        self._after_write(acc.ins, every, byte, block, warp, "atomic after write")
        self._after_reads(acc.ins, every, byte, block, warp, "atomic after read")
        if self.at_time is None:
            self.at_time = np.zeros_like(self.rd_time)
        warp = np.broadcast_to(warp, byte.shape)
        self.at_time[warp, byte] = self.known[block, warp, warp]
        self.wr_ins[byte] = self.number(acc.ins)

    # ---------------------------------------------------------- async proxy
    def bulk_write(self, ins, lane, first, size, bar):
        """A bulk copy into `size` bytes from flat index `first`, signalled by an mbarrier."""
        span = slice(first, first + size)
        self.written[span] = False
        if not self.races:
            return
        b, w = int(self.unit_of[lane]), int(self.lane_warp[lane])
        known = self.known[b, w]
        agent, time = self.wr_agent[span], self.wr_time[span]
        bad = time > known[agent]
        if bad.any():
            k = int(bad.argmax())
            self._race(ins, lane, first + k, "write after write", self.wr_ins, int(agent[k]))
        if self.rd_last[span].max() > known[: self.nw].min():
            for a in range(self.nw):
                bad = self.rd_time[a, span] > known[a]
                if bad.any():
                    k = int(bad.argmax())
                    self._race(
                        ins,
                        lane,
                        first + k,
                        "write after read",
                        self.rd_ins,
                        None if self.rd_time[a, first + k] == FLIGHT else a,
                    )
        bad = (agent < self.nw) & (time > self.fenced[b, w][np.minimum(agent, self.nw - 1)])
        if bad.any():
            self._unfenced(ins, lane, first + int(bad.argmax()), "overwritten")
        self.wr_agent[span] = self.nw + bar.column
        self.wr_ins[span] = self.number(ins)
        self.bulk_late(first, size, bar)

    def bulk_late(self, first, size, bar):
        """The copy will be complete when the mbarrier's present phase is."""
        if self.races:
            self.wr_time[first : first + size] = self.base + bar.passed + 1

    def bulk_arrived(self, first, size):
        self.written[first : first + size] = True

    def async_read(self, ins, lane, warps, chunks):
        """Reads of 16-byte chunks (flat numbers) begin, asked for by these warps of a block."""
        if self.uninit:
            miss = ~self.written.reshape(-1, 16)[chunks]
            if miss.any():
                k, j = np.argwhere(miss)[0]
                self._unwritten(ins, lane, chunks[k] * 16 + j)
        if not self.races:
            return
        b = int(self.unit_of[lane])
        agent = self.wr_agent.reshape(-1, 16)[chunks]
        time = self.wr_time.reshape(-1, 16)[chunks]
        generic = agent < self.nw
        self.flights = True
        for w in warps:
            bad = time > self.known[b, w][agent]
            if bad.any():
                k, j = np.argwhere(bad)[0]
                self._race(
                    ins, lane, chunks[k] * 16 + j, "read after write", self.wr_ins, int(agent[k, j])
                )
            bad = generic & (time > self.fenced[b, w][np.minimum(agent, self.nw - 1)])
            if bad.any():
                k, j = np.argwhere(bad)[0]
                self._unfenced(ins, lane, chunks[k] * 16 + j, "read")
            self.rd_time[w].reshape(-1, 16)[chunks] = FLIGHT
        self.rd_last.reshape(-1, 16)[chunks] = FLIGHT
        self.rd_ins.reshape(-1, 16)[chunks] = self.number(ins)

    def async_read_done(self, block, warps, chunks, others=()):
        """Those reads are complete for these warps; `others` are chunk arrays of reads by the
        same warps that still run."""
        if not self.races:
            return
        for w in warps:
            rows = self.rd_time[w].reshape(-1, 16)
            rows[chunks] = self.known[block, w, w]
            for more in others:
                rows[more] = FLIGHT
        self.rd_last.reshape(-1, 16)[chunks] = self.rd_time.reshape(self.nw, -1, 16)[:, chunks].max(
            axis=0
        )
