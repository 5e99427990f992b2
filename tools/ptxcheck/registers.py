"""Registers moved between the warps of a block: setmaxnreg."""

from __future__ import annotations

import numpy as np

from .binding import unsupported
from .errors import ExecutionError
from .state import warps_in


class RegisterPool:
    """Registers of the threads of a batch, as far as setmaxnreg moves them."""

    def __init__(self, batch):
        self.batch, self.st = batch, batch.st
        self.held = np.zeros(batch.st.W, np.int64)  # of a thread, by warp
        self.spare = np.zeros(batch.st.B, np.int64)  # of a block
        self.waiting = {}  # pc -> lanes that wait for registers

    def reset(self):
        self.held[:] = self.batch.kernel.fn.maxnreg or 0
        self.spare[:] = 0
        self.waiting.clear()

    def report(self):
        """Lines for a deadlock's report."""
        st, out = self.st, []
        for pc, mask in self.waiting.items():
            lane = int(np.flatnonzero(mask)[0])
            out.append(
                f"  {int(mask.sum())} threads (first: {st.lane_name(lane)}) wait for "
                f"registers at {self.batch.code[pc].where()}\n    {self.spare[lane // st.Tp]} "
                "of the block's are spare"
            )
        return out

    def closure(self, ins, pc):
        """setmaxnreg: an increase waits until the block has enough registers.  Without
        `.maxnreg` the number at the start is ptxas's choice, and nothing is checked."""
        st = self.st
        count = int(ins.ops[0].value)
        if count % 8 or not 24 <= count <= 256:
            raise unsupported(ins, "the count must be a multiple of 8 within 24 .. 256")
        if not self.batch.kernel.fn.maxnreg:
            return lambda m: pc + 1
        per = st.Tp // 32
        more = "inc" in ins.mods

        def ex(m):
            act = st.live if m is None else m
            stay = np.zeros(st.W, bool)
            for w in np.flatnonzero(warps_in(act)):
                need = 32 * (count - self.held[w])
                if (need > 0) != more and need:
                    raise st.error(
                        ExecutionError,
                        ins,
                        32 * w,
                        f"the warp's threads have {self.held[w]} registers already",
                    )
                if need > self.spare[w // per]:
                    stay[w] = True
                    continue
                self.spare[w // per] -= need
                self.held[w] = count
            if not more and self.waiting:
                for p, mask in self.waiting.items():
                    self.batch.add_group(p, mask)
                self.waiting.clear()
            if not stay.any():
                return pc + 1
            wait = act & np.repeat(stay, 32)
            old = self.waiting.get(pc)
            self.waiting[pc] = wait if old is None else old | wait
            if (act & ~wait).any():
                self.batch.add_group(pc + 1, act & ~wait)
            return None

        return ex
