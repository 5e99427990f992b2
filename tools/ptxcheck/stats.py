"""Counters collected while a kernel runs."""

from __future__ import annotations

from collections import Counter

import numpy as np


class Stats:
    """Instruction mix and memory traffic of one launch.

    opcodes              executed warp-instructions per opcode (counted when at
                         least one thread of the warp is active)
    global_read_bytes    bytes requested by active threads (not cache lines)
    global_write_bytes
    atomic_ops           thread-level global atomics
    notes                things worth knowing that are no errors, with how often
    With stats='full':
    global_read_sectors  32-byte sectors touched per warp request, summed
    global_write_sectors
    shared_requests      warp-level shared memory requests
    shared_wavefronts    estimated passes needed (bank conflicts included)
    """

    def __init__(self, detail=False):
        self.detail = detail
        self.opcodes = Counter()
        self.lines = Counter()
        self.global_read_bytes = 0
        self.global_write_bytes = 0
        self.atomic_ops = 0
        self.global_read_sectors = 0
        self.global_write_sectors = 0
        self.shared_requests = 0
        self.shared_wavefronts = 0
        self.shared_by_line = {}
        self.steps = 0
        self.seconds = 0.0
        self.notes = Counter()

    # -- called while running
    def note(self, text):
        """Something odd that is no error."""
        self.notes[text] += 1

    def global_access(self, acc, addr, lanes, write):
        n = len(addr) * acc.size
        if write:
            self.global_write_bytes += n
        else:
            self.global_read_bytes += n
        if self.detail:
            warp = acc.st.warp_of if lanes is None else acc.st.warp_of[lanes]
            sec = (addr - addr.min()) >> 5
            span = int(sec.max()) + 2
            keys = warp * span + sec
            if acc.size > 32:
                keys = np.concatenate([keys, keys + 1])
            s = len(np.unique(keys))
            if write:
                self.global_write_sectors += s
            else:
                self.global_read_sectors += s

    def atomic_access(self, acc, addr, lanes):
        self.atomic_ops += len(addr)
        self.global_read_bytes += len(addr) * acc.size
        self.global_write_bytes += len(addr) * acc.size

    def shared_access(self, acc, addr, lanes, write):
        """Bank conflicts: distinct 4-byte words per bank, per phase.

        A warp request of 8 (16) bytes per thread is served in 2 (4) phases of
        16 (8) threads."""
        st = acc.st
        every = np.arange(st.N) if lanes is None else lanes
        words = max(1, acc.size // 4)
        phase_threads = 32 // words
        phase = every // phase_threads
        w = ((addr >> 2)[:, None] + np.arange(words)).astype(np.int64)
        span = np.int64(1 << 20)
        uniq = np.unique((np.broadcast_to(phase[:, None], w.shape) * span + w).ravel())
        ph, word = uniq // span, uniq % span
        cnt = np.bincount(np.unique(ph * 32 + word % 32, return_inverse=True)[1])
        owner = np.unique(ph * 32 + word % 32) // 32
        worst = np.zeros(int(owner.max()) + 1, np.int64)
        np.maximum.at(worst, owner, cnt)
        waves = int(worst.sum())
        req = len(np.unique(every // 32))
        self.shared_requests += req
        self.shared_wavefronts += waves
        key = acc.ins.line
        old = self.shared_by_line.get(key, (acc.ins.text, 0, 0, 0))
        ideal = len(np.unique(phase))
        self.shared_by_line[key] = (acc.ins.text, old[1] + req, old[2] + waves, old[3] + ideal)

    # -- reading
    @property
    def warp_instructions(self) -> int:
        return sum(self.opcodes.values())

    def count(self, prefix: str) -> int:
        """Executed warp-instructions whose opcode starts with `prefix`."""
        return sum(v for k, v in self.opcodes.items() if k.startswith(prefix))

    def bank_conflicts(self):
        """[(PTX line, text, requests, wavefronts, wavefronts without conflict)]"""
        out = [(ln, t, r, w, i) for ln, (t, r, w, i) in self.shared_by_line.items() if w > i]
        return sorted(out, key=lambda x: x[4] - x[3])

    def mma_flops(self) -> int:
        """Multiply-add operations (x2) done by mma.sync and wgmma."""
        total = 0
        for op, n in self.opcodes.items():
            if op.startswith(("mma.sync", "wgmma.mma_async")):
                n = n / 4 if op.startswith("wgmma") else n  # a warpgroup is four warps
                for part in op.split("."):
                    if part.startswith("m") and "n" in part and "k" in part:
                        m, rest = part[1:].split("n", 1)
                        nn, k = rest.split("k", 1)
                        total += n * 2 * int(m) * int(nn) * int(k)
        return int(total)

    def __str__(self):
        out = [
            f"warp instructions {self.warp_instructions}, global read "
            f"{self.global_read_bytes} B, written {self.global_write_bytes} B, "
            f"atomics {self.atomic_ops}, mma flops {self.mma_flops()}, "
            f"{self.seconds:.3f} s on the host"
        ]
        if self.detail:
            out.append(
                f"sectors read {self.global_read_sectors}, written "
                f"{self.global_write_sectors}; shared requests {self.shared_requests}, "
                f"wavefronts {self.shared_wavefronts}"
            )
        out += [f"  note ({n} times): {text}" for text, n in self.notes.items()]
        for op, n in self.opcodes.most_common(20):
            out.append(f"  {n:10d}  {op}")
        return "\n".join(out)
