"""Fits the model's free rates to measured times of its kernels, and tabulates what is left.

Least squares on the logarithm of time over measured, in the logarithms of the rates (Gauss-Newton
with a numerical Jacobian). A ridge term holds a rate that no measured kernel depends on at the
published value it started from; it is worth as much as one case that is wrong by `PRIOR`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lorasb_kernels.hardware.gpus import RATES, Gpu
from lorasb_kernels.utils.tables import markdown_table, seconds

PRIOR = 0.01
STEP = 1e-4  # of the numerical Jacobian, in the logarithm
TURNS = 30


@dataclass(frozen=True)
class Case:
    """A measured launch or sequence: name, predicted seconds on a GPU, measured seconds."""

    name: str
    predict: Callable[[Gpu], float]
    measured: float


def with_rates(gpu: Gpu, logarithms: np.ndarray) -> Gpu:
    """`gpu` with the rates of these logarithms."""
    values = dict(zip(RATES, np.exp(logarithms).tolist(), strict=True))
    return dataclasses.replace(gpu, rates=dataclasses.replace(gpu.rates, **values))


def fit(gpu: Gpu, cases: Sequence[Case]) -> Gpu:
    """`gpu` with the rates that predict the measured times best.

    Raises:
        ValueError: no cases, or a time that is not positive.
    """
    if not cases or min(case.measured for case in cases) <= 0:
        raise ValueError(f"cases are {list(cases)}; expected at least one, with positive times")
    start = np.log([getattr(gpu.rates, name) for name in RATES])
    measured = np.log([case.measured for case in cases])
    weight = PRIOR / len(RATES) ** 0.5

    def residuals(point: np.ndarray) -> np.ndarray:
        device = with_rates(gpu, point)
        errors = np.log([case.predict(device) for case in cases]) - measured
        return np.concatenate([errors, weight * (point - start)])

    point, best = start, residuals(start)
    damping = 1e-3
    for _ in range(TURNS):
        columns = [(residuals(point + STEP * unit) - best) / STEP for unit in np.eye(len(RATES))]
        jacobian = np.stack(columns, axis=1)
        normal = jacobian.T @ jacobian
        move = np.linalg.solve(normal + damping * np.eye(len(RATES)), -jacobian.T @ best)
        moved = residuals(point + move)
        if moved @ moved < best @ best:
            point, best, damping = point + move, moved, damping / 3
        else:
            damping *= 4
    return with_rates(gpu, point)


def errors(gpu: Gpu, cases: Sequence[Case]) -> Mapping[str, float]:
    """Predicted over measured, minus one, by case."""
    return {case.name: case.predict(gpu) / case.measured - 1 for case in cases}


def error_table(before: Gpu, after: Gpu, cases: Sequence[Case]) -> str:
    """Markdown: each case predicted at published rates and at fitted ones; then the rates."""
    at_published, at_fitted = errors(before, cases), errors(after, cases)
    rows = [
        (
            case.name,
            seconds(case.measured),
            seconds(case.predict(before)),
            f"{at_published[case.name]:+.0%}",
            f"{at_fitted[case.name]:+.0%}",
        )
        for case in cases
    ]
    middle = [f"{np.median(np.abs(list(e.values()))):.0%}" for e in (at_published, at_fitted)]
    rows.append(("median of the errors' sizes", "", "", *middle))
    rates = [
        (name, f"{getattr(before.rates, name):.3g}", f"{getattr(after.rates, name):.3g}")
        for name in RATES
    ]
    return "\n\n".join(
        [
            markdown_table(("case", "measured", "predicted", "error", "after the fit"), rows),
            markdown_table(("rate", "published", "fitted"), rates),
        ]
    )


__all__ = ["Case", "error_table", "errors", "fit", "with_rates"]
