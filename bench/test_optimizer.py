"""An optimizer step over the cores of a model: one tensor for all against one tensor per core.

A step here is what a trainer does after backward: clip, step, clear the gradients.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from bench.recording import Case, Measurement
from lorasb_kernels import LoRASBConfig, adapt
from lorasb_kernels.optim.packed_cores import PackedCores
from lorasb_kernels.profiling.costs import Cost
from lorasb_kernels.utils.timing import interleave, peak_bytes

# Reads R, its gradient and both moments and writes all except the gradient; reads and writes the
# gradient once more to clip it; writes it to clear it. All fp32. Some 20 flops per element.
BYTES, FLOPS = 4 * (4 + 3 + 2 + 1), 20


@dataclass(frozen=True)
class OptimizerCase:
    """`cores` matrices of r×r."""

    cores: int
    r: int

    def __str__(self) -> str:
        return f"{self.cores}-cores-r{self.r}"


CONTENDERS = {
    "AdamW": (False, False),
    "AdamW, fused": (False, True),
    "packed, AdamW": (True, False),
    "packed, AdamW, fused": (True, True),
}


def cases(grid: str) -> list[OptimizerCase]:
    """The cores of Mistral-7B; of everything at every rank in the full grid."""
    if grid == "tiny":
        return [OptimizerCase(6, 8)]
    if grid == "full":
        return [OptimizerCase(cores, r) for cores in (144, 196, 224, 294) for r in (25, 64, 96)]
    return [OptimizerCase(224, 96)]


def pytest_generate_tests(metafunc):
    parameters = [
        pytest.param(case, name, id=f"{case}-{name.replace(' ', '_')}")
        for case in cases(metafunc.config.getoption("--grid"))
        for name in CONTENDERS
    ]
    metafunc.parametrize(("case", "contender"), parameters)


def optimizer_step(case: OptimizerCase, packed: bool, fused: bool, device: torch.device):
    """A call that clips, steps and clears the gradients."""
    linears = (nn.Linear(case.r, case.r, device=device) for _ in range(case.cores))
    config = LoRASBConfig(case.r, init="orthogonal")
    model = adapt(nn.Sequential(*linears), config, progress=False)
    cores = [layer.lora_R for layer in model]
    parameters = [PackedCores(model).parameter] if packed else cores
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=fused)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)

    def step(_: int) -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return step


@pytest.fixture(scope="module")
def measurements(device, timing, contenders_of):
    """What all selected contenders took on a case."""
    known = {}

    def of(case: OptimizerCase) -> dict[str, Measurement]:
        if case not in known:
            calls = {
                name: optimizer_step(case, *CONTENDERS[name], device)
                for name in contenders_of(case)
            }
            samples = interleave(calls, device, **timing)
            elements = case.cores * case.r**2
            known[case] = {
                name: Measurement(
                    samples[name],
                    launches=(Cost(BYTES * elements, FLOPS * elements),),
                    peak=peak_bytes(call, device),
                )
                for name, call in calls.items()
            }
        return known[case]

    return of


def test_optimizer(case, contender, measurements, record):
    measured = measurements(case)[contender]
    shape = f"{case.cores} cores"
    record(Case("optimizer.step", shape, 0, case.r, "float32"), contender, measured)
