"""A kernel's instructions, bound to the state of a batch when they are first reached."""

from __future__ import annotations

import numpy as np

from . import (  # noqa: F401 - they fill the tables of binders
    arithmetic,
    async_copies,
    atomics,
    bitwise,
    comparison,
    conversion,
    device_calls,
    memops,
    mma,
    moves,
    wmma,
)
from .binding import BINDERS, SYNC, unsupported
from .errors import PtxError

# What a binder raises on operands of a form that it does not know.
UNDECODED = (KeyError, IndexError, AttributeError, StopIteration, TypeError, ValueError)


class Program:
    """The closures of a kernel's instructions for one batch."""

    def __init__(self, kernel, st):
        self.st, self.code = st, kernel.code
        self.bound = [None] * len(self.code)
        self.kind = [self.classify(ins) for ins in self.code]
        self.leaders = set(kernel.label_pc.values())  # where threads may join or part
        for pc, kind in enumerate(self.kind):
            if kind != "plain":
                self.leaders |= {pc, pc + 1}

    @staticmethod
    def classify(ins):
        """'control' for what may change which threads run, 'sync' for what a warp does
        together, 'plain' for the rest."""
        b = ins.base
        if b in ("bra", "brx", "ret", "exit"):
            return "control"
        if b in ("bar", "barrier"):
            if b == "bar" and "warp" in ins.mods:
                return "sync"
            return "control"
        if b == "setmaxnreg" or (b == "mbarrier" and ins.mods[0] == "try_wait"):
            return "control"
        if b in SYNC:
            return "sync"
        return "plain"

    def closure(self, pc):
        """The bound form of a plain or sync instruction."""
        ex = self.bound[pc]
        if ex is None:
            ins = self.code[pc]
            key = "bar.warp" if ins.base == "bar" else ins.base
            bind = SYNC[key] if self.kind[pc] == "sync" else BINDERS.get(key)
            if bind is None:
                raise unsupported(ins, "unknown or unsupported instruction")
            try:
                ex = bind(self.st, ins)
            except PtxError as error:
                if "PTX line" in str(error):
                    raise
                raise type(error)(f"{error} in {ins.where()}") from None
            except UNDECODED as error:
                why = f"cannot decode ({type(error).__name__}: {error})"
                raise unsupported(ins, why) from error
            if ins.guard is not None:
                ex = self.guarded(ex, ins)
            self.bound[pc] = ex
        return ex

    def guarded(self, ex, ins):
        st = self.st
        p, neg = st.row(ins.guard), ins.guard_neg
        count = np.count_nonzero

        def run(m):
            gm = ~p if neg else p
            if m is not None:
                gm = gm & m
                if gm.any():
                    ex(gm)
                return
            if not st.all_live:
                gm = gm & st.live
            c = count(gm)
            if c == st.nlive:
                ex(None)
            elif c:
                # the predicate row may be overwritten by the instruction
                ex(gm.copy() if gm is p else gm)

        return run
