"""What `make gpu` runs first: one layer and three siblings, against float64, in seconds."""

import pytest
import torch

from lorasb_kernels.profiling.shapes import Layer
from lorasb_kernels.profiling.workload import Run, Workload, adapted_layers
from tests.bench.test_contenders import expected
from tests.contract import assert_within_contract

LAYERS = [Layer("q", 512, 384), Layer("k", 512, 128), Layer("v", 512, 128)]


@pytest.mark.parametrize("group", [LAYERS[:1], LAYERS], ids=["alone", "siblings"])
@pytest.mark.parametrize("M", [64, 2048])
def test_a_step_is_right(M, group, backend, device):
    workload = Workload([group], M, 96, torch.bfloat16, device, bias=True)
    run = Run(lambda operands: adapted_layers(operands, backend, len(group) > 1), workload)
    found = [*run.forward(0), *run.both(0)]
    exact = expected(workload, "core", torch.float64)
    eager = expected(workload, "core", torch.bfloat16)
    for index, (out, same, ref) in enumerate(zip(found, eager, exact, strict=True)):
        assert_within_contract(out, same, ref, name=f"{backend}[{index}]")
