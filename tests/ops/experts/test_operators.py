"""What torch asks of the experts' operators: schema, fake, counts; and one compiled graph."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lorasb_kernels.functional import experts_linear
from tests.ops.experts.operands import operands
from tests.ops.operands import dropout_seed, normal


def arguments(operation, device):
    given = operands([3, 0, 4], n=12, m=8, r=5, dtype=torch.float32, device=device, bias=True)
    x, weight, A, R, B, offsets, bias, _ = (
        t.detach() if isinstance(t, torch.Tensor) else t for t in given.values()
    )
    h = normal(7, 5, dtype=torch.float32, device=device)
    drop = (0.25, dropout_seed(device))
    return {
        "experts_shrink": (x, A, R, offsets, 0.5, *drop),
        "experts_expand": (x, weight, h, B, bias, offsets, *drop),
        "experts_core_backward": (weight.new_ones(7, 8), h, B, R, offsets, 0.5),
    }[operation]


@pytest.mark.parametrize("backend", ["reference", "triton"], indirect=True)
@pytest.mark.parametrize("operation", ["experts_shrink", "experts_expand", "experts_core_backward"])
def test_opcheck(operation, backend, device):
    operator = getattr(torch.ops.lorasb, f"{operation}_{backend}").default
    torch.library.opcheck(operator, arguments(operation, device))


@pytest.mark.parametrize("backend", ["reference", "triton"], indirect=True)
def test_one_graph_for_every_number_of_rows(backend, device):
    torch._dynamo.reset()
    compiled = torch.compile(experts_linear, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in ([6, 0, 5], [1, 2, 10]):
        results = []
        for function in (compiled, experts_linear):
            given = operands(tokens, dtype=torch.float32, device=device)
            y = function(**given, backend=backend)
            y.square().sum().backward()
            results.append((y.detach(), given["x"].grad, given["R"].grad))
        for ours, eager in zip(*results, strict=True):
            torch.testing.assert_close(ours, eager)


def test_counts_of_flops():
    given = operands([3, 0, 4], n=12, m=8, r=5, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        experts_linear(**given).sum().backward()
    forward = 12 * 8 + 5 * (12 + 8 + 5)
    assert counter.get_total_flops() == 2 * 7 * (2 * forward + 5 * 5)
