"""Execution state of one batch of thread blocks, and operand binding.

All threads ("lanes") of all blocks of a batch live in flat arrays: lane
`b * Tp + t` is thread t of the batch's block b, with Tp the block size rounded
up to whole warps.  A register is one row of a 2-D array, so that an instruction
is a numpy operation over all lanes at once.
"""

from __future__ import annotations

import numpy as np

from .errors import ExecutionError, PtxError, UnsupportedInstruction
from .syntax import Addr, Imm, Not, Reg, Sink, SReg, Sym

DTYPE = {
    "b8": np.uint8,
    "u8": np.uint8,
    "s8": np.int8,
    "b16": np.uint16,
    "u16": np.uint16,
    "s16": np.int16,
    "f16": np.float16,
    "bf16": np.uint16,
    "b32": np.uint32,
    "u32": np.uint32,
    "s32": np.int32,
    "f32": np.float32,
    "f16x2": np.uint32,
    "bf16x2": np.uint32,
    "tf32": np.uint32,
    "b64": np.uint64,
    "u64": np.uint64,
    "s64": np.int64,
    "f64": np.float64,
    "pred": np.bool_,
}
UDTYPE = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
WIDTH = {k: (1 if k == "pred" else np.dtype(v).itemsize * 8) for k, v in DTYPE.items()}


def warps_in(mask):
    """Which warps have a lane in the mask."""
    return mask.reshape(-1, 32).any(1)


def int_bits(value, width):
    return int(value) & ((1 << width) - 1)


class BatchState:
    """Registers, memories and thread masks of a batch of blocks."""

    def __init__(self, kernel, nblocks, options):
        self.kernel = kernel
        self.options = options
        self.B = nblocks
        self.block = kernel.block
        bx, by, bz = kernel.block
        self.T = bx * by * bz
        self.Tp = (self.T + 31) // 32 * 32
        self.N = self.B * self.Tp
        self.W = self.N // 32
        N = self.N
        self.live = np.zeros(N, bool)
        self.nlive = 0
        self.all_live = False
        # registers
        counts = {}
        self.reg_slot = {}
        for r in kernel.regs:
            k = counts.get(r.width, 0)
            self.reg_slot[r] = k
            counts[r.width] = k + 1
        self.files = {w: np.zeros((n, N), UDTYPE[w]) for w, n in counts.items() if w in UDTYPE}
        if any(w not in UDTYPE for w in counts):
            raise UnsupportedInstruction("128-bit registers are not supported")
        # memories
        self.sh_size = kernel.shared_size
        self.sh_stride = max(128, (self.sh_size + 127) // 128 * 128)
        self.shared = np.zeros(self.B * self.sh_stride, np.uint8)
        self.sh_views = {}
        self.sh_base = np.repeat(np.arange(self.B, dtype=np.int64) * self.sh_stride, self.Tp)
        self.lo_stride = max(16, (kernel.local_size + 15) // 16 * 16)
        self.local = np.zeros(N * self.lo_stride, np.uint8)
        self.lo_views = {}
        self.lo_base = np.arange(N, dtype=np.int64) * self.lo_stride
        self.param = np.zeros(max(16, (kernel.param_size + 15) // 16 * 16), np.uint8)
        self.mem = kernel.module.memory
        # lane identities
        lane = np.arange(N)
        self.block_of = lane // self.Tp
        self.block_used = np.zeros(self.B, bool)
        from .cluster import Cluster

        self.cluster = Cluster(self, kernel.cluster)
        self.warp_of = (lane // 32).astype(np.int64)
        w = np.arange(self.W)
        per = self.Tp // 32
        self.warpgroup = w // per * -(-per // 4) + w % per // 4
        t = lane % self.Tp
        u = np.uint32
        self.thread_ok = t < self.T
        self.sregs = {
            "tid.x": (t % bx).astype(u),
            "tid.y": (t // bx % by).astype(u),
            "tid.z": (t // (bx * by)).astype(u),
            "laneid": (t % 32).astype(u),
            "warpid": (t // 32).astype(u),
            "smid": np.zeros(N, u),
            "nsmid": np.full(N, 1, u),
            "ctaid.x": np.zeros(N, u),
            "ctaid.y": np.zeros(N, u),
            "ctaid.z": np.zeros(N, u),
            "nctaid.x": np.zeros(N, u),
            "nctaid.y": np.zeros(N, u),
            "nctaid.z": np.zeros(N, u),
            "ntid.x": np.full(N, bx, u),
            "ntid.y": np.full(N, by, u),
            "ntid.z": np.full(N, bz, u),
            "nwarpid": np.full(N, self.Tp // 32, u),
            "gridid": np.zeros(N, np.uint64),
            "dynamic_smem_size": np.zeros(N, u),
            "total_smem_size": np.full(N, self.sh_size, u),
            "is_explicit_cluster": np.full(N, kernel.explicit_cluster),
            "cluster_ctarank": self.cluster.rank_of.astype(u),
            "cluster_nctarank": np.full(N, self.cluster.size, u),
        }
        for d in "xyz":
            for name in ("cluster_ctaid.", "cluster_nctaid.", "nclusterid.", "clusterid."):
                self.sregs[name + d] = np.zeros(N, u)
        ln = self.sregs["laneid"].astype(np.uint64)
        one = np.uint64(1)
        eq = one << ln
        self.sregs["lanemask_eq"] = eq.astype(u)
        self.sregs["lanemask_lt"] = (eq - one).astype(u)
        self.sregs["lanemask_le"] = (eq | (eq - one)).astype(u)
        self.sregs["lanemask_gt"] = ~self.sregs["lanemask_le"]
        self.sregs["lanemask_ge"] = ~self.sregs["lanemask_lt"]
        self.steps = 0

    # ---------------------------------------------------------------- reset
    def reset(self, block_ids, grid, params, dyn_smem):
        """Prepare for the blocks with the given linear ids."""
        n = len(block_ids)
        self.block_ids = np.zeros(self.B, np.int64)
        self.block_ids[:n] = block_ids
        self.block_used[:] = np.arange(self.B) < n
        gx, gy, _ = grid
        lane_block = self.block_ids[self.block_of]
        self.sregs["ctaid.x"][:] = lane_block % gx
        self.sregs["ctaid.y"][:] = lane_block // gx % gy
        self.sregs["ctaid.z"][:] = lane_block // (gx * gy)
        for d, g, c in zip("xyz", grid, self.cluster.dims, strict=True):
            self.sregs["nctaid." + d][:] = g
            self.sregs["nclusterid." + d][:] = g // c
            self.sregs["cluster_nctaid." + d][:] = c
            self.sregs["clusterid." + d][:] = self.sregs["ctaid." + d] // c
            self.sregs["cluster_ctaid." + d][:] = self.sregs["ctaid." + d] % c
        self.sregs["dynamic_smem_size"][:] = dyn_smem
        self.sregs["smid"][:] = self.block_of
        self.live[:] = self.thread_ok & (self.block_of < n)
        self.refresh_live()
        for f in self.files.values():
            f[...] = 0
        self.shared[:] = self.options.shared_fill
        self.local[:] = 0xFF
        self.param[: len(params)] = np.frombuffer(params, np.uint8)
        self.cluster.reset()
        self.cp_async.reset()
        self.mbar.reset()
        self.bulk.reset()
        self.wgmma.reset()
        if self.checker is not None:
            self.checker.reset()

    @property
    def nbytes(self):
        """Host memory held by registers, shared and local memory."""
        return sum(f.nbytes for f in self.files.values()) + self.shared.nbytes + self.local.nbytes

    def refresh_live(self):
        self.nlive = int(np.count_nonzero(self.live))
        self.all_live = self.nlive == self.N
        self.live_warps = int(np.count_nonzero(self.live.reshape(-1, 32).any(1)))

    # -------------------------------------------------------------- binding
    def row(self, reg):
        return self.files[reg.width][self.reg_slot[reg]]

    def const(self, op, typ):
        """A literal as a 1-element array of the type's numpy dtype."""
        dt = DTYPE[typ]
        w = WIDTH[typ]
        v = op.value
        if typ == "pred":
            return np.array([bool(v)])
        if op.kind == "i":
            # used by a float instruction it carries bits
            return np.array([int_bits(v, w)], UDTYPE[w]).view(dt)
        if op.kind == "f32bits":
            bits = np.array([v], np.uint32)
            if typ == "f64":
                return bits.view(np.float32).astype(np.float64)
            return bits.view(dt) if w == 32 else bits.astype(UDTYPE[w]).view(dt)
        if typ in ("f32", "f64", "f16"):
            return np.array([v], dt)
        # float literal in an untyped position: bits of its own width
        if w == 64:
            return np.array([v], np.float64).view(dt)
        return np.array([v], np.float32).view(np.uint32).astype(UDTYPE[w]).view(dt)

    def src(self, op, typ):
        """Operand -> array of N (or 1) values of the type's dtype."""
        dt = DTYPE[typ]
        if isinstance(op, Reg):
            row = self.row(op)
            w = WIDTH[typ]
            if op.width == w:
                return row if row.dtype == dt else row.view(dt)
            if op.width > w > 1:
                return row.view(dt)[:: op.width // w]
            raise PtxError(f"register {op} ({op.width} bits) used as .{typ}")
        if isinstance(op, Imm):
            return self.const(op, typ)
        if isinstance(op, SReg):
            if op.name in ("envreg1", "envreg2"):  # grid workspace address, high and low
                a = self.kernel.module.grid_workspace().addr
                return np.array([a >> 32 if op.name == "envreg1" else a & 0xFFFFFFFF], dt)
            if op.name.startswith(("clock", "globaltimer", "envreg", "pm")):
                raise UnsupportedInstruction(f"%{op.name} is only supported in mov")
            a = self.sregs.get(op.name)
            if a is None:
                raise UnsupportedInstruction(f"special register %{op.name} is not supported")
            return a if a.dtype == dt else a.astype(dt)
        if isinstance(op, Sym):
            addr = self.kernel.symbol_address(op.var) + op.offset
            return np.array([int_bits(addr, WIDTH[typ])], UDTYPE[WIDTH[typ]]).view(dt)
        raise PtxError(f"unexpected operand {op!r}")

    def pred(self, op):
        """Predicate operand -> function returning a bool array."""
        if isinstance(op, Not):
            p = self.src(op.item, "pred")
            return lambda: ~p
        p = self.src(op, "pred")
        return lambda: p

    def dst(self, op, typ):
        """Destination row viewed as the type (widths must match)."""
        if not isinstance(op, Reg):
            raise PtxError(f"destination {op!r} is not a register")
        if op.width != WIDTH[typ]:
            raise PtxError(f"register {op} ({op.width} bits) written as .{typ}")
        row = self.row(op)
        return row if row.dtype == DTYPE[typ] else row.view(DTYPE[typ])

    def setter(self, op, typ):
        """Function set(values, mask) storing values of `typ` to a register.

        A register wider than the type is sign- or zero-extended."""
        if isinstance(op, Sink):
            return lambda val, m: None
        if not isinstance(op, Reg):
            raise PtxError(f"destination {op!r} is not a register")
        w = WIDTH[typ]
        row = self.row(op)
        if op.width == w:
            d = row if row.dtype == DTYPE[typ] else row.view(DTYPE[typ])
        elif op.width > w:
            d = row
        else:
            raise PtxError(f"register {op} ({op.width} bits) written as .{typ}")
        dt = DTYPE[typ]
        copyto = np.copyto

        def put(val, m):
            if val.dtype != dt:
                val = val.astype(dt)
            if m is None:
                copyto(d, val, casting="unsafe")
            else:
                copyto(d, val, where=m, casting="unsafe")

        return put

    def scatter(self, op, typ):
        """Function put(values, lanes) storing compressed values."""
        if isinstance(op, Sink):
            return lambda val, lanes: None
        w = WIDTH[typ]
        if not isinstance(op, Reg) or op.width < w:
            raise PtxError(f"destination {op!r} does not hold .{typ}")
        row = self.row(op)
        d = row.view(DTYPE[typ]) if op.width == w and typ != "pred" else row

        def put(val, lanes):
            if lanes is None:
                np.copyto(d, val, casting="unsafe")
            else:
                d[lanes] = val

        return put

    def active(self, m):
        """Mask of active lanes for memory operations; None when all N are."""
        if m is not None:
            return m
        return None if self.all_live else self.live

    # --------------------------------------------------------------- errors
    def lane_name(self, lane):
        lane = int(lane)
        t = lane % self.Tp
        bx, by, _ = self.block
        s = self.sregs
        cta = tuple(int(s["ctaid." + d][lane]) for d in "xyz")
        return f"block {cta} thread ({t % bx}, {t // bx % by}, {t // (bx * by)})"

    def error(self, cls, ins, lane, message):
        where = f"kernel {self.kernel.name}, {ins.where()}"
        who = "" if lane is None else f"\n  {self.lane_name(lane)}"
        return cls(f"{message}\n  {where}{who}")


def address_parts(state, op):
    """Addr operand -> (register row or None, constant offset, Var or None)."""
    if isinstance(op, Addr):
        base, off = op.base, op.offset
        if base is None:
            return None, off, None
        if isinstance(base, Reg):
            return state.row(base), off, None
        return None, state.kernel.symbol_address(base) + off, base
    raise ExecutionError(f"address expected, got {op!r}")
