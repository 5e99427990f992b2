"""Bytes and flops of the operations, and of the launches that compute a layer in several ways.

Every operand is counted as read once and every result as written once, as if no cache kept
anything between launches: the least memory traffic possible. Notation of the operators: M
tokens, n inputs, m outputs, rank r, `e` bytes per element of the 16- or 32-bit operands.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from lorasb_kernels.ops.two_call import FROZEN_FIRST_FROM


@dataclass(frozen=True)
class Cost:
    """One launch: bytes of device memory moved and flops computed."""

    bytes: float
    flops: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.flops + other.flops)


def total(costs: Iterable[Cost]) -> Cost:
    """The sum of several launches."""
    return sum(costs, Cost(0, 0))


def matmul(rows: int, inner: int, columns: int, e: int) -> Cost:
    """[rows, inner]·[inner, columns]."""
    moved = rows * inner + inner * columns + rows * columns
    return Cost(e * moved, 2 * rows * inner * columns)


def elementwise(elements: int, reads: int, e: int) -> Cost:
    """A pass that reads `reads` tensors of `elements` elements and writes one."""
    return Cost(e * elements * (reads + 1), elements)


def shrink(M: int, n: int, r: int, e: int) -> Cost:
    """h = x Aᵀ and p = s·h Rᵀ in one pass over x; R in fp32."""
    return Cost(e * (M * n + r * n + 2 * M * r) + 4 * r * r, 2 * M * r * (n + r))


def core_backward(M: int, m: int, r: int, e: int) -> Cost:
    """q = s·(dy B) R and dR = s·(dy B)ᵀ h in one pass over dy; R and dR in fp32."""
    return Cost(e * (M * m + m * r + 2 * M * r) + 8 * r * r, 2 * M * r * (m + 2 * r))


def expand(M: int, n: int, m: int, r: int, e: int) -> Cost:
    """y = x Wᵀ + p Bᵀ with one accumulator."""
    return Cost(e * (M * (n + r + m) + m * (n + r)), 2 * M * m * (n + r))


def sign_accumulate(M: int, m: int, n: int, e: int) -> Cost:
    """acc += dyᵀ x in fp32."""
    return Cost(e * M * (m + n) + 8 * m * n, 2 * M * m * n)


def sign_gradient(M: int, m: int, n: int, e: int) -> Cost:
    """Packed signs of dyᵀ x."""
    return Cost(e * M * (m + n) + m * n / 4, 2 * M * m * n)


def pack_signs(m: int, n: int) -> Cost:
    """Packed signs of an fp32 accumulator."""
    return Cost(4 * m * n + m * n / 4, 0)


def sign_matmul(m: int, n: int, q: int) -> Cost:
    """A packed m×n sign matrix times a dense fp32 one of q columns."""
    return Cost(m * n / 4 + 4 * (m + n) * q, 2 * m * n * q)


@dataclass(frozen=True)
class Launches:
    """The launches of a forward and of a backward pass."""

    forward: tuple[Cost, ...]
    backward: tuple[Cost, ...]

    def of(self, which: str) -> tuple[Cost, ...]:
        """`"forward"`, `"backward"` or `"both"`."""
        return self.forward + self.backward if which == "both" else getattr(self, which)


def frozen(M: int, n: int, m: int, r: int, e: int) -> Launches:
    """The frozen layer with its input gradient, the lower bound; `r` is ignored."""
    return Launches((matmul(M, n, m, e),), (matmul(M, m, n, e),))


def fused(M: int, n: int, m: int, r: int, e: int) -> Launches:
    """This library with the contraction extended over the rank: four launches."""
    return Launches(
        (shrink(M, n, r, e), expand(M, n, m, r, e)),
        (core_backward(M, m, r, e), expand(M, m, n, r, e)),
    )


def two_call(M: int, n: int, m: int, r: int, e: int) -> Launches:
    """This library with the frozen product and the expansion as two GEMMs, `ops/two_call.py`."""
    return Launches(
        (shrink(M, n, r, e), *_two_products(M, n, m, r, e)),
        (core_backward(M, m, r, e), *_two_products(M, m, n, r, e)),
    )


def _two_products(M: int, K: int, N: int, r: int, e: int) -> tuple[Cost, Cost]:
    if K >= FROZEN_FIRST_FROM:
        return matmul(M, K, N, e), _addmm(M, r, N, e)
    return matmul(M, r, N, e), _addmm(M, K, N, e)


def published(M: int, n: int, m: int, r: int, e: int) -> Launches:
    """LoRA-SB in eager PyTorch as published: three small GEMMs, a scaling pass and an add."""
    return Launches(
        (
            matmul(M, n, m, e),
            matmul(M, n, r, e),
            matmul(M, r, r, e),
            matmul(M, r, m, e),
            elementwise(M * m, 1, e),
            elementwise(M * m, 2, e),
        ),
        (
            elementwise(M * m, 1, e),
            matmul(M, m, r, e),
            matmul(M, r, r, e),
            matmul(r, M, r, e),
            matmul(M, r, n, e),
            matmul(M, m, n, e),
            elementwise(M * n, 2, e),
        ),
    )


def _addmm(rows: int, inner: int, columns: int, e: int) -> Cost:
    """A GEMM that adds to its output, which is read as well."""
    return matmul(rows, inner, columns, e) + Cost(e * rows * columns, 0)


WAYS = {"frozen": frozen, "fused": fused, "two_call": two_call, "published": published}

__all__ = [
    "WAYS",
    "Cost",
    "Launches",
    "core_backward",
    "elementwise",
    "expand",
    "frozen",
    "fused",
    "matmul",
    "pack_signs",
    "published",
    "shrink",
    "sign_accumulate",
    "sign_gradient",
    "sign_matmul",
    "total",
    "two_call",
]
