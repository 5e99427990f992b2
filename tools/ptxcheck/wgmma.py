"""Warpgroup matrix multiply: wgmma.fence, mma_async, commit_group, wait_group.

The product is computed at issue, from the shared memory of that moment; the accumulator
registers hold NaN until wait_group returns the result.  Shared memory that changes in between
turns the result into NaN.  So do changed registers of A under wgmma_registers='strict'; else
they are noted in the launch's Stats, for ptxas waits for each wgmma where it sees that.  The
four warps of a warpgroup execute these instructions together.
"""

from __future__ import annotations

import numpy as np

from . import numerics as nx
from .binding import sync, unsupported
from .errors import ExecutionError, MemoryFault
from .mma import a_matrix
from .syntax import Imm
from .tensormap import swizzled
from .warpops import active_warps

u8, u16, u32, f16, f32, f64 = np.uint8, np.uint16, np.uint32, np.float16, np.float32, np.float64
# signalling NaNs for the accumulators of a wgmma in flight: arithmetic on one changes it
POISON = {"f32": u32(0x7FBFDEAD), "f16": u32(0x7DAD7DAD)}
BYTES = {"bf16": 2, "f16": 2, "tf32": 4, "e4m3": 1, "e5m2": 1, "s8": 1, "u8": 1}
K_OF = {2: 16, 4: 8, 1: 32}


class Accumulator:
    """Results in flight of one tuple of accumulator registers, for all warps of the batch."""

    def __init__(self, warps, n, count, poison):
        self.poison = poison
        self.value = np.zeros((warps, 16, n), f64)
        self.busy = np.zeros(warps, bool)
        self.group = np.zeros(warps, np.int64)
        self.bad = np.zeros(warps, bool)  # operands changed
        self.count = count  # registers of a thread


class Reading:
    """Operands in flight of the warpgroups `heads` (first warps)."""

    __slots__ = ("acc", "bits", "chunks", "data", "group", "heads", "ins", "regs")

    def __init__(self, ins, heads, chunks, data, regs, bits, acc, group):
        self.ins, self.heads, self.chunks, self.data = ins, heads, chunks, data
        self.regs, self.bits, self.acc, self.group = regs, bits, acc, group


class WarpgroupUnit:
    """wgmma state of a batch."""

    def __init__(self, st):
        self.st = st
        self.strict = st.options.cp_async != "early"
        self.watch = st.options.check_races
        self.slots = None
        self.acc = {}
        self.reset()

    def reset(self):
        for a in self.acc.values():
            a.busy[:] = False
        self.reading = []
        self.group = np.zeros(self.st.W, np.int64)
        self.fenced = np.zeros(self.st.W, bool)
        self.seen = None
        self.layouts = {}

    # ---------------------------------------------------------------- fence
    def used_registers(self):
        """32-bit registers that some wgmma of the kernel uses."""
        if self.slots is None:
            regs = {
                r
                for ins in self.st.kernel.code
                if ins.base == "wgmma" and ins.mods[0] == "mma_async"
                for op in ins.ops[:2]
                if hasattr(op, "items")
                for r in op.items
            }
            self.slots = np.array(sorted(self.st.reg_slot[r] for r in regs), int)
            self.place = {s: k for k, s in enumerate(self.slots)}
        return self.slots

    def fence(self, m):
        warps = active_warps(self.st, m)
        sel = slice(None) if warps is None else warps
        self.fenced[sel] = True
        if not self.watch:
            return
        slots = self.used_registers()
        now = self.st.files[32][slots].reshape(len(slots), -1, 32)
        if self.seen is None or warps is None:
            self.seen = now if self.seen is None or warps is None else self.seen
        if warps is not None:
            self.seen[:, warps] = now[:, warps]

    def check_fence(self, ins, warps, slots, what):
        """Registers of a wgmma must not have been written since the last fence."""
        if not self.fenced[warps].all():
            w = warps[~self.fenced[warps]][0]
            raise self.st.error(ExecutionError, ins, 32 * w, "no wgmma.fence before this wgmma")
        if not self.watch or not len(warps):
            return
        rows = [self.place[s] for s in slots]
        now = self.st.files[32][slots].reshape(len(slots), -1, 32)[:, warps]
        bad = now != self.seen[rows][:, warps]
        if bad.any():
            k, w, lane = np.argwhere(bad)[0]
            raise self.st.error(
                ExecutionError,
                ins,
                32 * warps[w] + lane,
                f"register {k} of {what} was written after the last wgmma.fence",
            )

    # --------------------------------------------------------------- groups
    def commit(self, m):
        warps = active_warps(self.st, m)
        if warps is None:
            self.group += 1
        else:
            self.group[warps] += 1

    def wait(self, m, keep):
        st = self.st
        warps = np.flatnonzero((st.live if m is None else m).reshape(-1, 32).any(1))
        there = np.zeros(st.W, bool)
        there[warps] = True
        left = []
        for r in self.reading:
            done = there[r.heads] & (r.group < self.group[r.heads] - keep)
            if done.any():
                self.finish_reading(r, done)
            if not done.all():
                if done.any():
                    k = ~done
                    r.heads, r.chunks, r.data = r.heads[k], r.chunks[k], r.data[k]
                    r.bits = None if r.bits is None else r.bits[:, k]
                    r.group = r.group[k]
                left.append(r)
        self.reading = left
        if st.checker is not None and st.checker.races:
            self.refresh(warps)
        for (regs, _n), a in self.acc.items():
            w = warps[a.busy[warps] & (a.group[warps] < self.group[warps] - keep)]
            if w.size:
                self.retire(regs, a, w)

    def retire(self, regs, a, w):
        """Results of these warps appear in their registers."""
        st = self.st
        file = st.files[32].reshape(len(st.files[32]), -1, 32)
        if self.strict:
            touched = (file[np.ix_(regs, w)] != a.poison).any(axis=(0, 2)) & ~a.bad[w]
            a.bad[w[touched]] = True
        file[np.ix_(regs, w)] = to_registers(a.value[w], a.count)
        bad = w[a.bad[w]]
        if bad.size:
            file[np.ix_(regs, bad)] = a.poison
        if self.seen is not None and self.watch:  # written by wgmma: needs no new fence
            rows = [self.place[s] for s in regs]
            self.seen[np.ix_(rows, w)] = file[np.ix_(regs, w)]
        a.busy[w] = a.bad[w] = False

    def finish_reading(self, r, done):
        st = self.st
        heads = r.heads[done]
        if self.strict:
            now = st.shared.reshape(-1, 16)[r.chunks[done]]
            bad = (now != r.data[done]).any(axis=(1, 2))
            if r.regs is not None:
                w = (heads[:, None] + np.arange(4)).ravel()
                file = st.files[32].reshape(len(st.files[32]), -1, 32)[np.ix_(r.regs, w)]
                moved = (file.reshape(len(r.regs), len(heads), 128) != r.bits[:, done]).any(
                    axis=(0, 2)
                )
                if moved.any():
                    st.stats.target.note(
                        "registers of A were written while a wgmma that reads them was in flight "
                        f"(undefined in PTX; ptxas serializes such loops): {r.ins.where()}"
                    )
                if st.options.wgmma_registers == "strict":
                    bad |= moved
            for h in heads[bad]:
                r.acc.bad[h : h + 4] = True
        if st.checker is not None and st.checker.races:
            nw = st.checker.nw
            for h, chunks in zip(heads, r.chunks[done], strict=True):
                w = np.arange(h, h + 4) % nw
                st.checker.async_read_done(int(h) // nw, w, chunks)

    def refresh(self, warps):
        """Reads still in flight stay marked after the end of others of the same chunks."""
        st = self.st
        ck = st.checker
        nw = ck.nw
        for r in self.reading:
            for h, chunks in zip(r.heads, r.chunks, strict=True):
                if h in warps:
                    for w in np.arange(h, h + 4) % nw:
                        ck.rd_time[w].reshape(-1, 16)[chunks] = np.iinfo(np.int32).max
                    ck.rd_last.reshape(-1, 16)[chunks] = np.iinfo(np.int32).max

    def finish(self):
        """At the end of the blocks."""
        for a in self.acc.values():
            if a.busy.any() and self.strict:
                w = int(np.flatnonzero(a.busy)[0])
                raise self.st.error(
                    ExecutionError,
                    self.reading[0].ins if self.reading else self.st.kernel.code[-1],
                    32 * w,
                    "the block ends with a wgmma in flight (no wait_group)",
                )


def to_registers(mat, count):
    """(W, 16, n) -> (count, W, 32) register bits."""
    w, _, n = mat.shape
    v = mat.reshape(w, 2, 8, n // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4)  # j, half, pair, w, r, t
    if count == n // 2:
        return np.ascontiguousarray(v.astype(f32)).view(u32).reshape(count, w, 32)
    h = np.ascontiguousarray(v.astype(f16)).view(u16).astype(u32)
    return (h[:, :, 0] | h[:, :, 1] << u32(16)).reshape(count, w, 32)


def from_registers(bits, n):
    """(count, W, 32) register bits -> (W, 16, n) float64."""
    count, w, _ = bits.shape
    if count == n // 2:
        v = np.ascontiguousarray(bits).view(f32)
    else:
        v = np.stack([bits & u32(0xFFFF), bits >> u32(16)], 1).astype(u16).view(f16)
    v = v.reshape(n // 8, 2, 2, w, 8, 4).transpose(3, 1, 4, 0, 5, 2)
    return v.reshape(w, 16, n).astype(f64)


def decode(raw, kind):
    """Bytes (..., 16) -> (..., 16 / size) float32 values."""
    raw = np.ascontiguousarray(raw)
    if kind == "bf16":
        return nx.bf16_to_f32(raw.view(u16))
    if kind == "f16":
        return raw.view(f16).astype(f32)
    if kind == "tf32":
        return (raw.view(u32) & u32(0xFFFFE000)).view(f32)
    if kind in ("s8", "u8"):
        return raw.view(np.int8 if kind == "s8" else u8).astype(f32)
    return nx.FP8[kind][raw].astype(f32)


def layout(desc, rows, transposed):
    """Byte addresses of an operand's 16-byte chunks: (rows, 2) for a K-major operand, else
    (rows / 8, 16): chunks of eight rows for every k.  PTX ISA, matrix descriptors."""
    start, lead = (desc & 0x3FFF) << 4, (desc >> 16 & 0x3FFF) << 4
    stride, base, mode = (desc >> 32 & 0x3FFF) << 4, desc >> 49 & 7, desc >> 62 & 3
    mode = (0, 3, 2, 1)[mode]  # as in tensor maps: 3 is 128 bytes
    width = 1 << mode  # chunks in a row of the swizzle pattern
    if not transposed:
        r, c = np.arange(rows)[:, None], np.arange(2)
        a = r % 8 * 16 * width + r // 8 * stride + c * (16 if mode else lead)
    else:
        r, k = np.arange(rows // 8)[:, None], np.arange(16)
        if mode:
            a = r % width * 16 + r // width * lead + k % 8 * 16 * width + k // 8 * stride
        else:
            a = r * stride + k % 8 * 16 + k // 8 * lead
    a = a + start
    if base:  # the pattern starts at another row than the address says
        return swizzled(a - base * 128, mode) + base * 128
    return swizzled(a, mode)


def operand(st, ins, unit, desc, rows, transposed, kind, blocks, lane):
    """Gather an operand for blocks: ((B, rows, K) values, (B, chunks) flat chunks, bytes)."""
    key = desc, rows, transposed
    hit = unit.layouts.get(key)
    if hit is None:
        a = layout(desc, rows, transposed)
        if a.max() + 16 > st.sh_size or a.min() < 0:
            raise st.error(
                MemoryFault,
                ins,
                lane,
                f"out-of-bounds shared access by wgmma: byte "
                f"{int(a.max())} (descriptor 0x{desc:016x}); this kernel has "
                f"{st.sh_size} bytes of shared memory",
            )
        hit = unit.layouts[key] = a >> 4
    chunks = (blocks * (st.sh_stride >> 4))[:, None] + hit.ravel()
    data = st.shared.reshape(-1, 16)[chunks]
    v = decode(data, kind).reshape(len(blocks), *hit.shape, -1)
    if transposed:  # (B, rows/8, 16, 8)
        v = v.swapaxes(2, 3).reshape(len(blocks), rows, -1)
    else:
        v = v.reshape(len(blocks), rows, -1)
    return v, chunks, data


@sync("wgmma")
def bind_wgmma(st, ins):
    unit = st.wgmma
    kind = ins.mods[0]
    if kind == "fence":
        return unit.fence
    if kind == "commit_group":
        return unit.commit
    if kind == "wait_group":
        n = int(ins.ops[0].value)
        return lambda m: unit.wait(m, n)
    if kind != "mma_async" or "sp" in ins.mods:
        raise unsupported(ins)
    shape = next(x for x in ins.mods if x[0] == "m" and "n" in x and "k" in x)
    mm, rest = shape[1:].split("n")
    nn, kk = (int(x) for x in rest.split("k"))
    kinds = [x for x in ins.mods if x in BYTES or x in ("f32", "s32")]
    if (
        len(kinds) != 3
        or kinds[0] not in ("f32", "f16")
        or mm != "64"
        or BYTES.get(kinds[1]) != BYTES.get(kinds[2])
        or K_OF[BYTES[kinds[1]]] != kk
        or not 8 <= nn <= 256
        or nn % 8
    ):
        raise unsupported(ins)
    ak, bk = kinds[1:]
    dst = ins.ops[0].items
    if len(dst) != (nn // 2 if kinds[0] == "f32" else nn // 4):
        raise unsupported(ins, "accumulator size")
    regs = np.array([st.reg_slot[r] for r in dst])
    a_regs = None
    if hasattr(ins.ops[1], "items"):
        a_regs = np.array([st.reg_slot[r] for r in ins.ops[1].items])
    else:
        desc_a = st.src(ins.ops[1], "u64")
    desc_b = st.src(ins.ops[2], "u64")
    scale = ins.ops[3] if len(ins.ops) > 3 else Imm(1, "i")
    scale_d = st.src(scale, "pred")
    flags = [int(o.value) for o in ins.ops[4:]]
    sign = flags[0] * flags[1] if len(flags) > 1 else 1
    tnsp = [*flags[2:], 0, 0]
    ta, tb = (0, tnsp[0]) if a_regs is not None else tnsp[:2]
    if (ta or tb) and BYTES[ak] != 2:
        raise unsupported(ins, "transposed operand of this type")
    file = st.files[32].reshape(len(st.files[32]), -1, 32)
    key = tuple(regs.tolist()), nn
    acc = unit.acc.get(key)
    if acc is None:
        acc = unit.acc[key] = Accumulator(st.W, nn, len(regs), POISON[kinds[0]])
    nw = st.Tp // 32

    def ex(m):
        act = (st.live if m is None else m).reshape(-1, 32)
        warps = np.flatnonzero(act.any(1))
        heads = warps[warps % nw % 4 == 0]
        if len(heads) * 4 != len(warps) or not act[warps].all():
            raise st.error(
                ExecutionError, ins, 32 * warps[0], "wgmma needs all 128 threads of its warpgroups"
            )
        unit.check_fence(ins, warps[~acc.busy[warps]], regs, "the accumulator")
        for (slots, _), other in unit.acc.items():
            if other is not acc and other.busy[warps].any() and set(slots) & set(key[0]):
                raise st.error(
                    ExecutionError,
                    ins,
                    32 * warps[0],
                    "accumulator registers are in use by a wgmma of another shape in flight",
                )
        d_on = np.broadcast_to(scale_d, (st.N,))[warps * 32]
        new = warps[~acc.busy[warps]]
        if new.size:
            acc.value[new] = from_registers(file[np.ix_(regs, new)], nn)
        if unit.strict and new.size != warps.size:
            old = warps[acc.busy[warps]]
            acc.bad[old] |= (file[np.ix_(regs, old)] != acc.poison).any(axis=(0, 2))
        if not d_on.all():
            acc.value[warps[~d_on]] = 0
        blocks = heads // nw
        same = same_value(st, ins, desc_b, heads)
        if a_regs is None:
            same_a = same_value(st, ins, desc_a, heads)
            for da, db in set(zip(same_a.tolist(), same.tolist(), strict=True)):
                sel = np.flatnonzero((same_a == da) & (same == db))
                multiply(heads[sel], blocks[sel], da, db)
        else:
            unit.check_fence(ins, warps, a_regs, "A")
            for db in set(same.tolist()):
                sel = np.flatnonzero(same == db)
                multiply(heads[sel], blocks[sel], None, db)
        acc.busy[warps] = True
        acc.group[warps] = unit.group[warps]
        if unit.strict:
            file[np.ix_(regs, new)] = acc.poison
        if kinds[0] == "f16":
            acc.value[warps] = acc.value[warps].astype(f16)
        else:
            acc.value[warps] = acc.value[warps].astype(f32)

    def multiply(heads, blocks, da, db):
        w = (heads[:, None] + np.arange(4)).ravel()
        b, chunks, data = operand(st, ins, unit, db, nn, tb, bk, blocks, 32 * heads[0])
        bits = None
        if a_regs is None:
            a, more, data_a = operand(st, ins, unit, da, 64, ta, ak, blocks, 32 * heads[0])
            chunks = np.concatenate([chunks, more], 1)
            data = np.concatenate([data, data_a], 1)
            a = a.reshape(len(w), 16, kk)
        else:
            raw = file[np.ix_(a_regs, w)]
            bits = raw.reshape(len(a_regs), len(heads), 128)
            v = decode(np.ascontiguousarray(raw)[..., None].view(u8).reshape(*raw.shape, 4), ak)
            a = a_matrix(v, 16, kk)
        if st.checker is not None:
            for h, c in zip(heads, chunks, strict=True):
                st.checker.async_read(ins, 32 * int(h), np.arange(h, h + 4) % st.checker.nw, c)
        b = np.repeat(b, 4, axis=0) if len(heads) > 1 else b
        acc.value[w] += sign * np.matmul(a.astype(f64), b.astype(f64).swapaxes(1, 2))
        unit.reading.append(
            Reading(ins, heads, chunks, data, a_regs, bits, acc, unit.group[heads].copy())
        )

    return ex


def same_value(st, ins, op, heads):
    """Descriptor of each warpgroup; it must be the same in all of its threads."""
    if len(op) == 1:
        return np.broadcast_to(op, len(heads))
    v = op[(heads[:, None] * 32 + np.arange(128))]
    bad = (v != v[:, :1]).any(1)
    if bad.any():
        h = heads[bad][0]
        raise st.error(
            ExecutionError, ins, 32 * h, "the threads of the warpgroup give different descriptors"
        )
    return v[:, 0]
