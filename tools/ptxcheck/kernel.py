"""One kernel of a module: its code with device functions inlined, its memory, its arguments."""

from __future__ import annotations

import ctypes
import numbers
import struct

import numpy as np

from .device_calls import ASSERT, PRINTF
from .errors import PtxError, UnsupportedInstruction
from .flow import priorities
from .memory import is_torch
from .syntax import (
    TYPE_WIDTH,
    Addr,
    Args,
    Ins,
    Label,
    LabelDef,
    Not,
    Pair,
    Reg,
    Sym,
    TensorAddr,
    Var,
    Vec,
)
from .tensormap import TensorMap

BYTES = (
    bytes,
    bytearray,
    memoryview,
    ctypes.Structure,
    ctypes.Array,
    ctypes.Union,
    ctypes._SimpleCData,
)


class Kernel:
    """One entry function, flattened: device functions are inlined."""

    def __init__(self, module, fn):
        self.module, self.fn, self.name = module, fn, fn.name
        self.code, self.label_pc, self.regs = [], {}, []
        self.local_params = set()
        self.local_offsets, self.local_size = {}, 0
        self.static_shared = {}
        self.used_vars = set()
        self._reg_seen = set()
        self.params, self.param_size = [], 0
        for v in fn.params:
            off = (self.param_size + v.align - 1) // v.align * v.align
            self.params.append((v, off))
            self.param_size = off + v.size
        self.param_offset = {v: off for v, off in self.params}
        self._flatten(fn, {}, None, [])
        self._layout_shared()
        self.rank = priorities(self.code, self.label_pc)
        self.block = None
        self.cluster, self.explicit_cluster = fn.reqnctapercluster or (1, 1, 1), False
        self.shared_size = 0
        self.pool = {}

    # --------------------------------------------------------------- inlining
    def _flatten(self, fn, varmap, end_label, stack):
        """Append the function's instructions; formal parameters of an inlined
        function are mapped to the caller's variables by `varmap`."""
        inline = end_label is not None
        regmap, labmap = {}, {}

        def reg(r):
            if not inline:
                if r not in self._reg_seen:
                    self._reg_seen.add(r)
                    self.regs.append(r)
                return r
            n = regmap.get(r)
            if n is None:
                n = regmap[r] = Reg(f"{fn.name}:{r.name}", r.type)
                self._reg_seen.add(n)
                self.regs.append(n)
            return n

        def var(v):
            if not isinstance(v, Var):
                return v
            v = varmap.get(v, v)
            local = v.space == "local" or (v.space == "param" and v not in self.param_offset)
            if local and v not in self.local_offsets:
                a = max(v.align, 1)
                off = (self.local_size + a - 1) // a * a
                self.local_offsets[v] = off
                self.local_size = off + v.size
                if v.space == "param":
                    self.local_params.add(v)
            self.used_vars.add(v)
            return v

        def lab(x):
            if not inline:
                return x
            if x not in labmap:
                labmap[x] = LabelDef(f"{fn.name}:{x.name}")
            return labmap[x]

        def opnd(o):
            if isinstance(o, Reg):
                return reg(o)
            if isinstance(o, Sym):
                return Sym(var(o.var), o.offset)
            if isinstance(o, Addr):
                b = o.base
                b = reg(b) if isinstance(b, Reg) else var(b)
                return Addr(b, o.offset)
            if isinstance(o, TensorAddr):
                return TensorAddr(opnd(o.base), [opnd(x) for x in o.coords])
            if isinstance(o, Vec):
                return Vec([opnd(x) for x in o.items])
            if isinstance(o, Args):
                return Args([opnd(x) for x in o.items])
            if isinstance(o, Pair):
                return Pair(opnd(o.first), opnd(o.second))
            if isinstance(o, Not):
                return Not(opnd(o.item))
            if isinstance(o, Label):
                return Label(lab(o.name))
            return o

        if inline:  # fresh storage for the callee's own variables
            varmap = dict(varmap)
            for v in fn.vars:
                if v.space in ("local", "param"):
                    varmap[v] = Var(f"{fn.name}:{v.name}", v.space, v.align, v.type, v.size)
        for it in fn.items:
            if isinstance(it, LabelDef):
                self.label_pc[lab(it)] = len(self.code)
                continue
            new = Ins(
                it.op,
                [opnd(o) for o in it.ops],
                reg(it.guard) if it.guard else None,
                it.guard_neg,
                it.line,
                it.loc,
                it.text,
                fn.name,
            )
            if new.base == "call":
                self._call(new, fn, stack)
            elif new.base == "ret" and inline:
                new.op, new.base, new.parts, new.mods = "bra", "bra", ["bra"], []
                new.ops = [Label(end_label)]
                self.code.append(new)
            else:
                self.code.append(new)

    def _call(self, ins, fn, stack):
        ops = list(ins.ops)
        rets = ops.pop(0).items if isinstance(ops[0], Args) else []
        target = ops.pop(0)
        args = ops.pop(0).items if ops and isinstance(ops[0], Args) else []
        if not isinstance(target, Sym) or not isinstance(target.var, str):
            raise UnsupportedInstruction(f"indirect call is not supported: {ins.where()}")
        name = target.var
        callee = self.module.ast.functions.get(name)
        if name in (ASSERT, PRINTF):
            ins.op = ins.base = name
            ins.parts, ins.mods = [name], []
            ins.ops = [] if name == ASSERT else [args[0], args[1], rets[0] if rets else None]
            self.code.append(ins)
            return
        if callee is None or not callee.has_body:
            raise UnsupportedInstruction(f"call of unknown function {name}: {ins.where()}")
        if name in stack:
            raise UnsupportedInstruction(f"recursive call of {name}: {ins.where()}")
        if ins.guard is not None:
            skip = LabelDef("skip call")
            self.code.append(
                Ins(
                    "bra",
                    [Label(skip)],
                    ins.guard,
                    not ins.guard_neg,
                    ins.line,
                    ins.loc,
                    ins.text,
                    ins.func,
                )
            )
        vm = {}
        for formal, actual in zip(callee.params + callee.returns, args + rets, strict=True):
            if not isinstance(actual, Sym):
                raise UnsupportedInstruction(f"register call arguments: {ins.where()}")
            vm[formal] = actual.var
        end = LabelDef(f"end of {name}")
        self._flatten(callee, vm, end, [*stack, name])
        self.label_pc[end] = len(self.code)
        if ins.guard is not None:
            self.label_pc[skip] = len(self.code)

    # ----------------------------------------------------------------- layout
    def _layout_shared(self):
        off = 0
        dynamic = []
        for v in sorted(
            (v for v in self.used_vars if isinstance(v, Var) and v.space == "shared"),
            key=lambda v: (-v.align, v.name),
        ):
            if v.extern or v.size == 0:
                dynamic.append(v)
                continue
            off = (off + v.align - 1) // v.align * v.align
            self.static_shared[v] = off
            off += v.size
        self.static_size = off
        align = max([16] + [v.align for v in dynamic])
        self.dynamic_offset = (off + align - 1) // align * align if dynamic else off
        for v in dynamic:
            self.static_shared[v] = self.dynamic_offset

    def symbol_address(self, v):
        if isinstance(v, str):
            raise UnsupportedInstruction(f"address of {v}")
        if v.space == "shared":
            return self.static_shared[v]
        if v in self.local_offsets:
            return self.local_offsets[v]
        if v.space == "param":
            return self.param_offset[v]
        if v.name not in self.module.symbols:
            raise UnsupportedInstruction(f"external variable {v.name} is not defined")
        return self.module.symbols[v.name].addr

    # ------------------------------------------------------------- parameters
    def pack(self, args):
        """Python arguments -> parameter bytes."""
        if len(args) != len(self.params):
            names = ", ".join(
                f".{v.type} {v.name}" if v.size <= 8 else f"{v.size} bytes {v.name}"
                for v, _ in self.params
            )
            raise PtxError(
                f"kernel {self.name} takes {len(self.params)} arguments ({names}), got {len(args)}"
            )
        out = bytearray(self.param_size)
        for (v, off), a in zip(self.params, args, strict=True):
            b = self.pack_one(v, a)
            out[off : off + len(b)] = b
        return bytes(out)

    def pack_one(self, v, a):
        width = TYPE_WIDTH[v.type] // 8
        if isinstance(a, np.generic):
            a = a.item()
        if is_torch(a) or isinstance(a, np.ndarray):
            if v.size != 8:
                raise PtxError(f"{v.name}: buffer given for a {v.size}-byte parameter")
            return struct.pack("<Q", self.module.memory.address_of(a))
        if isinstance(a, TensorMap):
            a = a.pack()
        if isinstance(a, BYTES):
            a = bytes(a)
        if isinstance(a, bytes):
            if len(a) != v.size:
                raise PtxError(f"{v.name}: {len(a)} bytes given, {v.size} expected")
            return a
        if a is None:
            a = 0
        if v.size != width:
            raise PtxError(f"{v.name} is a {v.size}-byte struct: pass bytes or a ctypes object")
        if not isinstance(a, numbers.Real) or (isinstance(a, float) and v.type[0] in "us"):
            raise PtxError(f"{v.name} is {a!r}; .{v.type} is expected")
        if v.type[0] == "f" or isinstance(a, float):
            return struct.pack({2: "<e", 4: "<f", 8: "<d"}[width], a)
        a = int(a)
        if not -(1 << (8 * width - 1)) <= a < (1 << (8 * width)):
            raise PtxError(f"{v.name}: {a} does not fit .{v.type}")
        return (a & ((1 << (8 * width)) - 1)).to_bytes(width, "little")
