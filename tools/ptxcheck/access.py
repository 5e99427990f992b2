"""Typed loads and stores at the addresses of threads, checked."""

from __future__ import annotations

import numpy as np

from .binding import unsupported
from .errors import MemoryFault, RaceError, UninitializedRead
from .memory import LOCAL_BASE, PARAM_BASE, SHARED_BASE
from .state import DTYPE, UDTYPE, WIDTH, address_parts

u64, i64 = np.uint64, np.int64
SPACES = ("global", "shared", "local", "param", "const")


def space_of(ins):
    for m in ins.mods:
        s = m.split("::")[0]
        if s in SPACES and not m.endswith("cluster"):
            return s
        if m == "shared::cluster":
            return "shared"
    return None


class Access:
    """Typed gather/scatter at per-lane addresses.

    `lanes` is None (all N lanes) or an index array; address and data arrays
    are compressed accordingly.  `vec` elements of type `typ` are accessed at
    consecutive addresses; data has shape (n, vec) when vec > 1, else (n,).
    """

    def __init__(self, st, ins, space, typ, vec=1):
        self.st, self.ins, self.space = st, ins, space
        self.dt, self.vec = UDTYPE[WIDTH[typ]], vec
        self.esize = WIDTH[typ] // 8
        self.size = self.esize * vec
        self.shift = self.size.bit_length() - 1
        self.stats = st.stats
        self.checker = st.checker
        self.check_uninit = st.options.check_uninit
        self.check_overlap = st.options.check_overlap
        self.atomic = False
        self.local = space == "shared" and "shared::cluster" not in ins.mods

    # -- faults
    def fault(self, lanes, k, addr, what, hint):
        lane = k if lanes is None else lanes[k]
        return self.st.error(
            MemoryFault, self.ins, lane, f"{what}: {self.size} bytes at 0x{int(addr):x}; {hint}"
        )

    def check_align(self, addr, lanes):
        if self.size > 1:
            low = addr & (self.size - 1)
            if low.any():
                k = int(np.flatnonzero(low)[0])
                hint = self.st.mem.nearest(int(addr[k])) if self.space == "global" else "alignment"
                raise self.fault(lanes, k, addr[k], "misaligned access", hint)

    # -- flat windows (shared, local)
    def window(self, addr, lanes, space):
        """Element index into the flat shared or local array."""
        st = self.st
        if space == "local":
            limit, base = st.kernel.local_size, st.lo_base if lanes is None else st.lo_base[lanes]
        elif st.cluster.size == 1:
            limit, base = st.sh_size, st.sh_base if lanes is None else st.sh_base[lanes]
        else:
            block, addr = st.cluster.resolve(self.ins, addr, lanes, self.local)
            limit, base = st.sh_size, block * st.sh_stride
        self.check_align(addr, lanes)
        bad = (addr < 0) | (addr > limit - self.size)
        if bad.any():
            k = int(np.flatnonzero(bad)[0])
            raise self.fault(
                lanes,
                k,
                int(addr[k]) & 0xFFFFFFFFFFFFFFFF,
                f"out-of-bounds {space} access",
                f"{space} memory of this kernel has {limit} bytes",
            )
        return (base + addr) >> self.shift

    def flat(self, space):
        st = self.st
        views, data = (st.sh_views, st.shared) if space == "shared" else (st.lo_views, st.local)
        key = (self.dt, self.vec)
        v = views.get(key)
        if v is None:
            v = data.view(self.dt)
            if self.vec > 1:
                v = v.reshape(-1, self.vec)
            views[key] = v
        return v

    # -- global
    def pieces(self, addr, lanes):
        """Split by buffer: list of (buffer, selector or None)."""
        mem = self.st.mem
        lo, hi = int(addr.min()), int(addr.max())
        buf = mem.find(lo)
        if buf is not None and hi + self.size <= buf.end:
            return [(buf, None)]
        starts = np.array(mem.starts, np.uint64)
        a = addr.view(np.uint64)
        slot = np.searchsorted(starts, a, side="right").astype(i64) - 1
        out = []
        for s in np.unique(slot):
            sel = np.flatnonzero(slot == s)
            b = mem.buffers[s] if s >= 0 else None
            x = a[sel]
            bad = np.ones(len(sel), bool) if b is None else x + u64(self.size) > u64(b.end)
            if bad.any():
                k = int(sel[np.flatnonzero(bad)[0]])
                raise self.fault(
                    lanes, k, int(a[k]), "out-of-bounds global access", mem.nearest(int(a[k]))
                )
            out.append((b, sel))
        return out

    def buffer_load(self, buf, a, lanes):
        if self.check_uninit and buf.init is not None:
            off = (a - buf.addr)[:, None] + np.arange(self.size)
            miss = buf.init[off] == 0
            if miss.any():
                k = int(np.flatnonzero(miss.any(1))[0])
                lane = k if lanes is None else lanes[k]
                raise self.st.error(
                    UninitializedRead,
                    self.ins,
                    lane,
                    f"read of never-written global memory: byte "
                    f"{int(a[k]) - buf.addr} of {buf.name}",
                )
        v = buf.view(self.dt, self.vec)
        if v is not None:
            return v[(a - buf.addr) >> self.shift]
        off = (a - buf.addr)[:, None] + np.arange(self.size)
        r = buf.data[off].view(self.dt)
        return r if self.vec > 1 else r[:, 0]

    def buffer_store(self, buf, a, val, lanes):
        if buf.readonly:
            raise self.fault(lanes, 0, int(a[0]), "write to constant memory", buf.name)
        if buf.init is not None:
            buf.init[(a - buf.addr)[:, None] + np.arange(self.size)] = 1
        if self.check_overlap and not self.atomic:
            self.note_writer(buf, a, lanes)
        v = buf.view(self.dt, self.vec)
        if v is not None:
            v[(a - buf.addr) >> self.shift] = val
            return
        off = (a - buf.addr)[:, None] + np.arange(self.size)
        val = np.ascontiguousarray(val).reshape(len(a), self.vec)
        buf.data[off] = val.view(np.uint8).reshape(len(a), self.size)

    def note_writer(self, buf, a, lanes):
        """Check that no other block has stored to these bytes."""
        st = self.st
        every = np.arange(st.N) if lanes is None else lanes
        if buf.writer is None:
            buf.writer = np.zeros(buf.size, np.int32)
        byte = (a - buf.addr)[:, None] + np.arange(self.size)
        me = np.broadcast_to((st.block_ids[st.block_of[every]] + 1)[:, None], byte.shape)
        old = buf.writer[byte]
        buf.writer[byte] = me
        bad = ((old != 0) & (old != me)) | (buf.writer[byte] != me)
        if bad.any():
            k, j = np.argwhere(bad)[0]
            other = old[k, j] if old[k, j] not in (0, me[k, j]) else buf.writer[byte[k, j]]
            raise st.error(
                RaceError,
                self.ins,
                every[k],
                f"two blocks store to byte {byte[k, j]} of {buf.name}; the other one "
                f"is block number {int(other) - 1}",
            )

    # -- entry points
    def split_generic(self, addr, lanes):
        """Generic addresses -> list of (space, address, selector)."""
        top = addr >> 56
        t0 = int(top[0])
        names = {0: "global", 1: "shared", 2: "local", 3: "param"}
        bases = {0: 0, 1: SHARED_BASE, 2: LOCAL_BASE, 3: PARAM_BASE}
        if (top == t0).all():
            return [(names.get(t0, "global"), addr - bases.get(t0, 0), None)]
        out = []
        for t in np.unique(top):
            sel = np.flatnonzero(top == t)
            t = int(t)
            out.append((names.get(t, "global"), addr[sel] - bases.get(t, 0), sel))
        return out

    def load(self, addr, lanes, space=None):
        space = space or self.space
        if space is None:
            parts = self.split_generic(addr, lanes)
            if len(parts) == 1:
                return self.load(parts[0][1], lanes, parts[0][0])
            out = np.zeros((len(addr), self.vec) if self.vec > 1 else len(addr), self.dt)
            every = np.arange(self.st.N) if lanes is None else lanes
            for sp, a, sel in parts:
                out[sel] = self.load(a, every[sel], sp)
            return out
        if space in ("shared", "local"):
            idx = self.window(addr, lanes, space)
            if space == "shared" and self.checker is not None:
                self.checker.read(self, idx << self.shift, lanes)
            if space == "shared" and self.stats.detail:
                self.stats.shared_access(self, addr, lanes, False)
            return self.flat(space)[idx]
        if space == "param":
            bad = (addr < 0) | (addr > self.st.kernel.param_size - self.size)
            if bad.any():
                k = int(np.flatnonzero(bad)[0])
                raise self.fault(
                    lanes,
                    k,
                    int(addr[k]),
                    "out-of-bounds parameter access",
                    f"{self.st.kernel.param_size} bytes of parameters",
                )
            off = addr[:, None] + np.arange(self.size)
            r = self.st.param[off].view(self.dt)
            return r if self.vec > 1 else r[:, 0]
        self.check_align(addr, lanes)
        pieces = self.pieces(addr, lanes)
        self.stats.global_access(self, addr, lanes, False)
        if len(pieces) == 1:
            return self.buffer_load(pieces[0][0], addr, lanes)
        out = np.zeros((len(addr), self.vec) if self.vec > 1 else len(addr), self.dt)
        every = np.arange(self.st.N) if lanes is None else lanes
        for b, sel in pieces:
            out[sel] = self.buffer_load(b, addr[sel], every[sel])
        return out

    def store(self, addr, val, lanes, space=None, note=True):
        space = space or self.space
        if space is None:
            every = np.arange(self.st.N) if lanes is None else lanes
            for sp, a, sel in self.split_generic(addr, lanes):
                if sel is None:
                    self.store(a, val, lanes, sp)
                else:
                    self.store(a, val[sel], every[sel], sp)
            return
        if space in ("shared", "local"):
            idx = self.window(addr, lanes, space)
            if space == "shared" and note:
                if self.checker is not None:
                    self.checker.write(self, idx << self.shift, lanes, val)
                if self.stats.detail:
                    self.stats.shared_access(self, addr, lanes, True)
            self.flat(space)[idx] = val
            return
        self.check_align(addr, lanes)
        pieces = self.pieces(addr, lanes)
        if note:
            self.stats.global_access(self, addr, lanes, True)
        every = None
        for b, sel in pieces:
            if sel is None:
                self.buffer_store(b, addr, val, lanes)
            else:
                if every is None:
                    every = np.arange(self.st.N) if lanes is None else lanes
                self.buffer_store(b, addr[sel], val[sel], every[sel])


def addresser(st, op):
    """Function lanes -> int64 addresses (compressed)."""
    row, off, _ = address_parts(st, op)
    if row is None:
        const = np.full(st.N, off, i64)
        return lambda lanes: const if lanes is None else const[lanes]
    if row.dtype == np.uint32:
        if off >= 0 and off < (1 << 31):
            if off == 0:
                return lambda lanes: (row if lanes is None else row[lanes]).astype(i64)
            return lambda lanes: (row if lanes is None else row[lanes]).astype(i64) + off
        return lambda lanes: (row if lanes is None else row[lanes]).astype(i64) + off
    row = row.view(i64)
    if off == 0:
        return lambda lanes: row if lanes is None else row[lanes]
    return lambda lanes: (row if lanes is None else row[lanes]) + off


def lanes_of(st, m):
    """(any active, lanes) for a memory operation."""
    act = st.active(m)
    if act is None:
        return True, None
    lanes = np.flatnonzero(act)
    return lanes.size > 0, lanes


def access_type(ins):
    typ = [m for m in ins.mods if m in DTYPE]
    if not typ:
        raise unsupported(ins, "no access type")
    return typ[-1]
