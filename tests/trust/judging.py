"""The error of an output against the float64 oracle, relative to the allowed error.

Two measures, both a ratio that must not exceed 1:

* `contract`: for the whole tensor, by maximum and by norm,
      err(out) ≤ 2·(err(eager) + eps·|exact| + luck·terms).
  The last term is one rounding of the magnitudes that were summed: where they cancel, eager
  may hit the result by luck. It is an fp32 rounding, luck = 2⁻²³, and in a tensor of few
  elements, which may all be hit, one of the dtype, luck = eps/2.
* `elements`: for each element, err ≤ 2·err(eager) + 8·eps·terms, so that a small row next to a
  large one is checked too.

eps is that of the dtype in which intermediate results are stored. 2⁻¹²⁶ is added to err(eager),
which a product loses if it flushes subnormal numbers to zero. Before both measures: where the exact
result is NaN or infinite the output must not be finite; where it is finite the output must be
finite, unless the terms or the same formula in eager PyTorch overflow.
"""

import math
from dataclasses import dataclass

import torch

ROUNDINGS = 8
FP32_ROUNDING = 2.0**-23
FLUSHED = 2.0**-126
FEW = 16


@dataclass(frozen=True)
class Verdict:
    """Worst ratios of one output; `fault` names an error that no tolerance allows."""

    contract: float
    elements: float
    fault: str | None = None

    @property
    def ratio(self) -> float:
        return math.inf if self.fault else max(self.contract, self.elements)


def judge(
    out: torch.Tensor,
    eager: torch.Tensor,
    exact: torch.Tensor,
    terms: torch.Tensor,
    dtype: torch.dtype,
) -> Verdict:
    """Judges `out` against `exact`; `eager` and `terms` are what `formulas` makes them.

    Args:
        out, eager: the result under test and eager PyTorch's.
        exact, terms: float64 on the CPU.
        dtype: of the stored intermediate results, fp16, bf16 or fp32.
    """
    if out.shape != exact.shape:
        return Verdict(0, 0, f"shape {tuple(out.shape)}, expected {tuple(exact.shape)}")
    limits = torch.finfo(dtype)
    largest = min(limits.max, torch.finfo(out.dtype).max)
    out, eager = out.detach().cpu().double(), eager.detach().cpu().double()
    must_not_be_finite = ~exact.isfinite() | (exact.abs() > 1.01 * torch.finfo(out.dtype).max)
    if (must_not_be_finite & out.isfinite()).any():
        return Verdict(0, 0, "a finite number where the exact result is not one")
    judged = exact.isfinite() & eager.isfinite() & (terms < largest / 2)
    if (judged & ~out.isfinite()).any():
        return Verdict(0, 0, "NaN or infinity where the exact result is finite")
    if not judged.any():
        return Verdict(0, 0)
    out, eager, exact, terms = (t[judged] for t in (out, eager, exact, terms))
    error, own = (out - exact).abs(), (eager - exact).abs() + FLUSHED
    # In the subnormal range one rounding is that of the smallest normal number.
    size = exact.abs() + limits.tiny
    luck = FP32_ROUNDING if exact.numel() > FEW else limits.eps / 2
    allowed = [
        2 * (f(own) + limits.eps * f(size) + luck * f(terms))
        for f in (torch.max, torch.linalg.vector_norm)
    ]
    contract = max(error.max() / allowed[0], torch.linalg.vector_norm(error) / allowed[1])
    elements = (error / (2 * own + ROUNDINGS * limits.eps * (terms + limits.tiny))).max()
    return Verdict(float(contract), float(elements))
