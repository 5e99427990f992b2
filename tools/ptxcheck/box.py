"""The box of a tensor map at given coordinates, in global memory."""

from __future__ import annotations

import numpy as np

from .access import Access
from .errors import MemoryFault, UninitializedRead


class Box:
    """The part of a box within its tensor, as a view of the buffer's bytes."""

    def __init__(self, st, ins, lane, tm, coords):
        self.st, self.ins, self.lane, self.tm = st, ins, lane, tm
        self.inside, start, shape, strides = [], tm.address, [], []
        steps = [tm.esize, *tm.strides]
        for d, c in enumerate(coords):
            step = tm.steps[d]
            n = -(-tm.box[d] // step)
            lo = (step - 1 - c) // step if c < 0 else 0  # the first element inside
            hi = min(n, max(0, -(-(tm.dims[d] - c) // step)))
            self.inside.append((lo, max(lo, hi), n))
            start += (c + lo * step) * steps[d]
            shape.append(max(0, hi - lo))
            strides.append(steps[d] * step)
        self.empty = 0 in shape
        if self.empty:
            return
        span = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + tm.esize
        buf = st.mem.find(start)
        if buf is None or start + span > buf.end:
            raise st.error(
                MemoryFault,
                ins,
                lane,
                f"out-of-bounds global access by a bulk copy: "
                f"{span} bytes at 0x{start:x}; {st.mem.nearest(start)}; {tm}",
            )
        self.buf, self.offset = buf, start - buf.addr
        if strides[0] == tm.esize:  # inner dimension as bytes
            shape[0], strides[0] = shape[0] * tm.esize, 1
            extra, self.row = [], True
        else:
            extra, self.row = [(tm.esize, 1)], False
        self.shape = shape[::-1] + [n for n, _ in extra]
        self.strides = strides[::-1] + [s for _, s in extra]
        self.bytes = int(np.prod(self.shape))

    def view(self, data):
        return np.lib.stride_tricks.as_strided(data[self.offset :], self.shape, self.strides)

    def index(self):
        """Selects the inside part of a full box array (outermost dimension first)."""
        return tuple(slice(lo, hi) for lo, hi, _ in self.inside[::-1])

    def full(self):
        return (*tuple(n for _, _, n in self.inside[::-1]), self.tm.esize)

    def read(self):
        out = np.zeros(self.full(), np.uint8)
        if self.tm.nan_fill:
            out[..., :-1], out[..., -1] = 0xFF, 0x7F
        if not self.empty:
            if (
                self.st.options.check_uninit
                and self.buf.init is not None
                and not self.view(self.buf.init).all()
            ):
                raise self.st.error(
                    UninitializedRead,
                    self.ins,
                    self.lane,
                    f"bulk copy reads never-written global memory of {self.buf.name}",
                )
            part = self.view(self.buf.data)
            where = out[self.index()]
            where[...] = part.reshape(where.shape)
        return out

    def write(self, data, combine=None):
        """Store a box; combine(old, new) are arrays of bytes, the last axis whole elements."""
        if self.empty:
            return
        st, buf = self.st, self.buf
        if buf.readonly:
            raise st.error(MemoryFault, self.ins, self.lane, f"write to constant {buf.name}")
        part = data.reshape(self.full())[self.index()].reshape(self.shape)
        if combine is not None:
            if st.options.check_uninit and buf.init is not None and not self.view(buf.init).all():
                raise st.error(
                    UninitializedRead,
                    self.ins,
                    self.lane,
                    f"reducing bulk copy onto never-written global memory of {buf.name}",
                )
            part = combine(np.ascontiguousarray(self.view(buf.data)), np.ascontiguousarray(part))
        self.view(buf.data)[...] = part
        if buf.init is not None:
            self.view(buf.init)[...] = 1

    def note(self):
        """Bytes for check_overlap."""
        if self.empty or not self.st.options.check_overlap:
            return
        offs = self.offset + sum(
            np.ix_(*[np.arange(n) * s for n, s in zip(self.shape, self.strides, strict=True)])
        )
        note_bytes(self.st, self.ins, self.lane, self.buf, offs.ravel())


def note_bytes(st, ins, lane, buf, offs):
    acc = Access(st, ins, "global", "b8")
    acc.note_writer(buf, buf.addr + offs, np.full(len(offs), lane))
