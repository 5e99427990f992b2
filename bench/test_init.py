"""Initialization: the truncated SVD of a sign matrix, and that of a whole model.

The sign kernels are in `test_kernels.py`; `bench.init_cost` measures the CPU in fresh processes.
"""

import time
from dataclasses import dataclass

import pytest
import torch

from bench.contenders_init import CONTENDERS
from bench.models import random_model
from bench.recording import Case, Measurement
from lorasb_kernels import SignMatrix
from lorasb_kernels.init import truncated_svd
from lorasb_kernels.targets import find_targets
from lorasb_kernels.utils.timing import interleave, peak_bytes

WHOLE_MODEL = ("plain", "plain, targets only", "published", "resident", "layerwise")
ETA = 1e-4


@dataclass(frozen=True)
class SVDCase:
    """A random sign matrix, side × side: a flat spectrum, the hard case."""

    side: int
    r: int

    def __str__(self) -> str:
        return f"svd-{self.side}-r{self.r}"


@dataclass(frozen=True)
class ModelCase:
    """The first `layers` blocks of a preset, `samples` random samples of `length` tokens."""

    key: str
    layers: int
    samples: int
    length: int
    r: int

    def __str__(self) -> str:
        return f"{self.key}-{self.layers}-blocks-r{self.r}"


def svd_cases(grid: str) -> list[SVDCase]:
    """The matrices of a grid."""
    if grid == "tiny":
        return [SVDCase(64, 8)]
    return [SVDCase(4096, 96)] + ([SVDCase(2048, r) for r in (32, 96)] if grid == "full" else [])


def model_cases(grid: str) -> list[ModelCase]:
    """The models of a grid."""
    if grid == "tiny":
        return [ModelCase("tiny", 2, 4, 16, 8)]
    return [ModelCase("mistral-7b", 32 if grid == "full" else 4, 50, 512, 96)]


def svd_contenders(case: SVDCase, device: torch.device) -> dict:
    """Calls that return singular values."""
    generator = torch.Generator(device).manual_seed(0)
    dense = torch.randn(case.side, case.side, generator=generator, device=device).sign()
    signs = SignMatrix.from_dense(dense)
    return {
        "svd_lowrank, niter=10": lambda _: torch.svd_lowrank(dense, q=case.r, niter=10)[1],
        "truncated_svd": lambda _: truncated_svd(signs, case.r).S,
    }


def pytest_generate_tests(metafunc):
    grid = metafunc.config.getoption("--grid")
    if metafunc.function is test_svd:
        metafunc.parametrize("case", svd_cases(grid), ids=str)
        metafunc.parametrize("contender", ("svd_lowrank, niter=10", "truncated_svd"))
    else:
        metafunc.parametrize("case", model_cases(grid), ids=str)
        metafunc.parametrize("contender", WHOLE_MODEL)


@pytest.fixture(scope="module")
def svd_measurements(device, timing):
    """The SVDs of a case in turns."""
    known = {}

    def of(case: SVDCase) -> dict[str, Measurement]:
        if case not in known:
            calls = svd_contenders(case, device)
            samples = interleave(calls, device, **{**timing, "rounds": min(5, timing["rounds"])})
            known[case] = {
                name: Measurement(
                    samples[name],
                    peak=peak_bytes(call, device),
                    others=[("captured_energy", _energy(call(0), case), "1")],
                )
                for name, call in calls.items()
            }
        return known[case]

    return of


def _energy(values: torch.Tensor, case: SVDCase) -> float:
    """Σσ² over ‖±1‖² = side²."""
    return values.double().square().sum().item() / case.side**2


def test_svd(case, contender, svd_measurements, record):
    measured = svd_measurements(case)[contender]
    shape = f"random signs {case.side}x{case.side}"
    record(Case("init.svd", shape, 0, case.r, "float32"), contender, measured)


def random_batches(case: ModelCase, model, device: torch.device) -> list[dict]:
    """Micro-batches of four random samples without padding."""
    generator = torch.Generator().manual_seed(0)
    shape = (case.samples, case.length)
    ids = torch.randint(3, model.config.vocab_size, shape, generator=generator).to(device)
    mask = torch.ones_like(ids)
    return [
        {"input_ids": ids[i : i + 4], "attention_mask": mask[i : i + 4], "labels": ids[i : i + 4]}
        for i in range(0, case.samples, 4)
    ]


def test_model(case, contender, device, grid, record):
    model = random_model(case.key, device, torch.bfloat16, case.layers)
    batches = random_batches(case, model, device)
    targets = list(find_targets(model, "all-linear"))

    def run(_: int = 0) -> float:
        begin = time.perf_counter()
        CONTENDERS[contender](model, batches, targets, case.r, ETA)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    peak = peak_bytes(run, device)  # the first run warms up
    if device.type != "cuda":
        run()
    samples = [run() for _ in range(1 if grid == "tiny" else 2)]
    shape = f"{case.key} {case.layers} blocks, {case.samples}x{case.length}"
    tokens = case.samples * case.length
    measured = Measurement(samples, peak=peak)
    record(Case("init.model", shape, tokens, case.r, "bfloat16"), contender, measured)
