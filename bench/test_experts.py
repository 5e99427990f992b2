"""The experts of a mixture as transformers computes them, frozen: the bound for adapters on them.

Qwen3-30B-A3B's experts on random tokens, each sent to random experts; forward and the gradient of
the input, in each of transformers' implementations.
"""

from dataclasses import dataclass

import pytest
import torch

from bench.recording import Case, Measurement
from lorasb_kernels.utils.timing import interleave, peak_bytes

DTYPE = torch.bfloat16
IMPLEMENTATIONS = ("eager", "grouped_mm")


@dataclass(frozen=True)
class ExpertsCase:
    """`tokens` of width `hidden`, each through `chosen` of `experts` of width `width`."""

    experts: int
    chosen: int
    hidden: int
    width: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.experts}x{self.hidden}x{self.width}-top{self.chosen}-M{self.tokens}"


def cases(grid: str) -> list[ExpertsCase]:
    """The cases of a grid."""
    if grid == "tiny":
        return [ExpertsCase(4, 2, 32, 16, 24)]
    return [ExpertsCase(128, 8, 2048, 768, tokens) for tokens in (4096, 16384)]


def pytest_generate_tests(metafunc):
    parameters = [
        pytest.param(case, name, id=f"{case}-{name}")
        for case in cases(metafunc.config.getoption("--grid"))
        for name in IMPLEMENTATIONS
    ]
    metafunc.parametrize(("case", "contender"), parameters)


def experts(case: ExpertsCase, implementation: str, device: torch.device):
    """A call that runs forward and backward of frozen experts."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        num_experts=case.experts, hidden_size=case.hidden, moe_intermediate_size=case.width
    )
    config._experts_implementation = implementation
    with torch.device(device):
        module = Qwen3MoeExperts(config).to(DTYPE).requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    for weight in module.parameters():
        weight.copy_(draw(*weight.shape) * weight.shape[-1] ** -0.5)
    x = draw(case.tokens, case.hidden).to(DTYPE).requires_grad_()
    weights, index = draw(case.tokens, case.experts).softmax(-1).topk(case.chosen)
    dy = draw(case.tokens, case.hidden).to(DTYPE)
    return lambda _: torch.autograd.grad(module(x, index, weights.to(DTYPE)), x, dy)


@pytest.fixture(scope="module")
def measurements(device, timing, contenders_of):
    """What the implementations took on a case; only the last case is kept."""
    known = {}

    def of(case: ExpertsCase):
        if case not in known:
            known.clear()
            calls, found = {}, {}
            for name in contenders_of(case):
                try:
                    call = experts(case, name, device)
                    call(0)
                    calls[name] = call
                except Exception as failure:
                    found[name] = failure
            samples = interleave(calls, device, **timing) if calls else {}
            for name, call in calls.items():
                found[name] = Measurement(samples[name], peak=peak_bytes(call, device))
            known[case] = found
        return known[case]

    return of


def test_experts(case, contender, measurements, record):
    measured = measurements(case)[contender]
    if isinstance(measured, torch.OutOfMemoryError):
        pytest.skip(f"out of memory: {measured}")
    if isinstance(measured, Exception):
        raise measured
    shape = f"qwen3-moe {case.experts} experts {case.hidden}x{case.width}, top {case.chosen}"
    record(
        Case("experts.both", shape, case.tokens, 0, "bfloat16"),
        f"transformers {contender}, frozen",
        measured,
    )
