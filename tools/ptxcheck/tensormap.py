"""Tensor maps: what cuTensorMapEncodeTiled makes, as 128 bytes of our own format."""

from __future__ import annotations

import struct

import numpy as np

from .errors import PtxError

MAGIC = b"ptxcheck"
_FORMAT = "<8sQ5Q4Q5H5BBBBBB"
SWIZZLE = {0: 0, "none": 0, 32: 1, "32B": 1, 64: 2, "64B": 2, 128: 3, "128B": 3}
SPAN = (16, 32, 64, 128)  # bytes of a swizzled row, by mode

# name -> (number in CUtensorMapDataType, bytes)
TYPES = {
    "uint8": (0, 1),
    "uint16": (1, 2),
    "uint32": (2, 4),
    "int32": (3, 4),
    "uint64": (4, 8),
    "int64": (5, 8),
    "float16": (6, 2),
    "float32": (7, 4),
    "float64": (8, 8),
    "bfloat16": (9, 2),
    "float32_ftz": (10, 4),
    "tfloat32": (11, 4),
}
_BYTES = {n: b for n, b in TYPES.values()}
_ALIAS = {"int8": "uint8", "int16": "uint16", "bool": "uint8"}


class TensorMap:
    """A tiled tensor map; dimension 0 is the innermost one, as in CUDA.

    address    device address of the tensor
    dtype      a name of TYPES
    dims       elements in each dimension
    strides    bytes between elements of dimensions 1, 2, ...
    box        elements of the box in each dimension
    steps      element strides (traversal), 1 unless given
    swizzle    0, 32, 64 or 128 (bytes)
    nan_fill   out-of-bounds elements read as NaN instead of zero
    """

    def __init__(
        self, address, dtype, dims, strides, box, steps=None, swizzle=0, nan_fill=False, check=True
    ):
        self.address, self.dtype = int(address), _ALIAS.get(dtype, dtype)
        self.dims, self.strides = [int(x) for x in dims], [int(x) for x in strides]
        self.box = [int(x) for x in box]
        self.steps = [int(x) for x in steps] if steps else [1] * len(self.dims)
        self.mode = SWIZZLE[swizzle]
        self.nan_fill = bool(nan_fill)
        if self.dtype not in TYPES:
            raise PtxError(f"tensor map: element type {dtype} is not supported")
        self.number, self.esize = TYPES[self.dtype]
        if check:
            self.check()

    def check(self):
        """What cuTensorMapEncodeTiled checks."""

        def fail(why):
            raise PtxError(f"tensor map: {why} ({self})")

        rank = len(self.dims)
        if (
            not 1 <= rank <= 5
            or len(self.box) != rank
            or len(self.steps) != rank
            or len(self.strides) != rank - 1
        ):
            fail("1 to 5 dimensions, as many box sizes and element strides, one stride less")
        if self.address % 16:
            fail("the address is not a multiple of 16")
        if any(not 1 <= d <= 1 << 32 for d in self.dims):
            fail("a dimension is not within 1 .. 2^32")
        if any(s % 16 or not 0 < s < 1 << 40 for s in self.strides):
            fail("a stride is not a multiple of 16 below 2^40")
        if any(not 1 <= b <= 256 for b in self.box):
            fail("a box dimension is not within 1 .. 256")
        if any(not 1 <= s <= 8 for s in self.steps):
            fail("an element stride is not within 1 .. 8")
        if self.box[0] * self.esize % 16:
            fail("the inner box dimension is not a multiple of 16 bytes")
        if self.mode and self.box[0] * self.esize > SPAN[self.mode]:
            fail(f"the inner box dimension is larger than the swizzle of {SPAN[self.mode]} bytes")
        low = self.dims[0] * self.esize
        for s in self.strides:
            if s < low:
                fail("a stride is smaller than what it strides over")
            low = s

    @classmethod
    def of(cls, memory, tensor, box, swizzle=0, dtype=None, **more):
        """A map of a numpy array or torch tensor; `box` is in the tensor's order of dimensions,
        the last one contiguous."""
        shape, esize = list(tensor.shape), tensor.dtype.itemsize
        strides = (
            [s * esize for s in tensor.stride()]
            if hasattr(tensor, "stride")
            else list(tensor.strides)
        )
        if strides[-1] != esize:
            raise PtxError("tensor map: the last dimension is not contiguous")
        return cls(
            memory.address_of(tensor),
            dtype or str(tensor.dtype).split(".")[-1],
            shape[::-1],
            strides[-2::-1],
            list(box)[::-1],
            swizzle=swizzle,
            **more,
        )

    @property
    def size(self):
        """Bytes of a box."""
        return (
            int(np.prod([-(-b // s) for b, s in zip(self.box, self.steps, strict=True)]))
            * self.esize
        )

    def pack(self):
        def pad(values, n, fill=0):
            return list(values) + [fill] * (n - len(values))

        raw = struct.pack(
            _FORMAT,
            MAGIC,
            self.address,
            *pad(self.dims, 5),
            *pad(self.strides, 4),
            *pad(self.box, 5),
            *pad(self.steps, 5),
            len(self.dims),
            self.number,
            self.mode,
            self.nan_fill,
            0,
        )
        return raw + bytes(128 - len(raw))

    __bytes__ = pack

    @classmethod
    def unpack(cls, raw):
        v = struct.unpack(_FORMAT, bytes(raw[: struct.calcsize(_FORMAT)]))
        if v[0] != MAGIC:
            raise PtxError("these 128 bytes are no tensor map of ptxcheck")
        rank, number, mode, nan = v[21:25]
        names = {n: k for k, (n, _) in TYPES.items()}
        out = cls(
            v[1],
            names[number],
            v[2 : 2 + rank],
            v[7 : 7 + rank - 1],
            v[11 : 11 + rank],
            v[16 : 16 + rank],
            check=False,
            nan_fill=nan,
        )
        out.mode = mode
        return out

    def __repr__(self):
        return (
            f"TensorMap({self.dtype} dims {self.dims}, strides {self.strides}, box {self.box},"
            f" swizzle {SPAN[self.mode] if self.mode else 'none'}, at 0x{self.address:x})"
        )


def swizzled(address, mode):
    """Where a byte address of shared memory lies under a swizzle mode."""
    if not mode:
        return address
    return address ^ (address >> 3 & ((1 << mode) - 1) << 4)
