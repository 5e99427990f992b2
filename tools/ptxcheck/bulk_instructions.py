"""The instructions of bulk copies: operands, checks of addresses, multicast, reductions."""

from __future__ import annotations

import numpy as np

from .access import access_type, addresser, lanes_of
from .atomics import atomic_fn
from .binding import unsupported
from .box import Box, note_bytes
from .errors import ExecutionError, MemoryFault, UninitializedRead
from .mbarrier import barrier_addresses
from .memory import SHARED_BASE
from .state import UDTYPE, WIDTH
from .syntax import TensorAddr
from .tensormap import swizzled


def shared_place(st, ins, lane, addr, size, align, local=True):
    """(block, flat byte index) of a shared memory range, checked."""
    if addr >> 56 == SHARED_BASE >> 56:
        addr -= SHARED_BASE
    block = int(st.block_of[lane])
    if st.cluster.size > 1:
        block, addr = (
            int(v[0]) for v in st.cluster.resolve(ins, np.array([addr]), np.array([lane]), local)
        )
    if addr < 0 or addr + size > st.sh_size:
        raise st.error(
            MemoryFault,
            ins,
            lane,
            f"out-of-bounds shared access by a bulk copy: "
            f"{size} bytes at {addr}; this kernel has {st.sh_size} bytes of shared "
            "memory",
        )
    if addr % align:
        raise st.error(
            MemoryFault,
            ins,
            lane,
            f"misaligned bulk copy: shared byte {addr} is not a multiple of {align}",
        )
    return block, block * st.sh_stride + addr


def bind_bulk(st, ins):
    """cp.async.bulk..."""
    reduce = ins.mods[0] == "reduce"
    mods = ins.mods[2 + reduce :]
    bulk = st.bulk
    if "prefetch" in mods:
        return lambda m: None
    if "commit_group" in mods:
        return bulk.commit
    if "wait_group" in mods:
        n = int(ins.ops[0].value)
        return lambda m: bulk.wait(m, n, "read" in mods)
    if any(x.startswith(("im2col", "tile::", "ignore_oob", "cp_mask")) for x in mods):
        raise unsupported(ins)
    spaces = [x.split("::")[0] for x in mods if x.split("::")[0] in ("global", "shared")]
    if spaces == ["shared", "global"] and not reduce:
        return bind_load(st, ins, "tensor" in mods)
    if spaces == ["global", "shared"]:
        return bind_store(st, ins, "tensor" in mods, reduce)
    raise unsupported(ins)


def tensor_operands(st, ins, op):
    """Function lane -> (tensor map, coordinates)."""
    if not isinstance(op, TensorAddr):
        raise unsupported(ins, "tensor coordinates expected")
    where = addresser(st, op.base)
    coords = [st.src(c, "s32") for c in op.coords]

    def get(lane):
        one = np.array([lane])
        tm = st.bulk.tensor_map(ins, lane, int(where(one)[0]))
        at = [int(c[0] if len(c) == 1 else c[lane]) for c in coords]
        if len(at) != len(tm.dims):
            raise st.error(ExecutionError, ins, lane, f"{len(at)} coordinates for {tm}")
        return tm, at

    return get


def chunk_places(first, base, size, mode):
    """Flat chunk numbers of a box laid out from flat byte `first` (block at `base`)."""
    a = first - base + np.arange(0, size, 16)
    return (swizzled(a, mode) + base) >> 4


def each_lane(st, fn):
    def ex(m):
        some, lanes = lanes_of(st, m)
        if some:
            for lane in range(st.N) if lanes is None else lanes.tolist():
                fn(lane)

    return ex


def multicast_mask(st, ins, op):
    """Function lane -> blocks of the batch that a copy goes to; None without multicast."""
    if not any(x.startswith("multicast") for x in ins.mods):
        return None
    cl = st.cluster
    mask = st.src(op, "u16")

    def get(lane):
        bits = int(mask[0] if len(mask) == 1 else mask[lane])
        if bits == 0 or bits >> cl.size:
            raise st.error(
                ExecutionError,
                ins,
                lane,
                f"multicast mask 0x{bits:x} for a cluster of {cl.size} blocks",
            )
        start = int(st.block_of[lane]) // cl.size * cl.size
        return [start + r for r in range(cl.size) if bits >> r & 1]

    return get


def targets(st, ins, dst, bar_op, mask_op, align):
    """Function (lane, bytes) -> [(mbarrier, flat start of its block, flat byte)] of a load."""
    mbar, cl, ck = st.mbar, st.cluster, st.checker
    mask = multicast_mask(st, ins, mask_op)
    where_bar = barrier_addresses(st, ins, bar_op, mask is not None)

    def one_block(lane, size):
        idx = np.array([lane])
        block, at = divmod(int(where_bar(idx)[0]), st.sh_stride)
        bar = mbar.get(ins, lane, block, at)
        to, first = shared_place(st, ins, lane, int(dst(idx)[0]), size, align, False)
        if to != block:
            raise st.error(
                ExecutionError,
                ins,
                lane,
                f"the destination in {cl.name(to)} and {bar} belong to different blocks",
            )
        return [(bar, block * st.sh_stride, first)]

    def several(lane, size):
        idx = np.array([lane])
        at = int(where_bar(idx)[0]) % st.sh_stride
        _, first = shared_place(st, ins, lane, int(dst(idx)[0]), size, align, False)
        blocks = mask(lane)
        out = []
        for b in blocks:
            if b != st.block_of[lane]:
                cl.touch(ins, idx, np.array([b]), log=False)
            out.append(
                (
                    mbar.get(ins, lane, b, at),
                    b * st.sh_stride,
                    b * st.sh_stride + first % st.sh_stride,
                )
            )
        return out

    find = one_block if mask is None else several

    def get(lane, size):
        out = find(lane, size)
        for bar, _, _ in out:
            if ck is not None and ck.races and bar.block != st.block_of[lane]:
                bar.far = ck.base + bar.passed + 1, ins, lane
        return out

    return get


def bind_load(st, ins, tensor):
    """From global memory to the shared memory of one block or, multicast, of several."""
    bulk = st.bulk
    dst = addresser(st, ins.ops[0])
    last = ins.ops[-1]
    if not any("mbarrier" in x for x in ins.mods):
        raise unsupported(ins)
    if tensor:
        what = tensor_operands(st, ins, ins.ops[1])
        places_of = targets(st, ins, dst, ins.ops[2], ins.ops[3] if len(ins.ops) > 3 else last, 128)
    else:
        src, size_op = addresser(st, ins.ops[1]), st.src(ins.ops[2], "u32")
        places_of = targets(st, ins, dst, ins.ops[3], ins.ops[4] if len(ins.ops) > 4 else last, 16)

    def one(lane):
        if tensor:
            tm, at = what(lane)
            box = Box(st, ins, lane, tm, at)
            for bar, base, first in places_of(lane, tm.size):
                if tm.mode:
                    check_pattern(st, ins, lane, first - base, tm)
                bulk.load(
                    ins,
                    lane,
                    bar,
                    first,
                    chunk_places(first, base, tm.size, tm.mode),
                    tm.size,
                    box.read,
                )
            n = 0 if box.empty else box.bytes
        else:
            n = size = int(size_op[0] if len(size_op) == 1 else size_op[lane])
            data = flat_global(st, ins, lane, int(src(np.array([lane]))[0]), size)
            for bar, _, first in places_of(lane, size):
                bulk.load(
                    ins,
                    lane,
                    bar,
                    first,
                    np.arange(first, first + size, 16) >> 4,
                    size,
                    lambda: data.data[data.start : data.start + size],
                )
        count_bytes(st, lane, n, False)

    return each_lane(st, one)


def check_pattern(st, ins, lane, addr, tm):
    if tm.box[0] * tm.esize < 16 << tm.mode and len(tm.box) > 1:
        raise st.error(
            ExecutionError,
            ins,
            lane,
            f"a swizzled box whose rows are shorter than the swizzle is not modelled: {tm}",
        )


class _Range:
    def __init__(self, buf, start):
        self.buf, self.data, self.start = buf, buf.data, start


def flat_global(st, ins, lane, addr, size):
    buf = st.mem.find(addr)
    if buf is None or addr + size > buf.end:
        raise st.error(
            MemoryFault,
            ins,
            lane,
            f"out-of-bounds global access by a bulk copy: "
            f"{size} bytes at 0x{addr:x}; {st.mem.nearest(addr)}",
        )
    if addr % 16 or size % 16:
        raise st.error(MemoryFault, ins, lane, f"misaligned bulk copy: 0x{addr:x}, {size} bytes")
    return _Range(buf, addr - buf.addr)


def combiner(ins, typ):
    """Function (old, new) of byte arrays for a reducing copy of elements of this type."""
    op = next(
        (x for x in ins.mods if x in ("add", "min", "max", "and", "or", "xor", "inc", "dec")), None
    )
    fn = atomic_fn(op, typ) if op and typ else None
    if fn is None:
        raise unsupported(ins)
    dt = UDTYPE[WIDTH[typ]]

    def combine(old, new):
        return np.ascontiguousarray(fn(old.view(dt), new.view(dt), None)).view(np.uint8)

    return combine


REDUCED = {
    "float32": "f32",
    "float32_ftz": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "uint32": "u32",
    "int32": "s32",
    "uint64": "u64",
    "int64": "s64",
}


def bind_store(st, ins, tensor, reduce=False):
    """From shared to global memory, storing or (cp.reduce) combining with what is there."""
    bulk = st.bulk
    if "bulk_group" not in ins.mods:
        raise unsupported(ins)
    size_op = None
    if tensor:
        what = tensor_operands(st, ins, ins.ops[0])
    else:
        dst, size_op = addresser(st, ins.ops[0]), st.src(ins.ops[2], "u32")
        combine = combiner(ins, access_type(ins)) if reduce else None
    src = addresser(st, ins.ops[1])

    def one(lane):
        idx = np.array([lane])
        if tensor:
            tm, at = what(lane)
            box = Box(st, ins, lane, tm, at)
            block, first = shared_place(st, ins, lane, int(src(idx)[0]), tm.size, 128)
            base = block * st.sh_stride
            if tm.mode:
                check_pattern(st, ins, lane, first - base, tm)
            put, esize = box.write, tm.esize
            if reduce:
                fn = combiner(ins, REDUCED.get(tm.dtype))

                def put(data):
                    box.write(data, fn)

            bulk.store(ins, lane, first, chunk_places(first, base, tm.size, tm.mode), tm.size, put)
            if not reduce:
                box.note()
            n = 0 if box.empty else box.bytes
        else:
            n = int(size_op[0] if len(size_op) == 1 else size_op[lane])
            _, first = shared_place(st, ins, lane, int(src(idx)[0]), n, 16)
            to = flat_global(st, ins, lane, int(dst(idx)[0]), n)
            esize = WIDTH[access_type(ins)] // 8 if reduce else 0
            if st.options.check_overlap and not reduce:
                note_bytes(st, ins, lane, to.buf, to.start + np.arange(n))

            def put(data):
                span = slice(to.start, to.start + n)
                data = data.ravel()
                if reduce:
                    if (
                        st.options.check_uninit
                        and to.buf.init is not None
                        and not to.buf.init[span].all()
                    ):
                        raise st.error(
                            UninitializedRead,
                            ins,
                            lane,
                            f"reducing bulk copy onto never-written global memory of {to.buf.name}",
                        )
                    data = combine(np.ascontiguousarray(to.data[span]), data)
                to.data[span] = data
                if to.buf.init is not None:
                    to.buf.init[span] = 1

            bulk.store(ins, lane, first, np.arange(first, first + n, 16) >> 4, n, put)
        count_bytes(st, lane, n, True)
        if reduce:
            st.stats.target.atomic_ops += n // esize

    return each_lane(st, one)


def count_bytes(st, lane, n, write):
    """Bytes of a bulk copy in the launch's statistics."""
    stats = st.stats.target
    if write:
        stats.global_write_bytes += n
        stats.global_write_sectors += -(-n // 32)
    else:
        stats.global_read_bytes += n
        stats.global_read_sectors += -(-n // 32)
