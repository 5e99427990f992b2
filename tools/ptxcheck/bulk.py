"""Bulk asynchronous copies (TMA): cp.async.bulk, cp.async.bulk.tensor and cp.reduce.async.bulk.

Into shared memory: 'strict' poisons the destination at issue; the data arrive when a thread
waits for the mbarrier.  To global memory: the bytes are taken at issue and compared when the
issuing thread waits; those that changed in between are stored as 0xFF.
"""

from __future__ import annotations

import numpy as np

from .errors import ExecutionError, MemoryFault, PtxError
from .memory import PARAM_BASE
from .tensormap import TensorMap

i64 = np.int64


class Load:
    """A copy into shared memory in flight; `places` are flat indices of 16-byte chunks."""

    __slots__ = ("bulk", "fetch", "first", "ins", "lane", "places", "size")

    def __init__(self, bulk, ins, lane, first, places, size, fetch):
        self.bulk, self.ins, self.lane, self.first = bulk, ins, lane, first
        self.places, self.size, self.fetch = places, size, fetch

    def deliver(self):
        st = self.bulk.st
        st.shared.reshape(-1, 16)[self.places] = self.fetch().reshape(-1, 16)
        if st.checker is not None:
            st.checker.bulk_arrived(self.first, self.size)

    def late(self, bar):
        ck = self.bulk.st.checker
        ck.bulk_late(self.first, self.size, bar)
        if bar.far is not None and bar.far[2] == self.lane:
            bar.far = ck.base + bar.passed + 1, self.ins, self.lane


class Store:
    """A copy out of shared memory; `group` counts the thread's bulk groups."""

    __slots__ = ("data", "group", "ins", "lane", "places", "put", "taken")

    def __init__(self, ins, lane, places, data, put, group):
        self.ins, self.lane, self.places, self.data, self.put = ins, lane, places, data, put
        self.group, self.taken = group, False


class BulkCopies:
    """Bulk copies of a batch."""

    def __init__(self, st, mode):
        self.st, self.mode = st, mode
        self.maps = {}
        self.reset()

    def reset(self):
        self.stores = []
        self.group = np.zeros(self.st.N, np.int32)
        self.maps.clear()

    def load(self, ins, lane, bar, first, places, size, fetch):
        st = self.st
        if st.checker is not None:
            st.checker.bulk_write(ins, lane, first, size, bar)
        copy = Load(self, ins, lane, first, places, size, fetch)
        if self.mode == "early":
            copy.deliver()
            bar.tx -= size
        else:
            fetch()  # addresses are checked at issue
            if self.mode == "strict":
                st.shared[first : first + size] = 0xFF
            bar.copies.append(copy)
        st.mbar.settle(bar)
        st.mbar.keep(bar)

    def store(self, ins, lane, first, places, size, put):
        st = self.st
        if st.checker is not None:
            w = int(st.checker.lane_warp[lane])
            st.checker.async_read(ins, lane, [w], np.arange(first // 16, (first + size) // 16))
        data = st.shared.reshape(-1, 16)[places]
        self.stores.append(Store(ins, lane, places, data, put, int(self.group[lane])))

    def take(self, copy):
        """The copy has read its source."""
        st, copy.taken = self.st, True
        if self.mode != "early":
            now = st.shared.reshape(-1, 16)[copy.places]
            copy.data = np.where(now == copy.data, now, np.uint8(0xFF))
        if st.checker is not None:
            unit = st.cluster.unit_of
            b, w = int(unit[copy.lane]), int(st.checker.lane_warp[copy.lane])
            others = [
                c.places
                for c in self.stores
                if not c.taken and unit[c.lane] == b and st.checker.lane_warp[c.lane] == w
            ]
            st.checker.async_read_done(b, [w], copy.places, others)

    def commit(self, m):
        act = self.st.active(m)
        if act is None:
            self.group += 1
        else:
            self.group[act] += 1

    def wait(self, m, keep, read):
        if not self.stores:
            return
        act = self.st.live if m is None else m
        left = []
        for c in self.stores:
            if act[c.lane] and c.group < self.group[c.lane] - keep:
                if not c.taken:
                    self.take(c)
                if not read:
                    c.put(c.data)
                    continue
            left.append(c)
        self.stores = left

    def finish(self):
        """At the end of the blocks: what must not be under way, and the last writes."""
        st = self.st
        for bar in st.mbar.table.values():
            if bar.copies and self.mode != "early":
                c = bar.copies[0]
                raise st.error(
                    ExecutionError,
                    c.ins,
                    c.lane,
                    f"the block ends with a bulk copy into its shared memory in flight: {bar}",
                )
        for c in self.stores:
            if not c.taken:
                more = " and no commit_group" if c.group == self.group[c.lane] else ""
                raise st.error(
                    ExecutionError,
                    c.ins,
                    c.lane,
                    "the block ends before this bulk "
                    "copy has read its shared memory (no cp.async.bulk.wait_group"
                    f"{more})",
                )
            c.put(c.data)
        self.stores = []

    # ---------------------------------------------------------- tensor maps
    def tensor_map(self, ins, lane, addr):
        st = self.st
        if addr % 64:
            raise st.error(
                MemoryFault, ins, lane, f"tensor map at 0x{addr:x} is not aligned to 64 bytes"
            )
        if addr >> 56 == PARAM_BASE >> 56:
            raw = st.param[addr - PARAM_BASE : addr - PARAM_BASE + 128]
        else:
            buf = st.mem.find(addr)
            if buf is None or addr + 128 > buf.end:
                raise st.error(
                    MemoryFault, ins, lane, f"no tensor map at 0x{addr:x}; {st.mem.nearest(addr)}"
                )
            raw = buf.data[addr - buf.addr : addr - buf.addr + 128]
        raw = raw.tobytes()
        tm = self.maps.get(raw)
        if tm is None:
            try:
                tm = self.maps[raw] = TensorMap.unpack(raw)
                tm.check()
            except PtxError as e:
                raise st.error(ExecutionError, ins, lane, str(e)) from None
        return tm
