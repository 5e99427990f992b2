"""Asynchronous copies of threads into shared memory: cp.async and its groups."""

from __future__ import annotations

import numpy as np

from .access import Access, addresser, lanes_of
from .binding import binder, unsupported
from .bulk_instructions import bind_bulk
from .mbarrier import bind_async_arrive

i64 = np.int64


class AsyncCopies:
    """cp.async bookkeeping for one batch.

    mode 'strict': the destination is poisoned at issue and receives the data
    when the issuing thread waits; 'late': it keeps its old contents until the
    wait; 'early': the data arrive at issue."""

    def __init__(self, st, mode):
        self.st, self.mode = st, mode
        self.reset()

    def reset(self):
        self.pending = []  # [access, lanes, addr, data, group]
        self.group = np.zeros(self.st.N, np.int32)

    def issue(self, acc, lanes, dst, data):
        every = np.arange(self.st.N) if lanes is None else lanes
        if self.mode == "early":
            acc.store(dst, data, every)
            return
        idx = acc.window(dst, lanes, "shared")
        if acc.checker is not None:
            acc.checker.write(acc, idx << acc.shift, every, valid=False)
        if acc.stats.detail:
            acc.stats.shared_access(acc, dst, every, True)
        if self.mode == "strict":
            poison = np.full(data.shape, np.iinfo(acc.dt).max, acc.dt)
            acc.store(dst, poison, every, note=False)
        self.pending.append([acc, every, dst, data, self.group[every]])

    def commit(self, m):
        act = self.st.active(m)
        if act is None:
            self.group += 1
        else:
            self.group[act] += 1

    def wait(self, m, keep, uncommitted=False):
        """Complete groups of the active lanes, all but the last `keep`."""
        if not self.pending:
            return
        act = self.st.active(m)
        left = []
        for item in self.pending:
            acc, lanes, dst, data, grp = item
            done = grp < self.group[lanes] - keep
            if uncommitted:
                done = np.ones(len(lanes), bool)
            if act is not None:
                done &= act[lanes]
            if done.all():
                self.deliver(acc, lanes, dst, data)
            elif done.any():
                self.deliver(acc, lanes[done], dst[done], data[done])
                stay = ~done
                left.append([acc, lanes[stay], dst[stay], data[stay], grp[stay]])
            else:
                left.append(item)
        self.pending = left

    def deliver(self, acc, lanes, dst, data):
        if acc.checker is not None:
            acc.checker.write(acc, acc.window(dst, lanes, "shared") << acc.shift, lanes, data)
        acc.store(dst, data, lanes, note=False)


@binder("cp")
def bind_cp(st, ins):
    mods = ins.mods
    if mods[:3] == ["reduce", "async", "bulk"]:
        return bind_bulk(st, ins)
    if mods[:1] != ["async"]:
        raise unsupported(ins)
    if mods[1:2] == ["bulk"]:
        return bind_bulk(st, ins)
    if mods[1:2] == ["mbarrier"]:
        return bind_async_arrive(st, ins)
    copies = st.cp_async
    if "commit_group" in mods:
        return lambda m: copies.commit(m)
    if "wait_all" in mods:
        return lambda m: copies.wait(m, 0, True)
    if "wait_group" in mods:
        n = int(ins.ops[0].value)
        return lambda m: copies.wait(m, n)
    if mods[1:2] not in (["ca"], ["cg"]):
        raise unsupported(ins)
    size = int(ins.ops[2].value)
    if size not in (4, 8, 16) or (mods[1] == "cg" and size != 16):
        raise unsupported(ins, "copy size")
    vec = size // 4
    src_acc = Access(st, ins, "global", "b32", vec)
    dst_acc = Access(st, ins, "shared", "b32", vec)
    dst, src = addresser(st, ins.ops[0]), addresser(st, ins.ops[1])
    count, ignore = None, None
    if (len(ins.ops) > 3 and not any("cache_hint" in m for m in mods[2:])) or len(ins.ops) > 4:
        op = ins.ops[3]
        if getattr(op, "type", None) == "pred":
            ignore = st.src(op, "pred")
        else:
            count = st.src(op, "u32")
    byte_acc = Access(st, ins, "global", "b8")

    def ex(m):
        some, lanes = lanes_of(st, m)
        if not some:
            return
        d, s = dst(lanes), src(lanes)
        n = len(d)
        every = np.arange(st.N) if lanes is None else lanes
        if count is None and ignore is None:
            data = src_acc.load(s, lanes)
        else:
            if ignore is not None:
                k = np.where(ignore if len(ignore) == 1 else ignore[every], 0, size)
            else:
                k = (count if len(count) == 1 else count[every]).astype(i64)
            k = np.broadcast_to(k, (n,))
            if (k > size).any():
                raise src_acc.fault(
                    lanes,
                    int(np.flatnonzero(k > size)[0]),
                    0,
                    "cp.async src-size larger than cp-size",
                    f"cp-size {size}",
                )
            data = np.zeros((n, vec) if vec > 1 else n, np.uint32)
            full = np.flatnonzero(k == size)
            if full.size == n:
                data = src_acc.load(s, lanes)
            elif full.size:
                data[full] = src_acc.load(s[full], every[full])
            part = np.flatnonzero((k > 0) & (k < size))
            raw = data.view(np.uint8).reshape(n, size)
            for j in part:
                a = s[j] + np.arange(k[j])
                raw[j, : k[j]] = byte_acc.load(a, np.full(len(a), every[j]))
        copies.issue(dst_acc, lanes, d, data)

    return ex
