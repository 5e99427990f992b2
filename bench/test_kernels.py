"""Each operation alone: every implementation of it, and its share of the roofline."""

import pytest
import torch

from bench.kernel_cases import DTYPE, KernelCase, cases, implementations, why_not
from bench.recording import Case, Measurement
from lorasb_kernels.utils.timing import copies_past_cache, interleave, peak_bytes


def pytest_generate_tests(metafunc):
    parameters = [
        pytest.param(case, name, id=f"{case}-{name.replace(' ', '_')}")
        for case in cases(metafunc.config.getoption("--grid"))
        for name in implementations(case.op)
    ]
    metafunc.parametrize(("case", "contender"), parameters)


def prepared(case: KernelCase, implementation: str, device: torch.device):
    """A call that rotates through operands larger than the cache."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    copies = copies_past_cache(int(case.cost().bytes), device)
    calls = [case.prepare(implementation, draw) for _ in range(copies)]
    return lambda i: calls[i % copies]()


def measure(case: KernelCase, names, device, timing) -> dict[str, Measurement | Exception]:
    """All implementations in turns; for one that failed, its exception."""
    found, calls = {}, {}
    for name in names:
        try:
            call = prepared(case, name, device)
            call(0)
            calls[name] = call
        except Exception as failure:
            found[name] = failure
    samples = interleave(calls, device, **timing) if calls else {}
    for name, call in calls.items():
        peak = peak_bytes(call, device)
        found[name] = Measurement(samples[name], launches=(case.cost(),), peak=peak)
    return found


@pytest.fixture(scope="module")
def measurements(device, timing, contenders_of):
    """The measurements of all selected implementations; only the last case is kept."""
    known = {}

    def of(case: KernelCase) -> dict[str, Measurement | Exception]:
        if case not in known:
            known.clear()
            names = [name for name in contenders_of(case) if why_not(name, device) is None]
            known[case] = measure(case, names, device, timing)
        return known[case]

    return of


def test_kernel(case, contender, device, measurements, record):
    obstacle = why_not(contender, device)
    if obstacle:
        pytest.skip(obstacle)
    measured = measurements(case)[contender]
    if isinstance(measured, Exception):
        raise measured
    name = str(DTYPE).removeprefix("torch.")
    record(Case(f"kernel.{case.op}", case.shape, case.M, case.r, name), contender, measured)
