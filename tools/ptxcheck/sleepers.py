"""Threads that sleep in mbarrier.try_wait until the phase is complete."""

from __future__ import annotations

import numpy as np

from .mbarrier import wait_test


class Sleepers:
    """Threads of a batch that wait for mbarriers."""

    def __init__(self, batch):
        self.batch, self.st = batch, batch.st
        self.parked = {}  # pc -> lanes
        self.key = np.zeros((batch.st.N, 2), np.int64)  # their barriers: block, address

    def report(self):
        """Lines for a deadlock's report."""
        st, out = self.st, []
        for pc, mask in self.parked.items():
            for key in np.unique(self.key[mask], axis=0):
                sel = mask & (self.key == key).all(1)
                lane = int(np.flatnonzero(sel)[0])
                out.append(
                    f"  {int(sel.sum())} threads (first: {st.lane_name(lane)}) wait at "
                    f"{self.batch.code[pc].where()}\n    for the "
                    f"{st.mbar.table[tuple(key.tolist())]}"
                )
        return out

    def closure(self, ins, pc):
        """mbarrier.try_wait: threads whose phase is not complete wait here."""
        st = self.st
        test = wait_test(st, ins)
        put = st.setter(ins.ops[0], "pred")
        nxt = pc + 1
        yes = np.ones(1, bool)

        def ex(m):
            act = self.batch.guard_mask(ins, m)
            lanes = np.flatnonzero(act)
            if not lanes.size:
                return nxt
            ok, waits = test(lanes)
            self.wake()
            if ok.all():
                put(yes, None if m is None and act is st.live else act)
                if m is None or np.array_equal(act, m):
                    return nxt
            go = np.zeros(st.N, bool)
            go[lanes[ok]] = True
            if ok.any():
                put(yes, go)
            stay = np.zeros(st.N, bool)
            for bar, who in waits:
                bar.waiting += len(who)
                self.key[who] = bar.block, bar.addr
                stay[who] = True
            if waits:
                old = self.parked.get(pc)
                self.parked[pc] = stay if old is None else old | stay
            go |= (st.live if m is None else m) & ~act
            if go.any():
                self.batch.add_group(nxt, go)
            return None

        return ex

    def wake(self):
        """Let the threads go on whose mbarrier has completed a phase."""
        st = self.st
        bars = st.mbar
        while bars.ready:
            key = bars.ready.pop()
            bars.table[key].waiting = 0
            hit = (self.key == key).all(1)
            for pc, mask in list(self.parked.items()):
                go = mask & hit
                if go.any():
                    self.batch.add_group(pc, go)
                    rest = mask & ~hit
                    if rest.any():
                        self.parked[pc] = rest
                    else:
                        del self.parked[pc]
