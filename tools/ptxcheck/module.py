"""Loading a PTX module and launching its kernels."""

from __future__ import annotations

import re

import numpy as np

from .errors import PtxError
from .executor import Batch
from .grid import run_grid
from .kernel import Kernel
from .memory import Memory
from .options import Options
from .parser import parse
from .stats import Stats

# largest shared memory of one block, in bytes
SHARED_LIMIT = {
    70: 98304,
    75: 65536,
    80: 166912,
    86: 101376,
    87: 166912,
    89: 101376,
    90: 232448,
    100: 232448,
    103: 232448,
    110: 232448,
    120: 101376,
    121: 101376,
}


class Module:
    """A parsed PTX module with its own device memory."""

    def __init__(self, text: str, memory: Memory | None = None):
        self.text = text
        self.ast = parse(text)
        self.memory = memory or Memory()
        self.symbols = {}
        self._kernels = {}
        self._workspace = None
        for name, v in self.ast.vars.items():
            if v.space in ("global", "const") and not v.extern:
                data = np.zeros(v.size, np.uint8)
                if v.init:
                    data[:] = np.frombuffer(v.init, np.uint8)
                self.symbols[name] = self.memory.add(name, data, readonly=v.space == "const")
        for name, v in self.ast.vars.items():
            for off, sym, addend in v.relocs:
                addr = self.symbols[sym].addr + addend
                self.symbols[name].data[off : off + 8].view(np.uint64)[0] = addr

    @property
    def kernels(self) -> dict[str, list[tuple[str, str, int]]]:
        """{name: [(parameter name, type, bytes), ...]}"""
        return {
            f.name: [(v.name, v.type, v.size) for v in f.params]
            for f in self.ast.functions.values()
            if f.is_entry
        }

    def kernel(self, name: str) -> Kernel:
        k = self._kernels.get(name)
        if k is None:
            fn = self.ast.functions.get(name)
            if fn is None or not fn.is_entry:
                hits = [n for n in self.kernels if name in n]
                if len(hits) != 1:
                    raise PtxError(f"no kernel {name!r}; kernels: {', '.join(self.kernels)}")
                return self.kernel(hits[0])
            k = self._kernels[name] = Kernel(self, fn)
        return k

    def grid_workspace(self):
        """Memory used by cooperative groups' grid.sync()."""
        if self._workspace is None:
            self._workspace = self.memory.add("grid workspace", np.zeros(64, np.uint8))
        return self._workspace

    @property
    def arch(self) -> int:
        """Compute capability the PTX was made for, e.g. 86."""
        m = re.search(r"sm_(\d+)", self.ast.target)
        return int(m.group(1)) if m else 0

    def unsupported(self, name: str | None = None) -> dict[str, list[str]]:
        """Instructions that cannot be executed: {kernel: [message, ...]}."""
        out = {}
        for n in [name] if name else self.kernels:
            bad = []
            try:
                k = self.kernel(n)
                k.block = tuple(k.fn.reqntid or (32, 1, 1))
                k.shared_size = k.dynamic_offset
                batch = Batch(k, int(np.prod(k.cluster)), Options())
            except PtxError as e:
                out[n] = [str(e)]
                continue
            for pc, kind in enumerate(batch.program.kind):
                try:
                    batch.control(pc) if kind == "control" else batch.program.closure(pc)
                except PtxError as e:
                    bad.append(str(e))
            out[n] = bad
        return out

    def address_of(self, x):
        """Device address of an array or tensor, or of a module variable."""
        if isinstance(x, str):
            return self.symbols[x].addr
        return self.memory.address_of(x)

    def symbol(self, name: str, dtype=np.uint8) -> np.ndarray:
        """Contents of a __device__/__constant__ variable as a numpy view."""
        return self.symbols[name].data.view(dtype)

    def launch(
        self, name, grid, block, args=(), dynamic_smem=0, keep=False, cluster=None, **options
    ):
        """Run a kernel and return its :class:`Stats`.

        grid, block     ints or tuples of up to three
        args            arrays/tensors, numbers, bytes or ctypes objects
        dynamic_smem    bytes behind `extern __shared__`
        cluster         blocks of a cluster in x, y, z; default: what the PTX demands, or 1
        keep            keep the buffers mapped after the launch
        options         cp_async='strict'|'late'|'early', check_races, check_uninit,
                        stats=True|'full', max_lanes, max_steps, time_limit,
                        shared_fill (byte filling shared memory at start),
                        schedule_seed (random block and warp order),
                        check_overlap (two blocks store to the same global byte),
                        check_limits (shared memory size of the target)
        """
        k = self.kernel(name)
        grid, block = _dim3(grid), _dim3(block)
        if k.fn.reqntid and tuple(k.fn.reqntid) != block:
            raise PtxError(f"kernel {name} requires block {k.fn.reqntid}, got {block}")
        if k.fn.maxntid and np.prod(k.fn.maxntid) < np.prod(block):
            raise PtxError(f"kernel {name} allows at most {k.fn.maxntid} threads, got {block}")
        if not 1 <= np.prod(block) <= 1024:
            raise PtxError(f"bad block size {block}")
        k.block = block
        k.cluster, k.explicit_cluster = cluster_dims(k, grid, cluster)
        k.shared_size = k.dynamic_offset + dynamic_smem if dynamic_smem else k.static_size
        opts = Options(**options)
        before = set(map(id, self.memory.buffers))
        params = k.pack(list(args))
        limit = SHARED_LIMIT.get(self.arch)
        if opts.check_limits and limit and k.shared_size > limit:
            raise PtxError(
                f"kernel {name} uses {k.shared_size} bytes of shared memory; "
                f"sm_{self.arch} allows {limit} (check_limits=False runs it anyway)"
            )
        stats = Stats(detail=opts.stats == "full")
        if self._workspace is not None:
            self._workspace.data[:] = 0
        for b in self.memory.buffers:
            b.writer = None
        try:
            run_grid(k, grid, params, dynamic_smem, opts, stats)
        finally:
            if not keep:
                for b in [b for b in self.memory.buffers if id(b) not in before]:
                    if b.owner is not None:
                        self.memory.release(b.owner)
        return stats


def cluster_dims(k, grid, cluster):
    """(blocks of a cluster, whether the launch or the kernel asks for clusters)"""
    need = k.fn.reqnctapercluster
    if cluster is None and need is None and k.fn.explicit_cluster:
        raise PtxError(f"kernel {k.name} needs the launch option cluster (.explicitcluster)")
    dims = _dim3(cluster) if cluster is not None else need or (1, 1, 1)
    if need and need != dims:
        raise PtxError(f"kernel {k.name} requires clusters of {need} blocks, got {dims}")
    size = dims[0] * dims[1] * dims[2]
    if min(dims) < 1 or size > min(8, k.fn.max_cluster or 8):
        raise PtxError(f"bad cluster size {dims}: at most {min(8, k.fn.max_cluster or 8)} blocks")
    if any(g % c for g, c in zip(grid, dims, strict=True)):
        raise PtxError(f"grid {grid} is no multiple of the cluster {dims}")
    return dims, cluster is not None or need is not None


def _dim3(x):
    x = (x,) if isinstance(x, (int, np.integer)) else tuple(x)
    return tuple(int(v) for v in x) + (1,) * (3 - len(x))


def load(text: str | bytes, memory: Memory | None = None) -> Module:
    """Parse PTX text (str or bytes) into a Module."""
    if isinstance(text, bytes):
        text = text.decode()
    return Module(text, memory)
