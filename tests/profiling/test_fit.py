"""Fitting the rates: known ones are recovered from times that they make."""

import dataclasses
import functools

import numpy as np
import pytest

from lorasb_kernels.hardware.gemm import gemm
from lorasb_kernels.hardware.gpus import GPUS, RATES
from lorasb_kernels.profiling.fit import Case, error_table, errors, fit
from lorasb_kernels.profiling.layer_time import fused, projection, rank_gradient

PUBLISHED = GPUS["a6000"]
FACTORS = dict(tensor=0.85, bandwidth=0.9, l2=0.8, latency=1.5, launch=1.7, stall=1.4)
TRUE = dataclasses.replace(
    PUBLISHED,
    rates=dataclasses.replace(
        PUBLISHED.rates, **{n: f * getattr(PUBLISHED.rates, n) for n, f in FACTORS.items()}
    ),
)


def predict_gemm(gpu, M, N, K):
    return gemm(gpu, M, N, K).total


def predict_projection(gpu, M, n, r):
    return sum(launch.limits.total for launch in projection(gpu, M, n, r))


def predict_gradient(gpu, M, r):
    return sum(launch.limits.total for launch in rank_gradient(gpu, M, r))


def predict_fused(gpu, M, N, K, r):
    return fused(gpu, M, N, K, r, False, "fused")[0].limits.total


PREDICTIONS = (
    *(functools.partial(predict_gemm, M=M, N=4096, K=4096) for M in (64, 512, 8192)),
    functools.partial(predict_gemm, M=8192, N=4096, K=96),
    *(
        functools.partial(predict_projection, M=M, n=4096, r=r)
        for M in (64, 8192)
        for r in (16, 96)
    ),
    *(functools.partial(predict_gradient, M=M, r=r) for M in (64, 16384) for r in (16, 256)),
    *(functools.partial(predict_fused, M=M, N=4096, K=4096, r=16) for M in (64, 8192)),
)


def cases(noise: float = 0.0) -> list[Case]:
    drawn = np.random.default_rng(0).normal(0, noise, len(PREDICTIONS))
    return [
        Case(f"{p.func.__name__} {p.keywords}", lambda gpu, p=p: p(gpu), p(TRUE) * np.exp(e))
        for p, e in zip(PREDICTIONS, drawn, strict=True)
    ]


@pytest.mark.parametrize(("noise", "tolerance"), [(0.0, 0.03), (0.02, 0.25)])
def test_known_rates_are_recovered(noise, tolerance):
    found = fit(PUBLISHED, cases(noise)).rates
    for name in RATES:
        assert getattr(found, name) == pytest.approx(getattr(TRUE.rates, name), rel=tolerance), name


def test_the_errors_shrink_to_the_noise():
    given = cases(0.02)
    before, after = (
        np.abs(list(errors(gpu, given).values())) for gpu in (PUBLISHED, fit(PUBLISHED, given))
    )
    assert np.median(before) > 0.1
    assert np.median(after) < 0.02
    table = error_table(PUBLISHED, TRUE, cases())
    assert table.count("+0% |") >= len(PREDICTIONS)
    assert "median of the errors' sizes" in table
    assert all(name in table for name in RATES)


def test_a_rate_that_nothing_depends_on_stays():
    only_memory = Case("copy", lambda gpu: 1e9 / gpu.rates.bandwidth, 1e9 / TRUE.rates.bandwidth)
    found = fit(PUBLISHED, [only_memory]).rates
    assert found.bandwidth == pytest.approx(TRUE.rates.bandwidth, rel=0.01)
    for name in set(RATES) - {"bandwidth"}:
        assert getattr(found, name) == pytest.approx(getattr(PUBLISHED.rates, name))


def test_noise_does_not_drive_a_rate_on_which_little_depends():
    """A launch is a thousandth of these times, and they are wrong by a few hundredths."""
    wrong = np.random.default_rng(1).normal(0, 0.03, 6)
    large = [
        Case(
            f"{M}",
            functools.partial(predict_gemm, M=M, N=4096, K=4096),
            predict_gemm(PUBLISHED, M, 4096, 4096) * np.exp(error),
        )
        for M, error in zip((3000, 4000, 5000, 6000, 7000, 8000), wrong, strict=True)
    ]
    found = fit(PUBLISHED, large).rates
    assert found.launch == pytest.approx(PUBLISHED.rates.launch, rel=0.5)


@pytest.mark.parametrize("given", [[], [Case("broken clock", lambda gpu: 1.0, 0.0)]])
def test_times_that_are_none_are_refused(given):
    with pytest.raises(ValueError, match="expected at least one, with positive times"):
        fit(PUBLISHED, given)
