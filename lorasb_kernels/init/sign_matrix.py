"""A matrix of +1, −1 and 0 in two bits per element.

LoRA-SB's initialization needs only the sign of a gradient. `SignMatrix` stores it 16 times smaller
than fp32, with exact zeros, and multiplies without unpacking the whole matrix.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from lorasb_kernels.ops.bitplanes import WORD, check_planes, unpack, words
from lorasb_kernels.ops.pack_signs import pack_signs
from lorasb_kernels.ops.sign_matmul import sign_matmul
from lorasb_kernels.utils.files import write_tensors

# Integers up to this one are exact in bfloat16.
GRAM_DEPTH = 256


@dataclass(frozen=True, eq=False)
class SignMatrix:
    """An [m, n] sign matrix held as bit planes; `.T` is a view.

    Bit j of word k in row i of a plane, least significant first, is element (i, 32k + j);
    bits past the last column are 0. An element with both bits set means a gradient
    that was not finite: it counts in `nonfinite()` and multiplies as NaN.

    Args:
        positive: int32 [m, ceil(n/32)], bits set where the element is +1.
        negative: int32 [m, ceil(n/32)], bits set where the element is −1.
        columns: n.
        transposed: this object is the [n, m] transpose of what is stored.
    """

    positive: torch.Tensor
    negative: torch.Tensor
    columns: int
    transposed: bool = False

    __hash__ = None  # type: ignore[assignment]

    def __post_init__(self):
        check_planes(self.positive, self.negative, self.columns)

    @classmethod
    def from_dense(cls, dense: torch.Tensor, *, backend: str = "auto") -> "SignMatrix":
        """The signs of `dense` [m, n], fp32 or fp64; sign(0) is 0."""
        return cls(*pack_signs(dense, backend=backend), dense.shape[1])

    @property
    def shape(self) -> torch.Size:
        stored = (self.positive.shape[0], self.columns)
        return torch.Size(stored[::-1] if self.transposed else stored)

    @property
    def T(self) -> "SignMatrix":
        """The transpose, sharing the planes."""
        return replace(self, transposed=not self.transposed)

    @property
    def device(self) -> torch.device:
        return self.positive.device

    @property
    def nbytes(self) -> int:
        """Bytes of the two planes."""
        return self.positive.nbytes + self.negative.nbytes

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "SignMatrix":
        """The same matrix on `device`."""
        positive, negative = (
            plane.to(device, non_blocking=non_blocking) for plane in (self.positive, self.negative)
        )
        return replace(self, positive=positive, negative=negative)

    def to_dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix as a dense floating-point tensor of its shape."""
        if not dtype.is_floating_point:
            raise TypeError(f"dtype is {dtype}; expected a floating-point dtype")
        dense = unpack(self.positive, self.negative, self.columns, dtype)
        return (dense.T if self.transposed else dense).contiguous()

    def matmul(self, dense: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
        """This matrix [m, n] times `dense` [n, q] fp32, in fp32; see `sign_matmul`."""
        return sign_matmul(
            self.positive, self.negative, dense, self.columns, self.transposed, backend=backend
        )

    def __matmul__(self, dense: torch.Tensor) -> torch.Tensor:
        return self.matmul(dense)

    def gram(self) -> torch.Tensor:
        """S Sᵀ, fp32 [m, m]: integers, exact below 2²⁴.

        Sums 256 columns at a time. Their products are integers up to 256, which are exact in
        bfloat16, so that matrix units can compute them.
        """
        dtype = torch.bfloat16 if _fast_bfloat16(self.device) else torch.float32
        rows, columns = self.shape
        gram = torch.zeros(rows, rows, device=self.device)
        for start in range(0, columns, GRAM_DEPTH):
            panel = self._columns(start, min(start + GRAM_DEPTH, columns), dtype)
            gram += panel @ panel.T
        return gram

    def _columns(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """Columns start … stop − 1, dense; `start` is a multiple of 32."""
        if self.transposed:
            rows = slice(start, stop)
            return unpack(self.positive[rows], self.negative[rows], self.columns, dtype).T
        part = slice(start // WORD, words(stop))
        return unpack(self.positive[:, part], self.negative[:, part], stop - start, dtype)

    def zeros(self) -> int:
        """How many elements are exactly zero."""
        return math.prod(self.shape) - _population(self.positive | self.negative)

    def nonfinite(self) -> int:
        """How many elements come from an accumulator that was NaN or infinite."""
        return _population(self.positive & self.negative)

    def norm(self) -> float:
        """Frobenius norm: the square root of the number of non-zeros; NaN if any is."""
        if self.nonfinite():
            return math.nan
        return math.sqrt(_population(self.positive ^ self.negative))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SignMatrix):
            return NotImplemented
        if self.shape != other.shape:
            return False
        other = other.to(self.device)
        if self.transposed != other.transposed:
            other = _stored_transposed(other)
        return torch.equal(self.positive, other.positive) and torch.equal(
            self.negative, other.negative
        )

    def __repr__(self) -> str:
        rows, columns = self.shape
        return f"SignMatrix({rows}×{columns}, {self.nbytes} bytes on {self.device})"

    def save(self, path: str | Path) -> None:
        """Writes the planes as a safetensors file, atomically."""
        metadata = {"columns": str(self.columns), "transposed": str(int(self.transposed))}
        write_tensors(path, {"positive": self.positive, "negative": self.negative}, metadata)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "SignMatrix":
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a saved sign matrix.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"path is {str(path)!r}; expected a saved SignMatrix there")
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                positive, negative = map(file.get_tensor, ("positive", "negative"))
                metadata = file.metadata() or {}
            columns, transposed = (int(metadata[key]) for key in ("columns", "transposed"))
            return cls(positive, negative, columns, bool(transposed))
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"path is {str(path)!r}; expected a saved SignMatrix: {error}"
            ) from error


def _stored_transposed(matrix: SignMatrix) -> SignMatrix:
    """The same matrix, stored as the planes of its transpose."""
    dense = unpack(matrix.positive, matrix.negative, matrix.columns).T
    return SignMatrix(*pack_signs(dense), dense.shape[1], not matrix.transposed)


def _fast_bfloat16(device: torch.device) -> bool:
    """Whether `device` has matrix units for bfloat16: a GPU, or a CPU with AMX."""
    if device.type != "cpu":
        return True
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16", False))


def _population(bits: torch.Tensor) -> int:
    """Number of set bits, counted in all fields of a word at once."""
    bits = bits - (bits >> 1 & 0x55555555)
    bits = (bits & 0x33333333) + (bits >> 2 & 0x33333333)
    bits = bits + (bits >> 4) & 0x0F0F0F0F
    return int((bits * 0x01010101 >> 24).sum())


__all__ = ["SignMatrix"]
