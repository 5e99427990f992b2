"""Fake device memory: host buffers with device addresses.

Arrays are not copied.  Every registered buffer gets an address range of its
own, surrounded by unmapped guard space, so that any access outside of a buffer
is seen.
"""

from __future__ import annotations

import bisect
import ctypes

import numpy as np

from .errors import PtxError

GLOBAL_BASE = 0x10_0000_0000
SHARED_BASE = 0x0100_0000_0000_0000  # generic window of shared memory
LOCAL_BASE = 0x0200_0000_0000_0000
PARAM_BASE = 0x0300_0000_0000_0000
GUARD = 1 << 20


def is_torch(x):
    return type(x).__module__.split(".")[0] == "torch" and hasattr(x, "data_ptr")


def host_bytes(x):
    """(uint8 view of the memory spanned by x, first address, base address).

    Works for numpy arrays and torch CPU tensors, contiguous or not: the span
    runs from the first to the last element."""
    if is_torch(x):
        if x.device.type != "cpu":
            raise PtxError(f"tensor on {x.device}: only CPU tensors can be used")
        item = x.element_size()
        extent = (
            0
            if x.numel() == 0
            else sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1
        )
        if any(s < 0 for s in x.stride()):
            raise PtxError("negative strides are not supported")
        ptr = x.data_ptr()
        base = x.untyped_storage().data_ptr()
        nbytes = extent * item
    else:
        if not isinstance(x, np.ndarray):
            raise PtxError(f"cannot use {type(x).__name__} as a device buffer")
        if not x.flags.writeable:
            x = x.view()
        if any(s < 0 for s in x.strides):
            raise PtxError("negative strides are not supported")
        ptr = x.__array_interface__["data"][0]
        nbytes = (
            0
            if x.size == 0
            else sum((n - 1) * s for n, s in zip(x.shape, x.strides, strict=True)) + x.itemsize
        )
        owner = x
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        base = owner.__array_interface__["data"][0]
    if nbytes == 0 or ptr == 0:
        return np.zeros(0, np.uint8), ptr, base
    raw = (ctypes.c_uint8 * nbytes).from_address(ptr)
    return np.frombuffer(raw, dtype=np.uint8), ptr, base


class Buffer:
    """One registered range of device memory."""

    def __init__(self, name, data, addr, owner, readonly=False):
        self.name, self.data, self.addr, self.owner = name, data, addr, owner
        self.size = data.nbytes
        self.end = addr + self.size
        self.readonly = readonly
        self.init = None  # uint8 shadow, 1 = written
        self.writer = None  # int32 shadow, 1 + last storing block
        self._views = {}

    def view(self, dtype, vec=1):
        """Elements of `dtype`, or rows of `vec` of them; None when the
        buffer's device address does not allow such a view."""
        key = (dtype, vec)
        v = self._views.get(key)
        if v is None:
            chunk = np.dtype(dtype).itemsize * vec
            if self.addr % chunk:
                return None
            n = self.size // chunk * chunk
            v = self.data[:n].view(dtype)
            if vec > 1:
                v = v.reshape(-1, vec)
            self._views[key] = v
        return v

    def __repr__(self):
        return f"{self.name} [0x{self.addr:x}, {self.size} bytes]"


class Memory:
    """The set of buffers a kernel may touch."""

    def __init__(self):
        self.starts, self.buffers = [], []
        self.next = GLOBAL_BASE
        self.by_key = {}
        self._last = None

    def add(self, name, data, owner=None, offset=0, readonly=False):
        """Map uint8 array `data` at an address of its own; returns the Buffer."""
        buf = Buffer(name, data, self.next + offset % 512, owner, readonly)
        self.next = (buf.end + GUARD + 511) // 512 * 512
        return self._insert(buf)

    def map_at(self, address: int, data: np.ndarray, name: str) -> Buffer:
        """Map uint8 array `data` at a given address (until it is released); returns the Buffer."""
        new = Buffer(name, data, address, data)
        for old in self.buffers:
            if old.addr < new.end and new.addr < old.end:
                raise PtxError(f"{new} overlaps {old}")
        return self._insert(new)

    def _insert(self, buf):
        i = bisect.bisect_right(self.starts, buf.addr)
        self.starts.insert(i, buf.addr)
        self.buffers.insert(i, buf)
        return buf

    def register(self, x, name: str | None = None, uninit: bool = False) -> Buffer:
        """Map a numpy array or torch CPU tensor (idempotent).

        With uninit=True its present contents count as never written, so that
        the check_uninit option reports reads of them and
        :meth:`unwritten` tells what the kernel left out."""
        data, ptr, base = host_bytes(x)
        key = (ptr, data.nbytes)
        buf = self.by_key.get(key)
        if buf is None:
            shape = "x".join(map(str, x.shape)) or "scalar"
            buf = self.add(
                name or f"buffer{len(self.buffers)}({x.dtype}[{shape}])",
                data,
                x,
                ptr - base if ptr else 0,
            )
            self.by_key[key] = buf
        elif name:
            buf.name = name
        if uninit:
            buf.init = np.zeros(buf.size, np.uint8)
        return buf

    def address_of(self, x) -> int:
        """Device address of a tensor or array (registers it when needed)."""
        return self.register(x).addr

    def unwritten(self, x) -> int:
        """Number of bytes of an uninit-registered buffer never written."""
        buf = self.register(x)
        return 0 if buf.init is None else int(buf.size - np.count_nonzero(buf.init))

    def release(self, x=None):
        """Forget one buffer, or every buffer that belongs to an array."""
        keep = [b for b in self.buffers if b.owner is None or (x is not None and b.owner is not x)]
        self.buffers = keep
        self.starts = [b.addr for b in keep]
        self.by_key = {k: b for k, b in self.by_key.items() if b in keep}
        self._last = None

    def find(self, addr):
        """The buffer containing `addr`, or None."""
        last = self._last
        if last is not None and last.addr <= addr < last.end:
            return last
        i = bisect.bisect_right(self.starts, addr) - 1
        if i >= 0 and addr < self.buffers[i].end:
            self._last = self.buffers[i]
            return self._last
        return None

    def nearest(self, addr):
        """Words describing the buffer nearest to an address."""
        best, dist = None, None
        for b in self.buffers:
            d = b.addr - addr if addr < b.addr else max(0, addr - b.end + 1)
            if dist is None or d < dist:
                best, dist = b, d
        if best is None:
            return "no buffer is mapped"
        if addr >= best.end:
            rel = f"{addr - best.end} bytes past the end"
        elif addr < best.addr:
            rel = f"{best.addr - addr} bytes before the start"
        else:
            rel = f"at byte {addr - best.addr}"
        return f"{rel} of {best.name} ({best.size} bytes at 0x{best.addr:x})"
