"""Barriers of a block: bar.sync, bar.arrive and bar.red, named or not, with or without counts."""

from __future__ import annotations

import numpy as np

from .binding import unsupported
from .errors import BarrierError
from .state import warps_in
from .syntax import Imm


class BlockBarriers:
    """Threads that wait at the barriers of a batch's blocks."""

    def __init__(self, batch):
        self.batch, self.st = batch, batch.st
        N = batch.st.N
        self.waiting = np.zeros(N, bool)
        self.ident = np.zeros(N, np.int16)
        self.pc = np.zeros(N, np.int64)  # where they go on
        self.need = np.zeros(N, np.int32)  # threads, 0: all of the block
        self.value = np.zeros(N, bool)  # predicates of bar.red
        self.early = {}  # (block, barrier) -> threads of bar.arrive
        self.early_clocks = {}  # the same -> what those threads know, for the checks
        self.split = {}  # pc -> warps that wait there for their other threads
        self.finish = {}  # pc -> writer of bar.red's result

    def reset(self):
        self.waiting[:] = False
        self.early.clear()
        self.early_clocks.clear()
        self.split.clear()

    def report(self):
        """Lines for a deadlock's report."""
        st, out = self.st, []
        for pc in np.unique(self.pc[self.waiting]):
            sel = self.waiting & (self.pc == pc)
            lane = int(np.flatnonzero(sel)[0])
            out.append(
                f"  {int(sel.sum())} threads (first: {st.lane_name(lane)}) wait at "
                f"{self.batch.code[int(pc) - 1].where()}"
            )
        return out

    def closure(self, ins, pc):
        st = self.st
        mods = [x for x in ins.mods if x not in ("cta", "aligned")]
        kind = mods[0]
        nxt = pc + 1
        ops = ins.ops or [Imm(0, "i")]
        red = None
        if kind == "red":
            red = mods[1]
            out = st.setter(ops[0], "u32" if red == "popc" else "pred")
            predicate = st.pred(ops[-1])
            args = ops[1:-1]
        elif kind in ("sync", "arrive"):
            args = ops
        else:
            raise unsupported(ins)
        ident = st.src(args[0], "u32")
        const_id = int(args[0].value) if isinstance(args[0], Imm) else None
        need = st.src(args[1], "u32") if len(args) > 1 else None

        if red is not None:

            def finish(arrived, mask):
                """Reduce over the arrived lanes of each block, write to `mask`."""
                per = (self.value & arrived).reshape(st.B, st.Tp)
                if red == "popc":
                    r = per.sum(1).astype(np.uint32)
                elif red == "or":
                    r = per.any(1)
                else:
                    r = (per | ~arrived.reshape(st.B, st.Tp)).all(1)
                out(np.repeat(r, st.Tp), mask)

            self.finish[nxt] = finish

        aligned = ins.base == "bar" or "aligned" in ins.mods
        check = aligned and self.batch.options.check_races

        def ex(m):
            act = self.batch.guard_mask(ins, m)
            if check and act is not st.live:
                here, (m, act) = m, self.whole_warps(ins, pc, m, act)
                if m is not here and not act.any():
                    return self.batch.part(nxt, m)
            if (
                m is None
                and ins.guard is None
                and need is None
                and kind == "sync"
                and const_id is not None
                and not self.early
            ):
                if st.checker is not None:
                    st.checker.barrier_all(slice(None))
                return nxt
            if not act.any():
                return nxt
            if red is not None:
                np.copyto(self.value, predicate(), where=act)
            others = (st.live if m is None else m) & ~act
            if others.any():
                self.batch.add_group(nxt, others)
            if kind == "arrive":
                cnt = act.reshape(st.B, -1, 32).any(2).sum(1) * 32
                for blk in np.flatnonzero(cnt):
                    first = np.flatnonzero(act.reshape(st.B, -1)[blk])[0] + blk * st.Tp
                    k = (int(blk), int(np.broadcast_to(ident, (st.N,))[first]))
                    self.early[k] = self.early.get(k, 0) + int(cnt[blk])
                    if st.checker is not None and st.checker.races:
                        w = np.flatnonzero(act.reshape(st.B, -1, 32)[blk].any(1))
                        c = st.checker.release(*st.checker.place(blk, w))
                        old = self.early_clocks.get(k)
                        self.early_clocks[k] = c if old is None else tuple(map(np.maximum, old, c))
                self.batch.add_group(nxt, act)
                self.release()
                return None
            self.waiting |= act
            np.copyto(self.ident, ident.astype(np.int16), where=act)
            self.pc[act] = nxt
            if need is None:
                self.need[act] = 0
            else:
                np.copyto(self.need, need.astype(np.int32), where=act)
            self.release()
            return None

        return ex

    def whole_warps(self, ins, pc, m, act):
        """An aligned barrier: (mask, active lanes) of the warps that are complete.  A warp whose
        other threads sleep until an mbarrier or a cluster barrier is complete waits for them,
        as the compiler makes them meet first."""
        st = self.st
        rest = st.live & ~act
        split = act.reshape(-1, 32).any(1) & rest.reshape(-1, 32).any(1)
        before = self.split.get(pc)
        if before is not None:
            before &= ~warps_in(act) | split
        if not split.any():
            return m, act
        asleep = np.zeros(st.N, bool)
        for mask in (*self.batch.sleepers.parked.values(), *st.cluster.parked.values()):
            asleep |= mask
        wait = split & ~warps_in(rest & ~asleep)
        if before is not None:
            wait |= split & before & ~warps_in(rest & self.waiting)
        if self.batch.turn > 0 and (split & ~wait).any():  # out of order: once more, later
            back = m & np.repeat(split & ~wait, 32)
            self.batch.add_group(pc, back)
            m, act, split = m & ~back, act & ~back, wait
        if m is None or (split & ~wait).any():
            w = int(np.flatnonzero(split & ~wait if (split & ~wait).any() else split)[0])
            lane = 32 * w + int(np.flatnonzero(act[32 * w : 32 * w + 32])[0])
            raise st.error(
                BarrierError, ins, lane, "barrier reached by only a part of the warp's threads"
            )
        stay = m & np.repeat(wait, 32)
        old = self.batch.blocked.get(pc)
        self.batch.blocked[pc] = stay if old is None else old | stay
        self.split[pc] = wait if before is None else wait | before
        return m & ~stay, act & ~stay

    def release(self):
        """Let the threads of every complete barrier go on."""
        st = self.st
        ids = np.unique(self.ident[self.waiting])
        live_count = st.live.reshape(st.B, st.Tp).sum(1)
        for bid in ids:
            mine = self.waiting & (self.ident == bid)
            mine2 = mine.reshape(st.B, st.Tp)
            count = mine2.sum(1)
            need = np.where(mine, self.need, 0).reshape(st.B, st.Tp).max(1)
            warps = mine2.reshape(st.B, -1, 32)
            arrived = (warps.any(2)).sum(1) * 32
            for (blk, k), extra in self.early.items():
                if k == bid:
                    arrived[blk] += extra
            done = (count > 0) & np.where(need == 0, count == live_count, arrived >= need)
            if not done.any():
                continue
            go = mine & np.repeat(done, st.Tp)
            if st.checker is not None and st.checker.races:
                self.meet(done, need, warps, int(bid))
            for blk in np.flatnonzero(done):
                self.early.pop((int(blk), int(bid)), None)
            self.waiting &= ~go
            pcs = np.unique(self.pc[go])
            for p in pcs:
                sel = go if len(pcs) == 1 else go & (self.pc == p)
                fin = self.finish.get(int(p))
                if fin is not None:
                    fin(go, sel)
                self.batch.add_group(int(p), sel)

    def meet(self, done, need, warps, bid):
        """Tell the checker who a barrier has brought together."""
        st = self.st
        everyone = done & (need == 0)
        if everyone.any():
            st.checker.barrier_all(everyone)
        for blk in np.flatnonzero(done & (need > 0)):
            there = np.flatnonzero(warps[blk].any(1))
            unit, there = st.checker.place(blk, there)
            clocks = st.checker.release(unit, there)
            st.checker.acquire(unit, there, clocks)
            early = self.early_clocks.pop((int(blk), bid), None)
            if early is not None:
                st.checker.acquire(unit, there, early)
