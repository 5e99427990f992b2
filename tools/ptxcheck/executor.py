"""Control flow and thread scheduling for one batch of blocks.

Threads that share a program counter form a group.  The group that comes first
in the order of :mod:`flow` runs first, so that divergent threads meet again at
joins.  A group that keeps branching backwards while others wait is put aside
now and then, so that spin loops make progress.
"""

from __future__ import annotations

import numpy as np

from .async_copies import AsyncCopies
from .barriers import BlockBarriers
from .binding import unsupported
from .bulk import BulkCopies
from .checks import SharedChecker
from .cluster import cluster_barrier
from .errors import DeadlockError, ExecutionError, PtxError
from .mbarrier import Barriers
from .program import Program
from .registers import RegisterPool
from .sleepers import Sleepers
from .state import BatchState
from .syntax import Args, Label
from .warpops import member_operand, warp_bits
from .wgmma import WarpgroupUnit

SPIN_LIMIT = 256  # backward branches before a waiting group gets a turn
TURN = 64  # control transfers such a turn lasts


class Segment:
    """A run of instructions up to and including a control transfer."""

    __slots__ = ("body", "ctrl", "end", "start", "warps")

    def __init__(self, start, end, body, ctrl):
        self.start, self.end, self.body, self.ctrl = start, end, body, ctrl
        self.warps = 0


class _StatsProxy:
    """Stable object held by closures; forwards to the current Stats."""

    def __init__(self):
        self.target = None
        self.detail = False

    def set(self, stats):
        self.target, self.detail = stats, stats.detail
        self.global_access = stats.global_access
        self.shared_access = stats.shared_access
        self.atomic_access = stats.atomic_access


class Batch:
    """A bound program with the state of the blocks it runs."""

    def __init__(self, kernel, nblocks, options):
        self.kernel, self.options = kernel, options
        self.st = st = BatchState(kernel, nblocks, options)
        st.stats = _StatsProxy()
        st.stats.detail = options.stats == "full"
        st.checker = None
        if options.check_races or options.check_uninit:
            st.checker = SharedChecker(st, options.check_races, options.check_uninit)
        st.cp_async = AsyncCopies(st, options.cp_async)
        st.mbar = Barriers(st, options.cp_async)
        st.bulk = BulkCopies(st, options.cp_async)
        st.wgmma = WarpgroupUnit(st)
        self.code = kernel.code
        self.program = Program(kernel, st)
        self.useg, self.dseg = {}, {}
        self.label_pc = kernel.label_pc
        self.barriers = BlockBarriers(self)
        self.pool = RegisterPool(self)
        self.sleepers = Sleepers(self)

    def segment(self, pc, uniform):
        cache = self.useg if uniform else self.dseg
        seg = cache.get(pc)
        if seg is None:
            body, ctrl, i = [], None, pc
            n = len(self.code)
            while True:
                if i >= n:
                    ctrl = self.exit_closure(None, n)
                    break
                kind = self.program.kind[i]
                if not uniform and i > pc and i in self.program.leaders:
                    ctrl = self.fall(i)  # others may wait here
                    i -= 1
                    break
                if kind == "control":
                    ctrl = self.control(i)
                    break
                if kind == "sync" and not uniform:
                    ctrl = self.sync_closure(i)
                    break
                body.append(self.program.closure(i))
                i += 1
            seg = cache[pc] = Segment(pc, min(i + 1, n), body, ctrl)
        return seg

    @staticmethod
    def fall(pc):
        return lambda m: pc

    # -------------------------------------------------------- control flow
    def guard_mask(self, ins, m):
        """Active lanes of a guarded control instruction."""
        st = self.st
        act = m if m is not None else st.live
        if ins.guard is None:
            return act
        p = st.row(ins.guard)
        return (act & ~p) if ins.guard_neg else (act & p)

    def control(self, pc):
        ins = self.code[pc]
        b = ins.base
        if b == "bra":
            return self.bra_closure(ins, pc)
        if b == "brx":
            return self.brx_closure(ins, pc)
        if b in ("ret", "exit"):
            return self.exit_closure(ins, pc)
        if b == "mbarrier":
            return self.sleepers.closure(ins, pc)
        if b == "setmaxnreg":
            return self.pool.closure(ins, pc)
        if ins.mods[0] == "cluster":
            return cluster_barrier(self, ins, pc)
        return self.barriers.closure(ins, pc)

    def bra_closure(self, ins, pc):
        if not isinstance(ins.ops[0], Label) or ins.ops[0].name not in self.label_pc:
            raise unsupported(ins, "unknown label")
        target, nxt = self.label_pc[ins.ops[0].name], pc + 1
        if ins.guard is None:
            return lambda m: target
        st = self.st
        count = np.count_nonzero

        def ex(m):
            t = self.guard_mask(ins, m)
            c = count(t)
            if c == 0:
                return nxt
            act = st.live if m is None else m
            if c == (st.nlive if m is None else count(m)):
                return target
            self.add_group(target, t)
            self.add_group(nxt, act & ~t)
            return None

        return ex

    def brx_closure(self, ins, pc):
        if not isinstance(ins.ops[1], Args):
            raise unsupported(ins)
        st = self.st
        idx = st.src(ins.ops[0], "u32")
        targets = [self.label_pc[x.name] for x in ins.ops[1].items]

        def ex(m):
            act = self.guard_mask(ins, m)
            rest = (st.live if m is None else m) & ~act
            if rest.any():
                self.add_group(pc + 1, rest)
            for k in np.unique(idx[act]):
                if k >= len(targets):
                    raise st.error(
                        ExecutionError,
                        ins,
                        np.flatnonzero(act)[0],
                        f"brx.idx index {k} is out of range",
                    )
                self.add_group(targets[int(k)], act & (idx == k))
            return None

        return ex

    def exit_closure(self, ins, pc):
        st = self.st

        def ex(m):
            gone = (
                self.guard_mask(ins, m)
                if ins is not None
                else (m if m is not None else st.live).copy()
            )
            gone = gone.copy()
            act = st.live if m is None else m
            rest = act & ~gone
            if not gone.any():
                return pc + 1
            st.live &= ~gone
            st.refresh_live()
            st.cluster.gone(self)
            if st.nlive:
                if self.barriers.waiting.any():
                    self.barriers.release()
                if self.blocked:
                    for p, mask in self.blocked.items():
                        self.add_group(p, mask)
                    self.blocked.clear()
            if rest.any():
                if m is None:
                    return pc + 1  # all remaining live lanes go on
                self.add_group(pc + 1, rest)
            return None

        return ex

    def add_group(self, pc, mask):
        old = self.groups.get(pc)
        self.groups[pc] = mask if old is None else (old | mask)

    # ---------------------------------------------------------- warp syncs
    def sync_closure(self, pc):
        """Divergent form of a warp-synchronous instruction: lanes whose
        partners are missing wait here."""
        st = self.st
        ins = self.code[pc]
        ex = self.program.closure(pc)
        op = member_operand(ins)
        if ins.base == "shfl" and "sync" not in ins.mods:
            raise unsupported(ins)
        member = st.src(op, "u32") if op is not None else None
        group = st.warpgroup if ins.base == "wgmma" else None

        def run(m):
            there = m.reshape(-1, 32)
            present = warp_bits(m)[:, 0]
            if ins.guard is not None:
                # lanes whose guard is false pass; the others synchronize
                g = self.guard_mask(ins, m)
                if not g.any():
                    return pc + 1
            if member is None:
                need = warp_bits(st.live)[:, 0]
                go_warp = ((need & ~present) == 0) & there.any(1)
                if group is not None:  # all warps of the warpgroup, or none
                    missing = np.bincount(group, (need != 0) & ~go_warp) > 0
                    go_warp &= ~missing[group]
                go = m & np.repeat(go_warp, 32)
            else:
                need = np.broadcast_to(member, (st.N,)).reshape(-1, 32) & warp_bits(st.live)
                ok = (need & ~present[:, None]) == 0
                go = m & ok.ravel()
            if go.all() or np.array_equal(go, m):
                ex(m)
                return pc + 1
            stay = m & ~go
            old = self.blocked.get(pc)
            self.blocked[pc] = stay if old is None else (old | stay)
            if go.any():
                ex(go)
                self.add_group(pc + 1, go)
            return None

        return run

    def part(self, pc, m):
        """Only these lanes go on, others of the group wait."""
        if m.any():
            self.add_group(pc, m)

    # ----------------------------------------------------------- execution
    def start(self, block_ids, grid, params, dyn_smem, stats, rng=None):
        st = self.st
        self.rng, self.held = rng, []
        st.stats.set(stats)
        st.reset(block_ids, grid, params, dyn_smem)
        self.stats = stats
        self.groups, self.blocked = {}, {}
        self.barriers.reset()
        self.pool.reset()
        self.sleepers.parked.clear()
        st.mbar.rng = rng
        self.spin = self.turn = 0
        self.groups[0] = st.live.copy()
        for seg in list(self.useg.values()) + list(self.dseg.values()):
            seg.warps = 0

    def run(self, budget):
        """Run up to `budget` segments; True when all blocks are done."""
        st = self.st
        groups = self.groups
        count = np.count_nonzero
        rank = self.kernel.rank

        def first():
            return min(groups, key=rank.__getitem__)

        pc = m = None
        have = False
        steps = 0
        try:
            while True:
                if st.mbar.ready:
                    self.sleepers.wake()
                if self.rng is not None:
                    if (
                        not groups
                        and not have
                        and not self.held
                        and self.sleepers.parked
                        and st.mbar.flush()
                    ):
                        self.sleepers.wake()
                    if have and self.rng.random() < 0.3:
                        self.add_group(pc, st.live.copy() if m is None else m)
                        have = False
                    if not have:
                        self.shuffle()
                if not have:
                    if not groups:
                        if st.nlive == 0:
                            st.wgmma.finish()
                            st.bulk.finish()
                            st.mbar.finish()
                            return True
                        self.deadlock()
                    if len(groups) == 1:
                        pc = next(iter(groups))
                    elif self.turn <= 0 and self.spin > SPIN_LIMIT:
                        pc = next(iter(groups))  # waiting the longest
                        self.turn, self.spin = TURN, SPIN_LIMIT // 2
                    else:
                        pc = first()
                    m = groups.pop(pc)
                    if pc in self.blocked:
                        m = m | self.blocked.pop(pc)
                    if count(m) == st.nlive:
                        m = None
                    have = True
                if steps >= budget:
                    self.add_group(pc, st.live.copy() if m is None else m)
                    return False
                steps += 1
                if m is None:
                    seg = self.useg.get(pc) or self.segment(pc, True)
                    seg.warps += st.live_warps
                    for ex in seg.body:
                        ex(None)
                    pc = seg.ctrl(None)
                    have = pc is not None
                    continue
                seg = self.dseg.get(pc) or self.segment(pc, False)
                seg.warps += count(m.reshape(-1, 32).any(1))
                for ex in seg.body:
                    ex(m)
                nxt = seg.ctrl(m)
                if self.turn > 0:
                    self.turn -= 1
                if nxt is None:
                    have = False
                    if groups and rank[first()] <= rank[seg.start]:
                        self.spin += 1
                    continue
                if groups and rank[nxt] <= rank[seg.start]:
                    self.spin += 1
                meet = nxt in groups or nxt in self.blocked
                give_way = (
                    groups
                    and self.turn <= 0
                    and (rank[first()] < rank[nxt] or self.spin > SPIN_LIMIT)
                )
                if meet or give_way:
                    self.add_group(nxt, m)
                    have = False
                pc = nxt
        except PtxError:
            raise
        except Exception as e:
            ins = self.locate(e)
            where = "" if ins is None else f"\n  kernel {self.kernel.name}, {ins.where()}"
            raise ExecutionError(f"internal error: {type(e).__name__}: {e}{where}") from e
        finally:
            st.steps += steps

    def shuffle(self):
        """Random schedules: hold back some warps for a while."""
        groups, rng = self.groups, self.rng
        while self.held and (not groups or rng.random() < 0.3):
            for pc, mask in self.held.pop(int(rng.integers(len(self.held)))):
                self.add_group(pc, mask)
        if groups and rng.random() < 0.5:
            chosen = np.repeat(rng.random(self.st.W) < 0.5, 32)
            stay = [(pc, mask & chosen) for pc, mask in groups.items() if (mask & chosen).any()]
            for pc, mask in stay:
                groups[pc] = groups[pc] & ~mask
                if not groups[pc].any():
                    del groups[pc]
            if stay:
                self.held.append(stay)
        if not groups and self.held:
            for pc, mask in self.held.pop():
                self.add_group(pc, mask)

    def locate(self, exc):
        """The instruction whose closure raised, found by re-reading frames."""
        tb = exc.__traceback__
        while tb is not None:
            f = tb.tb_frame
            if f.f_code.co_name == "run" and f.f_locals.get("self") is self:
                seg, ex = f.f_locals.get("seg"), f.f_locals.get("ex")
                if seg is not None:
                    for k, e in enumerate(seg.body):
                        if e is ex:
                            return self.code[seg.start + k]
            tb = tb.tb_next
        return None

    def deadlock(self):
        st = self.st
        lines = self.pool.report()
        lines += self.sleepers.report()
        lines += st.cluster.waiting(self)
        for pc, mask in self.blocked.items():
            lane = int(np.flatnonzero(mask)[0])
            lines.append(
                f"  {int(mask.sum())} threads (first: {st.lane_name(lane)}) wait for "
                f"missing warp members at {self.code[pc].where()}"
            )
        lines += self.barriers.report()
        raise DeadlockError(
            f"kernel {self.kernel.name}: no thread can make progress\n" + "\n".join(lines)
        )

    def collect(self):
        """Add the executed instruction counts to the launch's Stats."""
        per = np.zeros(len(self.code) + 1, np.int64)
        for seg in list(self.useg.values()) + list(self.dseg.values()):
            if seg.warps:
                per[seg.start] += seg.warps
                per[seg.end] -= seg.warps
                seg.warps = 0
        per = np.cumsum(per)[:-1]
        for ins, n in zip(self.code, per, strict=True):
            if n:
                self.stats.opcodes[ins.op] += int(n)
                self.stats.lines[ins.line] += int(n)
