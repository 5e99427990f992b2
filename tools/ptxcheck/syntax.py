"""PTX as Python objects: operands, variables, instructions, functions.

Instructions are generic: an opcode string, a guard and a list of operands.  Meaning is
attached later by the binders.
"""

from __future__ import annotations

from dataclasses import dataclass, field


class Reg:
    """A virtual register (identity matters, the name is for messages)."""

    __slots__ = ("name", "type", "width")

    def __init__(self, name, type_):
        self.name, self.type = name, type_
        self.width = TYPE_WIDTH[type_]

    def __repr__(self):
        return self.name


@dataclass(eq=False)
class Var:
    """A named variable in some state space."""

    name: str
    space: str  # global const shared local param
    align: int
    type: str
    size: int  # bytes; 0 for an unsized extern array
    extern: bool = False
    init: bytes | None = None
    relocs: list = field(default_factory=list)  # (offset, symbol name, addend)

    def __repr__(self):
        return self.name


@dataclass
class Imm:
    value: object  # int or float
    kind: str  # 'i', 'f32', 'f64'


@dataclass
class SReg:
    name: str


@dataclass
class Sym:
    var: object  # Var (or unresolved name: functions, labels)
    offset: int = 0


@dataclass
class Addr:
    base: object  # Reg, Var or None
    offset: int = 0


@dataclass
class TensorAddr:
    base: object  # Addr of the tensor map
    coords: list


@dataclass
class Vec:
    items: list


@dataclass
class Pair:
    first: object
    second: object


@dataclass
class Not:
    item: object


@dataclass
class Args:
    items: list


@dataclass
class Label:
    name: object


class Sink:
    def __repr__(self):
        return "_"


SINK = Sink()

TYPE_WIDTH = {"pred": 1}
for _w in (8, 16, 32, 64, 128):
    for _k in "bsu":
        TYPE_WIDTH[f"{_k}{_w}"] = _w
TYPE_WIDTH.update(f16=16, bf16=16, f32=32, f64=64, f16x2=32, bf16x2=32, tf32=32)

SPECIAL = {
    "tid",
    "ntid",
    "ctaid",
    "nctaid",
    "laneid",
    "warpid",
    "nwarpid",
    "smid",
    "nsmid",
    "gridid",
    "clock",
    "clock_hi",
    "clock64",
    "globaltimer",
    "globaltimer_lo",
    "globaltimer_hi",
    "lanemask_eq",
    "lanemask_le",
    "lanemask_lt",
    "lanemask_ge",
    "lanemask_gt",
    "dynamic_smem_size",
    "total_smem_size",
    "is_explicit_cluster",
    "cluster_ctaid",
    "cluster_nctaid",
    "clusterid",
    "nclusterid",
    "cluster_ctarank",
    "cluster_nctarank",
    "aggr_smem_size",
    "reserved_smem_offset_begin",
}


class Ins:
    """One PTX instruction."""

    __slots__ = (
        "base",
        "func",
        "guard",
        "guard_neg",
        "line",
        "loc",
        "mods",
        "op",
        "ops",
        "parts",
        "text",
    )

    def __init__(self, op, ops, guard, guard_neg, line, loc, text, func):
        self.op, self.ops, self.guard, self.guard_neg = op, ops, guard, guard_neg
        self.parts = op.split(".")
        self.base = self.parts[0]
        self.mods = self.parts[1:]
        self.line, self.loc, self.text, self.func = line, loc, text, func

    def where(self):
        src = f" ({self.loc})" if self.loc else ""
        return f"PTX line {self.line}{src}: {self.text}"

    def __repr__(self):
        return self.text


@dataclass
class Function:
    name: str
    is_entry: bool
    params: list  # Var, space 'param'
    returns: list  # Var
    items: list = field(default_factory=list)  # Ins or Label (resolved object)
    vars: list = field(default_factory=list)  # local / shared / param vars in the body
    has_body: bool = False
    reqntid: tuple | None = None
    maxntid: tuple | None = None
    maxnreg: int | None = None
    reqnctapercluster: tuple | None = None
    max_cluster: int | None = None
    explicit_cluster: bool = False
    line: int = 0


class LabelDef:
    """A label position (identity matters)."""

    __slots__ = ("name",)

    def __init__(self, name):
        self.name = name

    def __repr__(self):
        return self.name


@dataclass
class ModuleAst:
    version: str = ""
    target: str = ""
    functions: dict = field(default_factory=dict)
    vars: dict = field(default_factory=dict)
    files: dict = field(default_factory=dict)
