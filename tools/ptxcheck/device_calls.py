"""What a kernel asks the host for: trap, failed assertions and printf."""

from __future__ import annotations

import re
import struct
import sys

import numpy as np

from .access import Access, lanes_of
from .binding import binder
from .errors import TrapError
from .memory import LOCAL_BASE

ASSERT, PRINTF = "__assertfail", "vprintf"  # the functions' names, and the opcodes of their calls
u32, i64 = np.uint32, np.int64


@binder("trap", "brkpt", ASSERT)
def bind_trap(st, ins):
    message = "device assertion failed" if ins.base == ASSERT else f"{ins.base} executed"

    def ex(m):
        some, lanes = lanes_of(st, m)
        if some:
            raise st.error(TrapError, ins, 0 if lanes is None else lanes[0], message)

    return ex


_FORMAT = re.compile(r"%[-+ #0]*(?:\d+|\*)?(?:\.(?:\d+|\*))?(hh|h|ll|l|j|z|t)?([diouxXeEfgGcsp%])")


def _c_string(mem, addr):
    buf = mem.find(addr)
    if buf is None:
        return "(bad pointer)"
    raw = buf.data[addr - buf.addr :].tobytes()
    return raw.split(b"\0", 1)[0].decode("utf-8", "replace")


def format_printf(mem, fmt, raw):
    """C format string and the bytes of its packed arguments -> text."""
    pos = 0

    def take(code, n):
        nonlocal pos
        pos = (pos + n - 1) // n * n
        v = struct.unpack_from("<" + code, raw, pos)[0]
        pos += n
        return v

    def one(match):
        size, conv = match.group(1) or "", match.group(2)
        if conv == "%":
            return "%"
        spec = match.group(0)[: -1 - len(size)]
        while "*" in spec:
            spec = spec.replace("*", str(take("i", 4)), 1)
        if conv in "eEfgG":
            return (spec + conv) % take("d", 8)
        if conv == "s":
            return (spec + "s") % _c_string(mem, take("Q", 8))
        if conv == "p":
            return "0x{:x}".format(take("Q", 8))
        wide = size in ("l", "ll", "j", "z", "t")
        v = take(
            ("q" if conv in "dic" else "Q") if wide else ("i" if conv in "dic" else "I"),
            8 if wide else 4,
        )
        if conv == "c":
            return (spec + "c") % (v & 255)
        return (spec + {"i": "d", "u": "d"}.get(conv, conv)) % v

    try:
        return _FORMAT.sub(one, fmt)
    except (struct.error, ValueError, TypeError):
        return fmt


@binder(PRINTF)
def bind_printf(st, ins):
    """vprintf: text goes to standard output, thread by thread."""
    fmt, args = (st.kernel.symbol_address(o.var) for o in ins.ops[:2])
    ret = ins.ops[2]
    ptr = Access(st, ins, "local", "b64")
    word = Access(st, ins, "local", "b32")

    def ex(m):
        some, lanes = lanes_of(st, m)
        if not some:
            return
        lanes = np.arange(st.N) if lanes is None else lanes
        f = ptr.load(np.full(len(lanes), fmt, i64), lanes)
        a = ptr.load(np.full(len(lanes), args, i64), lanes)
        for k, lane in enumerate(lanes):
            raw = b""
            if int(a[k]) >> 56 == LOCAL_BASE >> 56:
                start = int(lane) * st.lo_stride
                raw = st.local[start + int(a[k]) - LOCAL_BASE : start + st.lo_stride].tobytes()
            sys.stdout.write(format_printf(st.mem, _c_string(st.mem, int(f[k])), raw))
        if ret is not None:
            word.store(
                np.full(len(lanes), st.kernel.symbol_address(ret.var), i64),
                np.zeros(len(lanes), u32),
                lanes,
            )

    return ex
